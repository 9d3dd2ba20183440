"""Text -> tokens -> shards, with their manifest; what fineweb.py and a raw `--data` stand on.

In order: manifest · tokenizing · shards · text for the trainer. Heavy packages are imported where they are used, so
that a run on shards or on a small text starts without them (pyarrow 0.2 s).
"""

import base64
import errno
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from harness import shards, tokenizer
from harness.cli import UserError, say
from harness.documents import (
    BEGINNING,
    COUNTS,
    KINDS,
    SEPARATOR,
    Source,
    grouped,
    is_text,
    local_source,
    peeked,
    read_source,
)
from harness.files import DISK_FULL, atomic_file, sha256

SHARD_SIZE = 100_000_000  # tokens a shard
SMALL_SOURCE = 8 << 20  # below this many bytes, loading gigatoken takes longer than tiktoken takes for the whole
NPY_HEADER = 128  # bytes that np.save puts before a one-dimensional array
NO_ROOM = (*DISK_FULL, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

# ---------------------------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------------------------


def read_manifest(folder):
    """The manifest of a folder of shards as a dict, or None where there is none.

    Keys: `format_version`, `source`, `revision`, `name`, `tokenizer`, `dtype`, `vocab_size`, `shard_size` (None for
    ready-made shards), `files` ({file name: {"tokens", "sha256", "start"}}, in order, validation first), `complete`
    (everything that was asked for is there), `expected_shards` (an estimate until complete, None where unknown),
    `text_column`, `keep_endoftext`, `documents`, `skipped` (rows without text), `separators` (how many <|endoftext|>
    split documents) and `next` (where the source continues, None at its end). A place in a source, `start` or `next`,
    is {"file", "row", "skip", ...}: number of the file, row (of a .txt: byte), tokens to skip from there, and the
    counts of everything before that row. Raises `UserError` when the file is damaged.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its permissions, or delete it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder and make its shards again") from error
    if isinstance(manifest, dict) and manifest.get("format_version", 1) != 1:
        raise UserError(f"{path} has format version {manifest['format_version']}, this program reads 1: update it")
    if fault := _manifest_fault(manifest):
        raise UserError(f"{path} is not a manifest of token shards ({fault}): delete the folder and make its shards "
                        "again")
    before = {"text_column": "text", "keep_endoftext": True, "next": None}  # manifests that are older than these keys
    for key, value in {**before, **dict.fromkeys(COUNTS, 0)}.items():
        manifest.setdefault(key, value)
    return manifest


def _manifest_fault(manifest):
    """What keeps a JSON value from being a manifest, in words; None for nothing."""
    if not isinstance(manifest, dict):
        return "no JSON object"
    needed = {"format_version", "source", "revision", "name", "shard_size", "files", "complete", "expected_shards"}
    if missing := sorted(needed - manifest.keys()):
        return f"without {', '.join(missing)}"
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["name"], str):
        return "`files` or `name` is of another type"
    counts = [manifest.get(key) for key in ("shard_size", "expected_shards", *COUNTS)]
    if not all(count is None or _is_count(count) for count in counts):
        return "a number in it is none"
    for name, entry in manifest["files"].items():
        if "/" in name or "\\" in name or Path(name).suffix not in shards.SHARD_SUFFIXES:
            return f"{name[:50]!r} is not the name of a shard"
        if not isinstance(entry, dict) or not _is_count(entry.get("tokens")):
            return f"the entry of {name} has no tokens"
        if not isinstance(entry.get("sha256"), str):
            return f"the entry of {name} has no SHA-256"
    ready_made = manifest["shard_size"] is None  # its places name files only
    places = [manifest.get("next"), *(entry.get("start") for entry in manifest["files"].values())]
    for place in places:
        keys = ("file",) if ready_made else ("file", "row", "skip")
        if place is not None and not (isinstance(place, dict) and all(_is_count(place.get(key)) for key in keys)):
            return "a place in it has no file, row and tokens to skip"
    return None


def _is_count(value):
    return type(value) is int and value >= 0


def new_manifest(source, shard_size):
    """The manifest of shards of a `Source` before the first of them."""
    return {
        "format_version": 1, "source": source.title, "revision": source.revision, "name": source.name,
        "tokenizer": "gpt2", "dtype": "uint16", "vocab_size": tokenizer.VOCAB_SIZE, "shard_size": shard_size,
        "text_column": source.text_column, "keep_endoftext": source.keep_endoftext, "source_files": len(source.files),
        "complete": False, "expected_shards": None, **dict.fromkeys(COUNTS, 0), "next": None, "files": {},
    }


def save_manifest(folder, manifest):
    path = Path(folder) / "manifest.json"
    with disk_full_explained(folder), atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")


@contextmanager
def recorded(folder, manifest):
    """Keep the manifest on disk while shards are made: incomplete until the end, and none that names no shard."""
    manifest["complete"] = False
    save_manifest(folder, manifest)  # before any shard, so that none is ever without it
    try:
        yield
    except BaseException:
        if not manifest["files"]:
            (folder / "manifest.json").unlink(missing_ok=True)
        raise
    manifest |= {"complete": True, "expected_shards": len(manifest["files"])}
    save_manifest(folder, manifest)


def summary(manifest):
    """A folder of shards in a few words."""
    words = f"{len(manifest['files'])} shards, {sum(entry['tokens'] for entry in manifest['files'].values()):,} tokens"
    if manifest["documents"]:
        words += f" of {manifest['documents']:,} documents"
    if manifest["separators"]:
        words += f", split at {manifest['separators']:,} <|endoftext|>"
    if manifest["skipped"]:
        words += f", {manifest['skipped']:,} rows without text skipped"
    return words


def shards_there(manifest):
    """How far a folder of shards has come, in words."""
    expected = manifest.get("expected_shards") or "an unknown number of"
    return f"{len(manifest['files'])} of {expected} shards are there"


def verify(folder, workers=None):
    """Check every file of `folder` against its manifest, byte for byte; returns the manifest.

    Raises `UserError` naming the files that are missing, damaged or not in the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest.json, so there is nothing to verify: --out names a folder of shards")

    def digest(name):
        with suppress(OSError):  # then it cannot be read, which is as bad as damaged
            return sha256(folder / name)

    files = manifest["files"]
    present = [name for name, entry in files.items() if is_whole(folder / name, entry)]
    with ThreadPoolExecutor(workers or cores()) as pool:
        digests = dict(zip(present, pool.map(digest, present)))
    faults = [f"{name} is missing or damaged" for name, entry in files.items() if digests.get(name) != entry["sha256"]]
    strange = [f"{path.name} is not in the manifest" for path in _shards_in(folder) if path.name not in files]
    if faults := faults + strange:
        raise UserError(f"{folder}: {len(faults)} of {len(files) + len(strange)} files are bad: "
                        f"{'; '.join(faults[:5])}{' ...' if len(faults) > 5 else ''}. Delete these files and run the "
                        "command that made the folder again: it makes only what is missing")
    return manifest


def is_whole(path, entry):
    """Whether a shard is there in its full size (the cheap check; `verify` reads every byte)."""
    header = NPY_HEADER if path.suffix == ".npy" else shards.LLMC_HEADER
    return path.is_file() and path.stat().st_size == header + 2 * entry["tokens"]


def _shards_in(folder):
    found = Path(folder).glob("*")
    return sorted(p for p in found if p.suffix in shards.SHARD_SUFFIXES and not p.name.startswith("."))


# ---------------------------------------------------------------------------------------------------------------
# Tokenizing
# ---------------------------------------------------------------------------------------------------------------

def with_tiktoken(texts):
    """Tokens (uint16) of documents, each led by <|endoftext|>."""
    documents = texts if isinstance(texts, list) else texts.to_pylist()  # else an Arrow array
    lead = np.array([tokenizer.END_OF_TEXT], np.uint16)
    parts = [part for text in documents for part in (lead, tokenizer.encode_ordinary(text))]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, np.uint16)


