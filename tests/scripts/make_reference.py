"""Write a reference for `curves.py --against` from three runs or more that differ in their seeds alone.

    python tests/scripts/make_reference.py run1 run2 run3 reference/tiny.txt
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import curves  # noqa: E402
from harness.cli import UserError, exit_status  # noqa: E402
from harness.files import atomic_file  # noqa: E402


def make_reference(log_dirs, path):
    """Write mean and standard deviation of three runs or more that differ only in their seeds to `path`.

    A standard deviation of few runs is itself a rough estimate, so no row gets one below the median of its kind.
    """
    if len(log_dirs) < 3:
        raise UserError(f"{len(log_dirs)} runs were given: a standard deviation takes at least 3, with different seeds")
    runs, _ = curves._runs(log_dirs)
    curves.check_alike(runs)
    log, config, steps = runs[0].log, runs[0].config, runs[0].log["val"]["step"].tolist()
    measured = [curves._measured(run.log, steps) for run in runs]
    keys = [(step, kind) for step in steps for kind in curves.KEYS
            if all((step, kind) in values for values in measured)]
    values = np.array([[of_run[key] for of_run in measured] for key in keys])
    if not keys or not np.isfinite(values).all():
        raise UserError("the runs have no evaluation in common, or one that is not finite: train them to the end")
    spread, kinds = values.std(axis=1, ddof=1), np.array([kind for _, kind in keys])
    lines = [
        f"# {len(runs)} runs on {curves._hardware(log['config']) or 'an unnamed device'}, seeds "
        f"{sorted(run.config['seed'] for run in runs)}, {config.get('max_steps')} steps",
        f"# versions {log['config'].get('versions', 'unknown')}",
        "# STEP KIND MEAN SD, as the top of curves.py explains",
        f"data {curves.data_name(log)}",
        f"tokens_per_step {curves.tokens_per_step(log)}",
        f"tokenizer {runs[0].settings()['tokenizer']}",
        *(f"{name} {config[name]}" for name in ("optimizer", "schedule") if name in config),
        *(f"{step} {kind} {mean:.4f} {max(sd, np.median(spread[kinds == kind]), 1e-4):.4f}"
          for (step, kind), mean, sd in zip(keys, values.mean(axis=1), spread)),
    ]
    with atomic_file(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(lines) + "\n")


def main(argv):
    if len(argv) < 2:
        raise UserError(__doc__.partition("\n\n")[2])
    make_reference(argv[:-1], argv[-1])
    print(f"wrote {argv[-1]}")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
