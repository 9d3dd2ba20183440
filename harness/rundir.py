"""The folder of a run: claimed by one process, cleared for a new run or cut back for a resumed one, never emptied.

Also what grows in it (`Lines`) and what stands beside it (trackers). Knows file names and rows, no models.
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import filelock

from harness.checkpoint import files as checkpoint_files
from harness.checkpoint import newest as newest_checkpoint
from harness.checkpoint import read as read_checkpoint
from harness.cli import UserError, say
from harness.files import DISK_FULL, atomic_file

RUN_FILES = ("best.pt", "hf", "curves.png", "config.json", "metrics.jsonl", "log.txt")  # besides checkpoints


def archive(folder, files, copies=()):
    """Move `files` of a log folder, and copy `copies`, to archive/<time>/ in it; returns that folder, None for none."""
    if not files:
        return None
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp, *(f"{stamp}_{i}" for i in range(1, 1000)))
    target = next(t for t in (folder / "archive" / name for name in names) if not t.exists())
    target.mkdir(parents=True)
    for file in copies:
        shutil.copy2(file, target)
    for file in files:
        file.rename(target / file.name)
    return target


def home_of(resume, log_dir):
    """The log folder that `--resume` means: that of the checkpoint or run it names, `log_dir` where it names none."""
    if resume in (None, "newest", "auto"):
        return log_dir
    if not os.path.exists(resume):  # for any text; Path.exists fails on one too long for a name
        raise UserError(f"--resume {resume} is not there: give a checkpoint or the log folder of a run")
    return str(Path(resume).parent if os.path.isfile(resume) else Path(resume))


def find_checkpoint(resume, log_dir):
    """(path, contents) of the checkpoint that `--resume` means, (None, None) where `auto` finds nothing."""
    source = Path(log_dir if resume in ("newest", "auto") else resume)
    if os.path.isfile(source):
        return source, read_checkpoint(source)
    if os.path.isdir(source) and checkpoint_files(source):
        return newest_checkpoint(source)
    if resume == "auto":
        return None, None
    raise UserError(f"--resume: no checkpoint (model_*.pt, rolling_*.pt) at {source}; start without --resume, "
                    "or with --resume auto")


def prune_checkpoints(log_dir, keep):
    """Delete rolling checkpoints beyond the newest `keep`; nothing else is ever deleted."""
    rolling = [file for file in checkpoint_files(log_dir) if file.name.startswith("rolling_")]
    for file in rolling[keep:]:
        file.unlink()


def resume_command(log_dir):
    """The flags that go on with the run in `log_dir`."""
    return "--resume" + (f" --log_dir {shlex.quote(log_dir)}" if log_dir != "log" else "")


@contextlib.contextmanager
def claim_folder(log_dir):
    """Make the log folder and hold it locked; `UserError` where another run has it or it cannot be written."""
    folder = Path(log_dir)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            for leftover in (*folder.glob(".*.????????.tmp"), *folder.glob("hf/.*.????????.tmp")):  # of a killed run
                leftover.unlink(missing_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:  # an old lock file opens where a new one cannot be made
                probe.write(bytes(2**21))
        except filelock.Timeout:
            raise UserError(f"--log_dir {folder} is in use by another run: give another one, or wait for it") from None
        except OSError as error:
            raise UserError(f"--log_dir {folder} cannot be written ({error.strerror}): give another one") from None
        yield
    finally:
        lock.release()


def clear_folder(log_dir, step):
    """Make room for a run that starts at `step`: what belongs to an old run, or comes later, goes to the archive.

    Returns (what was moved where, in words, or None; log.txt's rows that stay, [(step, kind, value)]; what the logs
    have of `step` itself, a set of kinds and checkpoint names). `step` None: a new run.
    """
    folder = Path(log_dir)
    checkpoints = checkpoint_files(folder)
    others = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if step is None:
        # the newest checkpoint late, the log last: a kill in between leaves a run that can still be resumed
        target = archive(folder, checkpoints[::-1] + others)
        return target and f"the run that was in {folder} is now in {target}", [], set()
    later = [file for file in checkpoints if int(file.stem.split("_")[1]) > step]
    best = folder / "best.pt"
    if later and best.exists() and read_checkpoint(best)["step"] > step:
        later.append(best)
    if later and (folder / "hf").exists():
        later.insert(0, folder / "hf")  # the finished model of that later run; first, so that a kill leaves no old one
    target = archive(folder, later, [f for f in others if f.name in ("log.txt", "metrics.jsonl", "config.json")])
    return target and f"what came after step {step} is now in {target}", *trim_rows(folder, step)


def trim_rows(folder, step):
    """Cut both logs back to what a checkpoint after `step` updates knows; returns (rows, done) of `clear_folder`.

    Train rows before `step` stay and other rows up to it. A row without its newline is torn and goes. metrics.jsonl
    is written first, so a validation or HellaSwag row at `step` that log.txt lacks was cut off: it goes too.
    """
    def whole_lines(name):
        file = folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    rows, lines = [], []
    for line in whole_lines("log.txt"):
        match = re.fullmatch(r"(\d{1,12}) (train|val|hella) (-?\d+\.\d+|nan|-?inf)\n", line)
        if match and (int(match[1]) < step or (int(match[1]) == step and match[2] != "train")):
            rows.append((int(match[1]), match[2], float(match[3])))
            lines.append(line)
    present, metrics, done = {kind for at, kind, _ in rows if at == step}, [], set()
    for line in whole_lines("metrics.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            at, kind = row["step"], row["kind"]
            if at == step and kind != "train" and (kind not in ("val", "hella") or kind in present):
                done.add(row["file"] if kind == "checkpoint" else kind)
                metrics.append(line)
            elif at < step:
                metrics.append(line)
    for name, kept in (("metrics.jsonl", metrics), ("log.txt", lines)):
        with atomic_file(folder / name, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(kept)
    return rows, done


class Lines:
    """A file that grows by whole lines at once. What a full disk does not take waits for the next try."""

    def __init__(self, path):
        self.path, self.waiting, self.warned = path, b"", False
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open for the run)

    def add(self, line):
        self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not self.warned:
                say(f"WARNING: {self.path}: the disk is full; its rows wait in memory", sys.stderr)
            self.warned = True

    def sync(self):
        """Have all lines on the disk, as a checkpoint may not know more than the log; OSError where it is full."""
        if self.waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if os.fstat(self.file.fileno()).st_nlink == 0:
            self._restore()
        os.fsync(self.file.fileno())

    def _restore(self):
        """Write anew a file that was deleted under the run: until it is closed its lines can still be read."""
        say(f"WARNING: {self.path} was deleted; it is written anew", sys.stderr)
        self.file.seek(0)
        with atomic_file(self.path) as file:
            shutil.copyfileobj(self.file, file)
        self.file.close()
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115


class NoTracker:
    """Stands in where nothing is tracked."""

    id = None

    def log(self, step, **values):
        pass

    def finish(self):
        pass


def find_wandb():
    """The package, imported; `UserError` where it is not installed."""
    with contextlib.suppress(ImportError):
        import wandb
    if not hasattr(sys.modules.get("wandb"), "init"):  # a folder named wandb/ imports too, and holds nothing
        raise UserError("--tracker wandb: the package is not installed: pip install wandb")
    return wandb


class WandbTracker:
    """Weights & Biases: one run, which a resume continues by its id. WANDB_MODE=offline works without a network."""

    def __init__(self, project, folder, config, run_id):
        wandb = find_wandb()
        self.table = wandb.Table
        try:
            self.run = wandb.init(project=project, id=run_id, resume="allow", config=config, dir=folder)
        except wandb.Error as error:  # nobody is logged in, or there is no network
            raise UserError(f"--tracker wandb: {error} Log in with `wandb login`, or set WANDB_MODE=offline") from None
        self.id = self.run.id

    def log(self, step, **values):
        texts = values.pop("samples", None)
        if texts is not None:
            values["samples"] = self.table(columns=["step", "text"], data=[[step, text] for text in texts])
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()


@contextlib.contextmanager
def full_disk(what, mend=None):
    """Turn a full disk into a warning that says `what` came of it; into a `UserError` if `mend` says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        if mend:
            raise UserError(f"the disk is full: {what}. Make room, then go on with {mend}") from None
        say(f"WARNING: the disk is full: {what}", sys.stderr)
