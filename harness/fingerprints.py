"""Whether data is what it was: fingerprints of shards compared, and the SHA-256 of whole files found in the background.

`Shards.fingerprint` makes them from sizes and both ends of the files, at once. The hash of everything comes later.
"""

import hashlib
import json
import re
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from harness.cli import UserError
from harness.files import atomic_file, read_json
from harness.shards import identity, split_of

HASH_CHUNK = 1 << 20  # bytes between two looks at whether the run has ended; some 2 ms of hashing


def compare_fingerprints(saved, now):
    """None if two fingerprints of a split agree, else what differs, in words.

    Entries are [name, tokens, CRC-32 of both ends] or the same with the SHA-256 of the file as a fourth value. It is
    compared where both have it: checkpoints of older versions, and those written before it was known, have none.
    """
    names_then, names_now = [entry[0] for entry in saved], [entry[0] for entry in now]
    splits = {split_of(name) for name in names_now} - {None}
    for name in names_then:
        if name not in names_now and splits and split_of(name) not in (None, *splits):
            return f"{name} belonged to it, which is a {split_of(name)} shard: an older version misread its name"
        if name not in names_now:
            return f"{name} is missing"
    for name in names_now:
        if name not in names_then:
            return f"{name} is new"
    if names_then != names_now:
        return "the shards are in another order"
    for (name, tokens_then, crc_then, *sha_then), (_, tokens_now, crc_now, *sha_now) in zip(saved, now):
        if tokens_then != tokens_now:
            return f"{name} has {tokens_now:,} tokens, not {tokens_then:,}"
        if crc_then != crc_now or (sha_then and sha_now and sha_then != sha_now):
            return f"{name} has other contents"
    return None


class BackgroundHashes:
    """Fingerprints with the SHA-256 of every file, computed by a daemon thread, since 20 GB take up to a minute.

    `splits` is {"train": Shards, "val": Shards or None}, `saved` the fingerprints by split in the checkpoint that a
    run resumes from. A SHA-256 that is known is not computed again: it is in the manifest of the folder, which counts
    if the file did not change since, or in `shard_hashes.json` in `cache_dir`. Meant for rank 0 alone. Close it
    before the `Shards`, whose open files it reads.
    """

    def __init__(self, splits, cache_dir, saved=None):
        self._splits, self._saved = splits, saved or {}
        self._cache_file = Path(cache_dir) / "shard_hashes.json"
        self._closing, self._result = threading.Event(), Future()
        self._found = {}  # {file: SHA-256}, computed or known
        self._thread = threading.Thread(target=self._run, name="hashes", daemon=True)
        self._unknown = self._look_up()
        if self._unknown:
            self._thread.start()
        else:
            self._run()

    def ready(self):
        """{split: [[name, tokens, CRC-32, SHA-256]] or None}, or None while it is computed.

        Raises `UserError` if the data is not what `saved` says, if a file changed since it was opened, or if it cannot
        be read.
        """
        return self._result.result() if self._result.done() else None

    def wait(self, seconds=None):
        """`ready()` as soon as it is known, but after at most `seconds`."""
        with suppress(TimeoutError):
            return self._result.result(seconds)
        return None

    def for_checkpoint(self):
        """The fingerprints that a checkpoint stores now, by split. Errors as in `ready`.

        Without the SHA-256 while it is computed. A resumed run then passes on those of its checkpoint, which have
        agreed as far as was compared: the next resume has them to compare with, should this one end first.
        """
        known = self.ready()
        if known is not None:
            return known
        return {split: shards and (self._saved.get(split) or shards.fingerprint())
                for split, shards in self._splits.items()}

    def close(self):
        """End the thread within milliseconds; what it has computed is kept in the cache."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look_up(self):
        """Fill in what is known; returns [(shards, file, its key in the cache)] of the other files."""
        unknown, manifests, cache = {}, {}, _read(self._cache_file)
        for shards in self._splits.values():
            for file, _, _ in shards.shard_files if shards else ():
                stat, folder = shards.stats[file], file.parent
                if folder not in manifests:
                    manifests[folder] = _manifest_hashes(folder)
                written, recorded = manifests[folder]
                # subtle: a file moved or copied here keeps an old time of change, but not an old ctime
                if file.name in recorded and max(stat.st_mtime_ns, stat.st_ctime_ns) <= written:
                    self._found[file] = recorded[file.name]
                    continue
                key = [*identity(stat)[1:], stat.st_ctime_ns]
                known = cache.get(str(file.absolute()))
                if isinstance(known, list) and known[:-1] == key and _is_sha256(known[-1]):
                    self._found[file] = known[-1]
                else:
                    unknown[file] = (shards, file, key)
        return list(unknown.values())

    def _run(self):
        try:
            self._result.set_result(self._fingerprints())
        except Exception as error:  # raised again in ready()
            self._result.set_exception(error)

    def _fingerprints(self):
        computed, saved_at = {}, time.monotonic()
        for shards, file, key in self._unknown:
            digest = self._hash(shards, file)
            if digest is None:
                break
            self._found[file] = digest
            computed[str(file.absolute())] = [*key, digest]
            if time.monotonic() - saved_at > 10:
                self._save(computed)
                saved_at = time.monotonic()
        if computed:
            self._save(computed)
        if self._closing.is_set():
            return None
        known = dict.fromkeys(self._splits)
        for split, shards in self._splits.items():
            if shards is None:
                continue
            known[split] = [[*entry, self._found[file]]
                            for entry, (file, _, _) in zip(shards.fingerprint(), shards.shard_files)]
            saved = self._saved.get(split)
            if saved and (difference := compare_fingerprints(saved, known[split])):
                raise UserError(f"the {split} data is not what the checkpoint was trained with: {difference}; restore "
                                "it, or start a new run")
        return known

    def _hash(self, shards, file):
        """SHA-256 of a file as the loader has it open; None if `close` was called."""
        digest, size = hashlib.sha256(), shards.stats[file].st_size
        for start in range(0, size, HASH_CHUNK):
            if self._closing.is_set():
                return None
            digest.update(shards.read_at(file, start, min(HASH_CHUNK, size - start)))
        return digest.hexdigest()

    def _save(self, computed):
        with suppress(OSError):  # a cache that cannot be written costs the next start its time, and nothing else
            entries = _read(self._cache_file) | computed
            with atomic_file(self._cache_file, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=0)


def _manifest_hashes(folder):
    """(time in ns at which the manifest of `folder` was written, {file name: SHA-256}); nothing without a manifest."""
    path = folder / "manifest.json"
    files = _read(path).get("files")
    try:
        written = path.stat().st_mtime_ns
    except OSError:
        return 0, {}
    entries = files.items() if isinstance(files, dict) else ()
    return written, {name: entry["sha256"] for name, entry in entries
                     if isinstance(entry, dict) and _is_sha256(entry.get("sha256"))}


def _read(path):
    """The dictionary in a JSON file, an empty one where there is none."""
    with suppress(UserError):
        return read_json(path) or {}
    return {}


def _is_sha256(value):
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
