"""Token shards on disk: found in a folder, checked by their headers, and read by sequence number.

Three formats of GPT-2 tokens, all little-endian uint16: `.npy` as fineweb.py writes it, llm.c's `.bin` with its
header, nanoGPT's headerless `.bin`. Nothing here knows about ranks, batches or the order of a run.
"""

import hashlib
import os
import re
import threading
import tokenize
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from harness.cli import UserError
from harness.files import refuse_lfs_pointer, sha256
from harness.folders import KINDS, SHARD_SUFFIXES, is_plain_text, text_kind, walk
from harness.tokenizer import VOCAB_SIZE

LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # llm.c: 256 int32 of header, the third of which counts the tokens
CONVERT = "convert its ids with numpy's a.ravel().astype('<u2') if all are below 65,536, or make it from the text again"
END_BYTES = 65536  # read at each end of a shard: for the fingerprint, and to see whether it holds tokens at all

# --- finding ---


def kind_of_data(path, flag="--data", cache_dir=None):
    """"shards" or "text", whichever `path` holds. Raises `UserError`, which names the `flag`, if it is neither.

    Text beside shards that say which split they are, as nanoGPT keeps input.txt beside train.bin, is not read.
    """
    path = Path(path)
    if not os.path.exists(path):  # accepts any string; Path.exists raises for one that is too long for a file name
        raise UserError(f"{flag} {path} is not there: give a folder of shards, a shard, or {KINDS}; "
                        "`python fineweb.py` makes edu_fineweb10B")
    if path.is_dir():
        texts, shard_files, _ = walk(path, [cache_dir] if cache_dir else [])
    else:
        texts, shard_files = [path] * bool(text_kind(path)), [path] * (path.suffix in SHARD_SUFFIXES)
    if texts and shard_files and not any(split_of(file.name) for file in shard_files if file.parent == path):
        raise UserError(f"{flag} {path} holds text ({texts[0]}) and shards ({shard_files[0]}): move the one away that "
                        "you do not mean, or give the other alone")
    if shard_files:
        return "shards"
    if texts:
        return "text"
    raise UserError(f"{flag} {path} holds none of {', '.join(SHARD_SUFFIXES)}, {KINDS}: give one of these, or rename "
                    "plain text to .txt; `python fineweb.py` fills edu_fineweb10B")


def shards_below(folder):
    """The shards directly in `folder`, or in its subfolders if there are none, in the order of their paths."""
    found = walk(folder).shards
    # a subfolder beside shards is somebody's archive: it must not join the data of a run
    return [file for file in found if file.parent == Path(folder)] or found


def split_of(path):
    """"train", "val" or None: the last of these words in `path`, relative to the folder of the data, decides.

    The last, since what comes before is a name that the user chose: the validation shard of `train.txt` is called
    `train_val_000000.npy`. Subfolders count, so `val/000000.npy` is a validation shard.
    """
    words = re.findall(r"(?<![A-Za-z])(train|val)(?![A-Za-z])", Path(path).as_posix())
    return words[-1] if words else None


def find_shards(path, split, whole=False):
    """[(file, offset in bytes, tokens)] of a split ("train" or "val") of a folder of shards or a single shard.

    The last tenth of a single shard is its validation split. With `whole` everything belongs to the split: this is
    what --val_data names, or a shard that has validation data beside it.
    """
    path = Path(path)
    if path.is_file():
        file, offset, tokens = open_shard(path)
        val_tokens = 0 if whole else tokens // 10
        train_tokens = tokens - val_tokens
        if whole or split == "train":
            return [(file, offset, train_tokens)]
        return [(file, offset + 2 * train_tokens, val_tokens)]
    files = shards_below(path)
    of_split = [file for file in files if split_of(file.relative_to(path)) == split]
    if whole and not of_split:
        of_split = files
    if not of_split:
        other_way = "give --val_data" if split == "val" else "rename them"
        raise UserError(f"{path} has no {split} shards (*_{split}_*.npy or .bin): {other_way}, "
                        "or make the folder with fineweb.py")
    return [open_shard(file) for file in of_split]


