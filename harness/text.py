"""Text -> batches -> tokens -> shards, with their manifest; what fineweb.py and a raw --data stand on."""

import base64
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import unicodedata
import uuid
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness import shards, tokenizer
from harness.cli import UserError
from harness.files import DISK_FULL, atomic_file, sha256
from harness.shards import TEXT_SUFFIXES

SHARD_SIZE = 100_000_000  # tokens a shard
BATCH_BYTES = 2 << 20  # text that one thread tokenizes at a time: large against Python's overhead, small for caches
SMALL_SOURCE = 8 << 20  # below this many bytes, loading gigatoken takes longer than tiktoken takes for the whole
NPY_HEADER = 128  # bytes that np.save puts before a one-dimensional array
NO_ROOM = (*DISK_FULL, errno.EFBIG)

# ---------------------------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------------------------


def read_manifest(folder):
    """The manifest of a folder of shards as a dict, or None where there is none.

    Keys: `format_version`, `source`, `revision`, `name`, `tokenizer`, `dtype`, `vocab_size`, `shard_size` (None for
    ready-made shards), `files` ({file name: {"tokens", "sha256", ...}}, in order, validation first), `complete` (all
    that was asked for is there), `expected_shards` (an estimate until complete, None where unknown), `documents`,
    `skipped` (rows without text) and `next` (where the source goes on, None at its end). Raises `UserError` when the
    file is damaged.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder and make its shards again") from error
    needed = {"format_version", "source", "revision", "shard_size", "files", "complete", "expected_shards"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise UserError(f"{path} is not a manifest of token shards: delete the folder and make its shards again")
    if manifest["format_version"] != 1:
        raise UserError(f"{path} has format version {manifest['format_version']}, this program reads 1: update it")
    return manifest


def _new_manifest(source, revision, name, shard_size):
    return {
        "format_version": 1, "source": source, "revision": revision, "name": name,
        "tokenizer": "gpt2", "dtype": "uint16", "vocab_size": tokenizer.VOCAB_SIZE, "shard_size": shard_size,
        "complete": False, "expected_shards": None, "documents": 0, "skipped": 0, "next": None, "files": {},
    }


def _save_manifest(folder, manifest):
    path = Path(folder) / "manifest.json"
    with _disk_full_explained(folder), atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")


@contextmanager
def _recorded(folder, manifest):
    """Keep the manifest on disk while shards are made: incomplete until the end, and none that names no shard."""
    manifest["complete"] = False
    _save_manifest(folder, manifest)  # before any shard, so that none is ever without it
    try:
        yield
    except BaseException:
        if not manifest["files"]:
            (folder / "manifest.json").unlink(missing_ok=True)
        raise
    manifest |= {"complete": True, "expected_shards": len(manifest["files"])}
    _save_manifest(folder, manifest)


def _summary(manifest):
    tokens = sum(entry["tokens"] for entry in manifest["files"].values())
    skipped = f", {manifest['skipped']:,} rows without text skipped" if manifest["skipped"] else ""
    documents = f" of {manifest['documents']:,} documents" if manifest["documents"] else ""
    return f"{len(manifest['files'])} shards, {tokens:,} tokens{documents}{skipped}"


def verify(folder, workers=None):
    """Check every file of `folder` against its manifest, byte for byte; returns the manifest.

    Raises `UserError` naming the files that are missing, damaged or not in the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest.json, so there is nothing to verify: --out names a folder of shards")
    files = manifest["files"]
    present = [name for name, entry in files.items() if _is_whole(folder / name, entry)]
    with ThreadPoolExecutor(workers or _cores()) as pool:
        digests = dict(zip(present, pool.map(lambda name: sha256(folder / name), present)))
    faults = [f"{name} is missing or damaged" for name, entry in files.items() if digests.get(name) != entry["sha256"]]
    strange = [f"{path.name} is not in the manifest" for path in _shards_in(folder) if path.name not in files]
    if faults := faults + strange:
        raise UserError(f"{folder}: {len(faults)} of {len(files) + len(strange)} files are bad: "
                        f"{'; '.join(faults[:5])}{' ...' if len(faults) > 5 else ''}. Delete these files and run the "
                        "command that made the folder again: it makes only what is missing")
    return manifest