def with_gigatoken():
    """`with_tiktoken`'s twin by gigatoken, some 30 times as fast. Raises ImportError where it is not installed.

    subtle: the two may disagree on characters that are newer than the Unicode tables of either.
    """
    import awkward as ak
    import gigatoken
    import pyarrow as pa

    ranks = tokenizer.gpt2()._mergeable_ranks
    with tempfile.TemporaryDirectory() as folder, disk_full_explained(folder):  # it reads ranks from a file only
        path = Path(folder) / "gpt2.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
        engine = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")  # no special tokens: text stays text

    def encode(texts):
        if isinstance(texts, list):
            texts = pa.array(texts, pa.large_string())
        if not len(texts):
            return np.empty(0, np.uint16)
        tokens = engine.encode_batch(ak.from_arrow(texts), parallel=False)  # our threads are the parallel part
        counts, flat = ak.num(tokens).to_numpy(), ak.flatten(tokens).to_numpy()
        return np.insert(flat.astype(np.uint16), np.cumsum(counts) - counts, tokenizer.END_OF_TEXT)

    return encode


def encoder(sample, size):
    """The fastest function from texts to tokens for `size` bytes of source.

    It must give tiktoken's very tokens for the first documents of `sample`; otherwise tiktoken does the work.
    """
    if size < SMALL_SOURCE:
        return with_tiktoken
    try:
        encode = with_gigatoken()
    except ImportError as error:
        say(f"no gigatoken ({error}): tiktoken tokenizes instead, some 10 times slower", sys.stderr)
        return with_tiktoken
    if not np.array_equal(encode(sample[:256]), with_tiktoken(sample[:256])):
        say("warning: the fast tokenizer's tokens differ from tiktoken's: tiktoken does the work", sys.stderr)
        return with_tiktoken
    return encode


