"""Text -> tokens -> shards, with their manifest; what fineweb.py and a raw `--data` stand on.

In order: manifest · tokenizing · shards · text for the trainer. Heavy packages are imported where they are used, so
that a run on shards or on a small text starts without them (pyarrow 0.2 s).
"""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness import shards, tokenizer
from harness.cli import UserError, count, say
from harness.documents import (
    BEGINNING,
    COUNTS,
    SEPARATOR,
    Source,
    grouped,
    local_source,
    peeked,
    read_source,
    sha256_of,
)
from harness.files import atomic_file, folder_lock, read_json, sha256, tolerate_full_disk
from harness.folders import text_kind, walk
from harness.threads import ThreadPool, cores

SHARD_SIZE = 100_000_000  # tokens per shard
LEARN_FROM = 200 << 20  # bytes of text from which a vocabulary is learned
SMALL_SOURCE = 8 << 20  # below this many bytes, loading gigatoken takes longer than tiktoken takes for the whole
OF_GPT2 = {"tokenizer": "gpt2", "tokenizer_sha256": None, "vocab_size": tokenizer.VOCAB_SIZE,
           "end_of_text": tokenizer.END_OF_TEXT}  # in a manifest
LEFTOVER = re.compile(r"\.(manifest\.json|tokenizer\.json|.+_(train|val)_\d{6}\.(npy|mask))\.[0-9a-f]{8}\.tmp")
HALF_MADE = re.compile(r"\..+-[0-9a-f]{16}\.[0-9a-f]{32}\.making")  # this and LEFTOVER: of a process that was killed
NPY_HEADER = 128  # bytes that np.save puts before a one-dimensional array
UNCOUNTED = 1 << 16  # added to a token of a prompt, on which no loss is taken, until it is written
ANOTHER = "choose another --out, or delete the folder to start again"
VALIDATION = ("validation", "valid", "val", "dev", "test")  # names of splits, the first of which validates
AGAIN = "the same command again, or end at fewer shards with --max_shards"

# --- manifest ---


def read_manifest(folder):
    """The manifest of a folder of shards as a dict, or None where there is none.

    Keys: `format_version`, `source`, `revision`, `name`, `tokenizer` (what --tokenizer chose: gpt2, bytes, how many ids
    to learn, or tokenizer.json for a file's), `tokenizer_sha256` (of the folder's tokenizer.json, None for GPT-2's),
    `dtype`, `vocab_size`, `end_of_text` (id of <|endoftext|>), `shard_size` (None for ready-made shards), `files`
    ({file name: {"tokens", "sha256", "start"}}, in order, validation first; where some tokens do not count also how
    many do, "counted", and "mask_sha256"), `complete` (everything that was asked for is there), `expected_shards` (an
    estimate until complete, None where unknown), `text_column` (see `documents.PAIRS`), `keep_endoftext`,
    `documents`, `skipped` (rows without text), `separators` (how many <|endoftext|> split documents), `literal` (texts
    that hold one as letters), `source_sha256`
    (of local files, by number) and `next` (where the source continues, None at its end). A place in a source, `start`
    or `next`, is {"file", "skip", "sha256", ...}: number of the file, tokens of it that come before, their hash, and
    the counts of everything before that file. Older ones have a "row" too, from which they count, and no hash. Raises
    `UserError` when the file is damaged.
    """
    path = Path(folder) / "manifest.json"
    manifest = read_json(path)
    if manifest is None:
        return None
    if manifest.get("format_version", 1) != 1:
        raise UserError(f"{path} has format version {manifest['format_version']}, this program reads 1: update it")
    # manifests that are older than these keys
    manifest |= {"text_column": "text", "keep_endoftext": True, "next": None, "source_sha256": [],
                 **dict.fromkeys(COUNTS, 0), **OF_GPT2, **manifest}
    try:
        names, entries = list(manifest["files"]), list(manifest["files"].values())
        places = [entry.get("start") for entry in entries] + [manifest["next"]]
        numbers = [entry["tokens"] for entry in entries] + [manifest[key] for key in COUNTS]
        numbers += [manifest[key] or 0 for key in ("shard_size", "expected_shards")]
        if manifest["shard_size"]:  # of ready-made shards, places name files only
            numbers += [place[key] for place in places if place is not None for key in ("file", "skip")]
        is_sound = (all(type(number) is int and number >= 0 for number in numbers)
                    and all(isinstance(text, str) for text in (manifest["name"], *(e["sha256"] for e in entries)))
                    and all(Path(name).name == name and name.endswith(shards.SHARD_SUFFIXES) for name in names)
                    and {"source", "revision", "complete"} < manifest.keys()
                    and isinstance(manifest["source_sha256"], list))
    except (LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{path} is not a manifest of token shards, or damaged: restore it or move it away, or make "
                        "the shards in another folder")
    return manifest