def _is_whole(path, entry):
    """Whether a shard is there in its full size (the cheap check; `verify` reads every byte)."""
    header = NPY_HEADER if path.suffix == ".npy" else shards.LLMC_HEADER
    return path.is_file() and path.stat().st_size == header + 2 * entry["tokens"]


def _shards_in(folder):
    return sorted(path for path in Path(folder).glob("*") if path.suffix in shards.SHARD_SUFFIXES)


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Neighbouring documents of one file."""

    row: int  # where the batch starts: a row, a line, or a byte of a text file; reading can start again there
    texts: Any  # Arrow string array or list of str, none of them empty
    skipped: int  # rows without text between this batch's first row and the next batch's
    size: int  # bytes of text
    read: float  # share of the file that is read when this batch is
    leads: bool = True  # False for a later piece of one long text, which no <|endoftext|> leads
    file: int = 0  # number of the file in its source
    done: float = 0.0  # bytes of the source read up to the end of this batch

    @property
    def documents(self):
        """How many documents begin in it."""
        return len(self.texts) if self.leads else 0


def _read(path, row=0):
    """Batches of the file at `path` from batch start `row` on. The split depends on the file alone."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".gz": _read_jsonl, ".txt": _read_txt}
    return readers[path.suffix](path, row)


def _read_parquet(path, start):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            column = _text_column(path, file)
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            rows = max(1, file.metadata.num_rows)
            size = sum(group.column(column).total_uncompressed_size for group in groups)
            batch_rows = max(1, BATCH_BYTES * rows // max(1, size))
            row = 0
            for number, group in enumerate(groups):
                if row + group.num_rows <= start:
                    row += group.num_rows
                    continue
                for table in file.iter_batches(batch_rows, [number], ["text"], use_threads=False):
                    if row >= start:
                        texts = table.column(0).cast(pa.large_string())
                        texts.validate(full=True)  # Arrow reads invalid UTF-8 without a word
                        lengths = pc.binary_length(texts)
                        size = pc.sum(lengths).as_py() or 0
                        texts = texts.filter(lengths.cast(pa.bool_()))  # a number to compare with would import pandas
                        yield Batch(row, texts, len(table) - len(texts), size, (row + len(table)) / rows)
                    row += len(table)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no parquet file ({error}): fetch it again or leave it out") from error


def _text_column(path, file):
    """Index of the parquet column `text`, which must hold strings."""
    import pyarrow.types as types

    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(f"{path} has no column `text`, but {', '.join(names)}: rename the one that holds the documents")
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{path}: column `text` holds {kind}, not strings: turn it into text, or leave the file out")
    return [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)].index("text")


def _read_jsonl(path, start):
    size, keys = max(1, path.stat().st_size), set()

    def texts(lines):
        for number, line in enumerate(itertools.islice(lines, start, None), start):
            if line.isspace():
                yield None
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                raise UserError(f"{path}, line {number + 1}: {error}: every line must be a JSON object") from error
            row = row if isinstance(row, dict) else {}
            keys.update(row)
            yield row["text"] if isinstance(row.get("text"), str) else None

    with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as lines:
        try:
            for batch in _grouped(texts(lines), start):
                yield batch._replace(read=raw.tell() / size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): fetch it again or leave it out") from error
    if keys and "text" not in keys and start == 0:
        raise UserError(f"{path} has no `text` in any row, but {', '.join(sorted(keys))}: rename the one that holds it")


def _grouped(texts, start=0):
    """Batches of some 2 MB from an iterable of texts, the first of which is row `start`."""
    row, batch, size, skipped = start, [], 0, 0
    for number, text in enumerate(texts, start):
        if text:
            try:
                size += len(text.encode())
            except UnicodeEncodeError:  # half of a surrogate pair, as "\ud83d" in JSON: U+FFFD, as in tiktoken
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            batch.append(text)
        else:
            skipped += 1
        if size >= BATCH_BYTES:
            yield Batch(row, batch, skipped, size, 0.0)
            row, batch, size, skipped = number + 1, [], 0, 0
    if batch or skipped:
        yield Batch(row, batch, skipped, size, 1.0)


