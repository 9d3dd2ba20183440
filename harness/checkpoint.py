"""One checkpoint's whole life: what is in it, when and how it is written, checked, found, resumed from and pruned.

A checkpoint is one file of tensors and plain types as torch.save writes it. Its keys are declared twice over, and
nowhere else: the fields of the trainer's `TrainState` are what a run resumes from, those of `Header` say what it was.
Nothing that is read can run code.
"""

import contextlib
import hashlib
import os
import pickle
import re
import struct
import sys
import time
import zipfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from harness import commands, machine
from harness.cli import UserError, say
from harness.files import atomic_file, refuse_lfs_pointer, tolerate_full_disk
from harness.fingerprints import contents_sha256

FORMAT_VERSION = 1
PROBE_TOLERANCE = 0.01
PLAIN = (int, float, bool, str, list, dict, type(None))


@dataclass
class Header:
    """What a checkpoint says of its run beside the state. A default is what an older file without the key means."""

    format_version: int
    config: dict  # the model's
    train_config: dict
    position: int  # sequences read since step 0, by all ranks together
    micro_batch_size: int
    world_size: int
    data: dict  # fingerprints of the splits
    dtype: str | None = None  # this and the next two are what the digits depend on, see `Runtime.numerics`
    compiled: bool | None = None
    threads: int | None = None
    tokenizer: str | None = None  # the JSON of the model's own; None: GPT-2's
    not_gpt2: str | None = None  # why no Hugging Face folder can be made of it, None if one can
    probe: list | None = None  # what the model computes, see `probe`


# === A run's checkpoints ==========================================================================
def save_if_due(run):
    """Write the milestone or rolling checkpoint that is due at this step, on all ranks."""
    cfg, step = run.cfg, run.state.step
    last = step >= cfg.max_steps
    if step and (last or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0)):
        save(run, milestone_name(step), required=last)
    elif step and cfg.save_minutes and run.rt.clock() - run.saved_at > 60 * cfg.save_minutes:
        save(run, rolling_name(step))


def save(run, name, required=False):
    """Write the state of a run as the checkpoint `name`, unless that file is it already. Rank 0 writes, all wait.

    A full disk is a warning, unless the checkpoint is `required`. best.pt is no checkpoint to resume from.
    """
    saved_as = Path(run.cfg.log_dir, name).resolve(), run.state.step
    run.tried_at = run.state.step
    if run.saved_as != saved_as:
        run.rt.on_rank0(_save_on_rank0, run, name, required)
    if name != "best.pt":
        run.saved_as, run.saved_at = saved_as, run.rt.clock()


def rescue(run):
    """Save the state of a run that an error ends, unless that was done or tried at this step."""
    if run.tried_at != run.state.step:
        save(run, rolling_name(run.state.step), required=True)


def _save_on_rank0(run, name, required):
    cfg, state, log = run.cfg, run.state, run.log
    started, path = time.perf_counter(), Path(cfg.log_dir, name)
    fix = commands.resume(cfg.log_dir) if required else None
    if required:  # the last one; by then it is known, except in the shortest runs
        run.hashes.wait(10)
    content = contents(state, header(run))
    with tolerate_full_disk(f"{path} is not written; those before it stay", fix):
        log.sync()
        write(path, content)
        if name == "best.pt":
            state.best_id = contents_id(path)
        known = {split: contents_sha256(of_split) for split, of_split in content["data"].items()}
        log.write(state.step, "checkpoint", file=name, data_sha256=known, seconds=time.perf_counter() - started)
        prune(cfg.log_dir, cfg.keep_checkpoints)