def tokenized(batches, encode, workers):
    """(batch, tokens) of every batch, in order, tokenized by `workers` threads.

    Threads suffice: both tokenizers and Arrow's decoder release the interpreter's lock, and no text or token is
    copied between processes.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        ahead = deque()
        try:
            for batch in itertools.chain(batches, [None] * 2 * workers):  # at the end, None pushes the last ones out
                ahead.append((batch, batch and pool.submit(encode, batch.texts)))
                if len(ahead) > 2 * workers:
                    first, tokens = ahead.popleft()
                    if first:
                        yield first, tokens.result()[not first.leads :]
        finally:
            pool.shutdown(cancel_futures=True)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------


def write_shards(documents, out_dir, name, shard_size, max_shards=None, workers=None):
    """Tokenize an iterable of strings into `NAME_val_000000.npy`, `NAME_train_000001.npy`, ... and `manifest.json`.

    Every document is led by <|endoftext|> and split over shard ends without loss; every shard but the last holds
    exactly `shard_size` tokens, and at most `max_shards` are written. Empty documents and None are skipped and counted.
    Returns the manifest. Raises `UserError` when the folder holds shards already or the documents do not begin a second
    shard. (An iterable cannot be resumed; a `Source` can, by `make_shards`.)
    """
    out, workers = Path(out_dir), workers or cores()
    check_sizes(shard_size, max_shards)
    if isinstance(documents, str):
        raise TypeError("documents is one string, not an iterable of strings")
    with folder_for(out):
        if read_manifest(out) is not None or any(out.glob("*.npy")):
            raise UserError(f"{out} holds shards already: choose another folder, or delete it")
        head, batches = peeked(grouped(documents), 2)
        encode = encoder(head[0].texts if head else [], SMALL_SOURCE if len(head) == 2 else 0)
        manifest = new_manifest(Source("documents", None, name), shard_size)
        with recorded(out, manifest), writer(out, manifest) as save:
            stream = tokenized(batches, encode, workers)
            cut_into_shards(stream, BEGINNING, 0, max_shards, shard_size, save)
    return manifest


def check_sizes(shard_size, max_shards):
    if shard_size < 2:
        raise UserError(f"shard_size is {shard_size}, but a shard has at least 2 tokens")
    if max_shards is not None and max_shards < 2:
        raise UserError(f"max_shards is {max_shards}, but one shard for validation and one for training are the least")


@contextmanager
def folder_for(out):
    """Make the folder of shards and lock it. When the work in it fails, only what the next run can use stays."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        with locked(out, "--out"):
            try:
                for path in (*out.glob(".*.tmp"), *out.glob(".download/**/*.incomplete")):
                    if path.suffix == ".tmp" or re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
                        path.unlink()  # half-written by a run that was killed; the Hub's client begins a new one
                yield
                shutil.rmtree(out / ".download", ignore_errors=True)
            finally:
                if not _holds_downloads(out):
                    shutil.rmtree(out / ".download", ignore_errors=True)
    finally:
        with suppress(OSError):
            for path in made:  # the deepest first; one that is not empty ends it
                path.rmdir()


