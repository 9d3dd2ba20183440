"""Token shards on disk: found in a folder, checked by header and size, and their sequences read by number.

Three formats of GPT-2 tokens, all little-endian uint16: `.npy` as fineweb.py writes it, llm.c's `.bin` with its header,
nanoGPT's headerless `.bin`. Nothing here knows ranks, batches or the order of a run.
"""

import contextlib
import os
import re
import threading
import tokenize
import zlib
from pathlib import Path

import numpy as np

from harness.cli import UserError
from harness.tokenizer import VOCAB_SIZE

SHARD_SUFFIXES, TEXT_SUFFIXES = (".npy", ".bin"), (".txt", ".jsonl", ".jsonl.gz", ".parquet")
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # llm.c: 256 int32 of header, the third counts the tokens


def kind_of_data(path, flag="--data"):
    """"shards" or "text" by what lies at `path`; `UserError`, which names the `flag`, where nothing usable does."""
    path = Path(path)
    if not os.path.exists(path):  # for any text; Path.exists fails on one too long for a name
        raise UserError(f"{flag} {path} is not there: give a folder of shards, a shard, .txt, .jsonl or .parquet; "
                        "`python fineweb.py` makes edu_fineweb10B")
    names = [p.name for p in sorted(path.iterdir())] if path.is_dir() else [path.name]
    for kind, suffixes in (("shards", SHARD_SUFFIXES), ("text", TEXT_SUFFIXES)):
        if any(name.endswith(suffixes) for name in names):
            return kind
    raise UserError(f"{flag} {path} holds none of {', '.join(SHARD_SUFFIXES + TEXT_SUFFIXES)}: give one of these; "
                    "`python fineweb.py` fills edu_fineweb10B")


def find_shards(path, split, whole=False):
    """[(file, offset in bytes, tokens)] of a split ("train" or "val") of a folder of shards or a single shard.

    A single shard gives its last tenth to validation. `whole`: all there is belongs to the split, as with
    --val_data, or a shard that has validation data beside it.
    """
    path = Path(path)
    if path.is_file():
        file, offset, tokens = open_shard(path)
        held_out = 0 if whole else tokens // 10
        parts = {"train": (file, offset, tokens - held_out), "val": (file, offset + 2 * (tokens - held_out), held_out)}
        return [parts["train" if whole else split]]
    files = sorted(p for p in path.iterdir() if p.suffix in SHARD_SUFFIXES and not p.name.startswith("."))
    of_split = [p for p in files if re.search(rf"(^|_){split}[_.]", p.name)]
    files = (of_split or files) if whole else of_split
    if not files:
        raise UserError(f"{path} has no {split} shards (*_{split}_*.npy or .bin): give --val_data, "
                        "or make the folder with fineweb.py")
    return [open_shard(file) for file in files]


