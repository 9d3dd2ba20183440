"""One checkpoint's whole life: what is in it, how it is written, checked, found, pruned and resumed from."""

import contextlib
import os
import pickle
import re
import shlex
import struct
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from harness.cli import UserError
from harness.files import atomic_file, tolerate_full_disk

FORMAT_VERSION = 1
CHECKPOINT_KEYS = {
    "model": dict, "config": dict, "step": int, "val_loss": int | float | None, "best_val_loss": int | float | None,
    "optimizer": dict, "scaler": dict | None, "train_config": dict, "position": int, "micro_batch_size": int,
    "world_size": int, "skipped_in_a_row": int, "tracker_id": str | None, "data": dict, "format_version": int,
}


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint files
# ---------------------------------------------------------------------------------------------------------------
class _Inert:
    """Stands in for a pickled config class of another program: takes its attributes and does nothing."""


# What zipfile and torch.load raise, beside exceptions of their own, on bytes that are not in the format they expect.
_MALFORMED = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
              ArithmeticError, MemoryError, struct.error)


def read_pt(path):
    """The dictionary in the torch file at `path`, its tensors on the CPU. Nothing in the file is executed.

    The CRC-32 that torch.save's zip keeps of every record is checked first: torch.load takes a flipped bit for a
    weight. Raises `UserError` for a file that is missing, empty, cut short, damaged, of a torch before 1.6, or that
    holds anything but tensors and plain types. The one class let in is another program's `GPTConfig`, as an inert
    object with its attributes.
    """
    try:
        with open(path, "rb") as file:
            _check_zip(path, file)
            content = _unpickle(path, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__} where a dictionary is needed")
    return content


def _check_zip(path, file):
    """Raise `UserError` unless `file` is a zip as torch.save writes it, every record whole by its CRC-32."""
    head = file.read(2)
    if head[:1] == b"\x80":  # how a bare pickle begins
        again = f"torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
        raise UserError(f"{path} is no checkpoint, or one of a torch before 1.6: rewrite it in Python by {again}")
    if head != b"PK":
        raise UserError(f"{path} is no checkpoint: it is {'no zip, which torch.save writes' if head else 'empty'}")
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                # torch.save sets neither; torch.load makes uninitialised memory of a record marked a folder (0x10)
                if record.compress_type != zipfile.ZIP_STORED or record.external_attr & 0x10:
                    raise zipfile.BadZipFile(f"record {record.filename} is not marked as torch.save does it")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"record {damaged} fails its checksum")
    except (zipfile.BadZipFile, *_MALFORMED) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): use an older one or copy it again") from error


def _unpickle(path, file):
    """What torch reads from the checked `file`."""
    try:
        file.seek(0)
        classes = get_unsafe_globals_in_checkpoint(file)
        if code := [name for name in sorted(classes) if not name.endswith(".GPTConfig")]:
            raise UserError(f"{path} refers to code ({', '.join(map(repr, code)):.200}): save plain weights")
        file.seek(0)
        with safe_globals([(_Inert, name) for name in classes]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_MALFORMED) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is no checkpoint: torch cannot read it ({reason:.200})") from error


def read_checkpoint(path):
    """`read_pt(path)` as one of our own checkpoints: every key there and of its type, or `UserError`."""
    return _check_checkpoint(read_pt(path), path)


def _check_checkpoint(checkpoint, path):
    if missing := [key for key in CHECKPOINT_KEYS if key not in checkpoint]:
        raise UserError(f"{path} is no checkpoint of this program: it lacks {', '.join(missing)}")
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {checkpoint['format_version']!r}: this program reads {FORMAT_VERSION}"
        )
    for key, kind in CHECKPOINT_KEYS.items():
        value = checkpoint[key]
        if not isinstance(value, kind) or (kind is int and value < 0):
            raise UserError(f"{path} is damaged: its {key} is {value!r:.50}")
    _check_tensors(checkpoint["model"], path)
    return checkpoint


@contextlib.contextmanager
def blamed(path):
    """Have what a sound file at `path` with contents of another shape leads to end as a `UserError` that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} was altered or is of another program ({reason:.200}): use an older one") from error


def checkpoint_files(folder):
    """The milestones and rolling checkpoints in `folder`, a list of `Path`, newest first.

    Newest is by the step in the name; of two with one step the milestone comes first, being never pruned.
    """
    found = []
    for path in Path(folder).glob("*.pt"):
        if name := re.fullmatch(r"(model|rolling)_([0-9]{5,})\.pt", path.name):
            found.append((-int(name[2]), name[1], path))
    return [path for *_, path in sorted(found)]


def newest_checkpoint(folder):
    """`(path, checkpoint)` of the newest good checkpoint in `folder`; a warning on stderr for each bad one passed over.

    Raises `UserError` where none is good.
    """
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}; passed over", file=sys.stderr, flush=True)
    raise UserError(f"none of the {len(files)} checkpoints in {folder} can be read: name another folder or file")


def _check_tensors(tensors, where):
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where} holds {name!r:.100} of type {type(tensor).__name__} where a tensor is needed")
        stored = tensor.device.type == "cpu" and tensor.layout == torch.strided and (
            tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        )
        if not stored or not (tensor.is_floating_point() or _is_buffer(name)):
            raise UserError(f"{where}: tensor {name} ({tensor.dtype}) is not made of plain floating-point numbers")


def _is_buffer(name):
    """Whether `name` is the causal mask that older programs kept among the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


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


def save_if_due(run):
    """Write the milestone or rolling checkpoint that is due at this step, on all ranks. Returns whether one was."""
    cfg, state = run.cfg, run.state
    if state.step == 0:
        return False
    last = state.step >= cfg.max_steps
    milestone = cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0
    rolling = cfg.save_minutes and run.rt.clock() - state.saved_at > 60 * cfg.save_minutes
    if last or milestone:
        save(run, f"model_{state.step:05d}.pt", required=last)
    elif rolling:
        save(run, f"rolling_{state.step:05d}.pt")
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
    fix = f"python train_gpt2.py {resume_command(cfg.log_dir)}" if required else None
    content = contents(state, cfg, run.rt.world_size, log.hashes.for_checkpoint())
    with tolerate_full_disk(f"{path} is not written; those before it stay", fix):
        log.sync()
        write(path, content)
        log.row(state.step, "checkpoint", file=name, seconds=time.perf_counter() - started)
        prune(cfg.log_dir, cfg.keep_checkpoints)


def resume_command(log_dir):
    """The flags that resume the run in `log_dir`."""
    return "--resume" + (f" --log_dir {shlex.quote(log_dir)}" if log_dir != "log" else "")


def contents(state, cfg, world_size, data_fingerprints):
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
        "train_config": asdict(cfg),
        "position": state.loader.position,
        "micro_batch_size": state.micro_batch_size,
        "world_size": world_size,
        "skipped_in_a_row": state.skipped_in_a_row,
        "tracker_id": state.tracker_id,
        "data": data_fingerprints,
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


def write(path, content):
    """Write a checkpoint to `path`, whole or not at all. Raises `OSError` where the disk is full."""
    with atomic_file(path) as file:
        try:
            torch.save({"format_version": FORMAT_VERSION, **content}, file)
        except RuntimeError as error:
            raise error.__context__ or error from None  # the full disk's OSError, which torch's close() hides


def prune(log_dir, keep):
    """Delete rolling checkpoints beyond the newest `keep`; nothing else is ever deleted."""
    rolling = [file for file in checkpoint_files(log_dir) if file.name.startswith("rolling_")]
    for file in rolling[keep:]:
        file.unlink()