def _read_txt(path, start):
    """A text file is one document. Long ones come in pieces, cut where GPT-2's pre-tokenizer cuts anyway."""
    size, row, length = path.stat().st_size, start, BATCH_BYTES
    with open(path, "rb") as file:
        while row < size:
            file.seek(row)
            if not (data := file.read(length)):
                raise UserError(f"{path} got shorter while it was read: run the same command again")
            cut = len(data) if row + len(data) >= size or len(data) < length else _safe_cut(data)
            if cut == 0:  # a long stretch without line ends
                length *= 2
                continue
            text = data[:cut] if row else data[:cut].removeprefix(b"\xef\xbb\xbf")  # the byte order mark is no text
            try:
                texts = [text.decode()] if text else []
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 (byte {row + error.start:,} is 0x{text[error.start]:02x}): "
                                "convert it, for example with `iconv -f latin1 -t utf-8`") from error
            yield Batch(row, texts, 0, cut, (row + cut) / size, leads=row == 0)
            row, length = row + cut, BATCH_BYTES


def _safe_cut(data):
    """The end of the last newline in UTF-8 `data` that has no white space on either side; 0 if there is none.

    The pre-tokenizer makes such a newline a piece of its own whatever the rest of the text is, so the tokens of the
    parts are those of the whole.
    """
    at = data.rfind(b"\n")
    while at > 0:
        before = data[max(0, at - 4) : at].decode(errors="ignore")[-1:]
        after = data[at + 1 : at + 5].decode(errors="ignore")[:1]
        if before and after and not before.isspace() and not after.isspace():
            return at + 1
        at = data.rfind(b"\n", 0, at)
    return 0


# ---------------------------------------------------------------------------------------------------------------
# Tokenizing
# ---------------------------------------------------------------------------------------------------------------


def _with_tiktoken(texts):
    """Tokens (uint16) of documents, each led by <|endoftext|>. Its text inside a document is ordinary text."""
    encoding = tokenizer.gpt2()
    documents = texts if isinstance(texts, list) else texts.to_pylist()  # else an Arrow array
    return _led([encoding.encode_to_numpy(text, disallowed_special=()) for text in documents])


def _led(documents):
    """One uint16 array of documents' token arrays, each led by <|endoftext|>."""
    lead = np.array([tokenizer.END_OF_TEXT], np.uint16)
    parts = [part for tokens in documents for part in (lead, tokens)]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe") if parts else np.empty(0, np.uint16)


def _gigatoken():
    """`_with_tiktoken`'s twin by gigatoken, some 30 times as fast. Raises ImportError where it is not installed."""
    import awkward as ak
    import gigatoken
    import pyarrow as pa

    ranks = tokenizer.gpt2()._mergeable_ranks
    with tempfile.TemporaryDirectory() as folder:  # gigatoken reads ranks from a file only
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
        strange = _unknown_to_python(texts)
        if not len(strange):
            return np.insert(flat.astype(np.uint16), np.cumsum(counts) - counts, tokenizer.END_OF_TEXT)
        documents = np.split(flat, np.cumsum(counts)[:-1])
        for i in strange:
            documents[i] = tokenizer.gpt2().encode_to_numpy(texts[i].as_py(), disallowed_special=())
        return _led(documents)

    return encode


def _unknown_to_python(texts):
    """Indices of those strings in an Arrow array that hold a code point which this Python's tables do not know.

    The libraries' Unicode versions differ, and so do their letters. A new one may be a letter to gigatoken and none to
    tiktoken, whose word counts: such documents, one in millions, go to tiktoken. Code points below 0x800, of one or two
    bytes, are old.
    """
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    at = np.flatnonzero(data >= 0xE0)  # where a character of 3 or 4 bytes starts
    four = data[at] >= 0xF0
    head, tail = data[at].astype(np.int64), [data[at + i].astype(np.int64) & 0x3F for i in (1, 2)]
    codes = np.where(four, head & 0x07, head & 0x0F) << 12 | tail[0] << 6 | tail[1]
    codes[four] = codes[four] << 6 | data[at[four] + 3] & 0x3F
    unknown = np.zeros(0x110000, bool)
    unknown[codes] = True
    for code in np.flatnonzero(unknown):
        unknown[code] = unicodedata.category(chr(code)) == "Cn"
    return np.unique(np.searchsorted(offsets, at[unknown[codes]] + offsets[0], side="right") - 1)


