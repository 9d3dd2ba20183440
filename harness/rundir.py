"""The folder of a run: locked by one process, archived for a new run, never emptied. Knows file names, no models."""

import contextlib
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

from harness import checkpoint
from harness.cli import UserError
from harness.files import folder_lock

RUN_FILES = (  # besides checkpoints
    "best.pt", "hf", "trace.json", "profile.txt", "curves.png", "config.json", "metrics.jsonl", "log.txt")


def log_dir_of(resume, log_dir):
    """The log folder that `--resume` names: that of its checkpoint or run; `log_dir` where it names none."""
    if resume in (None, "newest", "auto"):
        return log_dir
    checkpoint.check_exists(resume)
    return str(Path(resume).parent if os.path.isfile(resume) else Path(resume))


@contextlib.contextmanager
def lock(log_dir):
    """Make the log folder and lock it; `UserError` where another run uses it or it cannot be written."""
    folder = Path(log_dir)
    is_new = not os.path.exists(folder)
    try:
        with folder_lock(folder, "--log_dir"):
            try:
                for leftover in (*folder.glob(".*.????????.tmp"), *folder.glob("hf/.*.????????.tmp")):  # a killed run's
                    leftover.unlink(missing_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:  # a lock file opens where no file can be written
                    probe.write(bytes(2**21))
            except OSError as error:
                raise UserError(f"--log_dir {folder} cannot be written ({error.strerror}): give another one") from None
            yield
    finally:
        with contextlib.suppress(OSError):
            if is_new and not any(folder.iterdir()):  # the start was refused
                folder.rmdir()


def archive(folder, files, copies=()):
    """Move `files` of a log folder, and copy `copies`, to archive/<time>/ in it; returns that folder, None for none.

    archive/ may be a link to another disk. `UserError` where nothing can be written there; no file is lost then.
    """
    if not files:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp, *(f"{stamp}_{i}" for i in range(1, 1000)))
    target = folder / "archive"
    try:
        target = next(t for t in (target / name for name in names) if not t.exists())
        target.mkdir(parents=True)
        for file in copies:
            shutil.copy2(file, target)
        for file in files:
            shutil.move(file, target / file.name)
    except OSError as error:
        raise UserError(f"the run in {folder} cannot be moved to {target} ({error.strerror or error}): make that a "
                        "folder with room, or give another --log_dir") from None
    return target


def archive_old_run(log_dir, step):
    """Make room for a run that starts at `step`: an old run, or what comes after `step`, goes to the archive.

    `step` None: a new run. Returns what was moved where, in words, or None.
    """
    folder = Path(log_dir)
    checkpoints = checkpoint.files(folder)
    others = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if step is None:
        # the newest checkpoint late, the log last: a kill in between leaves a run that can still be resumed
        target = archive(folder, checkpoints[::-1] + others)
        return target and f"the run that was in {folder} is now in {target}"
    later = [file for file in checkpoints if checkpoint.step_of(file) > step]
    if later and _is_later(folder / "best.pt", step):
        later.append(folder / "best.pt")
    if later and (folder / "hf").exists():
        later.insert(0, folder / "hf")  # the finished model of that later run; first, so that a kill leaves no old one
    target = archive(folder, later, [f for f in others if f.name in ("log.txt", "metrics.jsonl", "config.json")])
    return target and f"what came after step {step} is now in {target}"


def _is_later(best, step):
    """Whether best.pt is of a step after `step`; so is a damaged one, which is of no use to the run any more."""
    if not best.exists():
        return False
    try:
        return checkpoint.read(best)["step"] > step
    except (UserError, LookupError, TypeError):
        return True
