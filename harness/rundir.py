"""The folder of a run: locked by one process, archived for a new run, never emptied. Knows file names, no models."""

import contextlib
import os
import re
import shutil
import tempfile
import zipfile
from datetime import datetime
from pathlib import Path

from harness import checkpoint, rows
from harness.cli import UserError
from harness.files import folder_lock, read_json

# What a run writes besides checkpoints; the order is that in which a new run moves them to the archive.
RUN_FILES = ("best.pt", "hf", "code", "trace.json", "profile.txt", "curves.png", "config.json", "metrics.jsonl",
             "log.txt")
LEFTOVER = re.compile(  # of `atomic_file`, in a run that was killed: its own, those of hf/ and of code/
    r"\.(config\.json|metrics\.jsonl|log\.txt|curves\.png|profile\.txt|best\.pt|(model|rolling)_\d+\.pt|"
    r"model\.safetensors|README\.md|(generation_|tokenizer_)config\.json|(tokenizer|vocab)\.json|merges\.txt|"
    r"train_gpt2\.py|diff\.patch)\.[a-z0-9_]{8}\.tmp")
TORN_ROW = re.compile(r"0( \w*( [\d.]*)?)?")  # how the first line of log.txt begins


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
            refuse_foreign_files(folder)
            try:
                for path in [path for below in (".", "hf", "code") for path in Path(folder, below).glob(".*.tmp")]:
                    if LEFTOVER.fullmatch(path.name):
                        path.unlink(missing_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:  # a lock file opens where no file can be written
                    probe.write(bytes(2**21))
                open(folder / ".lock", "ab").close()  # noqa: SIM115 (where files cannot be appended to, logs cannot be)
            except OSError as error:
                raise UserError(f"--log_dir {folder} cannot be written ({error.strerror}): give another one") from None
            yield
    finally:
        with contextlib.suppress(OSError):
            if is_new and not any(folder.iterdir()):  # the start was refused
                folder.rmdir()


def refuse_foreign_files(folder):
    """Raise `UserError` where `folder` has a file by the name of a run's that no run wrote: a run would move it away.

    Most files have a mark in them. Those that have none are a run's if one that has is beside them.
    """
    def is_ours(name):
        return MARKS.get(name, _is_checkpoint)(folder / name)

    there = [name for name in (*RUN_FILES, *(path.name for path in checkpoint.files(folder)))
             if os.path.lexists(folder / name)]
    foreign = [name for name in there if name in MARKS and not is_ours(name)]
    marked = any(is_ours(name) for name in there if name not in UNMARKED)
    if not foreign and not marked and not _has_keys("training_step")(folder / "hf" / "config.json"):
        foreign = there
    if foreign:
        raise UserError(f"--log_dir {folder} holds {foreign[0]}, which no run of this program wrote: give another "
                        "folder, or move it away")


def _has_keys(*keys):
    def has(path):
        try:
            return set(keys) <= read_json(path).keys()
        except (UserError, AttributeError):
            return False

    return has


def _is_log(parse):
    def is_log(path):
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                first = file.readline()
        except OSError:
            return False
        if not first.endswith("\n"):  # empty or torn: a run that was killed early
            return first.startswith('{"step": ') or '{"step": '.startswith(first) or bool(TORN_ROW.fullmatch(first))
        return parse(first.rstrip("\n")) is not None

    return is_log


def _is_code(path):
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    return ".git" not in names and ("train_gpt2.py" in names or all(map(LEFTOVER.fullmatch, names)))


def _is_export(path):
    config = path / "config.json"  # none where a run was killed in its export
    return _has_keys("training_step")(config) or not _has_keys("model_type")(config)


def _is_checkpoint(path):
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(b"format_version" in archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl"))
    return False


MARKS = {"config.json": _has_keys("config"), "metrics.jsonl": _is_log(rows.from_json),
         "log.txt": _is_log(rows.from_log_line), "hf": _is_export, "code": _is_code}
UNMARKED = ("trace.json", "profile.txt", "curves.png", "hf", "code")  # others may have what these have


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
            shutil.copyfile(file, target / file.name)
        for file in files:
            shutil.move(file, target / file.name)
    except OSError as error:
        raise UserError(f"the run in {folder} cannot be moved to {target} ({error.strerror or error}): make that a "
                        "folder with room, or give another --log_dir") from None
    return target


def archive_old_run(log_dir, step=None, best_id=None):
    """Make room for a run that starts at `step`: an old run, or what comes after `step`, goes to the archive.

    `step` None: a new run. `best_id` is that of the best.pt which belongs to the run up to `step`. Returns what was
    moved where, in words, or None.
    """
    folder = Path(log_dir)
    checkpoints, best, hf = checkpoint.files(folder), folder / "best.pt", folder / "hf"
    others = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if step is None:
        # the newest checkpoint late, the log last: a kill in between leaves a run that can still be resumed
        target = archive(folder, checkpoints[::-1] + others)
        return target and f"the run that was in {folder} is now in {target}"
    later = [file for file in checkpoints if checkpoint.step_of(file) > step]
    if best.exists() and (best_id is None or checkpoint.contents_id(best) != best_id):
        later.append(best)
    exported = read_json(hf / "config.json") or {}  # a kill leaves an hf/ without it
    if hf.exists() and (later or (exported.get("training_step") or 0) > step):
        later.insert(0, hf)  # the finished model of that later run; first, so that a kill leaves no old one
    target = archive(folder, later, [f for f in others if f.name in ("log.txt", "metrics.jsonl", "config.json")])
    return target and f"what came after step {step} is now in {target}"
