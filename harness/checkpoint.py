"""One checkpoint's whole life: what is in it, when and how it is written, checked, found, resumed from and pruned.

A checkpoint is one file of tensors and plain types as torch.save writes it. `CHECKPOINT_KEYS` is its schema: writing
and reading both go by it. Nothing that is read can run code.
"""

import contextlib
import os
import pickle
import re
import struct
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from harness import commands
from harness.cli import UserError
from harness.files import LFS_POINTER, atomic_file, refuse_lfs_pointer, tolerate_full_disk

FORMAT_VERSION = 1
CHECKPOINT_KEYS = {
    "format_version": int,
    "model": dict,  # state dict of the raw model, under the model's own names
    "config": dict,  # the model's
    "step": int,  # completed updates
    "val_loss": int | float | None,  # of this model, None if it was not measured
    "best_val_loss": int | float | None,  # of the run so far
    "optimizer": dict,  # {optimizer's name: its state dict}
    "scaler": dict | None,
    "train_config": dict,
    "position": int,  # sequences read since step 0, by all ranks together
    "micro_batch_size": int,
    "world_size": int,
    "skipped_in_a_row": int,
    "tracker_id": str | None,
    "data": dict,  # fingerprints of the splits
    "dtype": str | None,  # this and the next two are what the digits depend on, see `Runtime.numerics`
    "compiled": bool | None,
    "threads": int | None,
    "not_gpt2": str | None,  # why no Hugging Face folder can be made of it, None if one can
}
ADDED_LATER = ("dtype", "compiled", "threads", "not_gpt2")  # None where an older file has no such key


# ---------------------------------------------------------------------------------------------------------------
# A run's checkpoints
# ---------------------------------------------------------------------------------------------------------------
def save_if_due(run):
    """Write the milestone or rolling checkpoint that is due at this step, on all ranks. Returns whether one was."""
    cfg, state = run.cfg, run.state
    if state.step == 0:
        return False
    last = state.step >= cfg.max_steps
    milestone = cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0
    rolling = cfg.save_minutes and run.rt.clock() - state.saved_at > 60 * cfg.save_minutes
    if last or milestone:
        save(run, milestone_name(state.step), required=last)
    elif rolling:
        save(run, rolling_name(state.step))
    return last or milestone or rolling


def save(run, name, required=False):
    """Write the state of a run as the checkpoint `name`, unless it was just read from it. Rank 0 writes, all wait.

    A full disk is a warning, unless the checkpoint is `required`. best.pt is no checkpoint to resume from.
    """
    state = run.state
    if state.saved_as != name:
        run.rt.on_rank0(_save_on_rank0, run, name, required)
    if name != "best.pt":
        state.saved_as, state.saved_at = name, run.rt.clock()


def _save_on_rank0(run, name, required):
    cfg, state, log = run.cfg, run.state, run.log
    started, path = time.perf_counter(), Path(cfg.log_dir, name)
    fix = commands.resume(cfg.log_dir) if required else None
    content = contents(state, cfg, run.rt, log.hashes.for_checkpoint())
    with tolerate_full_disk(f"{path} is not written; those before it stay", fix):
        log.sync()
        write(path, content)
        log.row(state.step, "checkpoint", file=name, seconds=time.perf_counter() - started)
        prune(cfg.log_dir, cfg.keep_checkpoints)


def contents(state, cfg, rt, data_fingerprints):
    """All that an exact resume of a `TrainState` needs, as tensors and plain types: a checkpoint's keys."""
    sequences = cfg.total_batch_size // cfg.seq_len  # a step
    assert state.loader.position == state.step * sequences, "the loader is ahead of the model"
    return {
        "model": state.raw_model.state_dict(),
        "config": asdict(state.raw_model.config),
        "step": state.step,
        "val_loss": state.val_loss,
        "best_val_loss": state.best_val_loss,
        "optimizer": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "scaler": state.scaler.state_dict(),
        "train_config": {**asdict(cfg), "asked": cfg.all_asked},
        "position": state.loader.position,
        "micro_batch_size": state.micro_batch_size,
        "world_size": rt.world_size,
        "skipped_in_a_row": state.skipped_in_a_row,
        "tracker_id": state.tracker_id,
        "data": data_fingerprints,
        **rt.numerics(),
        "not_gpt2": state.not_gpt2,
    }


def restore(state, saved):
    """Give a `TrainState`, whose model was made from `saved`, everything else in it.

    Of the optimizers the tensors, settings are the config's. Raises `ValueError` or `LookupError` where something does
    not fit: fused kernels do not check shapes.
    """
    for name, optimizer in state.optimizers.items():
        tensors = saved["optimizer"][name]["state"]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": tensors})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if len({tuple(optimizer.state[p]) for p in parameters}) > 1:
            raise ValueError(f"{name} does not have the same figures for every parameter")
        for p in parameters:
            if any(slot.shape not in ((), p.shape) for slot in optimizer.state[p].values()):
                raise ValueError(f"{name} has another shape than its parameter, {tuple(p.shape)}")
    if saved["scaler"]:  # empty where the run had another dtype
        state.scaler.load_state_dict(saved["scaler"])
    for name in ("step", "val_loss", "best_val_loss", "skipped_in_a_row", "tracker_id"):
        setattr(state, name, saved[name])