def new_manifest(source, shard_size, vocabulary="gpt2"):
    """The manifest of shards of a `Source` before the first of them; `vocabulary` as in `tokenizer.chosen`."""
    return {
        "format_version": 1, "source": source.title, "revision": source.revision, "name": source.name,
        **describe(tokenizer.chosen(vocabulary), vocabulary), "dtype": "uint16", "shard_size": shard_size,
        "text_column": source.text_column, "keep_endoftext": source.keep_endoftext, "source_files": len(source.files),
        "source_sha256": [], "complete": False, "expected_shards": None, **dict.fromkeys(COUNTS, 0), "next": None,
        "files": {},
    }


def describe(own, vocabulary):
    """What a manifest says of the `Tokenizer`, None if it is still to be learned, that `vocabulary` chose."""
    if own is None:
        return {**dict.fromkeys(OF_GPT2), "tokenizer": vocabulary}
    if own.json is None:
        return OF_GPT2
    is_learned = not isinstance(vocabulary, tokenizer.Tokenizer) and tokenizer.size_to_learn(vocabulary)
    return {"tokenizer": vocabulary if is_learned else "tokenizer.json", "tokenizer_sha256": own.fingerprint,
            "vocab_size": own.size, "end_of_text": own.end_of_text}


def tokenizer_of(folder, manifest):
    """The `Tokenizer` of a folder of shards with this manifest. `UserError` if its file is missing or another one."""
    if manifest["tokenizer"] == "gpt2":
        return tokenizer.gpt2_tokenizer()
    own = tokenizer.read(Path(folder) / "tokenizer.json")
    if own.json is None or own.fingerprint != manifest["tokenizer_sha256"]:
        raise UserError(f"{folder}/tokenizer.json is another one than that of the shards, by their manifest.json: "
                        "restore it, or make the folder again")
    return own


def summary(manifest):
    """A folder of shards in a few words."""
    tokens = sum(entry["tokens"] for entry in manifest["files"].values())
    words = f"{count(len(manifest['files']), 'shard')}, {tokens:,} tokens"
    if manifest["documents"]:
        words += f" of {count(manifest['documents'], 'document')}"
    if manifest["separators"]:
        words += f", split at {manifest['separators']:,} <|endoftext|>"
    if manifest["literal"]:
        words += f", {count(manifest['literal'], 'text')} with <|endoftext|> as letters (only in a .txt it ends one)"
    if manifest["skipped"]:
        words += f", {count(manifest['skipped'], 'row')} without text skipped"
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

    tokenizer_of(folder, manifest)

    def is_sound(path, digest):
        with suppress(OSError):  # then it cannot be read, which is as bad as damaged
            return sha256(path) == digest

    wanted = {path: digest for name, entry in manifest["files"].items()
              for path, _, digest in _files_of(folder / name, entry)}
    there = [*_shards_in(folder), *sorted(folder.glob("*.mask"))]
    with ThreadPool(workers or cores()) as pool:
        results = pool.map(is_sound, wanted, wanted.values())
        bad = [f"{path.name} is missing or damaged" for path, is_good in zip(wanted, results) if not is_good]
    bad += [f"{path.name} is not in the manifest" for path in there if path not in wanted]
    if bad:
        raise UserError(f"{folder}: {len(bad)} of {len(wanted.keys() | there)} files are bad: "
                        f"{'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. Delete these files and run the "
                        "command that made the folder again: it makes only what is missing")
    return manifest


