"""Signs of life of a run's ranks: every rank counts in a key of the group's store and reads the others' counts.

Work may take hours, silence may not. A process that is frozen, or on a machine that lost its network, ends the others
after `dist_timeout`. Not noticed: a main thread that hangs while its process lives, since this thread goes on beating.
Taken for silence: a process whose interpreter is blocked for longer than `dist_timeout` by one call into C that does
not release its lock.
"""

import contextlib
import itertools
import threading
import time
from datetime import timedelta

from harness.signals import signal_name

STOP_PATIENCE = 10.0  # seconds that a rank which is asked to stop waits for a silent one
LEFT = "-1"  # the count of a rank that an error ended


class SilentRank(Exception):
    """A rank shows no sign of life, so nothing can be agreed on with it any more."""


class Heartbeat(threading.Thread):
    """Shows the other ranks that this process lives, and sees which of them do.

    `seen` has the counts of all ranks as they were read last; where they do not change, their ranks are silent.
    subtle: `multi_get` may never return, whatever its time limit, where the process that serves the store is frozen.
    So only this thread talks to the store, on a connection of its own, and `seen` then stands still for all ranks.
    """

    def __init__(self, store, ranks):
        super().__init__(name="heartbeat", daemon=True)
        self.ranks = ranks
        self.store = store.clone()
        self.store.set_timeout(timedelta(seconds=10))
        self.keys, self.key = [f"alive/{r}" for r in range(ranks.world_size)], f"alive/{ranks.rank}"
        self.pause = max(1.0, ranks.world_size / 64)  # seconds; 1,024 ranks read 64,000 counts a second
        self.seen = ["0"] * ranks.world_size
        self.left = False
        self.closed = threading.Event()
        self.store.set(self.key, "0")

    def run(self):
        for beat in itertools.count(1):
            with contextlib.suppress(RuntimeError):  # the store is gone or busy: `seen` shows it
                self.store.set(self.key, str(beat))
                self.seen = [count.decode() for count in self.store.multi_get(self.keys)]
            if self.closed.wait(self.pause):
                break
        if self.left:
            with contextlib.suppress(RuntimeError):
                self.store.set(self.key, LEFT)

    def close(self, left=False):
        """Stop beating; `left`: let the others know that an error ended this rank."""
        self.left = left
        self.closed.set()
        self.join(2)  # not longer: the store may never answer

    def wait(self, work):
        """Wait for an operation of the control group: hours if the others work so long, but not for a silent rank."""
        seen, silence = self.seen, [0.0] * len(self.keys)
        while not work.is_completed():
            began = time.monotonic()
            with contextlib.suppress(RuntimeError):  # it is not completed; if it failed, the last line raises why
                work.wait(timedelta(seconds=1))
            # subtle: 2 s a turn at most, or ranks that were all stopped for a while (Ctrl-Z) would give each other up
            passed = min(time.monotonic() - began, 2.0)
            before, seen = seen, self.seen
            silence = [seconds + passed if then == now else 0.0 for seconds, then, now in zip(silence, before, seen)]
            limit, number = self.ranks.dist_timeout, self.ranks.signal
            patience = min(limit, STOP_PATIENCE) if number else limit
            if max(silence) > patience + 3 * self.pause:
                silent = ", ".join(str(rank) for rank, seconds in enumerate(silence) if seconds == max(silence))
                asked = f", {signal_name(number)} while waiting" if number else ""
                raise SilentRank(f"no sign of life from rank {silent} for {max(silence):.0f} s "
                                 f"(--dist_timeout {limit:g} s{asked}); all of them: rank 0's machine")
        work.wait()

    def lost_another(self):
        """Whether another rank was ended by an error or is dead or frozen; six beats show that none is.

        All six are waited for, so that several ranks that fail at the same time see one another alive meanwhile.
        """
        before = self.seen
        for _ in range(6):
            if LEFT in self.seen:
                return True
            time.sleep(self.pause)
        # subtle: one beat of a dead rank, two with bad luck, are younger than what was read of it last
        return any(int(now) - int(then) < 3 for then, now in zip(before, self.seen))