@contextmanager
def locked(folder, flag, wait=False):
    """Keep other processes out of `folder`, which is made, or wait until they are done.

    Raises `UserError`, which names the `flag`, where another process has it or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    path, lock = folder / ".lock", None
    while lock is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                if not wait:
                    raise UserError(f"another process is writing to {folder}: wait for it, or choose another "
                                    f"{flag}") from error
                say(f"waiting for another process that is writing to {folder}", sys.stderr)
                lock.acquire()
            if not path.exists():  # the other process has ended and removed it, as below
                lock = lock.release()
        except (OSError, NotImplementedError) as error:  # the latter is filelock's word for ENOSYS
            if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another {flag}") from error
            say(f"warning: the file system of {folder} has no locks: start no second process there", sys.stderr)
            lock = nullcontext()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file; there filelock itself does at the release
            path.unlink()  # while it is ours: whoever has opened it meanwhile sees that it is gone
        if isinstance(lock, FileLock):
            lock.release()


def _holds_downloads(out):
    """Whether there is something fetched, whole or in part, that the next run can continue from."""
    found = (path for path in out.glob(".download/**/*") if path.suffix == ".incomplete" or is_text(path)
             or path.suffix in shards.SHARD_SUFFIXES)
    return any(path.is_file() and path.stat().st_size for path in found)


def continued(out, fresh, has_txt=False):
    """The manifest to continue from: that of `out` if it is of the same data as `fresh`, `fresh` in an empty folder.

    `has_txt`: whether the source has .txt files, whose tokens depend on `keep_endoftext`.
    """
    manifest = read_manifest(out)
    if manifest is None:
        if strange := _shards_in(out):
            raise UserError(f"{out} holds {strange[0].name}, but no manifest that says of what: choose another --out")
        return fresh
    another = "choose another --out, or delete the folder to start again"
    if re.match(r"(train|val)\b", manifest["name"], re.IGNORECASE):
        raise UserError(f"{out} was made when shards could be called {manifest['name']}_..., which mixes training and "
                        f"validation: {another}")
    fresh["name"] = manifest["name"]  # an older program may have made another one of the same source
    if has_txt and manifest["keep_endoftext"] != fresh["keep_endoftext"]:
        how = "with" if manifest["keep_endoftext"] else "without"
        raise UserError(f"{out} was begun {how} <|endoftext|> of .txt files as ordinary letters: continue {how} "
                        f"--keep_endoftext, or {another}")
    if fresh["text_column"] is not None and fresh["text_column"] != (manifest["text_column"] or fresh["text_column"]):
        raise UserError(f"{out} was begun with --text_column {manifest['text_column']}, not {fresh['text_column']}: "
                        f"{another}")
    for key in ("source", "shard_size", "revision", "source_files"):
        if manifest.get(key, fresh[key]) != fresh[key]:
            raise UserError(f"{out} holds another dataset's shards ({key} {manifest[key]}, not {fresh[key]}): "
                            f"{another}")
    return manifest


def gaps(out, manifest, max_shards):
    """[(place, first shard, end)] of what is to be made: recorded shards that are gone, then all that are not begun."""
    files = manifest["files"]
    missing = [(entry.get("start"), i, i + 1) for i, (name, entry) in enumerate(files.items())
               if not is_whole(out / name, entry)]
    following = manifest["next"] if files else BEGINNING
    if following is not None and (max_shards is None or len(files) < max_shards):
        missing.append((following, len(files), max_shards))
    return missing


def cut_into_shards(tokenized, place, first, stop, shard_size, save):
    """Cut a stream of (batch, tokens), from `place` on, into shards number `first`, ..., `stop` - 1.

    Calls `save(index, arrays, start, following, counts)` for each, `start` and `following` being the places where it
    and the next one begin, `following` None for the last. A shard is closed when there is a token for the next one.
    """
    start, skip, index, arrays, waiting = place, place["skip"], first, [], 0
    counts = {key: place.get(key, 0) for key in COUNTS}
    for batch, tokens in tokenized:
        here = {"file": batch.file, "row": batch.row, "skip": 0, **counts}
        counts = {key: counts[key] + getattr(batch, key) for key in COUNTS}
        at = min(skip, len(tokens))
        skip -= at
        while waiting + len(tokens) - at > shard_size:
            at += shard_size - waiting
            arrays.append(tokens[at - shard_size + waiting : at])
            following = {**here, "skip": at}
            save(index, arrays, start, following, counts)
            start, index, arrays, waiting = following, index + 1, [], 0
            if index == stop:
                return
        arrays.append(tokens[at:])
        waiting += len(tokens) - at
    if index == 0:
        raise UserError(f"the source holds {waiting:,} tokens, which do not fill one shard of {shard_size:,} for "
                        "validation and begin one for training: pass a smaller --shard_size, for example "
                        f"{max(2, waiting // 10)}" if waiting else "the source holds no text: its rows or files are "
                        "empty; give another --source")
    if waiting:
        save(index, arrays, start, None, counts)


@contextmanager
def writer(folder, manifest):
    """A function for `cut_into_shards` that writes shards and their manifest in a thread of its own."""
    last = None

    def write(index, arrays, start, following, counts):
        name = shard_name(manifest["name"], index)
        entry = write_npy(folder / name, arrays) | {"start": start}
        known = manifest["files"].get(name)
        if known and (known["tokens"], known["sha256"]) != (entry["tokens"], entry["sha256"]):
            raise UserError(f"{folder / name} was missing and cannot be made again as it was: the source has changed. "
                            "Choose another --out, or delete the folder to start again")
        if not known:  # otherwise a gap was filled, and what follows is known already
            manifest["files"][name] = entry
            manifest.update(counts, next=following)
        save_manifest(folder, manifest)

    def save(*shard):
        nonlocal last
        if last:
            last.result()  # at most one shard waits in memory, and a full disk is reported early
        last = pool.submit(write, *shard)

    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        yield save
        if last:
            last.result()


def shard_name(name, index):
    """`NAME_val_000000.npy` for shard 0, which is the validation split, else `NAME_train_000001.npy` and so on."""
    return f"{name}_{'train' if index else 'val'}_{index:06d}.npy"


def write_npy(path, arrays):
    """Write uint16 arrays as one `.npy` file that appears when whole; returns its tokens and SHA-256."""
    tokens, header = sum(map(len, arrays)), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256()
    with disk_full_explained(path), atomic_file(path) as file:
        for part in (header.getbuffer(), *(array.astype("<u2", copy=False).data for array in arrays)):
            digest.update(part)
            file.write(part)  # np.save would hide that the disk is full
    return {"tokens": tokens, "sha256": digest.hexdigest()}


@contextmanager
def disk_full_explained(path):
    """Turn the errors of a full disk, a quota or a limit on file sizes into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room for {path} ({error.strerror}). Whole shards stay: free some space and run the same "
                        "command again, or end at fewer shards with --max_shards") from error


