"""What a run is going to do: its resume point, preset, data and batch, found and checked before anything is written.

Rank 0 makes the plan, every rank gets it. What it needs of the commands is handed in; it knows no model class.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from harness import checkpoint, text
from harness.cli import UserError
from harness.shards import Shards, compare_fingerprints, kind_of_data, shards_below, split_of


@dataclass
class Plan:
    """What rank 0 found out before the run starts."""

    cfg: object  # the resolved `TrainConfig`
    checkpoint_path: Path | None  # to resume from
    checkpoint: dict | None  # what is in it, on rank 0, which has read it
    saved_data: dict | None  # the fingerprints of the data in it
    train_files: list  # (file, offset in bytes, tokens) each, see `find_shards`
    val_files: list | None
    data_fingerprints: dict  # of both splits
    benchmark: Path | None  # HellaSwag's file
    notes: list  # lines for the console

    def __getstate__(self):
        return {**self.__dict__, "checkpoint": None}  # other ranks read the file, which costs less than a broadcast

    def take_checkpoint(self):
        """The contents of the checkpoint, None for a new run. They are handed out once, so that memory is freed."""
        taken, self.checkpoint = self.checkpoint, None
        if taken is None and self.checkpoint_path is not None:
            taken = checkpoint.read(self.checkpoint_path)
        return taken

    def check_data(self, rank):
        """Raise `UserError` where this rank's machine does not have the data that rank 0 planned with."""
        try:
            same = fingerprints(self.train_files, self.val_files, self.cfg.seq_len) == self.data_fingerprints
            reason = "" if same else " (they differ)"
        except UserError as error:
            same, reason = False, f" ({error})"
        if not same:
            raise UserError(f"--data {self.cfg.data}: rank {rank} does not find rank 0's files there{reason}: every "
                            "machine needs the same, on a disk that all share or copied to the same path")


