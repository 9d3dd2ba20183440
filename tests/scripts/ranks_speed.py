"""Tokens a second of N ranks with one thread each, against one process with N threads: `ranks_speed.py [N] [FLAGS]`.

Both take the same batches of the tiny preset on input.txt, not compiled; FLAGS of the trainer come on top. Printed is
the median of the steps after the first five, from metrics.jsonl.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def tokens_per_second(ranks, threads, flags):
    """Run the trainer under torchrun and return its median speed in tokens a second."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, ROOT / "train_gpt2.py", "--preset", "tiny", "--data", ROOT / "input.txt", "--max_steps", 25,
                   "--log_dir", folder, "--no-compile", "--val_every", 0, "--sample_every", 0, *flags]
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return statistics.median(row["tokens_per_sec"] for row in rows[5:])


def main():
    ranks, flags = int(sys.argv[1]) if len(sys.argv) > 1 else 2, sys.argv[2:]
    for world_size, threads in ((1, ranks), (ranks, 1)):
        speed = tokens_per_second(world_size, threads, flags)
        print(f"{world_size} ranks x {threads} threads: {speed:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
