"""Kill training runs anywhere, resume them, and compare what comes out with runs that nobody disturbed.

    python tests/scripts/kill_anywhere.py --kills 100

Half of the kills (SIGKILL) come at a random moment, half at a chosen spot: in a step, an evaluation or an export;
while a checkpoint's temporary file is there; before or after any sync, rename or deletion; in the middle of a line of
a log; while an old run moves to the archive; while text becomes shards. A run is killed a few times in a row, each
time resumed by the same command, and then left to finish. log.txt, metrics.jsonl (without times), the last
checkpoint's weights and optimizer state, the best one and the export must then be the undisturbed run's, to the bit.

POSIX only. Shuffle, dropout, gradient accumulation, two epochs, validation, samples, milestones, rolling checkpoints,
best.pt and the export are on in every run.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402

from harness.checkpoint import read as read_checkpoint  # noqa: E402

STEPS, PATIENCE = 20, 900  # updates of a run; seconds until one counts as hung
TIMES = {"seconds", "data_seconds", "tokens_per_sec", "mfu", "memory_allocated_gb", "memory_reserved_gb"}
PER_START = {"start", "compile", "checkpoint", "export"}  # kinds of rows that each start, or each kill, adds to
VARIANTS = {"one rank": (1, False), "two ranks": (2, False), "one rank, compiled": (1, True),
            "two ranks, compiled": (2, True)}
# phase: what the chosen call is of. `None` is aimed at from outside.
PHASES = {
    "first step": ("train_gpt2", "train_step"), "mid-step": ("train_gpt2", "train_step"),
    "evaluation": ("train_gpt2", "validate"), "samples": ("train_gpt2", "write_samples"),
    "checkpoint's temporary file": None, "sync": ("os", "fsync"), "rename": ("os", "replace"),
    "log line": ("harness.runlog", "LineFile.add"), "deletion": ("pathlib", "Path.unlink"),
    "export": ("convert", "save"), "archive move": ("shutil", "move"),
    "shard preparation": ("harness.text", "prepare_text"),
}


# ---------------------------------------------------------------------------------------------------------------
# Striking
# ---------------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def die_in(seconds):
    def wait():
        time.sleep(seconds)
        die()

    threading.Thread(target=wait, daemon=True).start()


def aim(trainer, rank, phase, call, how, delay):
    """In rank `rank`, die at the `call`-th call of what `phase` names; `how`: "before", "after", or "during" it.

    "during" is `delay` seconds after it began; for a line of a log, when half of the line is written.
    """
    if int(os.environ.get("RANK", 0)) != rank:
        return
    module, name = PHASES[phase]
    owner = importlib.import_module(module)
    while "." in name:
        first, name = name.split(".", 1)
        owner = getattr(owner, first)
    inner, calls = getattr(owner, name), [0]

    def struck(*args, **kwargs):
        calls[0] += 1
        if calls[0] != call:
            return inner(*args, **kwargs)
        if how == "before":
            die()
        if how == "during" and phase == "log line":
            log, line = args
            log.file.write(line.encode()[: len(line) // 2])
            die()
        if how == "during":
            die_in(delay)
        result = inner(*args, **kwargs)
        if how == "after":
            die()
        return result

    setattr(owner, name, struck)


def draw_strike(rng, world_size, aimed, duration):
    """(phase, rank or None for all, call, how, delay) of a kill."""
    rank = rng.choice([None, *range(world_size)]) if world_size > 1 else None
    if not aimed:
        return "random moment", rank, 0, "", rng.uniform(0, 0.8 * duration)
    phase = rng.choice(list(PHASES))
    if phase == "checkpoint's temporary file":
        return phase, rank, rng.randint(1, 2), "", rng.choice([0, rng.uniform(0, 0.02)])
    if phase not in ("first step", "mid-step", "evaluation", "samples"):
        rank = 0  # the others write nothing
    most = {"mid-step": 6, "evaluation": 2, "sync": 12, "rename": 6, "log line": 15, "deletion": 3,
            "archive move": 8}.get(phase, 1)
    longest = {"shard preparation": 0.3, "export": 0.1, "sync": 0.01, "rename": 0.001}.get(phase, 0.03)
    how = rng.choice(["before", "during", "after"])
    return phase, rank or 0, rng.randint(1, most), how, rng.uniform(0, longest)


def run_and_strike(flags, world_size, strike, env, log_dir):
    """Start the ranks and kill as `strike` says; True when a kill landed, False when the run had finished before it.

    A rank that is left alone must end by itself; an end other than by the kill, or by the loss of the other rank, is an
    error.
    """
    phase, rank, call, how, delay = strike
    before = partial(aim, rank=rank, phase=phase, call=call, how=how, delay=delay) if PHASES.get(phase) else None
    started, ranks = time.monotonic(), helpers.start_ranks(flags, world_size, before=before, env=env)
    if before is None:
        seen, sightings = set(), 0
        while any(process.is_alive() for process in ranks):
            if phase == "random moment":
                due = time.monotonic() - started >= delay
            else:
                new = {file.name for file in log_dir.glob(".*.pt.*.tmp")} - seen
                seen |= new
                sightings += len(new)
                due = sightings >= call
            if due:
                time.sleep(0 if phase == "random moment" else delay)
                for process in ranks if rank is None else [ranks[rank]]:
                    process.kill()
                break
            time.sleep(0.0005)
    ends = [helpers.finish(process, PATIENCE) for process in ranks]
    codes = [end.returncode for end in ends]
    if all(code == 0 for code in codes):
        return False
    # 1: lost the other rank; 2: never found it
    if -signal.SIGKILL not in codes or not set(codes) <= {-signal.SIGKILL, 0, 1, 2}:
        raise AssertionError(f"{strike}: exit codes {codes}\n" + "\n".join(end.stderr[-3000:] for end in ends))
    return True


# ---------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------


def differences(a, b, where=""):
    """Where two nested values of dicts, lists, tensors and plain types differ, as words."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
    else:
        same = a == b
    return [] if same else [f"{where}: {str(a)[:80]} and {str(b)[:80]}"]