def _files_of(path, entry):
    """[(path, bytes, SHA-256)] of a shard in a manifest and of its mask, where it has one."""
    header = NPY_HEADER if path.suffix == ".npy" else shards.LLMC_HEADER
    files = [(path, header + 2 * entry["tokens"], entry["sha256"])]
    if "mask_sha256" in entry:
        files.append((shards.mask_of(path), -(-entry["tokens"] // 8), entry["mask_sha256"]))
    return files


def missing_shards(folder, manifest):
    """Names of the shards that are not there in their full size (the cheap check; `verify` reads every byte)."""
    return [name for name, entry in manifest["files"].items()
            if not all(path.is_file() and path.stat().st_size == size
                       for path, size, _ in _files_of(folder / name, entry))]


def _shards_in(folder):
    found = Path(folder).glob("*")
    return sorted(p for p in found if p.suffix in shards.SHARD_SUFFIXES and not p.name.startswith("."))


def _without_manifest(folder):
    """What lies in a folder without a manifest and would be written over: shards, a tokenizer.json."""
    return [*_shards_in(folder), *Path(folder).glob("tokenizer.json")]


# --- tokenizing ---

def plainly(own):
    """The function from documents to tokens (uint16), each document led by <|endoftext|>, by a `Tokenizer` itself."""
    lead = np.array([own.end_of_text], np.uint16)

    def encode(texts):
        documents = texts if isinstance(texts, list) else texts.to_pylist()  # else an Arrow array
        parts = [part for text in documents for part in (lead, own.encode(text))]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    return encode


def with_gigatoken(own):
    """The twin of `plainly` by gigatoken, some 30 times as fast. Raises ImportError where it is not installed.

    subtle: the two may disagree on characters that are newer than the Unicode tables of either.
    """
    import awkward as ak
    import gigatoken
    import pyarrow as pa

    if own.json:  # without its special tokens: text stays text
        engine = gigatoken.Tokenizer.from_json(json.dumps(json.loads(own.json) | {"added_tokens": []}))
    else:
        ranks = tokenizer.gpt2()._mergeable_ranks
        with tempfile.TemporaryDirectory() as folder:  # it reads ranks from a file only
            path = Path(folder) / "gpt2.tiktoken"
            path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
            engine = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")

    def encode(texts):
        if isinstance(texts, list):
            texts = pa.array(texts, pa.large_string())
        if not len(texts):
            return np.empty(0, np.uint16)
        tokens = engine.encode_batch(ak.from_arrow(texts), parallel=False)  # our threads are the parallel part
        counts, flat = ak.num(tokens).to_numpy(), ak.flatten(tokens).to_numpy()
        return np.insert(flat.astype(np.uint16), np.cumsum(counts) - counts, own.end_of_text)

    return encode


def encoder(sample, size, own):
    """The fastest function from texts to tokens for `size` bytes of source.

    It must give the tokenizer's very tokens for the first documents of `sample`; otherwise that does the work itself.
    """
    if size < SMALL_SOURCE or not own.splits_as_gpt2:
        return plainly(own)
    try:
        encode = with_gigatoken(own)
    except ImportError as error:
        say(f"no gigatoken ({error}): tiktoken tokenizes instead, some 10 times slower", sys.stderr)
        return plainly(own)
    if not np.array_equal(encode(sample[:256]), plainly(own)(sample[:256])):
        say("warning: the fast tokenizer's tokens differ from tiktoken's: using tiktoken instead", sys.stderr)
        return plainly(own)
    return encode


def learned(vocabulary, batches, size):
    """The `Tokenizer` that `vocabulary` chooses; one to be learned is learned from `batches` of `size` bytes in all.

    Of more than 200 MB a sample is taken that is spread over all of them.
    """
    if (own := tokenizer.chosen(vocabulary)) is not None:
        return own
    step = -(-size // LEARN_FROM)
    ids = tokenizer.size_to_learn(vocabulary)
    if ids == tokenizer.SIZES[0]:
        batches = ()  # bytes alone are not learned
    spread = (batch.texts for batch in itertools.islice(batches, 0, None, max(1, step)))
    own = tokenizer.learn((texts if isinstance(texts, list) else texts.to_pylist() for texts in spread), ids)
    share = f"one in {step} pieces of the text" if step > 1 else "the text"
    if own.size > tokenizer.SIZES[0]:
        say(f"learned a vocabulary of {own.size:,} tokens from {share}"
            + (f", too short for {ids:,}" if own.size < ids else ""))
    return own


def tokens_of(batch, encode):
    """The tokens of a batch, uint16; of pairs uint32, those of prompts with `UNCOUNTED` added.

    Prompt and completion are tokenized apart. The <|endoftext|> that leads a prompt counts: it ends what was before.
    """
    tokens = encode(batch.texts)
    if not batch.pairs:
        return tokens
    is_lead = tokens == tokens[:1]  # it leads prompts and completions in turn, and no text has it
    is_prompt = np.cumsum(is_lead) % 2 == 1
    return (tokens + UNCOUNTED * (is_prompt & ~is_lead).astype(np.uint32))[is_prompt | ~is_lead]


def tokenized(batches, encode, workers):
    """(batch, tokens) of every batch, in order, tokenized by `workers` threads, as `tokens_of` gives them.

    Threads suffice: both tokenizers and Arrow's decoder release the interpreter's lock, and no text or token is
    copied between processes.
    """
    with ThreadPool(workers, thread_name_prefix="tokenize") as pool:
        ahead = deque()
        try:
            for batch in itertools.chain(batches, [None] * 2 * workers):  # at the end, None pushes the last ones out
                ahead.append((batch, batch and pool.submit(tokens_of, batch, encode)))
                if len(ahead) > 2 * workers:
                    first, tokens = ahead.popleft()
                    if first:
                        yield first, tokens.result()[not first.leads :]
        finally:
            pool.shutdown(cancel_futures=True)


# --- shards ---


def write_shards(documents, out_dir, name, shard_size, max_shards=None, workers=None, own=None):
    """Tokenize an iterable of strings into `NAME_val_000000.npy`, `NAME_train_000001.npy`, ... and `manifest.json`.

    Every document is led by <|endoftext|> and split over shard ends without loss; every shard but the last holds
    exactly `shard_size` tokens, and at most `max_shards` are written. Empty documents and None are skipped and counted.
    `own`: the `Tokenizer`, GPT-2's by default. Returns the manifest. Raises `UserError` when the folder holds shards
    already or the documents do not begin a second shard. (An iterable cannot be resumed; a `Source` can, by
    `make_shards`.)
    """
    out, workers, own = Path(out_dir), workers or cores(), own or tokenizer.gpt2_tokenizer()
    check_sizes(shard_size, max_shards)
    if isinstance(documents, str):
        raise TypeError("documents is one string, not an iterable of strings")
    with folder_for(out):
        if read_manifest(out) is not None or _without_manifest(out):
            raise UserError(f"{out} holds shards already: choose another folder, or delete it")
        head, batches = peeked(grouped(documents), 2)
        encode = encoder(head[0].texts if head else [], SMALL_SOURCE if len(head) == 2 else 0, own)
        manifest = new_manifest(Source("documents", None, name), shard_size, own)
        with ShardFolder(out, manifest, own) as folder:
            for shard in cut_into_shards(tokenized(batches, encode, workers), BEGINNING, 0, max_shards, shard_size):
                folder.add(shard)
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
        with folder_lock(out, "--out"), tolerate_full_disk(f"no room for {out}; whole shards stay", AGAIN):
            try:
                for path in (*out.glob(".*.tmp"), *out.glob(".download/**/*.incomplete")):
                    if LEFTOVER.fullmatch(path.name) or re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
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


def _holds_downloads(out):
    """Whether there is something fetched, whole or in part, that the next run can continue from."""
    found = (path for path in out.glob(".download/**/*") if path.suffix == ".incomplete" or text_kind(path)
             or path.suffix in shards.SHARD_SUFFIXES)
    return any(path.is_file() and path.stat().st_size for path in found)


def continued(out, source, shard_size, vocabulary="gpt2"):
    """The manifest to continue from: that of `out` if it is of this `source`, a new one in an empty folder.

    A local source must have the very files that the shards were made of; those beyond may be others by now.
    """
    manifest, fresh = read_manifest(out), new_manifest(source, shard_size, vocabulary)
    if manifest is None:
        if strange := _without_manifest(out):
            raise UserError(f"{out} holds {strange[0].name}, but no manifest that describes it: choose another --out")
        return fresh
    if source.revision is None and manifest["revision"] is not None:
        fresh["revision"] = old_revision(source.files)
    keys = ["source", "shard_size", "revision", "tokenizer"]
    if fresh["tokenizer_sha256"]:  # else it is to be learned, or has been
        keys.append("tokenizer_sha256")
    if fresh["text_column"] and manifest["text_column"]:
        keys.append("text_column")
    if any(".txt" in Path(file.name).name.lower() for file in source.files):
        keys.append("keep_endoftext")
    for key in keys:
        if manifest[key] != fresh[key]:
            raise UserError(f"{out} holds shards of another source or of other flags ({key} {manifest[key]}, not "
                            f"{fresh[key]}): {ANOTHER}")
    _check_files_read(out, manifest, source)
    return manifest | {"source_files": len(source.files)}


def old_revision(files):
    """The revision of local files in manifests of an older version: SHA-256 of names, sizes and both ends of files."""
    digest = hashlib.sha256()
    for entry in files:
        with open(entry.where, "rb") as file:
            digest.update(os.fsencode(f"{entry.name}\n{entry.size}\n") + file.read(1 << 16))
            file.seek(max(0, entry.size - (1 << 16)))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _check_files_read(out, manifest, source):
    """Raise `UserError` where a local file of which there are shards in `out` is not what it was."""
    known = [] if source.revision else manifest["source_sha256"]  # none in manifests of older versions either
    read = manifest["next"]["file"] if manifest["next"] else len(known)
    files = source.files[: min(read, len(known))]
    is_ended = manifest["complete"] and manifest["next"] is None
    if known and (len(source.files) < read or (is_ended and len(source.files) > read)):
        raise UserError(f"{out} is made of {count(read, 'file')}, and {source.title} has {len(source.files)} now: "
                        f"restore them, or {ANOTHER}")
    with ThreadPool(cores()) as pool:
        for file, before, now in zip(files, known, pool.map(sha256_of, files)):
            if before not in (None, now):
                raise UserError(f"{file.where} is not what it was when the shards in {out} were made: restore it, or "
                                f"{ANOTHER}")


def gaps(out, manifest, max_shards):
    """[(place, first shard, end)] of what is to be made: recorded shards that are gone, then all that are not begun."""
    files = manifest["files"]
    numbers = {name: number for number, name in enumerate(files)}
    missing = [(files[name].get("start"), numbers[name], numbers[name] + 1) for name in missing_shards(out, manifest)]
    following = manifest["next"] if files else BEGINNING
    if following is not None and (max_shards is None or len(files) < max_shards):
        missing.append((following, len(files), max_shards))
    return missing


class Shard(NamedTuple):
    """A stretch of the token stream of a source, see `cut_into_shards`."""

    number: int
    arrays: list  # of uint16 or, with `UNCOUNTED`, uint32
    start: dict  # the place in the source where it begins
    following: dict | None  # where the next one does, None for the last
    counts: dict  # of all that was read up to its end
    source_sha256: dict  # {number of a source's file that was read: SHA-256}
    column: str | None  # of the documents


def cut_into_shards(tokenized, place, first, stop, shard_size):
    """Cut a stream of (batch, tokens), from the file of `place` on, into `Shard`s number `first`, ..., `stop` - 1.

    A shard is closed when there is a token for the next one. Raises `UserError` where there is no second one, and where
    the tokens before `place` are not those that were there when it was noted.
    """
    start, skip, number, arrays, waiting = place, place["skip"], first, [], 0
    counts = {key: place.get(key, 0) for key in COUNTS}
    file, position, digest = place, 0, hashlib.sha256()  # the file at hand, how many of its tokens are used, their hash
    column, hashes = None, {}
    for batch, tokens in tokenized:
        if batch.file != file["file"]:
            file, position, digest = {"file": batch.file, **counts}, 0, hashlib.sha256()
        counts = {key: counts[key] + getattr(batch, key) for key in COUNTS}
        column = batch.column or column
        hashes[batch.file] = batch.origin.sha256
        at = min(skip, len(tokens))
        digest.update(tokens[:at])
        skip -= at
        if at and not skip and place.get("sha256") not in (None, digest.hexdigest()):
            raise UserError(f"{batch.origin.name} is not what it was, before the place at which shard {number} begins: "
                            "restore it, or choose another --out")
        while waiting + len(tokens) - at > shard_size:
            end = at + shard_size - waiting
            arrays.append(tokens[at:end])
            digest.update(tokens[at:end])
            following = {**file, "skip": position + end, "sha256": digest.hexdigest()}
            yield Shard(number, arrays, start, following, counts, hashes, column)
            start, number, arrays, waiting, at = following, number + 1, [], 0, end
            if number == stop:
                return
        arrays.append(tokens[at:])
        digest.update(tokens[at:])
        waiting += len(tokens) - at
        position += len(tokens)
    if number == 0:
        raise UserError(f"the source holds {waiting:,} tokens, which do not fill one shard of {shard_size:,} for "
                        "validation and begin one for training: pass a smaller --shard_size, for example "
                        f"{max(2, waiting // 10)}" if waiting else "the source holds no text: its rows or files are "
                        "empty; give another --source")
    if waiting:
        yield Shard(number, arrays, start, None, counts, hashes, column)


class ShardFolder:
    """A folder of shards that are being made. It writes them, in a thread of its own, and alone changes the manifest.

    Within `with` the manifest is on the disk and calls the folder incomplete. It goes if no shard was written.
    """

    def __init__(self, folder, manifest, own):
        self.folder, self.manifest, self.own = folder, manifest, own
        self._pool, self._last = ThreadPool(1, thread_name_prefix="write"), None

    def __enter__(self):
        self._save(complete=False)  # before any shard, so that none is ever without it
        if self.own.json:
            with atomic_file(self.folder / "tokenizer.json") as file:
                file.write(self.own.json.encode())
        return self

    def __exit__(self, kind, *_):
        try:
            with self._pool:
                if kind is None and self._last:
                    self._last.result()
            if kind is None:
                self._save(complete=True, expected_shards=len(self.manifest["files"]))
        finally:
            if not self.manifest["files"]:
                for name in ("manifest.json", "tokenizer.json"):
                    (self.folder / name).unlink(missing_ok=True)

    def add(self, shard, expected_shards=None):
        """Write a `Shard`, while the next one is made. `expected_shards`: how many there will be."""
        if self._last:
            self._last.result()  # at most one shard waits in memory, and a full disk is reported early
        self._last = self._pool.submit(self._write, shard, expected_shards)

    def _write(self, shard, expected_shards):
        name = shard_name(self.manifest["name"], shard.number)
        entry = write_npy(self.folder / name, shard.arrays) | {"start": shard.start}
        known = self.manifest["files"].get(name)
        if known is None:
            hashes = dict(enumerate(self.manifest["source_sha256"])) | shard.source_sha256
            hashes = hashes if any(hashes.values()) else {}
            self.record(name, entry, **shard.counts, next=shard.following, expected_shards=expected_shards,
                        text_column=shard.column or self.manifest["text_column"],
                        source_sha256=[hashes.get(i) for i in range(max(hashes, default=-1) + 1)])
        elif any(known.get(key) != entry.get(key) for key in ("tokens", "sha256", "mask_sha256")):
            raise UserError(f"{self.folder / name} was missing and cannot be made again as it was, since the source "
                            f"has changed: {ANOTHER}")

    def record(self, name, entry, **changes):
        """Note a shard that is there, and other changes of the manifest."""
        self.manifest["files"][name] = entry
        self._save(**changes)

    def _save(self, **changes):
        self.manifest |= changes
        with atomic_file(self.folder / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(self.manifest, file, indent=1)
            file.write("\n")


def shard_name(name, index):
    """`NAME_val_000000.npy` for shard 0, which is the validation split, else `NAME_train_000001.npy` and so on."""
    return f"{name}_{'train' if index else 'val'}_{index:06d}.npy"


def write_npy(path, arrays):
    """Write arrays of tokens as one `.npy` file that appears when whole; returns its entry in the manifest.

    Where some do not count, a mask stands beside it: a bit for each token, set for those that do, as np.packbits does.
    """
    tokens, header = sum(map(len, arrays)), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for part in (header.getbuffer(), *(array.astype("<u2", copy=False).data for array in arrays)):
            digest.update(part)
            file.write(part)  # np.save would hide that the disk is full
        entry = {"tokens": tokens, "sha256": digest.hexdigest()}
        if any(array.max(initial=0) >= UNCOUNTED for array in arrays):
            counted = np.concatenate([array < UNCOUNTED for array in arrays])
            mask = np.packbits(counted).tobytes()
            entry |= {"counted": int(counted.sum()), "mask_sha256": hashlib.sha256(mask).hexdigest()}
            with atomic_file(shards.mask_of(path)) as beside:  # there before the shard is
                beside.write(mask)
        else:
            shards.mask_of(path).unlink(missing_ok=True)  # another shard's, which is gone
    return entry


# --- text for the trainer ---


def find_splits(data, val_data, cache_dir, allow_incomplete=False, val=True, vocabulary="gpt2", asked=False, own=None,
                text_column=None):
    """(train parts, validation parts, `Tokenizer`) of what --data and --val_data name; parts as `shards.find_shards`.

    Raw text becomes shards in `cache_dir` first, by the `vocabulary` that is chosen (see `tokenizer.chosen`). That of
    shards is the one that their manifest names: with `asked` another one is refused, and always if it is not `own`, the
    model's. Without `val` the validation parts of a folder are not looked for: None. Raises `UserError` where something
    is missing, or not complete and not `allow_incomplete`.
    """
    def shards_at(path, held_out, flag, own):
        path = Path(path)
        if shards.kind_of_data(path, flag, cache_dir) == "text":
            column, split = text_column, None
            if flag == "--val_data":
                texts = walk(path, [cache_dir]).texts if path.is_dir() else [path]
                column = None if all(".txt" in text_kind(text) for text in texts) else text_column
                split = VALIDATION
            folder = prepare_text(path, cache_dir, held_out, vocabulary, own, column, split)
            return folder, tokenizer_of(folder, read_manifest(folder))
        if text_column and flag == "--data":
            raise UserError(f"--text_column {text_column}: --data {path} holds tokens, which have no columns: leave it "
                            "out")
        folder = path if path.is_dir() else path.parent
        for name, entry in (read_manifest(folder) or {"files": {}})["files"].items():
            if "mask_sha256" in entry and (folder / name).is_file() and not shards.mask_of(folder / name).is_file():
                raise UserError(f"{flag} {path}: {shards.mask_of(name)} is missing, without which prompts would count "
                                "as answers: restore it, or make the folder again")
        if path.is_dir() and (ignored := walk(path, [cache_dir]).texts):
            say(f"{flag} {path}: its shards are read, the text beside them ({ignored[0].name}) is not")
        return path, vocabulary_of(path, flag, own or vocabulary, asked or own is not None)

    folder, own = shards_at(data, 0.0 if val_data else 0.1, "--data", own)
    manifest = read_manifest(folder) if folder.is_dir() else None
    # a validation shard may be elsewhere, where --val_data takes its place
    missing = [name for name in (missing_shards(folder, manifest) if manifest else [])
               if shards.split_of(name) != "val" or (val and not val_data)]
    if manifest and (missing or not manifest["complete"]) and not allow_incomplete:
        found = f"{missing[0]} is missing or torn" if manifest["complete"] else shards_there(manifest)
        raise UserError(f"--data {folder} is incomplete ({found}): finish it with fineweb.py, or "
                        "train on what is there with --allow_incomplete")
    train_parts = shards.find_shards(folder, "train", whole=val_data is not None)
    if val_data:
        other, _ = shards_at(val_data, 0.0, "--val_data", own)
        val_parts = shards.find_shards(other, "val", whole=True)
        if _contents(folder, train_parts) & _contents(other, val_parts):
            say(f"WARNING: --val_data {val_data} is part of what --data {data} trains on: the validation loss says "
                "nothing about new text")
        return train_parts, val_parts, own
    return train_parts, shards.find_shards(folder, "val") if val else None, own


def _contents(path, parts):
    """What tells that two splits share text: the SHA-256 of the texts, as far as known, and the paths of the shards."""
    texts = (read_manifest(path) or {"source_sha256": []})["source_sha256"]
    return {*texts, *(os.path.realpath(file) for file, _, _ in parts)} - {None}


def vocabulary_of(path, flag, vocabulary, asked):
    """The `Tokenizer` of the shards at `path`: by their manifest, else by --tokenizer if `asked`, else GPT-2's.

    Raises `UserError` if the manifest's is not the one that is `asked` for.
    """
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder)
    if manifest is None or not (path.is_dir() or path.name in manifest["files"]):
        own = tokenizer.chosen(vocabulary if asked else "gpt2")
        if own is None:
            raise UserError(f"{flag} {path} holds tokens already, so that no vocabulary can be learned: give the "
                            "--tokenizer that they were made with, a file, or the text itself")
        return own
    own = tokenizer_of(folder, manifest)
    wanted = tokenizer.chosen(vocabulary) if asked else own
    if own != wanted and manifest["tokenizer"] != vocabulary:
        raise UserError(f"{flag} {path} was made with {own} (its manifest.json says {manifest['tokenizer']}), not with "
                        f"{wanted or f'--tokenizer {vocabulary}'}: leave that out, or make it again from the text")
    return own


def prepare_text(path, cache_dir, held_out=0.1, vocabulary="gpt2", own=None, text_column=None, split=None):
    """A folder of shards made from the raw text at `path` (a file of `TEXT_SUFFIXES` or a folder of them).

    The folder lies in `cache_dir`, is keyed by the text's hash and the `vocabulary` or, if it is given, the `Tokenizer`
    `own`, made once and never seen half-made. The last `held_out` of the tokens (with GPT-2's vocabulary) or bytes
    (with another one, which is learned from the rest) are the validation shard, the rest are the train shards; with
    `held_out=0` there are train shards only. Raises `UserError` when the text is damaged, not UTF-8 or too short, or
    the cache cannot be written.
    """
    source, cache = local_source([path], text_column, split=split, leave_out=[cache_dir]), Path(cache_dir)
    key = [1, held_out, source.name, [(file.where.suffix, sha256_of(file)) for file in source.files]]
    if any(_has_separator(file.where) for file in source.files):
        key.append("split at <|endoftext|>")  # other tokens than those of an earlier version
    if text_column:
        key.append({"text_column": text_column})

    def named(choice):
        of_choice = choice if isinstance(choice, str) else choice.json and choice.fingerprint
        parts = [*key, of_choice] if of_choice else key  # GPT-2's as they always were
        return cache / f"{source.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    own = own or tokenizer.chosen(vocabulary)
    final = named(own or vocabulary)
    if own and tokenizer.size_to_learn(vocabulary) and _is_prepared(named(vocabulary), own):
        final = named(vocabulary)  # a model's own, which was learned here
    if not _is_prepared(final):
        with folder_lock(cache, "--cache_dir", wait=True):
            for left in cache.glob(".*.making"):
                if HALF_MADE.fullmatch(left.name):  # nobody else is in here
                    shutil.rmtree(left, ignore_errors=True)
            if not _is_prepared(final):  # by the process that was waited for
                _make_cache(source, final, held_out, own or vocabulary)
    manifest = read_manifest(final)
    if len(source.files) > 1 or source.notes or manifest["text_column"] or manifest["separators"]:  # no plain text
        say(f"{source.in_words(manifest['text_column'])}; {summary(manifest)}")
    return final


def _make_cache(source, final, held_out, vocabulary):
    making = final.with_name(f".{final.name}.{uuid.uuid4().hex}.making")
    try:
        making.mkdir()
        _split_text(source, making, held_out, vocabulary)
        shutil.rmtree(final, ignore_errors=True)
        making.rename(final)
    except OSError as error:
        raise UserError(f"--cache_dir {final.parent} cannot be written ({error.strerror or error}): give another "
                        "one") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _has_separator(path):
    """Whether a .txt file has <|endoftext|> in it; packed ones count as if (there were none in earlier versions)."""
    if path.suffix.lower() != ".txt":
        return ".txt." in path.name.lower()
    separator, end = SEPARATOR.encode(), b""
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            if separator in end + data:
                return True
            end = data[-len(separator) :]
    return False


def _is_prepared(folder, own=None):
    """Whether the shards of `prepare_text` are in `folder` and, if it is given, made with the `Tokenizer` `own`."""
    try:
        manifest = read_manifest(folder)
        return (manifest is not None and tokenizer_of(folder, manifest) in (own or tokenizer_of(folder, manifest),)
                and not missing_shards(folder, manifest))
    except UserError:
        return False


def _split_text(source, folder, held_out, vocabulary):
    """Write the shards and the manifest of `prepare_text` into `folder`."""
    own, column = tokenizer.chosen(vocabulary), source.text_column
    if own and own.json is None:
        halves = [read_source(source, column=column)]  # cut by tokens, below
    else:
        limit = sum(batch.size for batch in read_source(source, column=column))
        limit -= int(limit * held_out)
        own = learned(vocabulary, cut(read_source(source, column=column), limit, before=True), limit)
        halves = [cut(read_source(source, column=column), limit, before) for before in (True, False)]
        halves = halves[: 2 if held_out else 1]
    stream, ends, encode = folder / "tokens", [], None  # on disk, because the split is known only at the end
    has_columns = not all(".txt" in file.where.name.lower() for file in source.files)
    dtype = np.dtype(np.uint32 if has_columns else np.uint16)  # with room for `UNCOUNTED`
    counts = dict.fromkeys(COUNTS, 0)
    with open(stream, "wb") as file:
        for half in halves:
            head, batches = peeked(half)
            encode = encode or encoder(head[0].texts if head else [], source.size, own)
            for batch, tokens in tokenized(batches, encode, cores()):
                file.write(tokens.astype(dtype, copy=False))
                counts = {key: counts[key] + getattr(batch, key) for key in COUNTS}
                column = batch.column or column
            ends.append(file.tell() // dtype.itemsize)
    total = ends[-1]
    train_tokens = ends[0] if len(ends) == 2 else total - int(total * held_out)
    held_out_tokens = total - train_tokens
    if train_tokens < 2 or (held_out and held_out_tokens < 2):
        skipped = f" and {count(counts['skipped'], 'row')} without text" if counts["skipped"] else ""
        raise UserError(f"{source.title} holds {total} tokens{skipped}, {held_out_tokens} of them for validation: too "
                        "few, both parts need at least 2. Give a longer text")
    parts = [(0, train_tokens, total)] if held_out else []
    for number, begin in enumerate(range(0, train_tokens, SHARD_SIZE), 1):
        parts.append((number, begin, min(begin + SHARD_SIZE, train_tokens)))
    about = {**counts, "source_sha256": [sha256_of(file) for file in source.files], "text_column": column,
             "held_out": held_out, **describe(own, vocabulary)}
    with ShardFolder(folder, new_manifest(source, SHARD_SIZE, own) | about, own) as out:
        for number, begin, end in parts:
            name = shard_name(source.name, number)
            tokens = np.fromfile(stream, dtype, end - begin, offset=dtype.itemsize * begin)
            out.record(name, write_npy(folder / name, [tokens]))
    stream.unlink()


def cut(batches, limit, before):
    """The batches of the first `limit` bytes, or with `before=False` those of the rest, which begins a document.

    The cut is moved on to the end of a character, so that it depends on the text alone; of pairs back to the start of
    one.
    """
    at = 0
    for batch in batches:
        begin, at = at, at + batch.size
        if at <= limit or begin >= limit:
            if (at <= limit) == before:
                yield batch if begin != limit else batch._replace(leads=True)
            continue
        texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
        left, kept = limit - begin, []
        for number, text in enumerate(texts):
            data = text.encode()
            if len(data) > left:
                while left < len(data) and data[left] & 0xC0 == 0x80:
                    left += 1
                kept, rest = [*texts[:number], data[:left].decode()], [data[left:].decode(), *texts[number + 1 :]]
                break
            left -= len(data)
        else:
            kept, rest = texts, []
        if batch.pairs:
            kept, rest = texts[: number - number % 2], texts[number - number % 2 :]
            yield batch._replace(texts=kept if before else rest, skipped=batch.skipped if before else 0)
        elif before:
            yield batch._replace(texts=[text for text in kept if text])
        else:
            yield batch._replace(texts=[text for text in rest if text], leads=True, skipped=0, separators=0, literal=0)