# ---------------------------------------------------------------------------------------------------------------
# Writing and reading one file
# ---------------------------------------------------------------------------------------------------------------
def write(path, content):
    """Write `content`, a dict with the keys of `CHECKPOINT_KEYS`, to `path`, whole or not at all.

    `format_version` is added here, and those `ADDED_LATER` may be left out. Raises `OSError` where there is no room.
    """
    content = {"format_version": FORMAT_VERSION, **dict.fromkeys(ADDED_LATER), **content}
    assert content.keys() == CHECKPOINT_KEYS.keys(), sorted(content.keys() ^ CHECKPOINT_KEYS.keys())
    assert (fault := _fault(content)) is None, fault
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # subtle: after a failed write torch closes its zip, which fails too and hides the full disk's OSError
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def read(path):
    """The checkpoint at `path` as a dict with all of `CHECKPOINT_KEYS`, its tensors on the CPU; `UserError` if bad."""
    return check(read_pt(path), path)


def check(content, path):
    """`content`, read from `path` by `read_pt`, with the keys `ADDED_LATER` filled in; `UserError` if it is bad."""
    content = {**dict.fromkeys(ADDED_LATER), **content}
    version = content.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version!r:.50}, and this program reads {FORMAT_VERSION}: use the "
                        "version of the program that wrote it")
    if missing := [key for key in CHECKPOINT_KEYS if key not in content]:
        raise UserError(f"{path} is not a checkpoint of this program: it has no {', '.join(missing)}")
    if fault := _fault(content):
        raise UserError(f"{path} is damaged: {fault}")
    check_tensors(content["model"], path)
    return content


def _fault(content):
    """What is wrong with the values of a checkpoint that has all keys, None if nothing is."""
    for key, kind in CHECKPOINT_KEYS.items():
        value = content[key]
        is_kind = isinstance(value, kind)
        if isinstance(value, bool):  # which Python takes for an int
            is_kind = kind == bool | None
        if not is_kind or (kind is int and value < 0):
            return f"its {key} is {value!r:.50}"
    return None


def step_in(path):
    """The step of the checkpoint at `path`, None if the file is missing or too damaged to say.

    Reads no tensors, which takes milliseconds, and so does not say that they are whole.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            _check_layout(archive, path)
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl"):
                    archive.read(record)  # verifies its CRC-32
        # subtle: mapped into memory, so that only the pages that are looked at are read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_MALFORMED):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if type(step) is int and step >= 0 else None


# ---------------------------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------------------------
def milestone_name(step):
    """File name of the checkpoint after `step` updates that is kept."""
    return f"model_{step:05d}.pt"


def rolling_name(step):
    """File name of the checkpoint after `step` updates that is pruned when newer ones exist."""
    return f"rolling_{step:05d}.pt"


def step_of(path):
    """The step in the name of a milestone or rolling checkpoint; None for any other name (`step_in` looks inside)."""
    name = re.fullmatch(r"(?:model|rolling)_([0-9]{5,})\.pt", Path(path).name)
    return int(name[1]) if name else None


def files(folder):
    """The milestones and rolling checkpoints in `folder`, a list of `Path`, newest first.

    Newest is by the step in the name; of two with one step the milestone comes first, since it is never pruned.
    """
    found = [path for path in Path(folder).glob("*.pt") if step_of(path) is not None]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def newest(folder):
    """`(path, checkpoint)` of the newest good checkpoint in `folder`, read once; warns of each bad one on stderr.

    Raises `UserError` where none is good.
    """
    candidates = files(folder)
    for path in candidates:
        try:
            return path, read(path)
        except UserError as error:
            print(f"warning: {error}; skipped", file=sys.stderr, flush=True)
    raise UserError(f"none of the {len(candidates)} checkpoints in {folder} can be read: give another folder or file")


def find(resume, log_dir):
    """`(path, checkpoint)` that `--resume RESUME` means, read once; `(None, None)` where `auto` finds none.

    `newest` and `auto` look in `log_dir`; anything else is a checkpoint or the log folder of a run.
    """
    source = Path(log_dir if resume in ("newest", "auto") else resume)
    if resume not in ("newest", "auto"):
        check_exists(resume)
    if os.path.isfile(source):  # for any text; Path.is_file fails on one too long for a name
        return source, read(source)
    if os.path.isdir(source) and files(source):
        return newest(source)
    if resume == "auto":
        return None, None
    raise UserError(f"--resume: there is no checkpoint (model_*.pt, rolling_*.pt) at {source}; start without "
                    "--resume, or with --resume auto")


def check_exists(resume):
    """Raise `UserError` where there is nothing at the path `resume`; it names the checkpoints beside it."""
    if os.path.exists(resume):  # for any text; Path.exists fails on one too long for a name
        return
    path = Path(resume)
    others = files(path.parent) if path.suffix == ".pt" and os.path.isdir(path.parent) else []
    instead = "a checkpoint or the log folder of a run"
    if others:
        instead = f"one of {path.parent}: {', '.join(file.name for file in others[-4:])}"
    raise UserError(f"--resume {resume} is not there: give {instead}")


def prune(log_dir, keep):
    """Delete the rolling checkpoints in `log_dir` except the newest `keep`; nothing else is ever deleted."""
    rolling = [path for path in files(log_dir) if path.name.startswith("rolling_")]
    for path in rolling[keep:]:
        path.unlink()


@contextlib.contextmanager
def naming(path):
    """Raise errors from inside the block as a `UserError` that names `path`, an undamaged file that does not fit."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} was altered or is another program's ({reason:.200}): use another one") from error


