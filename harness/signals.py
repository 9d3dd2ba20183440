"""What stops a process: signals that are noted, so that the run is saved first, or that end it at once."""

import contextlib
import os
import signal
import sys
import threading

from tqdm import tqdm

from harness.cli import say_now

# SIGUSR1, SIGUSR2: schedulers' warnings before the time is over; SIGXCPU: the CPU time of `ulimit -t` is.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Stopped(Exception):
    """A stop signal has reached some rank; raised on all ranks at the same place. `str` names the signal."""

    def __init__(self, number):
        super().__init__(signal_name(number))
        self.signal = number


def signal_name(number):
    """How users know a signal: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def handling(handler):
    """Context in which `handler(number, frame)` gets the stop signals."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    caught = list(STOP_SIGNALS)
    # nohup ignores SIGHUP. subtle: torchrun takes it nevertheless and then kills ranks that do not leave.
    hup = getattr(signal, "SIGHUP", None)
    if hup and signal.getsignal(hup) is signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ:
        caught.remove(hup)
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def counting_seconds(doing, rank):
    """On rank 0's terminal, count the seconds that `doing` takes: a minute without a word looks like a hang."""
    if rank or not sys.stderr.isatty():  # subtle: a bar that is hidden leaves tqdm's monitor thread behind, too
        yield
        return
    done = threading.Event()

    def tick():
        while not done.wait(1):
            bar.refresh()

    with tqdm(bar_format=f"{doing}: {{elapsed}}", leave=False) as bar:
        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


class Signals:
    """The stop signals that reach this process, of which rank 0 tells the user."""

    rank = 0
    signal = 0  # the first that was noted

    def catch_signals(self):
        """Context that notes the stop signals which arrive, for `raise_if_stopped`; a second Ctrl-C leaves at once."""
        received = []

        def note(number, frame):
            if number == signal.SIGINT and number in received:
                say_now("left at once; what is not in a checkpoint is lost")
                os._exit(128 + number)
            if not received and self.rank == 0:
                text = "stopping after this step, saving"
                ctrl_c = number == signal.SIGINT
                say_now(f"{text}; Ctrl-C again leaves at once" if ctrl_c else f"{signal_name(number)}: {text}")
            received.append(number)
            self.signal = received[0]

        return handling(note)

    @contextlib.contextmanager
    def interruptible(self, doing):
        """Context in which a stop signal ends the process at once, since there is nothing to save; `doing`: what.

        subtle: KeyboardInterrupt would not do while torch compiles. The terminal sends SIGINT to the C++ compiler too,
        whose failure is then what the user sees, and some of torch's imports swallow the exception.
        """
        def leave(number, frame=None):
            if self.rank == 0:
                say_now(f"interrupted while {doing}; nothing to save; the same command starts again")
            os._exit(128 + number)

        if self.signal:  # noted just before
            leave(self.signal)
        with handling(leave), counting_seconds(doing, self.rank):
            yield