def _tiktoken_at_once():
    """`_with_tiktoken`'s twin, some 1.6 times as fast: a batch of documents in one call, by a plainer pattern.

    GPT-2's pattern looks ahead, `\\s+(?!\\S)`, to keep the last white space of a run for the word after it. Only a slow
    matcher can do that. With runs cut before their last character `\\s+` does the same, and a fast matcher does all.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import tiktoken

    document, cut, space = "\x1e", "\x1f", "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    engine = tiktoken.Encoding(
        "gpt2 without look-ahead", mergeable_ranks=tokenizer.gpt2()._mergeable_ranks,
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        special_tokens={document: tokenizer.END_OF_TEXT, cut: tokenizer.VOCAB_SIZE})  # marks, which texts hardly hold
    run_end = f"([{space}])([{space}][^{space}])"

    def encode(texts):
        if isinstance(texts, list):
            texts = pa.array(texts, pa.large_string())
        if pc.any(pc.match_substring_regex(texts, f"[{document}{cut}]")).as_py():
            return _with_tiktoken(texts)
        marked = pc.replace_substring_regex(texts, run_end, rf"\1{cut}\2").to_pylist()
        tokens = engine.encode_to_numpy("".join(document + text for text in marked), allowed_special="all")
        return tokens[tokens != tokenizer.VOCAB_SIZE].astype(np.uint16)

    return encode


def _encoder(sample, size):
    """The fastest function from texts to tokens for `size` bytes of source.

    It must give tiktoken's very tokens for the first documents of `sample`, or tiktoken does the work one by one.
    """
    if size < SMALL_SOURCE:
        return _with_tiktoken
    try:
        encode = _gigatoken()
    except ImportError as error:
        print(f"no gigatoken ({error}): tiktoken tokenizes instead, some 10 times slower", file=sys.stderr)
        encode = _tiktoken_at_once()
    if not np.array_equal(encode(sample[:256]), _with_tiktoken(sample[:256])):
        print("warning: the fast tokenizer's tokens differ from tiktoken's: tiktoken does the work", file=sys.stderr)
        return _with_tiktoken
    return encode


def _tokenized(batches, encode, workers):
    """(batch, tokens) of every batch, in order, tokenized by `workers` threads.

    Threads suffice: both tokenizers and Arrow's decoder let go of the interpreter's lock, and no text or token is
    copied between processes.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        ahead = deque()
        try:
            for batch in itertools.chain(batches, [None] * 2 * workers):  # at the end, None pushes the last ones out
                ahead.append((batch, batch and pool.submit(encode, batch.texts)))
                if len(ahead) > 2 * workers:
                    first, tokens = ahead.popleft()
                    yield first, tokens.result()[not first.leads :]
        finally:
            pool.shutdown(cancel_futures=True)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------


class SourceFile(NamedTuple):
    name: str
    size: int  # bytes
    where: Path | str  # on this disk, or in the repository
    sha256: str | None = None  # where the repository tells


@dataclass(frozen=True)
class Source:
    """Files of documents in a fixed order, and how to lay hands on one of them."""

    title: str
    revision: str  # equal revisions hold equal files
    name: str  # what the shards are called
    files: tuple[SourceFile, ...]
    fetch: Callable[[SourceFile], Path]
    discard: Callable[[Path], None] = lambda path: None  # called when a file has been read
    remote: bool = False

    @property
    def size(self):
        """Bytes of all files."""
        return sum(file.size for file in self.files)


# A place in a source, as manifests record it: file, batch and token of that batch, with the counts of all before it.
BEGINNING = {"file": 0, "row": 0, "skip": 0, "documents": 0, "skipped": 0}


def local_source(paths):
    """The documents of files and folders (all their files of a known kind, in the order of their names)."""
    files = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given} does not exist: --source takes known names, or paths of files and folders")
        found = sorted(given.rglob("*")) if given.is_dir() else [given]
        found = [path for path in found if path.is_file() and path.name.endswith(TEXT_SUFFIXES)
                 and not any(part.startswith(".") for part in path.relative_to(given).parts)]
        if not found:
            raise UserError(f"{given} is or holds no file of these kinds: {', '.join(TEXT_SUFFIXES)}")
        for path in found:
            label = f"{given.name}/{path.relative_to(given).as_posix()}" if given.is_dir() else given.name
            files.append(SourceFile(label, path.stat().st_size, path))
    first = Path(paths[0]).resolve()
    stem = first.name if first.is_dir() else first.name.split(".")[0]
    return Source(
        title=", ".join(Path(path).resolve().name for path in paths),
        revision=_fingerprint(files),
        name=re.sub(r"[^0-9A-Za-z.]+", "-", stem).strip("-.") or "text",  # no underscore: it parts name and split
        files=tuple(files),
        fetch=lambda file: file.where,
    )