# ---------------------------------------------------------------------------------------------------------------
# Torch files that may be damaged or hostile
# ---------------------------------------------------------------------------------------------------------------
class Inert:
    """Stands in for a pickled config class of another program: takes its attributes and does nothing."""


# What zipfile and torch.load raise, beside exceptions of their own, on bytes that are not in the format they expect.
_MALFORMED = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
              ArithmeticError, MemoryError, struct.error)


def read_pt(path):
    """The dictionary in the torch file at `path`, its tensors on the CPU. Nothing in the file is executed.

    The CRC-32 that torch.save's zip keeps for every record is checked first, since torch.load takes a flipped bit for
    a weight. Raises `UserError` for a file that is missing, empty, cut short, damaged, from a torch before 1.6, or
    that contains anything but tensors and plain types. The one class let in is another program's `GPTConfig`, as an
    inert object with its attributes.
    """
    try:
        with open(path, "rb") as file:
            _check_zip(path, file)
            content = _unpickle(path, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it contains a {type(content).__name__}, not a dictionary")
    return content


def _check_zip(path, file):
    """Raise `UserError` unless `file` is a zip as torch.save writes it, every record whole by its CRC-32."""
    head = file.read(len(LFS_POINTER))
    if head[:1] == b"\x80":  # how a bare pickle begins
        command = f"torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
        raise UserError(f"{path} is not a checkpoint, or one of a torch before 1.6: rewrite it in Python by {command}")
    if head == LFS_POINTER:
        refuse_lfs_pointer(path)
    if head[:2] != b"PK":
        what = "not a zip, which torch.save writes" if head else "empty"
        raise UserError(f"{path} is not a checkpoint: it is {what}")
    try:
        with zipfile.ZipFile(file) as archive:
            _check_layout(archive, path)
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"record {damaged} fails its checksum")
    except (zipfile.BadZipFile, *_MALFORMED) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): use an older one or copy it again") from error


def _check_layout(archive, path):
    """Raise `BadZipFile` unless the records are stored as torch.save does it: plain, one after another, in the file.

    Records that share bytes let a small file keep the checksums busy for as long as it likes.
    """
    size = Path(path).stat().st_size
    names, end = set(), 0
    for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
        # subtle: torch.load makes uninitialised memory of a record that is marked as a folder (0x10)
        if record.compress_type != zipfile.ZIP_STORED or record.external_attr & 0x10:
            raise zipfile.BadZipFile(f"record {record.filename} is not marked as torch.save does it")
        if record.header_offset < end or record.filename in names:
            raise zipfile.BadZipFile(f"record {record.filename} overlaps another one")
        names.add(record.filename)
        end = record.header_offset + zipfile.sizeFileHeader + record.compress_size
    if end > size:
        raise zipfile.BadZipFile("its records are larger than the file")


def _unpickle(path, file):
    """What torch reads from the checked `file`."""
    try:
        file.seek(0)
        classes = get_unsafe_globals_in_checkpoint(file)
        if code := [name for name in sorted(classes) if not name.endswith(".GPTConfig")]:
            raise UserError(f"{path} refers to code ({', '.join(map(repr, code)):.200}): save plain weights")
        file.seek(0)
        with safe_globals([(Inert, name) for name in classes]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_MALFORMED) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is not a checkpoint: torch cannot read it ({reason:.200})") from error


def check_tensors(tensors, where):
    """Raise `UserError` unless `tensors`, a dict read from `where`, maps names to whole tensors on the CPU."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where} contains {name!r:.100} of type {type(tensor).__name__} where a tensor belongs")
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{where}: tensor {name} ({tensor.dtype}) does not consist of plain numbers")