# --- formats ---


def mask_of(file):
    """The path of a shard's mask: one bit per token (np.packbits), set where it counts as a target. Many have none."""
    return Path(file).with_suffix(".mask")


def open_shard(file):
    """(file, offset in bytes, tokens) of a shard, from its header, its size and a look at its first 64 KiB.

    Raises `UserError` for a file that is torn, cannot be read, or does not hold GPT-2 tokens.
    """
    file = Path(file)
    refuse_lfs_pointer(file)
    try:
        with open(file, "rb") as opened:
            size, head = os.fstat(opened.fileno()).st_size, opened.read(END_BYTES)
            opened.seek(0)
            offset, tokens = _npy_layout(file, opened) if file.suffix == ".npy" else _bin_layout(file, head, size)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): restore it or move it away") from None
    _check_vocabulary(file, np.frombuffer(head[offset : len(head) // 2 * 2], "<u2"))
    if size != offset + 2 * tokens:
        raise UserError(f"{file} has {size} bytes where {tokens} tokens need {offset + 2 * tokens}: it is torn; "
                        "fetch or make it again (`python fineweb.py --verify` checks a folder)")
    return file, offset, tokens


def _npy_layout(file, opened):
    """(offset, tokens) by the header of a NumPy file."""
    # subtle: 3.0 differs from 2.0 in the encoding of field names only, and an array of tokens has no fields
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
               (3, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(opened)](opened)
    except (ValueError, LookupError, TypeError, EOFError, SyntaxError, MemoryError, RecursionError,
            tokenize.TokenError) as error:  # NumPy passes on what its parsers raise
        raise UserError(f"{file} is no .npy file ({str(error)[:100]}): make it again") from None
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 0:
        raise UserError(f"{file} holds {dtype} of shape {shape}, and a shard is one-dimensional uint16: {CONVERT}")
    return opened.tell(), shape[0]


def _bin_layout(file, head, size):
    """(offset, tokens) of llm.c's file by its header, or of nanoGPT's, which is tokens and nothing else."""
    header = np.frombuffer(head[: min(LLMC_HEADER, len(head) // 4 * 4)], "<i4")
    if len(header) == 256 and header[0] == LLMC_MAGIC:
        if header[1] != 1:
            raise UserError(f"{file} is of llm.c's version {header[1]}: version 1 (uint16, GPT-2) can be read")
        return LLMC_HEADER, int(header[2])
    _check_headerless(file, head)
    return 0, size // 2


def _check_headerless(file, head):
    """Raise `UserError` if the first bytes of a headerless `.bin` cannot be GPT-2's tokens in uint16.

    Any bytes can be read as uint16, and the loss falls nicely on most of them. Where this check is wrong about a
    file, its tokens can be saved as `.npy`, whose header states the dtype.
    """
    ids = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    if len(head) >= 256 and is_plain_text(file):
        raise UserError(f"{file} holds plain text, not tokens: rename it to .txt")
    # ids of 32 bits have 0 in their upper half, or up to 3 where the vocabulary is larger than 65,536
    if len(ids) >= 64 and ids[1::2].max() < 4 <= ids[::2].max():
        raise UserError(f"{file} holds ids of 32 or 64 bits, not uint16: {CONVERT}; if it does hold uint16, save it as "
                        ".npy, whose header says so")


def _check_vocabulary(file, ids):
    """Raise `UserError` if the first ids of a file are those of characters.

    nanoGPT writes meta.pkl for character-level data only. One in ten of GPT-2's tokens has an id above 10,000, and no
    character-level vocabulary is that large.
    """
    meta = [folder / "meta.pkl" for folder in (file.parent, file.parent.parent) if (folder / "meta.pkl").exists()]
    if len(ids) and ids.max() < 10000 and meta:
        raise UserError(f"{file} holds ids up to {ids.max()}, and there is {meta[0]}: these are nanoGPT's "
                        "character-level ids, not GPT-2 tokens: give the text itself (input.txt), or move meta.pkl "
                        "away if they are GPT-2's")


# --- reading ---


class Shards:
    """The sequences of one split, numbered 0..len-1 in shard order; sequence i of a shard starts at its token i T.

    Files are opened at once and stay open: replacing or deleting one later does no harm, and changing one in place
    is noticed at the next read. Read by position and never mapped, so memory does not grow with what was read.
    `masked`: whether the masks beside shards say which targets count; else all do. `most`: only so many sequences.
    """

    def __init__(self, shard_files, T, vocab_size=VOCAB_SIZE, with_tail=False, masked=True, most=None):
        self.shard_files, self.T, self.vocab_size, self.with_tail = shard_files, T, vocab_size, with_tail
        # a sequence needs T + 1 tokens, or with `with_tail` 2, the last of a shard
        counts = [max(0, tokens - 1 + with_tail * (T - 1)) // T for _, _, tokens in shard_files]
        self.ends = np.cumsum(counts)
        self.is_whole = most is None or max(1, most) >= self.ends[-1]
        if not self.is_whole:
            self.ends = self.ends.clip(max=max(1, most))
        self.tokens = sum(tokens for _, _, tokens in shard_files)
        if not len(self):
            raise UserError(f"{shard_files[0][0]} has {self.tokens} tokens, too few for one sequence of {T} + 1: "
                            "give more data or a smaller --seq_len")
        self.masks = {}  # {file: (its mask, the bit of its first token)}
        for file, offset, _ in shard_files if masked else ():
            if (mask := mask_of(file)).is_file():
                _, begin, tokens = open_shard(file)
                if mask.stat().st_size != -(-tokens // 8):
                    raise UserError(f"{mask} has {mask.stat().st_size} bytes where {tokens} tokens need "
                                    f"{-(-tokens // 8)}: it is torn or of another shard; make both again")
                self.masks[file] = mask, (offset - begin) // 2
        self.masked = bool(self.masks)
        self.files = [file for file, _, _ in shard_files] + [mask for mask, _ in self.masks.values()]
        self.stats = {}  # {file: os.stat_result} when it was opened
        self.sha256 = {}  # {file: SHA-256}, where harness/fingerprints.py has found it
        self._handles, self._lock, self._text_sha256 = {}, threading.Lock(), None
        allow_open_files(len(self.files))
        for file in self.files:
            try:
                self._handles[file] = open(file, "rb", buffering=0)  # noqa: SIM115 (stays open)
            except OSError as error:
                raise _unreadable(file, error) from None
            self.stats[file] = os.fstat(self._handles[file].fileno())

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """[[name, tokens, CRC-32 of the first and last 64 KiB]] of `files`; see harness/fingerprints.py."""
        entries, parts = [], [(file, offset, 2 * tokens, tokens) for file, offset, tokens in self.shard_files]
        parts += [(mask, 0, self.stats[mask].st_size, self.stats[mask].st_size) for mask, _ in self.masks.values()]
        for file, offset, length, tokens in parts:
            size = min(length, END_BYTES)
            ends = self.read_at(file, offset, size) + self.read_at(file, offset + length - size, size)
            entries.append([file.name, tokens, zlib.crc32(ends)])
        return entries

    def _where(self, i):
        """(shard, first token, tokens) of sequence `i`, the token that follows it included."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        first = self.T * (int(i) - (int(self.ends[shard - 1]) if shard else 0))
        return shard, first, min(self.T + 1, self.shard_files[shard][2] - first)

    def targets(self, i):
        """How many of sequence `i`'s T targets there are; fewer than T in a shard's tail, see `with_tail`."""
        return self._where(i)[2] - 1

    def read(self, ids):
        """Sequences `ids` with the token that follows each: (len(ids), T + 1) uint16; 0 behind a tail."""
        sequences = np.zeros((len(ids), self.T + 1), np.uint16)
        for sequence, i in zip(sequences, ids):
            shard, first, tokens = self._where(i)
            file, offset, _ = self.shard_files[shard]
            sequence[:tokens] = np.frombuffer(self.read_at(file, offset + 2 * first, 2 * tokens), "<u2")
            if sequence.max() >= self.vocab_size:
                raise UserError(f"{file} holds token {sequence.max()} in sequence {i}, and ids end at "
                                f"{self.vocab_size - 1}: it is not GPT-2 data, or it is damaged "
                                "(`python fineweb.py --verify` finds out)")
        return sequences

    def counted(self, ids):
        """Which targets of sequences `ids` count, (len(ids), T) bool: those that a mask has, none behind a tail."""
        if not (self.masked or self.with_tail):
            return np.ones((len(ids), self.T), bool)
        counted = np.zeros((len(ids), self.T), bool)
        for row, i in zip(counted, ids):
            shard, first, tokens = self._where(i)
            mask, bit = self.masks.get(self.shard_files[shard][0], (None, 0))
            row[: tokens - 1] = True
            if mask:
                begin = bit + first + 1  # targets are one token further
                size = (begin + tokens + 6) // 8 - begin // 8
                bits = np.unpackbits(np.frombuffer(self.read_at(mask, begin // 8, size), np.uint8))
                row[: tokens - 1] = bits[begin % 8 :][: tokens - 1]
        return counted

    def text(self, tokenizer):
        """The text of all tokens, in bytes."""
        parts = [self.read_at(file, offset, 2 * tokens) for file, offset, tokens in self.shard_files]
        ids = np.frombuffer(b"".join(parts), "<u2")
        return b"".join([tokenizer.texts[id] for id in ids[ids < tokenizer.size].tolist()])

    def text_sha256(self, tokenizer):
        """SHA-256 of the text of all targets that count, by which a validation is known."""
        if self._text_sha256 is None:
            digest = hashlib.sha256()
            for i in range(len(self)):
                ids = self.read([i])[:, 1:][self.counted([i])]
                digest.update(b"".join([tokenizer.texts[id] for id in ids.tolist()]))
            self._text_sha256 = digest.hexdigest()
        return self._text_sha256

    def read_at(self, file, offset, size):
        """`size` bytes of `file` from `offset` on; `UserError` if it changed since it was first opened."""
        handle = self._handles[file]
        try:
            if hasattr(os, "pread"):
                data = os.pread(handle.fileno(), size, offset)
            else:  # Windows
                with self._lock:
                    handle.seek(offset)
                    data = handle.read(size)
            # subtle: looked at after the read, so that a change in between is noticed too
            now = os.fstat(handle.fileno())
        except OSError as error:
            raise _unreadable(file, error) from None
        if len(data) != size:
            raise UserError(f"{file} got shorter while it was in use: restore it and continue with --resume")
        if identity(now) != identity(self.stats[file]):  # its contents decide
            with suppress(OSError):
                if self.sha256.get(file) == sha256(file):
                    self.stats[file] = now
                    return data
            raise UserError(f"{file} changed while it was in use: restore it and continue with --resume, which also "
                            "accepts it if only its time changed")
        return data

    def close(self):
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


def _unreadable(file, error):
    return UserError(f"{file} cannot be read ({error.strerror}): restore it, or raise the number of open files "
                     "(`ulimit -n`); an interrupted run continues with --resume")


def identity(stat):
    """What stays the same of an open or reopened file while nobody writes to it."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def allow_open_files(count):
    """Raise this process's limit on open files for a split of `count`, as far as it can be.

    512 are left for everything else, and train and validation share the rest. Systems start at 256 or 1,024.
    """
    with suppress(ImportError, ValueError, OSError):  # Windows; macOS, which has a lower maximum than the hard limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * count + 512
        if soft != resource.RLIM_INFINITY and soft < needed:
            most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# --- the order of the data ---


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