def open_shard(file):
    """(file, offset in bytes, tokens) of a shard after a look at its header and size; its tokens are not read."""
    try:
        f, file, size = open(file, "rb"), Path(file), Path(file).stat().st_size  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): restore it, or take it away") from None
    with f:
        if file.suffix == ".npy":
            try:
                shape, _, dtype = {(1, 0): np.lib.format.read_array_header_1_0,
                                   (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(f)](f)
            except (ValueError, LookupError, TypeError, EOFError, SyntaxError, MemoryError, RecursionError,
                    tokenize.TokenError) as error:  # NumPy lets out what its parsers raise
                raise UserError(f"{file} is no .npy file ({str(error)[:100]}): make it again") from None
            if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 0:
                raise UserError(f"{file} holds {dtype} of shape {shape}: a shard is one-dimensional uint16")
            offset, tokens = f.tell(), shape[0]
        else:
            header = np.frombuffer(f.read(LLMC_HEADER), np.uint8)
            head = header[: len(header) // 4 * 4].view("<i4")
            offset, tokens = 0, size // 2  # nanoGPT's file: tokens and nothing else
            if len(head) == 256 and head[0] == LLMC_MAGIC:
                if head[1] != 1:
                    raise UserError(f"{file} is of llm.c's version {head[1]}: version 1 (uint16, GPT-2) can be read")
                offset, tokens = LLMC_HEADER, int(head[2])
    if size != offset + 2 * tokens:
        raise UserError(f"{file} has {size} bytes, {offset + 2 * tokens} were due for {tokens} tokens: it is torn; "
                        "fetch or make it again (`python fineweb.py --verify` checks a folder)")
    return file, offset, tokens


class Shards:
    """The sequences of one split, numbered 0..len-1 in shard order; sequence i of a shard starts at its token i T.

    Read by position on kept handles, never mapped, so that memory does not grow with what was read.
    """

    def __init__(self, parts, T, vocab_size=VOCAB_SIZE):
        self.parts, self.T, self.vocab_size = parts, T, vocab_size
        counts = [max(0, tokens - 1) // T for _, _, tokens in parts]  # a sequence needs T + 1 tokens
        self.ends = np.cumsum(counts)
        self.tokens = sum(tokens for _, _, tokens in parts)
        if not len(self):
            raise UserError(f"{parts[0][0]} has {self.tokens} tokens, too few for one sequence of {T} + 1: "
                            "give more data or a smaller --seq_len")
        self._handles, self._lock = {}, threading.Lock()
        raise_file_limit(len(parts))

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """[name, tokens, CRC-32 of the first and last 64 KiB] a file: runs that agree in it read the same data."""
        marks = []
        for file, offset, tokens in self.parts:
            size = min(2 * tokens, 65536)
            ends = self._read_at(file, offset, size) + self._read_at(file, offset + 2 * tokens - size, size)
            marks.append([file.name, tokens, zlib.crc32(ends)])
        return marks

    def read(self, ids):
        """Sequences `ids` with the token that follows each: (len(ids), T + 1) uint16."""
        rows = np.empty((len(ids), self.T + 1), np.uint16)
        for row, i in zip(rows, ids):
            part = int(np.searchsorted(self.ends, i, side="right"))
            first = int(i) - (int(self.ends[part - 1]) if part else 0)
            file, offset, _ = self.parts[part]
            data = self._read_at(file, offset + 2 * first * self.T, row.nbytes)
            if len(data) != row.nbytes:
                raise UserError(f"{file} got shorter while it was read: restore it and go on with --resume")
            row[:] = np.frombuffer(data, "<u2")
            if row.max() >= self.vocab_size:
                raise UserError(f"{file} holds token {row.max()} in sequence {i}; ids end at {self.vocab_size - 1}: "
                                "it is no GPT-2 data, or damaged (`python fineweb.py --verify`)")
        return rows

    def _read_at(self, file, offset, size):
        with self._lock:
            if file not in self._handles:
                self._handles[file] = open(file, "rb", buffering=0)  # noqa: SIM115 (kept for the run)
            handle = self._handles[file]
            if not hasattr(os, "pread"):  # Windows
                handle.seek(offset)
                return handle.read(size)
        return os.pread(handle.fileno(), size, offset)

    def close(self):
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


def raise_file_limit(files):
    """Allow so many open files besides a few hundred others; systems start at 256 or 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < files + 512:
            wanted = files + 512 if hard < 0 else min(files + 512, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def derive_seed(*numbers):
    """A 63-bit seed from whole numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sequence_ids(n, position, count, seed):
    """Sequences that positions [position, position + count) of a run over n sequences read, an array.

    Position p reads sequence p mod n of epoch p // n, in the order that `seed` gives it, None: as it is stored.
    """
    positions = np.arange(position, position + count)
    if seed is None:
        return positions % n
    ids = np.empty(count, np.int64)
    for epoch in range(position // n, (position + count - 1) // n + 1):
        inside = positions // n == epoch
        ids[inside] = shuffled(seed, epoch, positions[inside] % n, n)
    return ids


def shuffled(seed, epoch, index, n):
    """The sequences at positions `index` (an array) of an epoch over n: a seeded bijection on 0..n-1.

    A Feistel network on the smallest even number of bits that holds n, with cycle walking: values
    that fall outside go through again (Black & Rogaway 2002). It needs no memory, whatever n is.
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low = np.uint64(2 ** int(half) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)

    def permute(x):
        left, right = x >> half, x & low
        for key in keys:
            h = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as intended
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((h >> np.uint64(32)) & low)
        return left << half | right

    x = permute(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)
