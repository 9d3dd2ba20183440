"""What lies in a folder of data: one walk and one rule for texts and shards, for the trainer and fineweb.py.

What this program and libraries wrote about data, models and runs is known by what is in it and is no data.
"""

import codecs
import json
import os
import re
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harness.cli import UserError
from harness.files import read_json

SHARD_SUFFIXES = (".npy", ".bin")
PACKED = (".gz", ".zst")
STREAMS = (".txt", ".jsonl", ".json", ".ndjson")  # they may be packed
TEXT_SUFFIXES = (*(kind + packed for kind in STREAMS for packed in (*PACKED, "")), ".parquet", ".csv", ".tsv", ".arrow")
KINDS = ".txt, .jsonl, .json (also .gz, .zst), .parquet, .csv, .tsv, .arrow"  # the same for people

# a key of each file in which `datasets` describes a data set
METADATA = {"dataset_info.json": "features", "dataset_dict.json": "splits", "state.json": "_data_files"}
RUN_FILES = {"config.json", "metrics.jsonl", "log.txt", "profile.txt", "trace.json", "hf", "code", "archive"}
SPLITS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid",
          "dev": "valid", "test": "test"}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
HUB_FILE = re.compile(r"([A-Za-z]\w*)-\d{5}-of-\d{5}\b")  # how the Hub names the files of a split


class Found(NamedTuple):
    """What `walk` finds, each a list of paths in order."""

    texts: list
    shards: list
    others: list  # files of other kinds


def text_kind(name):
    """The suffix of a text file's name, with that of what it is packed in; None for files of other kinds."""
    return next((suffix for suffix in TEXT_SUFFIXES if str(name).lower().endswith(suffix)), None)


def walk(root, leave_out=()):
    """The files below a folder: a `Found`.

    Links are followed, and each folder is entered once. Hidden names, lost+found (closed to all but root), the folders
    `leave_out`, and what `_not_data` knows are passed over. Raises `UserError` for what cannot be read.
    """
    def fail(error):
        link = f", a link to {os.readlink(error.filename)}" if os.path.islink(error.filename) else ""
        raise UserError(f"{error.filename} cannot be read ({error.strerror}{link}): restore it, change its permissions "
                        "or move it away")

    found = Found([], [], [])
    entered = {os.path.realpath(folder) for folder in leave_out} - {os.path.realpath(root)}
    for parent, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(parent) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(parent))
        passed_over = _not_data(Path(parent), {*names}, Path(parent) == Path(root)) | {"lost+found"}
        # os.walk enters what is left in this list; a folder itself goes before a link to it
        folders[:] = sorted({name for name in folders if name[0] != "."} - passed_over,
                            key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for path in (Path(parent, name) for name in names if name[0] != "." and name not in passed_over):
            try:
                is_file = stat.S_ISREG(os.stat(path).st_mode)  # no pipe, no socket
            except OSError as error:
                fail(error)
            if is_file:
                is_shard = path.suffix in SHARD_SUFFIXES
                (found.shards if is_shard else found.texts if text_kind(path) else found.others).append(path)
    return Found(*map(sorted, found))


def _not_data(folder, names, is_root):
    """Names in a folder of what tells about data, models or runs, and of what a run has written."""
    def keys(name):
        with suppress(UserError):
            return (name in names and read_json(folder / name) or {}).keys()
        return set()

    found = {name for name, key in METADATA.items() if key in keys(name)}
    if keys("dataset_infos.json"):
        found.add("dataset_infos.json")
    if keys("shard_hashes.json"):  # the trainer's --cache_dir
        found |= {"shard_hashes.json", "hellaswag_val.jsonl"}
    if {"format_version", "files", "shard_size"} <= keys("manifest.json"):  # shards
        found |= {"manifest.json", "tokenizer.json"}
    if "held_out" in keys("manifest.json") and not is_root:  # text that the trainer made into shards
        found |= names
    if {"config", "world_size"} <= keys("config.json") or _is_log(folder / "metrics.jsonl"):
        found |= RUN_FILES | {name for name in names if name.endswith((".pt", ".png"))}
    if "model_type" in keys("config.json"):  # weights in Hugging Face's form
        found |= {name for name in names if name.endswith((".json", ".bin"))} | {"merges.txt"}
    return found


def _is_log(path):
    with suppress(OSError, ValueError, AttributeError), open(path, "rb") as file:
        return {"step", "kind"} <= json.loads(file.readline()).keys()
    return False


def find_texts(root, split=None, leave_out=()):
    """(text files that the file or folder `root` gives, [what the user should know of the choice]).

    Of a folder whose files are named as the Hub names them, `split` (train) is taken, of several the first that is
    there. `leave_out`: see `walk`.
    """
    root, notes = Path(root), []
    found = walk(root, leave_out) if root.is_dir() else Found([root] * bool(text_kind(root)), [], [])
    if isinstance(split, str) and not root.is_dir():
        raise UserError(f"--split {split} chooses among the files of a folder, and {root} is a file: leave it out")
    texts = _of_split(root, found.texts, split, notes) if root.is_dir() else found.texts
    if not texts:
        raise UserError(f"{root} is or holds no file of these kinds: {KINDS}; rename plain text to .txt")
    seen = {}
    for path in texts:  # packed and plain, documents would be there twice, and end in both splits
        plain = path.with_suffix("") if path.suffix.lower() in PACKED else path
        if (twin := seen.setdefault(plain, path)) != path:
            raise UserError(f"{twin} and {path.name} are the same file, once packed: move one of them away")
    if others := Counter(path.suffix or "without suffix" for path in found.others + found.shards):
        notes.append("left out: " + ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items())))
    return texts, notes


def _of_split(root, texts, split, notes):
    """Those of the files in the folder `root` that belong to `split`. `notes` get what their names say."""
    named = {path: match[1] for path in texts if (match := HUB_FILE.match(path.name))}
    splits = sorted(set(named.values()))
    if len(splits) > 1 or isinstance(split, str):
        if isinstance(split, tuple):  # of several, else the only one that is not for training
            others = [name for name in splits if name != "train"]
            split = next((name for name in (*split, *others) if name in others), split[0])
        split = split or "train"
        if split not in splits:
            raise UserError(f"{root} has no split {split}, but {', '.join(splits) or 'none'}: choose one with "
                            "--split, or give its files")
        notes.append(f"split {split} of {', '.join(splits)}")
        return [path for path, name in named.items() if name == split]
    said = {}  # {split: path down to the part that says so, None where there are several}
    for path in texts:
        parts = path.relative_to(root).parts
        for depth, part in enumerate(parts, 1):
            if match := SPLIT_WORD.search(part.lower()):
                name, where = SPLITS[match[1]], root.joinpath(*parts[:depth])
                said[name] = where if said.get(name, where) == where else None
                break
    if len(said) > 1:
        flags = [f"{flag} {said[name]}" for name, flag in (("train", "--data"), ("valid", "--val_data"))
                 if said.get(name)]
        notes.append(f"WARNING: names say {', '.join(said)}, and all of it is read as one text: to keep them apart "
                     f"give {' '.join(flags) or 'the files one by one'}")
    return texts


def is_plain_text(path):
    """Whether a file begins with UTF-8 text and no control characters."""
    try:
        with open(path, "rb") as file:
            # the cut may split the last character
            text = codecs.getincrementaldecoder("utf-8")().decode(file.read(1 << 16))
    except (OSError, UnicodeDecodeError):
        return False
    return not re.search(r"[\x00-\x08\x0e-\x1f]", text)
