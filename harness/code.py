"""The code of a run: its commit, and a copy in the log folder, so that what was changed for a run can be seen later."""

import contextlib
import hashlib
import inspect
import subprocess
from pathlib import Path

from harness.commands import ROOT
from harness.files import atomic_file, sha256, tolerate_full_disk

MAX_DIFF = 1 << 20  # bytes


def git(*arguments):
    """What a git command prints about this checkout; None if it is not one, or git is not installed."""
    command = ["git", "-C", ROOT, *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout.decode(errors="replace")
    return None


def git_commit():
    """This checkout's commit, with "-dirty" if tracked files differ from it; None if this folder is no checkout."""
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != ROOT:  # a copy within somebody else's repository
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return commit and commit.strip() + "-dirty" * bool(changes)


def code_sha256(run):
    """One hash over the code that a run's results may depend on: the trainer, what it imports at its side, harness/."""
    files = [Path(inspect.getfile(type(run))), ROOT / "convert.py", ROOT / "hellaswag.py",
             *sorted((ROOT / "harness").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def keep_code(run):
    """Copy the trainer as it runs to code/train_gpt2.py in the log folder; code/diff.patch has what is not committed.

    Returns {"before": SHA-256, "now": SHA-256, "kept": file} if the run had other code so far, else None.
    """
    running, folder = Path(inspect.getfile(type(run))), Path(run.cfg.log_dir, "code")
    copy, changed = folder / "train_gpt2.py", None
    if copy.exists() and sha256(copy) != sha256(running):
        kept = folder / f"train_gpt2_until_{run.state.step:05d}.py"
        changed = {"before": sha256(copy), "now": sha256(running), "kept": str(kept)}
        copy.rename(kept)
    diff = (git("diff", "HEAD") or "").encode() if git_commit() else b""
    if len(diff) > MAX_DIFF:
        diff = diff[:MAX_DIFF] + b"\n... cut off here\n"
    with tolerate_full_disk(f"{folder} is not written"):
        for name, content in (("train_gpt2.py", running.read_bytes()), ("diff.patch", diff)):
            if content:
                with atomic_file(folder / name) as file:
                    file.write(content)
    return changed
