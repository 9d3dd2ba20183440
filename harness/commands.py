"""The commands that messages tell users to run, spelled so that they work in the folder where the user is."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

from harness.ranks import launcher

ROOT = Path(__file__).resolve().parent.parent


def script(name, *flags, start=("python",)):
    """`python NAME FLAGS` for a command of this project, by a path that is right from the working folder."""
    path = str(ROOT / name)
    with contextlib.suppress(OSError, ValueError):  # the working folder is gone; another drive on Windows
        path = min(os.path.relpath(path), path, key=len)
    return shlex.join([*start, path, *map(str, flags)])


def resume(log_dir, *flags):
    """The command that resumes the run in `log_dir`."""
    flags = (*([] if log_dir == "log" else ["--log_dir", log_dir]), *flags)
    return script("train_gpt2.py", "--resume", *flags, start=launcher())


def after_out_of_memory(log_dir, B):
    """What to do about a run that is out of memory at micro-batches of `B`: a line."""
    half = next(d for d in range(max(1, B // 2), 0, -1) if B % d == 0)
    return f"out of memory at --micro_batch_size {B}: resume with {resume(log_dir, '--micro_batch_size', half)}"


def as_started():
    """The command line of this run, None where it was not started as `train_gpt2.py` (a notebook, another script)."""
    name = Path(sys.argv[0]).name
    return shlex.join([*launcher(), *sys.argv]) if name == "train_gpt2.py" else None