def results(log_dir):
    """All of a finished run that must not depend on kills."""
    found = {"log.txt": Path(log_dir, "log.txt").read_text().splitlines()}
    rows = [row for row in helpers.metric_rows(log_dir) if row["kind"] not in PER_START]
    found["metrics.jsonl"] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    for name in (f"model_{STEPS:05d}.pt", f"model_{STEPS // 2:05d}.pt", "best.pt"):
        found[name] = read_checkpoint(Path(log_dir, name))
        del found[name]["train_config"]  # names this run's own folders
    found["hf"] = {file.name: file.read_bytes() for file in Path(log_dir, "hf").iterdir()}
    card = found["hf"]["README.md"].splitlines()
    found["hf"]["README.md"] = [line for line in card if not line.startswith(b"- Command:")]  # which may be --resume
    found["temporary files"] = [str(file) for file in Path(log_dir).rglob("*.tmp")]
    found["too many rolling checkpoints"] = len(list(Path(log_dir).glob("rolling_*.pt"))) > 2
    return found


def lost_from_archive(old, log_dir):
    """Names of files of the folder `old`, copied into `log_dir` before the run, that no archive of it holds whole."""
    kept = {(file.name, file.read_bytes()) for file in Path(log_dir, "archive").rglob("*") if file.is_file()}
    return [file.name for file in old.rglob("*") if file.is_file() and (file.name, file.read_bytes()) not in kept
            and not file.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------------------------------------------


class Bench:
    """The data, the model to start from, an old run, and one undisturbed run of each variant."""

    def __init__(self, work, variants):
        self.work, self.references = Path(work), {}
        rng = random.Random(0)
        self.text = self.work / "words.txt"
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(500)]
        self.text.write_text(" ".join(rng.choices(words, k=600)), encoding="utf-8")
        self.env = {"TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        self.old = self.work / "old"
        self.start(helpers.tiny_flags(self.text, self.old, cache_dir=self.work / "cache", preset="tiny", n_embd=16,
                                      seq_len=16, total_batch_size=64, micro_batch_size=2, max_steps=2))
        (self.old / ".lock").unlink(missing_ok=True)
        for name in variants:
            began = time.monotonic()
            log_dir = self.work / f"reference {name}"
            self.start(self.flags(name, log_dir, self.work / "cache"), VARIANTS[name][0])
            if VARIANTS[name][1]:  # the first one filled the compiler's cache: take the time of a second
                shutil.rmtree(log_dir)
                began = time.monotonic()
                self.start(self.flags(name, log_dir, self.work / "cache"), VARIANTS[name][0])
            self.references[name] = (results(log_dir), time.monotonic() - began)

    def start(self, flags, world_size=1):
        for process in helpers.start_ranks(flags, world_size, env=self.env):
            end = helpers.finish(process, PATIENCE)
            assert end.returncode == 0, end.stderr

    def flags(self, variant, log_dir, cache_dir, resume=None):
        world_size, compiled = VARIANTS[variant]
        return helpers.tiny_flags(
            self.text, log_dir, preset="finetune", init_from=self.old / "hf", n_embd=16, cache_dir=cache_dir,
            seq_len=16, total_batch_size=64, micro_batch_size=2 // world_size, max_steps=STEPS, dropout=0.1,
            compile=compiled, val_every=5, val_tokens=128, sample_every=8, num_samples=2, sample_tokens=4,
            checkpoint_every=STEPS // 2, save_minutes=0.002, dist_timeout=120, resume=resume)

    def round(self, variant, strikes, name):
        """Kill a run by `strikes` in turn, let it finish, compare; (kills that landed, differences)."""
        log_dir, cache_dir, landed = self.work / name, self.work / "cache", []
        if any(phase == "archive move" for phase, *_ in strikes):
            shutil.copytree(self.old, log_dir)
        if any(phase == "shard preparation" for phase, *_ in strikes):
            cache_dir = self.work / f"{name} cache"
        resume = None
        for strike in strikes:
            flags = self.flags(variant, log_dir, cache_dir, resume)
            if run_and_strike(flags, VARIANTS[variant][0], strike, self.env, log_dir):
                landed.append(strike)
            else:
                break
            # as long as the old run's log.txt is there the new run has not begun, and --resume would continue it
            resume = "auto" if self.begun(log_dir) else None
        else:
            self.start(self.flags(variant, log_dir, cache_dir, resume), VARIANTS[variant][0])
        found = differences(self.references[variant][0], results(log_dir))
        if any(phase == "archive move" for phase, *_ in strikes):
            found += [f"not in the archive: {lost}" for lost in lost_from_archive(self.old, log_dir)]
        if not found:
            shutil.rmtree(log_dir)
            if cache_dir.name.startswith(name):
                shutil.rmtree(cache_dir, ignore_errors=True)
        return landed, found

    def begun(self, log_dir):
        """Whether the new run has written a first row: the old run's shorter length is in its config.json."""
        config = log_dir / "config.json"
        return config.exists() and json.loads(config.read_text())["config"]["max_steps"] == STEPS


def main(argv=None):
    """Run rounds until enough kills landed; returns 1 when anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--a_round", type=int, default=6, help="kills before a run is left to finish")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.1, 0.05], help="of rounds, a variant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", help="folder for the runs (default: a temporary one)")
    args = parser.parse_args(argv)
    work = Path(args.work or tempfile.mkdtemp(prefix="kills_"))
    work.mkdir(parents=True, exist_ok=True)
    rng, began = random.Random(args.seed), time.monotonic()
    bench = Bench(work, args.variants)
    times = [f"{name} {seconds:.1f} s" for name, (_, seconds) in bench.references.items()]
    print("undisturbed runs: " + ", ".join(times), flush=True)
    kills, faults, number = Counter(), 0, 0
    while kills.total() < args.kills:
        number += 1
        variant = rng.choices(args.variants, args.shares[: len(args.variants)])[0]
        count = min(args.a_round, args.kills - kills.total())
        duration = bench.references[variant][1]
        strikes = [draw_strike(rng, VARIANTS[variant][0], rng.random() < 0.5, duration) for _ in range(count)]
        try:
            landed, found = bench.round(variant, strikes, f"round {number}")
        except (AssertionError, TimeoutError, OSError) as error:
            landed, found = [], [str(error)]
        kills.update((variant, phase) for phase, *_ in landed)
        faults += bool(found)
        kinds = ", ".join(re.sub(r"(\.\d{4})\d+", r"\1", str(s)) for s in landed)
        print(f"round {number:2d}, {variant}: {'DIFFERS' if found else 'same'} after {kinds or 'no kill'}", flush=True)
        for line in found[:8]:
            print(f"    {line}", flush=True)
    phases = Counter()
    for (_, phase), n in kills.items():
        phases[phase] += n
    for variant in args.variants:
        print(f"{variant}: {sum(n for (v, _), n in kills.items() if v == variant)} kills")
    print(", ".join(f"{phase} {n}" for phase, n in phases.most_common()))
    print(f"{kills.total()} kills in {number} rounds, {faults} rounds with a difference, "
          f"{time.monotonic() - began:.0f} s; {work}")
    if not args.work and not faults:
        shutil.rmtree(work)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