def header(run):
    """The `Header` of a checkpoint that is written now."""
    cfg, state = run.cfg, run.state
    own = getattr(state.model, "tokenizer", None)
    return Header(
        format_version=FORMAT_VERSION,
        config=asdict(state.model.config),
        train_config={**asdict(cfg), "asked": cfg.all_asked, "changes": cfg.changes},
        position=state.step * (cfg.total_batch_size // cfg.seq_len),
        micro_batch_size=run.micro_batch_size,
        world_size=run.rt.world_size,
        data=run.hashes.for_checkpoint(),
        **run.rt.numerics(),
        tokenizer=own and own.json,
        not_gpt2=run.not_gpt2,
        probe=probe(state.model),
    )


@torch.no_grad()
def probe(model):
    """Log-probabilities that a model gives to 8 fixed tokens, in fp32: by them its function is known again."""
    T, V = min(8, model.config.block_size), model.config.vocab_size
    ids = torch.tensor([[(7919 * i + 1) % V for i in range(T + 1)]], device=next(model.parameters()).device)
    with machine.plain_fp32(model):
        logits, _ = model(ids[:, :-1])
    return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten().tolist()


def weights_sha256(model):
    """SHA-256 of a model's tensors, as they are on this device."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_probe(model, saved, path):
    """Say so on stderr if the code that runs computes something else for the weights of the checkpoint `saved`.

    A log-probability may differ by `PROBE_TOLERANCE`, which is a hundred times what another device makes of it.
    """
    before = saved["probe"]
    if before is None:
        return
    difference = max((abs(a - b) for a, b in zip(before, probe(model))), default=0.0)
    if difference > PROBE_TOLERANCE:  # never for nan
        say(f"WARNING: {path} was written by other code: for its weights the model here computes something else (a "
            f"log-probability differs by {difference:.2g})", sys.stderr)


def contents(state, header):
    """A checkpoint's keys and values: all fields of a `Header` and of a state, as tensors and plain types."""
    return {f.name: _saved(getattr(part, f.name)) for part in (header, state) for f in fields(part)}


def _saved(value):
    """What a checkpoint holds of a value: the state dict of what has one, also within a dict."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, dict):
        return {name: _saved(inner) for name, inner in value.items()}
    return value


def restore(state, saved):
    """Give a state, whose `model` was made from the checkpoint `saved`, everything else in it.

    What an older file does not have stays as it is. Raises `ValueError` or `LookupError` where something does not fit.
    """
    for f in fields(state):
        if f.name in saved and f.name != "model":
            setattr(state, f.name, _restored(getattr(state, f.name), saved[f.name]))


def _restored(value, saved):
    """`value` with what a checkpoint holds of it; the counterpart of `_saved`."""
    if isinstance(value, torch.optim.Optimizer):
        _restore_optimizer(value, saved)
    elif hasattr(value, "load_state_dict"):
        if saved:  # a scaler's is empty where the run had another dtype
            value.load_state_dict(saved)
    elif isinstance(value, dict):
        return {name: _restored(inner, saved[name]) for name, inner in value.items()}
    else:
        return saved
    return value


def _restore_optimizer(optimizer, saved):
    """Restore an optimizer's tensors; its settings come from the config. Fused kernels do not check shapes: we do."""
    name = type(optimizer).__name__
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len({tuple(optimizer.state[p]) for p in parameters}) > 1:
        raise ValueError(f"{name} does not have the same figures for every parameter")
    for p in parameters:
        if any(slot.shape not in ((), p.shape) for slot in optimizer.state[p].values()):
            raise ValueError(f"{name} has another shape than its parameter, {tuple(p.shape)}")


# === Writing and reading one file =================================================================
def write(path, content):
    """Write `content`, see `contents`, to `path`, whole or not at all. Raises `OSError` where there is no room."""
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # subtle: after a failed write torch closes its zip, which fails too and hides the full disk's OSError
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def contents_id(path):
    """A hash by which the tensors of a checkpoint are known, None where there is no whole file: of the sizes and CRC-32
    that its zip keeps for every one. Takes milliseconds; `read` holds the tensors themselves against the CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()
                       if "/data/" in record.filename]
    except (OSError, zipfile.BadZipFile, *_MALFORMED):
        return None
    return hashlib.sha256(repr(records).encode()).hexdigest()


def best_id_of(log_dir, state):
    """The `best_id` of a state that was restored. Of an older checkpoint, which has none, that of a best.pt of the step
    and loss which the state knows; None if there is none."""
    path = Path(log_dir, "best.pt")
    if state.best_id or state.best_val_loss is None or not path.exists():
        return state.best_id
    try:
        best = read(path, type(state))
    except UserError:
        return None
    return contents_id(path) if best["step"] <= state.step and best["val_loss"] == state.best_val_loss else None


def read(path, state_class=None):
    """The checkpoint at `path` as a dict, its tensors on the CPU; `UserError` if it is bad, see `check`."""
    return check(read_pt(path), path, state_class)


def check(content, path, state_class=None):
    """`content`, read from `path` by `read_pt`, with the values that keys missing in an older file have.

    Raises `UserError` where a field of `Header` or, if given, of the dataclass `state_class` is missing or bad.
    """
    version = content.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version!r:.50}, and this program reads {FORMAT_VERSION}: use the "
                        "version of the program that wrote it")
    if state_class is None and not _is_of_type(content.get("step", 0), int):
        raise UserError(f"{path} is damaged: its step is {content['step']!r:.50}")
    schema = {f.name: f for part in (Header, state_class) if part for f in fields(part)}
    defaults = {name: f.default for name, f in schema.items() if f.default is not MISSING}
    content = defaults | content
    if missing := sorted({"model", *schema} - content.keys()):
        raise UserError(f"{path} is not a checkpoint of this program: it has no {', '.join(missing)}")
    for name, f in schema.items():
        if not _is_of_type(content[name], f.type):
            raise UserError(f"{path} is damaged: its {name} is {content[name]!r:.50}")
    check_tensors(content["model"], path)
    return content


def _is_of_type(value, wanted):
    """Whether a checkpoint may hold `value` for a field of the type `wanted`. Whole numbers are at least 0."""
    kinds = get_args(wanted) or (wanted,)
    if isinstance(value, bool):  # which Python takes for an int
        return bool in kinds
    if isinstance(value, int):
        return float in kinds or (int in kinds and value >= 0)
    if value is not None and any(kind not in PLAIN for kind in kinds):
        return isinstance(value, dict | torch.Tensor)  # what has a state dict is one in the file
    return isinstance(value, kinds)


# === Finding files ================================================================================
def milestone_name(step):
    """File name of the checkpoint after `step` updates that is kept."""
    return f"model_{step:05d}.pt"


def rolling_name(step):
    """File name of the checkpoint after `step` updates that is pruned when newer ones exist."""
    return f"rolling_{step:05d}.pt"


def step_of(path):
    """The step in the name of a milestone or rolling checkpoint; None for any other name."""
    name = re.fullmatch(r"(?:model|rolling)_([0-9]{5,})\.pt", Path(path).name)
    return int(name[1]) if name else None


def files(folder):
    """The milestones and rolling checkpoints in `folder`, a list of `Path`, newest first.

    Newest is by the step in the name; of two with one step the milestone comes first, since it is never pruned.
    """
    found = [path for path in Path(folder).glob("*.pt") if step_of(path) is not None]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def newest(folder, state_class=None):
    """`(path, checkpoint)` of the newest good checkpoint in `folder`, read once; warns of each bad one on stderr.

    `state_class` as in `check`. Raises `UserError` where none is good.
    """
    candidates = files(folder)
    for path in candidates:
        try:
            return path, read(path, state_class)
        except UserError as error:
            say(f"warning: {error}; skipped", sys.stderr)
    raise UserError(f"none of the {len(candidates)} checkpoints in {folder} can be read: give another folder or file")


def find(resume, log_dir, state_class):
    """`(path, checkpoint)` that `--resume RESUME` means, read once; `(None, None)` where `auto` finds none.

    `newest` and `auto` look in `log_dir`; anything else is a checkpoint or the log folder of a run.
    """
    source = Path(log_dir if resume in ("newest", "auto") else resume)
    if resume not in ("newest", "auto"):
        check_exists(resume)
    if os.path.isfile(source):  # for any text; Path.is_file fails on one too long for a name
        return source, read(source, state_class)
    if os.path.isdir(source) and files(source):
        return newest(source, state_class)
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
    except OSError as error:
        raise UserError(f"{path} cannot be used ({error.strerror or error}): give another one") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not fit this code ({reason:.200}): run the code that wrote it, or use another "
                        "file") from error


# === Torch files that may be damaged or hostile ===================================================
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
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            if (head := file.read(2)) != b"PK":
                what = "not a zip, which torch.save writes" if head else "empty"
                rewrite = f"torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
                raise UserError(f"{path} is not a checkpoint: it is {what}. One of a torch before 1.6 must be "
                                f"rewritten, in Python: {rewrite}")
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    # subtle: no checksum covers the record's own marks. One bit makes it a folder (0x10), of which
                    # torch.load makes uninitialised memory.
                    if record.compress_type != zipfile.ZIP_STORED or record.external_attr & 0x10:
                        raise zipfile.BadZipFile(f"record {record.filename} is not marked as torch.save does it")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"record {damaged} fails its checksum")
            file.seek(0)
            classes = get_unsafe_globals_in_checkpoint(file)
            if code := [name for name in sorted(classes) if not name.endswith(".GPTConfig")]:
                raise UserError(f"{path} refers to code ({', '.join(map(repr, code)):.200}): save plain weights")
            file.seek(0)
            with safe_globals([(Inert, name) for name in classes]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_MALFORMED) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read as a checkpoint ({reason:.200}): use an older one, or copy it "
                        "again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it contains a {type(content).__name__}, not a dictionary")
    return content


def check_tensors(tensors, where):
    """Raise `UserError` unless `tensors`, read from `where`, is a dict of names and whole tensors on the CPU."""
    if not isinstance(tensors, dict):
        raise UserError(f"{where} has a {type(tensors).__name__} where its tensors belong")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{where} contains {name!r:.100} of type {type(tensor).__name__} where a tensor belongs")
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{where}: tensor {name} ({tensor.dtype}) does not consist of plain numbers")
