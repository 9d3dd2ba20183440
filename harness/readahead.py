"""Batches of sequences, read in threads before they are asked for. Knows shards; no ranks, no devices."""

import time
from collections import deque

import numpy as np

from harness.threads import ThreadPool

ROWS = 16  # that one task reads
THREADS = 16  # tasks at a time, so that slow storage overlaps


class ReadAhead:
    """Reads batch after batch of `shards`, up to `ahead` of them in advance.

    `next_ids()` returns the sequences of the next batch to be read. `seconds` sums up waits for reads.
    """

    def __init__(self, shards, next_ids, ahead):
        self.shards, self.next_ids, self.ahead, self.seconds = shards, next_ids, ahead, 0.0
        self._reads = deque()
        self._pool = ThreadPool(THREADS, thread_name_prefix="loader")

    def _start(self, count):
        while len(self._reads) < count:
            ids = self.next_ids()
            parts = [ids[i : i + ROWS] for i in range(0, len(ids), ROWS)]
            self._reads.append([self._pool.submit(self._read, part) for part in parts])

    def _read(self, ids):
        return self.shards.read(ids), self.shards.counted(ids)

    def error(self, count):
        """The `UserError` of reading the next `count` batches, None if all of them are here."""
        self._start(count)
        started = time.perf_counter()
        errors = [part.exception() for parts in list(self._reads)[:count] for part in parts]
        self.seconds += time.perf_counter() - started
        return next(filter(None, errors), None)

    def next(self):
        """The next batch: tokens (B, T + 1) uint16, and which targets count, (B, T) bool.

        None if it could not be read; it stays where it is then, for `error`.
        """
        self._start(self.ahead + 1)
        if self.error(1):
            return None
        parts = [part.result() for part in self._reads.popleft()]
        tokens, counted = zip(*parts)
        return np.concatenate(tokens), np.concatenate(counted)

    def close(self):
        self._pool.shutdown(cancel_futures=True)