# ---------------------------------------------------------------------------------------------------------------
# Text for the trainer
# ---------------------------------------------------------------------------------------------------------------


def find_splits(data, val_data, cache_dir, allow_incomplete=False, val=True):
    """(train parts, validation parts), as `shards.find_shards` gives them, of what --data and --val_data name.

    Raw text becomes shards in `cache_dir` first. Without `val` the validation parts of a folder are not looked for:
    None. Raises `UserError` where something is missing, or not complete and not `allow_incomplete`.
    """
    def shards_at(path, held_out, flag):
        if shards.kind_of_data(path, flag) == "shards":
            return Path(path)
        return prepare_text(path, cache_dir, held_out)

    folder = shards_at(data, 0.0 if val_data else 0.1, "--data")
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest and not manifest["complete"] and not allow_incomplete:
        raise UserError(f"--data {folder} is incomplete ({shards_there(manifest)}): finish it with fineweb.py, or "
                        "train on what is there with --allow_incomplete")
    train_parts = shards.find_shards(folder, "train", whole=val_data is not None)
    if val_data:
        return train_parts, shards.find_shards(shards_at(val_data, 0.0, "--val_data"), "val", whole=True)
    return train_parts, shards.find_shards(folder, "val") if val else None


def prepare_text(path, cache_dir, held_out=0.1):
    """A folder of shards made from the raw text at `path` (a file of `TEXT_SUFFIXES` or a folder of them).

    The folder lies in `cache_dir`, is keyed by the text's hash, made once and never seen half-made. The last `held_out`
    of the tokens are the validation shard, the rest are the train shards; with `held_out=0` there are train shards
    only. Raises `UserError` when the text is damaged, not UTF-8 or too short, or the cache cannot be written.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out is {held_out}, but the share kept for validation is at least 0 and below 1")
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: give a file or folder of {KINDS}")
    source, cache = local_source([path]), Path(cache_dir)
    contents = [(file.where.suffix, sha256(file.where)) for file in source.files]
    key = [1, held_out, source.name, contents]
    if any(_has_separator(file.where) for file in source.files):
        key.append("split at <|endoftext|>")  # other tokens than those of an earlier version
    final = cache / f"{source.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if _is_prepared(final):
        return final
    with locked(cache, "--cache_dir", wait=True):
        for left in cache.glob(".*.making"):  # by a process that was killed: nobody else is in here
            shutil.rmtree(left, ignore_errors=True)
        if _is_prepared(final):  # by the process that was waited for
            return final
        making = cache / f".{final.name}.{uuid.uuid4().hex}.making"
        try:
            making.mkdir()
            _split_text(path, source, making, held_out)
            shutil.rmtree(final, ignore_errors=True)
            making.rename(final)
        except OSError as error:
            raise UserError(f"--cache_dir {cache} cannot be written to ({error}): choose another one") from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return final


def _has_separator(path):
    """Whether a .txt file has <|endoftext|> in it; packed ones count as if (there were none in earlier versions)."""
    if path.suffix.lower() != ".txt":
        return ".txt." in path.name.lower()
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(SEPARATOR.encode()) >= 0


def _is_prepared(folder):
    try:
        manifest = read_manifest(folder)
        return manifest is not None and all(is_whole(folder / name, entry) for name, entry in manifest["files"].items())
    except UserError:
        return False


def _split_text(path, source, folder, held_out):
    """Write the shards and the manifest of `prepare_text` into `folder`."""
    manifest = new_manifest(source, SHARD_SIZE)
    head, all_batches = peeked(read_source(source, manifest))
    encode = encoder(head[0].texts if head else [], source.size)
    stream = folder / "tokens"  # on disk, because the split is known only at the end
    with disk_full_explained(stream), open(stream, "wb") as file:
        for batch, tokens in tokenized(all_batches, encode, cores()):
            file.write(tokens)
            for key in COUNTS:
                manifest[key] += getattr(batch, key)
    if manifest["separators"]:
        say(f"{path}: {manifest['separators']:,} <|endoftext|> split it into {manifest['documents']:,} documents")
    count = stream.stat().st_size // 2
    held_out_tokens = int(count * held_out)
    train_tokens = count - held_out_tokens
    if train_tokens < 2 or (held_out and held_out_tokens < 2):
        raise UserError(f"{path} holds {count} tokens, {held_out_tokens} of them for validation: too few, both parts "
                        "need at least 2. Give a longer text")
    tokens = np.memmap(stream, np.uint16, "r")
    parts = [(0, train_tokens, count)] if held_out else []
    for index, begin in enumerate(range(0, train_tokens, SHARD_SIZE), 1):
        parts.append((index, begin, min(begin + SHARD_SIZE, train_tokens)))
    for index, begin, end in parts:
        name = shard_name(source.name, index)
        manifest["files"][name] = write_npy(folder / name, [tokens[begin:end]])
    del tokens  # Windows deletes no mapped file
    stream.unlink()
    manifest |= {"complete": True, "expected_shards": len(manifest["files"]), "held_out": held_out}
    save_manifest(folder, manifest)