def make_plan(cfg, overrides, world_size, bundled_text, fetch_hellaswag):
    """Find the resume point, the preset and the data, and check that they fit; writes nothing but the cache.

    `overrides`: {field: value} given on purpose. `bundled_text`: the file behind the name that the tiny preset has,
    for runs started elsewhere. `fetch_hellaswag(cache_dir)` returns the benchmark's path. Raises `UserError`.
    """
    if overrides.get("epochs") is not None and "max_steps" in overrides:
        raise UserError(f"--epochs {overrides['epochs']} and --max_steps {overrides['max_steps']} both set the length: "
                        "give one")
    path, saved = checkpoint.find(cfg.resume, cfg.log_dir) if cfg.resume else (None, None)
    if saved:
        cfg, notes = resume_config(cfg, overrides, saved, path, world_size), [f"resuming from {path}"]
    else:
        cfg, notes = resolve_preset(cfg, overrides, world_size)
    if cfg.data == bundled_text.name and "data" not in overrides and not Path(cfg.data).exists():
        cfg = replace(cfg, data=str(bundled_text))
    train_files, val_files = text.find_splits(cfg.data, cfg.val_data, cfg.cache_dir, cfg.allow_incomplete,
                                              val=cfg.val_every > 0 or cfg.eval_only)
    data_fingerprints = fingerprints(train_files, val_files, cfg.seq_len)
    if saved:
        check_same_data(cfg, saved, path, data_fingerprints)
    tokens = sum((count - 1) // cfg.seq_len * cfg.seq_len for _, _, count in train_files)
    if cfg.epochs is not None:
        cfg = replace(cfg, max_steps=max(1, round(cfg.epochs * tokens / cfg.total_batch_size)))
    check_batch(cfg, world_size)
    if not cfg.eval_only:
        notes += describe_length(cfg, len(train_files), tokens)
    benchmark = None
    if cfg.hellaswag_every or (cfg.eval_only and "hellaswag_every" not in overrides):
        try:
            benchmark = Path(cfg.hellaswag_path) if cfg.hellaswag_path else fetch_hellaswag(cfg.cache_dir)
        except UserError as error:
            notes.append(f"WARNING: no HellaSwag in this run: {error}")
    return Plan(cfg, path, saved, saved and saved["data"], train_files, val_files, data_fingerprints, benchmark, notes)


# --- presets and resumes ---


def changes_from_preset(cfg):
    """{field: value} where `cfg` differs from its preset: what was set on purpose, where no flags say so."""
    preset = asdict(type(cfg).from_preset(cfg.preset))
    return {name: value for name, value in asdict(cfg).items() if value != preset[name]}


def resolve_preset(cfg, overrides, world_size):
    """(config of the preset that `auto` means for the data at hand, lines that say so)."""
    if cfg.preset != "auto":
        weights = f", weights of {cfg.init_from}" if cfg.init_from != "scratch" else ""
        return cfg, [f"preset {cfg.preset}{weights}"]
    from_preset, folder = type(cfg).from_preset, Path(cfg.data)
    overrides = {name: value for name, value in overrides.items() if name != "preset"}
    if "data" in overrides:
        name = "gpt2" if kind_of_data(folder) == "shards" else "tiny"
        return from_preset(name, **overrides), [f"preset {name}, by --data {folder}"]
    manifest = text.read_manifest(folder) if folder.is_dir() else None
    enough = manifest is None or manifest["complete"] or cfg.allow_incomplete
    files = shards_below(folder) if folder.is_dir() else []
    if enough and any(split_of(file.relative_to(folder)) == "train" for file in files):
        return from_preset("gpt2", **overrides), [f"preset gpt2: {folder}/ is there"]
    found = text.shards_there(manifest) if manifest else "it is not there"
    notes = [f"preset tiny on input.txt, since {folder}/ is missing ({found})",
             "the real run: python fineweb.py --pretokenized && python train_gpt2.py"]
    if world_size > 1:
        notes = ["=" * 110, f"WARNING: {world_size} ranks will train a TOY: " + notes[0], notes[1], "=" * 110]
    return from_preset("tiny", **overrides), notes


def resume_config(cfg, overrides, saved, path, world_size):
    """The config in the checkpoint `saved` with the flags given beside --resume, which may not change data or model."""
    other_run = Path(cfg.log_dir, "log.txt")
    if other_run.exists() and other_run.parent.resolve() != path.parent.resolve():
        raise UserError(f"--log_dir {cfg.log_dir} holds another run than {path}: give a new folder or none")
    before = saved["train_config"]
    before = {f.name: before.get(f.name, f.default) for f in fields(cfg)}  # older ones may not have all
    with checkpoint.naming(path):
        type(cfg)(**before)  # whatever is wrong with these is not the flags'
    for f in fields(cfg):
        moved = f.name in ("data", "val_data")  # they may lie elsewhere by now: their contents are compared
        if f.metadata["locked_on_resume"] and not moved and overrides.get(f.name, before[f.name]) != before[f.name]:
            raise UserError(f"--{f.name} {overrides[f.name]} contradicts {path}, which has {before[f.name]}: "
                            "leave it out, or start a new run")
    if "max_lr" in overrides and before["min_lr"] == type(cfg)(**{**before, "min_lr": None}).min_lr:
        before["min_lr"] = None  # it followed from the old rate, and follows from the new one
    if "max_steps" in overrides:
        before["epochs"] = None
    now = {name: getattr(cfg, name) for name in ("log_dir", "resume", "eval_only")}
    cfg = type(cfg)(**{**before, **overrides, **now, "preset": before["preset"]})
    if overrides.get("max_steps", saved["step"]) < saved["step"] and not cfg.eval_only:
        raise UserError(f"--max_steps {cfg.max_steps}: {path} has {saved['step']} updates already: give more, or "
                        "--resume an older checkpoint")
    if "micro_batch_size" in overrides:
        return cfg
    if world_size == saved["world_size"]:  # the same bits need the same micro-batch, found or given
        return replace(cfg, micro_batch_size=saved["micro_batch_size"])
    rows = cfg.total_batch_size // cfg.seq_len // world_size
    return replace(cfg, micro_batch_size=cfg.micro_batch_size and math.gcd(cfg.micro_batch_size, rows))


def check_same_data(cfg, saved, path, data_fingerprints):
    """Raise `UserError` where the data are not those of the checkpoint `saved`."""
    for split, now in data_fingerprints.items():
        before = saved["data"].get(split)
        if split == "val" and not (before and now):  # a run may leave out validation, or begin it
            continue
        if reason := compare_fingerprints(before, now):
            name = "val_data" if split == "val" and cfg.val_data else "data"
            raise UserError(f"--{name} {getattr(cfg, name)} does not hold what {path} has for {split}, "
                            f"{saved['train_config'][name]} ({reason}): give that, or start a new run")


def fingerprints(train_files, val_files, T):
    """{"train": ..., "val": ... or None}: what `Shards.fingerprint` makes of each split."""
    found = {"train": None, "val": None}
    for split, files in (("train", train_files), ("val", val_files)):
        if files:
            with contextlib.closing(Shards(files, T)) as shards:
                found[split] = shards.fingerprint()
    return found


# --- batches ---


def check_batch(cfg, world_size):
    """`UserError`, naming values that do, where the batch does not divide into ranks and micro-batches."""
    def nearest(unit):
        low = cfg.total_batch_size // unit * unit
        return f"{low:,} or {low + unit:,}" if low else f"{unit:,}"

    unit = cfg.seq_len * world_size
    if cfg.total_batch_size % unit:
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is no multiple of --seq_len {cfg.seq_len}"
                        f" x {world_size} ranks: take {nearest(unit)}")
    rows = cfg.total_batch_size // unit
    if cfg.micro_batch_size and rows % cfg.micro_batch_size:
        closest = sorted(divisors(rows), key=lambda d: abs(d - cfg.micro_batch_size))[:2]
        raise UserError(f"--micro_batch_size {cfg.micro_batch_size} does not divide the {rows} rows that a "
                        f"rank reads a step: take {' or '.join(map(str, sorted(closest)))}, or a "
                        f"--total_batch_size of {nearest(unit * cfg.micro_batch_size)}")


