"""Run the trainer of another checkout and this one in turns, with the same flags: wall time, and time of an update.

    git worktree add /tmp/before COMMIT
    python tests/scripts/side_by_side.py /tmp/before                              the default run of each
    python tests/scripts/side_by_side.py /tmp/before -- --preset tiny --optimizer adamw --max_steps 20

The first round of both is cold: nothing is in the cache for kernels and text. Then come --repeats warm rounds, in which
the two take turns at going first. An update's time is the median over a run of all but its first.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import metric_rows  # noqa: E402


def run(checkout, flags, work):
    """Wall time and figures of one run: a dict."""
    log_dir = work / "log"
    shutil.rmtree(log_dir, ignore_errors=True)
    command = [sys.executable, checkout / "train_gpt2.py", "--log_dir", log_dir, "--cache_dir", work / "cache", *flags]
    started, home = time.perf_counter(), {**os.environ, "XDG_CACHE_HOME": str(work / "kernels")}
    result = subprocess.run(list(map(str, command)), cwd=checkout, capture_output=True, text=True, env=home)
    seconds = time.perf_counter() - started
    if result.returncode:
        raise SystemExit(f"{checkout}: exit {result.returncode}: {result.stderr[-2000:]}")
    updates, val = metric_rows(log_dir, "train"), metric_rows(log_dir, "val")
    return {"wall": seconds, "update": statistics.median(row["seconds"] for row in updates[1:]),
            "compile": sum(row["seconds"] for row in metric_rows(log_dir, "compile")),
            "loss": val[-1]["loss"] if val else updates[-1]["loss"],
            "bits": val[-1]["bits_per_byte"] if val else math.nan}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--repeats", type=int, default=3, help="warm rounds [3]")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)  # what follows is for the runs
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    checkouts, warm = {"before": args.before.resolve(), "now": ROOT}, {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as work:
        for number in range(args.repeats + 1):
            for name in sorted(checkouts, reverse=number % 2 == 1):
                folder = Path(work, name)
                folder.mkdir(exist_ok=True)
                figures = run(checkouts[name], flags, folder)
                if number:
                    warm[name].append(figures)
                print(f"{'warm' if number else 'cold'} {name:6}: {figures['wall']:.1f} s (compile "
                      f"{figures['compile']:.1f}); an update {figures['update']:.3f} s; loss {figures['loss']:.4f}, "
                      f"{figures['bits']:.4f} bits per byte", flush=True)
    for what in ("wall", "update") if args.repeats else ():
        before, now = (statistics.median(figures[what] for figures in warm[name]) for name in ("before", "now"))
        print(f"{what}, medians of {args.repeats}: before {before:.3f} s, now {now:.3f} s: {now / before:.3f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