def _fingerprint(files):
    """SHA-256 of names, sizes and both ends of files: tells changed sources without reading terabytes."""
    digest = hashlib.sha256()
    for entry in files:
        try:
            with open(entry.where, "rb") as file:
                digest.update(f"{entry.name}\n{entry.size}\n".encode() + file.read(1 << 16))
                file.seek(max(0, entry.size - (1 << 16)))
                digest.update(file.read(1 << 16))
        except PermissionError as error:
            raise UserError(f"{entry.where} cannot be read ({error.strerror}): change its permissions") from error
    return digest.hexdigest()


def _batches(source, place=BEGINNING):
    """The batches of `source` from the one at `place` on."""
    done = sum(file.size for file in source.files[: place["file"]])
    for index, path in enumerate(_fetched(source.fetch, source.files[place["file"] :]), place["file"]):
        size = source.files[index].size
        for batch in _read(path, place["row"] if index == place["file"] else 0):
            yield batch._replace(file=index, done=done + batch.read * size)
        source.discard(path)
        done += size


def _fetched(fetch, files):
    """`fetch(file)` of every file, in order, the next one being fetched while the last one is used."""
    coming = None
    for file in (*files, None):
        path = coming and coming.result()
        coming = file and _in_background(fetch, file)
        if path:
            yield path


def _in_background(function, *args):
    """Run a function in a thread that does not keep the process from ending; returns a `Future`."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _peeked(batches, count=1):
    """The first batches, in a list, and an iterator of all of them."""
    head = list(itertools.islice(batches, count))
    return head, itertools.chain(head, batches)


# ---------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------


def make_shards(source, out, shard_size=SHARD_SIZE, workers=None, max_shards=None):
    """Tokenize a `Source` into shards in the folder `out`, going on where an earlier run stopped.

    Returns the manifest (see `read_manifest`). Raises `UserError` when `out` holds other data, when the source is
    damaged or too small, and when the disk is full.
    """
    out, workers = Path(out), workers or _cores()
    _check_sizes(shard_size, max_shards)
    with _folder_for(out):
        manifest = _continued(out, _new_manifest(source.title, source.revision, source.name, shard_size))
        gaps, encode = _gaps(out, manifest, max_shards), None
        if gaps or not manifest["complete"]:  # a kill may have come between the last shard and this word
            with _recorded(out, manifest), _writer(out, manifest) as save:
                for place, first, stop in gaps:
                    head, batches = _peeked(_batches(source, place))
                    position = first * shard_size - place["skip"]  # in the stream of all tokens
                    progress = _Progress(source, manifest, max_shards, position)
                    if head and encode is None:
                        encode = _encoder(head[0].texts, source.size)
                        progress.announce(out, head[0], encode, workers)
                    tokenized = progress.watch(_tokenized(batches, encode, workers))
                    _cut(tokenized, place, first, stop, shard_size, save)
        print(f"{out} is complete: {_summary(manifest)}")
    return manifest


def write_shards(documents, out_dir, name, shard_size, max_shards=None, workers=None):
    """Tokenize an iterable of strings into `NAME_val_000000.npy`, `NAME_train_000001.npy`, ... and `manifest.json`.

    Every document is led by <|endoftext|> and split over shard ends without loss; every shard but the last holds
    exactly `shard_size` tokens, and at most `max_shards` are written. Empty documents and None are skipped and counted.
    Returns the manifest (see `read_manifest`). Raises `UserError` when the folder holds shards already or the documents
    do not begin a second shard. (An iterable cannot be resumed; a `Source` can, by `make_shards`.)
    """
    out, workers = Path(out_dir), workers or _cores()
    _check_sizes(shard_size, max_shards)
    if isinstance(documents, str):
        raise TypeError("documents is one string, not an iterable of strings")
    with _folder_for(out):
        if read_manifest(out) is not None or _shards_in(out):
            raise UserError(f"{out} holds shards already: choose another folder, or delete it")
        head, batches = _peeked(_grouped(documents), 2)
        encode = _encoder(head[0].texts if head else [], SMALL_SOURCE if len(head) == 2 else 0)
        manifest = _new_manifest("documents", None, name, shard_size)
        with _recorded(out, manifest), _writer(out, manifest) as save:
            _cut(_tokenized(batches, encode, workers), BEGINNING, 0, max_shards, shard_size, save)
    return manifest


def _check_sizes(shard_size, max_shards):
    if shard_size < 2:
        raise UserError(f"shard_size is {shard_size}, but a shard holds at least 2 tokens")
    if max_shards is not None and max_shards < 2:
        raise UserError(f"max_shards is {max_shards}, but one shard for validation and one for training are the least")


@contextmanager
def _folder_for(out):
    """Make the folder of shards and hold it locked. Only what is of use to a next run stays when this one fails."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        with _locked(out):
            for path in out.glob(".*.tmp"):  # what a killed run left half-written
                path.unlink()
            yield
            shutil.rmtree(out / ".download", ignore_errors=True)
    finally:
        with suppress(OSError):
            for path in made:  # the deepest first; one that is not empty ends it
                path.rmdir()


