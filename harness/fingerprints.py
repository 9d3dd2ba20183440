"""Whether data is what it was: fingerprints of shards compared, and the SHA-256 of whole files found in the background.

`Shards.fingerprint` makes them from sizes and both ends of the files, at once. The hash of everything comes later, and
it decides: names, times and ends only save time.
"""

import hashlib
import json
import threading
import time
from contextlib import suppress
from pathlib import Path

from harness.cli import UserError
from harness.files import atomic_file, in_background, read_json
from harness.shards import identity

CLOCK_TICK = 50_000_000  # ns; file systems count time in steps of some ms
HASH_CHUNK = 1 << 20  # bytes between two looks at whether the run has ended; some 2 ms of hashing


def compare_fingerprints(saved, now):
    """None if two fingerprints of a split are of the same contents in the same order, else what differs, in words.

    Entries are [name, tokens, CRC-32 of both ends] or the same with the SHA-256 of the file as a fourth value. It is
    compared where both have it: checkpoints of older versions, and those written before it was known, have none. Names
    do not count: data may be renamed.
    """
    def same(a, b):
        return a[1:3] == b[1:3] and (len(a) < 4 or len(b) < 4 or a[3] == b[3])

    if len(saved) == len(now) and all(map(same, saved, now)):
        return None
    gone = {entry[0]: entry for entry in saved if not any(same(entry, other) for other in now)}
    new = {entry[0]: entry for entry in now if not any(same(entry, other) for other in saved)}
    if changed := gone.keys() & new.keys():
        return f"{min(changed)} has other contents"
    if gone:
        return f"{min(gone)} is missing"
    return f"{min(new)} is new" if new else "the shards are in another order"


def contents_sha256(fingerprint):
    """A SHA-256 of all contents of a split, whatever its files are called; None while that of a file is not known."""
    if fingerprint is None or any(len(entry) < 4 for entry in fingerprint):
        return None
    return hashlib.sha256(repr([entry[3] for entry in fingerprint]).encode()).hexdigest()


def start_hashing(run, saved, cleanup):
    """The `BackgroundHashes` of a run's data, on rank 0; `cleanup`, an `ExitStack`, closes them. `saved` as there: with
    it all ranks wait up to 10 s for the comparison, so that most changes end a resume before its first update."""
    hashes = None
    if run.rt.rank == 0:
        splits = {"train": run.loader.shards, "val": run.val_shards}
        hashes = BackgroundHashes(splits, run.cfg.cache_dir, saved)
        cleanup.callback(hashes.close)
    if saved:
        run.rt.on_rank0(BackgroundHashes.wait, hashes, 10)
    return hashes


class BackgroundHashes:
    """Fingerprints with the SHA-256 of every file, computed in a thread, since 20 GB take 15 s of a core and more.

    `splits` is {"train": Shards, "val": Shards or None}, `saved` the fingerprints by split in the checkpoint that a
    run resumes from. A SHA-256 is not computed again while `shard_hashes.json` in `cache_dir` has it beside the file's
    size, times and inode, which no change leaves as they are: the time of the last change of an inode cannot be set.
    Meant for rank 0 alone. Close it before the `Shards`, whose open files it reads.
    """

    def __init__(self, splits, cache_dir, saved=None):
        self._splits, self._saved, self._closing = splits, saved or {}, threading.Event()
        self._cache_file = Path(cache_dir) / "shard_hashes.json"
        self._unknown = self._look_up()
        self._result = in_background(self._fingerprints, name="hashes")

    def error(self):
        """The `UserError` of `wait`, None if there is none."""
        return self._result.exception() if self._result.done() else None

    def wait(self, seconds):
        """{split: [[name, tokens, CRC-32, SHA-256]] or None}, or None where that is not known after `seconds`.

        Raises `UserError` if the data is not what `saved` says, if a file changed since it was opened, or if it cannot
        be read.
        """
        with suppress(TimeoutError):
            return self._result.result(seconds)
        return None

    def for_checkpoint(self):
        """The fingerprints that a checkpoint stores now, by split. Errors as in `wait`.

        Without the SHA-256 while it is computed. A resumed run then passes on those of its checkpoint, which have
        agreed as far as was compared: the next resume has them to compare with, should this one end first. So it
        always does with those of a split that is not open.
        """
        return self.wait(0) or {split: self._saved.get(split) or (shards and shards.fingerprint())
                                for split, shards in self._splits.items()}

    def close(self):
        """End the thread within milliseconds; what it has computed is kept in the cache."""
        self._closing.set()
        with suppress(UserError):  # for `wait`
            self._result.result()

    def _look_up(self):
        """Fill in what is known; returns [(shards, file, its key in the cache)] of the other files."""
        unknown, cache = {}, _read(self._cache_file)
        for shards in self._splits.values():
            for file in shards.files if shards else ():
                stat = shards.stats[file]
                key = [*identity(stat)[1:], stat.st_ctime_ns]
                known = cache.get(str(file.absolute()))
                if isinstance(known, list) and known[:-1] == key and isinstance(known[-1], str):
                    shards.sha256[file] = known[-1]
                else:
                    unknown[file] = (shards, file, key)
        return list(unknown.values())

    def _fingerprints(self):
        computed = {}
        for shards, file, key in self._unknown:
            started, digest = time.time_ns(), hashlib.sha256()
            for start in range(0, shards.stats[file].st_size, HASH_CHUNK):
                if self._closing.is_set():
                    break
                digest.update(shards.read_at(file, start, min(HASH_CHUNK, shards.stats[file].st_size - start)))
            if self._closing.is_set():
                break
            for split in filter(None, self._splits.values()):  # a file may be of both
                if file in split.stats:
                    split.sha256[file] = digest.hexdigest()
            if key[-1] < started - CLOCK_TICK:  # else a later change could bear the same time
                computed[str(file.absolute())] = [*key, digest.hexdigest()]
        if computed:
            with suppress(OSError), atomic_file(self._cache_file, "w", encoding="utf-8") as file:  # it only saves time
                json.dump(_read(self._cache_file) | computed, file, indent=0)
        if self._closing.is_set():
            return None
        known = {split: self._saved.get(split) for split in self._splits}  # also of a split that is not open now
        for split, shards in self._splits.items():
            if shards is None:
                continue
            known[split] = [[*entry, shards.sha256[file]] for entry, file in zip(shards.fingerprint(), shards.files)]
            saved = self._saved.get(split)
            if saved and (difference := compare_fingerprints(saved, known[split])):
                raise UserError(f"the {split} data is not what the checkpoint was trained with: {difference}; restore "
                                "it, or start a new run")
        return known


def _read(path):
    """The dictionary in a JSON file, an empty one where there is none."""
    with suppress(UserError):
        return read_json(path) or {}
    return {}
