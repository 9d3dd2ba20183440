"""Take away terminals, hang up and freeze ranks while runs go on, and see what becomes of the runs.

    python tests/scripts/terminals.py --times 10

    closed     the terminal goes without a signal (`& disown`): the run must finish, as one that nobody disturbed
    hangup     the terminal goes with SIGHUP: the run must save, leave with 129, and resume to the same end
    torchrun   the same with two ranks below torchrun
    nohup      the terminal goes with SIGHUP ignored: the run must finish
    frozen     SIGSTOP to a rank in a sample, in front of a save, or while it writes one: the other must leave with 1
               within --dist_timeout + 10 s, or with 143 on SIGTERM

POSIX only. Prints a line a case and returns 1 when anything was not as it must be.
"""

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402

PATIENCE, STEPS = 2, 40  # --dist_timeout; updates of a run
# where a rank freezes: (rank, what it calls, which call); and whether the other one gets SIGTERM then
FROZEN = {
    "rank 0 in a sample": (0, "write_samples", 1, False),
    "rank 1 in front of a save": (1, "checkpoint.save", 1, False),
    "rank 0 while it writes": (0, "checkpoint.write", 1, False),
    "rank 0 while it writes, SIGTERM": (0, "checkpoint.write", 1, True),
}


class Bench:
    """The data, and a run that nobody disturbed."""

    def __init__(self, work):
        self.work, self.numbers = Path(work), itertools.count()
        self.data = helpers.make_shards(self.work / "data")
        self.reference = self.new_folder()
        end = helpers.run_trainer(self.flags(self.reference))
        assert end.returncode == 0, end.stderr

    def new_folder(self):
        return self.work / f"log{next(self.numbers)}"

    def flags(self, log_dir, **changes):
        small = {"n_layer": 1, "n_embd": 8, "total_batch_size": 64, "micro_batch_size": 2, "max_steps": STEPS,
                 "val_every": 20, "val_tokens": 64, "save_minutes": 0}
        return helpers.tiny_flags(self.data, log_dir, **{**small, **changes})

    def disturb(self, launcher=(sys.executable,), session=True, ignore=None, **changes):
        """Start a run in a terminal, close it when the run is under way: (log folder, exit status)."""
        log_dir = self.new_folder()
        command = [*launcher, helpers.TRAINER, *self.flags(log_dir, **changes)]
        terminal = helpers.Terminal(command, session, cwd=self.work, ignore=ignore)
        log = log_dir / "log.txt"
        terminal.wait_until(lambda: log.exists() and log.read_text().count("train") >= 3)
        terminal.close()
        return log_dir, terminal.finish()

    def must_be_whole(self, log_dir):
        assert helpers.log_rows(log_dir) == helpers.log_rows(self.reference), "other rows"
        assert (log_dir / "hf" / "model.safetensors").exists(), "no hf/"

    def must_have_saved(self, log_dir, launched_as=1):
        """It stopped early and saved, and a resume makes it whole."""
        assert list(log_dir.glob("rolling_*.pt")), "nothing saved"
        for end in helpers.run_ranks(["--resume", "--log_dir", log_dir], launched_as):
            assert end.returncode == 0, end.stderr

    def closed(self, i):
        log_dir, status = self.disturb(session=False)
        assert status == 0, status
        self.must_be_whole(log_dir)

    def hangup(self, i):
        log_dir, status = self.disturb()
        assert status == 128 + signal.SIGHUP, status
        self.must_have_saved(log_dir)
        self.must_be_whole(log_dir)

    def torchrun(self, i):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        log_dir, status = self.disturb(launcher)
        assert status, status
        self.must_have_saved(log_dir, 2)
        assert len(helpers.log_rows(log_dir)) == len(helpers.log_rows(self.reference)), "other rows"

    def nohup(self, i):
        log_dir, status = self.disturb(ignore=signal.SIGHUP)
        assert status == 0, status
        self.must_be_whole(log_dir)

    def frozen(self, i):
        name = list(FROZEN)[i % len(FROZEN)]
        rank, function, call, terminated = FROZEN[name]
        log_dir = self.new_folder()
        flags = self.flags(log_dir, sample_every=4, sample_tokens=4, checkpoint_every=4,
                           dist_timeout=600 if terminated else PATIENCE)
        ranks = helpers.start_ranks(flags, 2, before=partial(freeze, rank, function, call))
        try:
            while not helpers.is_stopped(ranks[rank]):
                assert ranks[rank].is_alive(), "it did not freeze"
                time.sleep(0.1)
            since = time.monotonic()
            if terminated:
                time.sleep(1)
                os.kill(ranks[1 - rank].pid, signal.SIGTERM)
            end = helpers.finish(ranks[1 - rank], 90)
            seconds = time.monotonic() - since
        finally:
            ranks[rank].kill()
            helpers.finish(ranks[rank])
        assert end.returncode == (143 if terminated else 1), (end.returncode, end.stderr)
        assert f"no sign of life from rank {rank}" in end.stderr or "has not answered" in end.stderr, end.stderr
        limit = 20 if terminated else PATIENCE + 10
        assert seconds < limit, f"{seconds:.1f} s"
        return f"{name}: left after {seconds:.1f} s"


def freeze(rank, function, call, trainer):
    if os.environ["RANK"] == str(rank):
        helpers.strike(trainer, function, call, signal.SIGSTOP)


def main(argv=None):
    """Run every kind so many times; returns 1 when anything was wrong."""
    kinds = ["closed", "hangup", "torchrun", "nohup", "frozen"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    args = parser.parse_args(argv)
    for number in (signal.SIGHUP, signal.SIGINT):  # a shell in the background may have had them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    cases = [(kind, i) for kind in args.kinds for i in range(args.times)]
    with tempfile.TemporaryDirectory(prefix="terminals_") as work, ThreadPoolExecutor(args.jobs) as pool:
        good = list(pool.map(partial(run_case, Bench(work)), cases))
    for kind in args.kinds:
        print(f"{kind}: {sum(ok for (k, _), ok in zip(cases, good) if k == kind)} of {args.times} as they must be")
    return int(not all(good))


def run_case(bench, case):
    """Whether case `i` of a kind went as it must."""
    kind, i = case
    began = time.monotonic()
    try:
        note, ok = getattr(bench, kind)(i) or "as it must be", True
    except (AssertionError, TimeoutError) as error:
        note, ok = f"WRONG: {error}", False
    print(f"{kind} {i + 1}: {note} ({time.monotonic() - began:.0f} s)", flush=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