@contextmanager
def _locked(out):
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if not (out / ".lock").exists():  # another run has just ended and taken it away, as below
            raise Timeout(lock.lock_file)
    except Timeout as error:
        raise UserError(f"another process is writing to {out}: wait for it, or choose another --out") from error
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error.strerror}): choose another --out") from error
    try:
        yield
    finally:
        if not _holds_downloads(out):
            shutil.rmtree(out / ".download", ignore_errors=True)
        with suppress(OSError):  # Windows deletes no open file; there filelock itself does at the release
            (out / ".lock").unlink()  # while it is ours: whoever opened it meanwhile is told that it is gone
        lock.release()


def _holds_downloads(out):
    """Whether there is something fetched, whole or in part, that the next run can go on with."""
    found = (path for suffix in (".parquet", ".bin", ".incomplete") for path in out.glob(f".download/**/*{suffix}"))
    return any(path.is_file() and path.stat().st_size for path in found)


def _continued(out, fresh):
    """The manifest to go on from: that of `out` if it is of the same data as `fresh`, `fresh` in an empty folder."""
    manifest = read_manifest(out)
    if manifest is None:
        if strange := _shards_in(out):
            raise UserError(f"{out} holds {strange[0].name}, but no manifest that says of what: choose another --out")
        return fresh
    for key in ("source", "name", "shard_size", "revision"):
        if manifest[key] != fresh[key]:
            raise UserError(f"{out} holds another dataset's shards ({key} {manifest[key]}, not {fresh[key]}): "
                            "choose another --out, or delete the folder to start anew")
    return manifest


def _gaps(out, manifest, max_shards):
    """[(place, first shard, end)] of what is to be made: recorded shards that are gone, then all that are not begun."""
    files = manifest["files"]
    gaps = [(entry.get("start"), i, i + 1) for i, (name, entry) in enumerate(files.items())
            if not _is_whole(out / name, entry)]
    following = manifest["next"] if files else BEGINNING
    if following is not None and (max_shards is None or len(files) < max_shards):
        gaps.append((following, len(files), max_shards))
    return gaps


def _cut(tokenized, place, first, stop, shard_size, save):
    """Cut a stream of (batch, tokens), from `place` on, into shards number `first`, ..., `stop` - 1.

    Calls `save(index, arrays, start, following, counts)` for each, `start` and `following` being the places where it
    and the next one begin, `following` None for the last. A shard is closed when there is a token for the next one.
    """
    start, taken, index, arrays, held = place, place["skip"], first, [], 0
    counts = {"documents": place["documents"], "skipped": place["skipped"]}
    for batch, tokens in tokenized:
        here = {"file": batch.file, "row": batch.row, "skip": 0, **counts}
        counts = {"documents": here["documents"] + batch.documents, "skipped": here["skipped"] + batch.skipped}
        while held + len(tokens) - taken > shard_size:
            end = taken + shard_size - held
            arrays.append(tokens[taken:end])
            following = {**here, "skip": end}
            save(index, arrays, start, following, counts)
            start, taken, index, arrays, held = following, end, index + 1, [], 0
            if index == stop:
                return
        arrays.append(tokens[taken:])
        held, taken = held + len(tokens) - taken, 0
    if index == 0:
        raise UserError(f"the source holds {held:,} tokens, which do not fill one shard of {shard_size:,} for "
                        "validation and begin one for training: pass a smaller --shard_size, for example "
                        f"{max(2, held // 10)}" if held else "the source holds no text at all: give another --source")
    if held:
        save(index, arrays, start, None, counts)


