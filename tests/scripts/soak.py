"""A long run of a very small model: does memory grow, does a step get slower, is the log complete?

    python tests/scripts/soak.py --steps 20000

Watches the trainer's process from outside, on Linux: resident memory and processor time a step, once a second. Other
work on the machine does not change the first, and changes the second less than the time on the clock. After the warm-up
neither may grow by more than --tolerance. The run reads its data several times, with validations, samples, rolling
checkpoints and plots of the curves; the warm-up is a tenth of the steps, and lasts until each of these came once.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402

ROWS, TOKENS = 4, 8  # a step: 4 rows of 8 tokens


def sample(process, log):
    """(completed steps, resident MiB, processor seconds, whether curves.png exists); None before the log is there."""
    try:
        drawn = log.with_name("curves.png").exists()
        stat = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            rows = [line.split() for line in file.read().decode().splitlines()[1:]]
    except OSError:
        return None
    steps = [int(row[0]) for row in rows if len(row) == 3 and row[1] == "train"]
    ticks, pages = int(stat[11]) + int(stat[12]), int(stat[21])
    if not steps:
        return None
    return steps[-1] + 1, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK"), drawn


def main(argv=None):
    """Make the run and judge it; returns 1 where something grew or is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--tolerance", type=float, default=0.05)
    args = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="soak_"))
    data = helpers.make_shards(work / "data", train=(int(args.steps * ROWS * TOKENS / args.epochs),), val=(2000,))
    flags = helpers.tiny_flags(
        data, work / "log", n_layer=1, n_head=2, n_embd=8, seq_len=TOKENS, total_batch_size=ROWS * TOKENS,
        micro_batch_size=2, max_steps=args.steps, dropout=0.1, val_every=args.steps // 20, val_tokens=320,
        sample_every=args.steps // 20, num_samples=1, sample_tokens=8, save_minutes=0.1)
    began, samples = time.monotonic(), []
    process = helpers.start_ranks(flags)[0]
    while process.is_alive():
        time.sleep(1)
        if found := sample(process, work / "log" / "log.txt"):
            samples.append(found)
    end = helpers.finish(process)
    if end.returncode:
        print(end.stdout[-2000:], end.stderr[-2000:])
        return 1

    warm = np.array([s for s in samples if args.steps // 10 <= s[0] < args.steps])  # the export is no part of it
    if warm[:, 3].any():  # a short run plots its curves only at its end
        warm = warm[warm[:, 3] > 0]
    memory = warm[:, 1]
    cost = 1000 * np.diff(warm[:, 2]) / np.maximum(1, np.diff(warm[:, 0]))
    fifth = max(1, len(cost) // 5)
    growth = memory.max() / memory[0] - 1
    drift = np.median(cost[-fifth:]) / np.median(cost[:fifth]) - 1
    rows = helpers.log_rows(work / "log")
    complete = [step for step, kind, _ in rows if kind == "train"] == list(range(args.steps))
    finite = all(np.isfinite(float(value)) for *_, value in rows)
    rolling = len(list((work / "log").glob("rolling_*.pt")))
    print(f"{args.steps:,} steps, {args.epochs:g} epochs, {time.monotonic() - began:.0f} s, {len(samples)} samples\n"
          f"resident memory: {memory[0]:.0f} MiB after the warm-up (step {warm[0, 0]:,.0f}), {memory.max():.0f} at "
          f"most ({growth:+.1%}), {memory[-1]:.0f} at the end\n"
          f"processor time a step: {np.median(cost[:fifth]):.2f} ms in the first fifth, {np.median(cost[-fifth:]):.2f} "
          f"in the last ({drift:+.1%})\n"
          f"log {'complete' if complete else 'NOT COMPLETE'}, losses {'finite' if finite else 'NOT FINITE'}, "
          f"{rolling} rolling checkpoints")
    shutil.rmtree(work)
    return int(growth > args.tolerance or drift > args.tolerance or not complete or not finite or rolling > 2)


if __name__ == "__main__":
    sys.exit(main())