def divisors(n):
    """All divisors of `n`, in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def smaller_micro_batch(log_dir, B):
    """What to do about a run that is out of memory at micro-batches of `B`: a line."""
    half = max(d for d in divisors(B) if d <= max(1, B // 2))
    return (f"out of memory at --micro_batch_size {B}: resume with python train_gpt2.py "
            f"{checkpoint.resume_command(log_dir)} --micro_batch_size {half}")


def describe_length(cfg, shards, tokens):
    """Lines that say how long the run is, and warn of a length that can hardly be meant."""
    epochs = cfg.max_steps * cfg.total_batch_size / tokens
    notes = [f"{shards} train shard{'s' if shards > 1 else ''}, {tokens:,} tokens; {cfg.max_steps:,} steps of "
             f"{cfg.total_batch_size:,} = {epochs:.2f} epochs"]
    if epochs > 50:
        notes.append(f"WARNING: the data will be read {epochs:,.0f} times and memorized: --epochs sets the length by "
                     "the data, --preset tiny takes a model for small texts")
    if cfg.warmup_steps >= cfg.max_steps:
        top = cfg.max_lr * cfg.max_steps / cfg.warmup_steps
        notes.append(f"WARNING: --warmup_steps {cfg.warmup_steps} of --max_steps {cfg.max_steps}: the learning rate "
                     f"only rises, to {top:.2g} of --max_lr {cfg.max_lr:.2g}")
    return notes


def find_micro_batch(raw_model, compiled, cfg, rt):
    """Rows a forward pass: as given, or the largest that fits one real step. Compiles the model on the way.

    On CUDA sizes are tried from 65,536 tokens down by halves (more gains nothing), on all ranks alike; the CPU and MPS
    take 4,096 tokens, since their caches hold no more.
    """
    largest = (65536 if rt.device.type == "cuda" else 4096) // cfg.seq_len
    sizes = [b for b in divisors(cfg.total_batch_size // cfg.seq_len // rt.world_size) if b <= largest] or [1]
    B = cfg.micro_batch_size or sizes[-1]
    while True:
        with rt.interruptible("compiling" if rt.compile else "trying the micro-batch"):
            fits, failure = try_micro_batch(raw_model, compiled, B, cfg, rt)
        if failures := [failure for failure in rt.gather(failure) if failure]:
            rt.stop_compiling(failures[0])
            continue
        if all(rt.gather(fits)):
            return B
        smaller = [b for b in sizes if b <= B // 2]
        if cfg.micro_batch_size or not smaller:
            rt.fail(f"out of memory at --micro_batch_size {B}, a forward and backward pass of {B} x {cfg.seq_len} "
                    "tokens: lower it, or --seq_len, or the model's size")
        B = smaller[-1]


def try_micro_batch(raw_model, compiled, B, cfg, rt):
    """Whether `B` rows can be trained and validated, and why torch.compile failed or None; the model is left as is."""
    if rt.device.type != "cuda" and not rt.compile:
        return True, None  # nothing to find out or to compile
    try:
        x, y = (torch.zeros((B, cfg.seq_len), dtype=torch.int64, device=rt.device) for _ in "xy")
        # what Adam will allocate in the first update
        spare = torch.empty(2 * sum(p.numel() for p in raw_model.parameters()), device=rt.device)
        for _ in range(2 if rt.device.type == "cuda" else 1):  # the second pass has the first one's gradients
            with rt.autocast():
                _, loss = compiled(x, y)
            loss.backward()
        del spare
        if cfg.val_every or cfg.eval_only:
            raw_model.eval()
            with torch.no_grad(), rt.autocast():
                compiled(x, y)
        return True, None
    except RuntimeError as error:
        failure = rt.why_not_compiled(error)
        if not failure and not isinstance(getattr(error, "inner_exception", error), torch.OutOfMemoryError):
            raise
        if rt.compile:
            torch._dynamo.reset()  # it compiles 8 shapes at most: those that do not fit are not to count
        return False, failure
    finally:
        raw_model.zero_grad(set_to_none=True)
        raw_model.train()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