@contextmanager
def _writer(folder, manifest):
    """A function for `_cut` that writes shards and what the manifest says of them, behind the tokenizer's back."""
    last = None

    def write(index, arrays, start, following, counts):
        name = shard_name(manifest["name"], index)
        entry = _write_npy(folder / name, arrays) | {"start": start}
        recorded = manifest["files"].get(name)
        if recorded not in (None, entry):
            raise UserError(f"{folder / name} was missing and cannot be made again as it was: the source has changed. "
                            "Choose another --out, or delete the folder to start anew")
        if recorded is None:  # otherwise a gap was filled, and what follows is known already
            manifest["files"][name] = entry
            manifest.update(counts, next=following)
        _save_manifest(folder, manifest)

    def save(*shard):
        nonlocal last
        if last:
            last.result()  # at most one shard waits in memory, and a full disk is told early
        last = pool.submit(write, *shard)

    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        yield save
        if last:
            last.result()


def shard_name(name, index):
    """`NAME_val_000000.npy` for shard 0, which is the validation split, else `NAME_train_000001.npy` and so on."""
    return f"{name}_{'train' if index else 'val'}_{index:06d}.npy"


def _write_npy(path, arrays):
    """Write uint16 arrays as one `.npy` file that appears when whole; returns its tokens and SHA-256."""
    tokens, header = sum(map(len, arrays)), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    digest = hashlib.sha256()
    with _disk_full_explained(path), atomic_file(path) as file:
        for part in (header.getbuffer(), *(array.astype("<u2", copy=False).data for array in arrays)):
            digest.update(part)
            file.write(part)  # np.save would hide from us that the disk is full
    return {"tokens": tokens, "sha256": digest.hexdigest()}


@contextmanager
def _disk_full_explained(path):
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room for {path} ({error.strerror}). Whole shards stay: free some space and run the same "
                        "command again, or end at fewer shards with --max_shards") from error


def _check_room(out, needed, free):
    if needed > free:
        raise UserError(f"{out} needs {_gigabytes(needed)} more, but {_gigabytes(free)} are free: choose an --out on "
                        "another disk, or end at fewer shards with --max_shards")


class _Progress:
    """What a run tells: the size of the task before it starts, then one bar, or a line now and then in a log file."""

    def __init__(self, source, manifest, max_shards, position):
        self.source, self.manifest, self.max_shards = source, manifest, max_shards
        self.position = position  # tokens from the source's beginning

    def announce(self, out, head, encode, workers):
        """Tell size, disk space and time, from the first batch. Raises `UserError` when the disk is too small."""
        source, started = self.source, time.monotonic()
        tokens = len(encode(head.texts))
        pace = (time.monotonic() - started) / max(1, tokens) / workers
        expected = self._expected(self.position + tokens, head.done)
        left = max(0, expected - sum(entry["tokens"] for entry in self.manifest["files"].values()))
        needed, free, download = 2 * left, shutil.disk_usage(out).free, 0
        if source.remote:
            needed += 2 * max(file.size for file in source.files)  # the one in use and the one being fetched
            download = head.done * (expected / max(1, self.position + tokens) - 1)
        print(f"{source.title}: {len(source.files)} files, {_gigabytes(source.size)}; about {expected:,.0f} tokens -> "
              f"{-(-expected // self.manifest['shard_size']):,} shards, {_gigabytes(2 * expected)} in {out} "
              f"({_gigabytes(free)} free); about {_duration(pace * left)} on {workers} threads"
              + (f" and the download of {_gigabytes(download)}" if download > 0 else ""), flush=True)
        _check_room(out, 0.9 * needed, free)  # an estimate gets the benefit of the doubt

    def _expected(self, position, done):
        """Tokens when all is read (or `max_shards` are written), from `position` tokens in `done` bytes."""
        tokens = round(position / max(done, 1) * self.source.size)
        return tokens if self.max_shards is None else min(tokens, self.max_shards * self.manifest["shard_size"])

    def watch(self, tokenized):
        """Pass (batch, tokens) through and show how far they are."""
        from tqdm import tqdm

        size, first, text = self.manifest["shard_size"], self.position, 0
        told = started = time.monotonic()
        with tqdm(unit=" tokens", unit_scale=True, initial=first, disable=None, dynamic_ncols=True) as bar:
            for batch, tokens in tokenized:
                self.position += len(tokens)
                text += batch.size
                expected, seconds = self._expected(self.position, batch.done), time.monotonic() - started
                self.manifest["expected_shards"] = shards = -(-expected // size)
                state = f"{text / seconds / 1e6:.0f} MB/s, shard {self.position // size + 1:,} of {shards:,}"
                bar.total = expected
                bar.set_postfix_str(state, refresh=False)
                bar.update(len(tokens))
                if bar.disable and time.monotonic() - told > 10:
                    told = time.monotonic()
                    left = seconds * (expected - self.position) / max(1, self.position - first)
                    print(f"{self.position:,} tokens, {state}, {_duration(left)} left", flush=True)
                yield batch, tokens


def _gigabytes(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------
# Data for the trainer
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


def shards_there(manifest):
    """How far a folder of shards has come, in words."""
    expected = manifest.get("expected_shards") or "an unknown number of"
    return f"{len(manifest['files'])} of {expected} shards are there"


def prepare_text(path, cache_dir, held_out=0.1):
    """A folder of shards made from the raw text at `path` (a file of `TEXT_SUFFIXES` or a folder of them).

    The folder lies in `cache_dir`, is keyed by the text's hash, made once and never seen half-made. The last `held_out`
    of the tokens are the validation shard, the rest are the train shards; with `held_out=0` there are train shards
    only. A `.txt` file is one document. Raises `UserError` when the text is damaged, not UTF-8 or too short.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out is {held_out}, but the share kept for validation is at least 0 and below 1")
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: give a file or folder of {', '.join(TEXT_SUFFIXES)}")
    source, cache = local_source([path]), Path(cache_dir)
    contents = [(file.where.suffix, sha256(file.where)) for file in source.files]
    key = hashlib.sha256(json.dumps([1, held_out, source.name, contents]).encode()).hexdigest()[:16]
    final = cache / f"{source.name}-{key}"
    if _is_prepared(final):
        return final
    making = cache / f".{final.name}.{uuid.uuid4().hex}"
    try:
        making.mkdir(parents=True)
        _split_text(path, source, making, held_out)
        if final.exists() and not _is_prepared(final):
            shutil.rmtree(final)
        try:
            making.rename(final)
        except OSError:
            if not _is_prepared(final):  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return final


def _is_prepared(folder):
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    return manifest is not None and all(_is_whole(folder / name, entry) for name, entry in manifest["files"].items())


def _split_text(path, source, folder, held_out):
    """Write the shards and the manifest of `prepare_text` into `folder`."""
    head, batches = _peeked(_batches(source))
    encode = _encoder(head[0].texts if head else [], source.size)
    manifest = _new_manifest(source.title, source.revision, source.name, SHARD_SIZE)
    stream = folder / "tokens"  # on disk, because the split is known only at the end
    with _disk_full_explained(stream), open(stream, "wb") as file:
        for batch, tokens in _tokenized(batches, encode, _cores()):
            file.write(tokens)
            manifest["documents"] += batch.documents
            manifest["skipped"] += batch.skipped
    count = stream.stat().st_size // 2
    held = int(count * held_out)
    if count - held < 2 or (held_out and held < 2):
        raise UserError(f"{path} holds {count} tokens, {held} of them for validation: too few, both parts need at "
                        "least 2. Give a longer text")
    tokens = np.memmap(stream, np.uint16, "r")
    parts = [(0, count - held, count)] if held_out else []
    for index, begin in enumerate(range(0, count - held, SHARD_SIZE), 1):
        parts.append((index, begin, min(begin + SHARD_SIZE, count - held)))
    for index, begin, end in parts:
        name = shard_name(source.name, index)
        manifest["files"][name] = _write_npy(folder / name, [tokens[begin:end]])
    del tokens  # Windows deletes no mapped file
    stream.unlink()
    manifest |= {"complete": True, "expected_shards": len(manifest["files"]), "held_out": held_out}
    _save_manifest(folder, manifest)


