"""What a run is going to do: its resume point, preset, data and batch, found and checked before anything is written.

Rank 0 makes the plan, every rank gets it. What it needs of the commands is handed in; it knows no model class.
"""

import contextlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from harness import checkpoint, commands, text, tokenizer
from harness.cli import UserError
from harness.fingerprints import compare_fingerprints
from harness.runlog import count
from harness.shards import Shards, kind_of_data, shards_below, split_of

FEW_TOKENS = 50_000_000  # shards with fewer are for a small model: the 124M one would read them for hundreds of epochs


@dataclass
class Plan:
    """What rank 0 found out before the run starts."""

    cfg: object  # the resolved `TrainConfig`
    checkpoint_path: Path | None  # to resume from
    checkpoint: dict | None  # what is in it, on rank 0, which has read it
    saved_data: dict | None  # the fingerprints of the data in it
    checkpoint_numerics: dict  # its `Runtime.numerics`, as far as it has them
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

    def announcement(self, rt):
        """What the console says before the run starts."""
        def describe(name, value):
            if name == "threads":
                return count(value, "thread")
            return ("compiled" if value else "not compiled") if name == "compiled" else value

        lines = [*self.notes]
        for name, now in rt.numerics().items():
            before = self.checkpoint_numerics.get(name)
            if None not in (before, now) and before != now:
                lines.append(f"note: {describe(name, before)} so far, {describe(name, now)} from here: the losses will "
                             "differ slightly from those of an uninterrupted run")
        return "\n".join([*lines, ", ".join(rt.notes)])

    def check(self, rt):
        """Raise `UserError` where this rank's machine cannot do what rank 0 has planned: it has other data, say."""
        if self.cfg.memory_budget < 1 and not rt.compile:
            raise UserError(f"--memory_budget {self.cfg.memory_budget}: torch.compile does it, and is off: leave it "
                            "out")
        try:
            same = fingerprints(self.train_files, self.val_files, self.cfg.seq_len) == self.data_fingerprints
            reason = "" if same else " (they differ)"
        except UserError as error:
            same, reason = False, f" ({error})"
        if not same:
            raise UserError(f"--data {self.cfg.data}: rank {rt.rank} does not find rank 0's files there{reason}: every "
                            "machine needs the same, on a disk that all share or copied to the same path")


def make_plan(cfg, overrides, world_size, fetch_hellaswag, state_class):
    """Find the resume point, the preset and the data, and check that they fit; writes nothing but the cache.

    `overrides`: {field: value} given on purpose. `fetch_hellaswag(cache_dir)` returns the benchmark's path.
    `state_class`: what a checkpoint to resume from must hold. Raises `UserError`.
    """
    if overrides.get("epochs") is not None and "max_steps" in overrides:
        raise UserError(f"--epochs {overrides['epochs']} and --max_steps {overrides['max_steps']} both set the length: "
                        "give one")
    check_cache_dir(cfg.cache_dir)
    path, saved = find_start(cfg, state_class)
    if saved and cfg.resume:
        cfg, notes = resume_config(cfg, overrides, saved, path, world_size), [f"resuming from {path}"]
    elif saved:
        cfg, notes = eval_config(cfg, overrides, saved), [f"{path}, after {saved['step']:,} updates"]
    else:
        cfg, notes = resolve_preset(cfg, overrides, world_size)
        if cfg.eval_only and "seq_len" not in overrides:
            cfg = replace(cfg, seq_len=context_of(cfg.init_from) or cfg.seq_len)
    if saved and cfg.seq_len > saved["config"].get("block_size", cfg.seq_len):
        raise UserError(f"--seq_len {cfg.seq_len} is beyond the context of {path}, {saved['config']['block_size']}: "
                        "lower it")
    if cfg.eval_only:  # nothing is trained, so only the shape of a micro-batch is left of the batch
        unit = cfg.seq_len * world_size
        cfg = replace(cfg, total_batch_size=max(1, cfg.total_batch_size // unit) * unit)
    bundled = commands.ROOT / cfg.data  # the tiny preset's text, for runs started elsewhere
    if "data" not in overrides and not Path(cfg.data).exists() and bundled.is_file():
        cfg = replace(cfg, data=str(bundled))
    train_files, val_files = text.find_splits(cfg.data, cfg.val_data, cfg.cache_dir, cfg.allow_incomplete,
                                              val=cfg.val_every > 0 or cfg.eval_only)
    data_fingerprints = fingerprints(train_files, val_files, cfg.seq_len)
    if saved and cfg.resume:
        check_same_data(cfg, saved, path, data_fingerprints)
    if cfg.sample_prompt is None:
        cfg = replace(cfg, sample_prompt=first_words((val_files or train_files)[0]))
    tokens = sum((n - 1) // cfg.seq_len * cfg.seq_len for _, _, n in train_files)
    if cfg.epochs is not None:
        cfg = replace(cfg, max_steps=max(1, round(cfg.epochs * tokens / cfg.total_batch_size)))
    check_batch(cfg, world_size)
    if not cfg.eval_only:
        notes += describe_length(cfg, len(train_files), tokens)
        if cfg.sample_every:
            notes.append(f"samples continue {cfg.sample_prompt!r}")
    benchmark = None
    if cfg.hellaswag_every or (cfg.eval_only and "hellaswag_every" not in overrides):
        try:
            benchmark = Path(cfg.hellaswag_path) if cfg.hellaswag_path else fetch_hellaswag(cfg.cache_dir)
        except UserError as error:
            notes.append(f"WARNING: no HellaSwag in this run: {error}")
    numerics = {name: saved[name] for name in ("dtype", "compiled", "threads")} if saved and cfg.resume else {}
    return Plan(cfg, path, saved, saved and saved["data"], numerics, train_files, val_files,
                data_fingerprints, benchmark, notes)


def check_cache_dir(folder):
    """`UserError` where nothing can be written to --cache_dir."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--cache_dir {folder} cannot be written ({error.strerror}): give another folder") from None


def first_words(part):
    """What samples continue where no prompt is given: the first line of a split, or the first six words of it.

    `part` is the first of its files, as in `Plan`. A split that begins inside a document, as the held-out tenth of a
    text does, is read from its first whole line on.
    """
    with contextlib.closing(Shards([part], min(part[2] - 1, 255))) as shards:
        ids = shards.read([0])[0].tolist()
    starts_document = ids[0] == tokenizer.END_OF_TEXT
    ids = ids[starts_document:]
    if tokenizer.END_OF_TEXT in ids:
        ids = ids[: ids.index(tokenizer.END_OF_TEXT)]
    beginning = tokenizer.gpt2().decode(ids, errors="ignore")
    if not starts_document and beginning.count("\n") > 1:
        beginning = beginning.partition("\n")[2]
    line, newline, _ = beginning.lstrip().partition("\n")
    words = line.split()
    if len(words) > 6 or len(line) > 80:
        return " ".join(words[:6])[:80]
    return line + newline


# --- presets and resumes ---


def changes_from_preset(cfg):
    """{field: value} where `cfg` differs from its preset: what was set on purpose, where no flags say so."""
    preset = asdict(type(cfg).from_preset(cfg.preset))
    return {name: value for name, value in asdict(cfg).items() if value != preset[name]}


def resolve_preset(cfg, overrides, world_size):
    """(config of the preset that `auto` means for the data at hand, lines that say so)."""
    if cfg.preset != "auto":
        source = f" as {cfg.config} has it" if cfg.config else ""
        weights = f", weights of {cfg.init_from}" if cfg.init_from != "scratch" else ""
        return cfg, [f"preset {cfg.preset}{source}{weights}"]
    from_preset, folder = type(cfg).from_preset, Path(cfg.data)
    overrides = {name: value for name, value in overrides.items() if name != "preset"}
    if "data" in overrides:
        name, reason = "tiny", "which is text"
        if kind_of_data(folder, cache_dir=cfg.cache_dir) == "shards":
            tokens = count_tokens(folder)
            reason = f"which has about {tokens / 1e6:,.1f}M tokens"
            if tokens >= FEW_TOKENS:
                name = "gpt2"
        other = "; --preset gpt2 trains the 124M model on it" if name == "tiny" else ""
        return from_preset(name, **overrides), [f"preset {name}, by --data {folder}, {reason}{other}"]
    manifest = text.read_manifest(folder) if folder.is_dir() else None
    enough = manifest is None or manifest["complete"] or cfg.allow_incomplete
    files = shards_below(folder) if folder.is_dir() else []
    if enough and any(split_of(file.relative_to(folder)) == "train" for file in files):
        return from_preset("gpt2", **overrides), [f"preset gpt2: {folder}/ is there"]
    found = f"is not complete ({text.shards_there(manifest)})" if manifest else "is not there"
    notes = [f"preset tiny on input.txt, since {folder}/ {found}",
             "the real run: " + commands.script("fineweb.py", "--pretokenized") + " && " +
             commands.script("train_gpt2.py")]
    if world_size > 1:
        notes = ["=" * 110, f"WARNING: {world_size} ranks will train a TOY: " + notes[0], notes[1], "=" * 110]
    return from_preset("tiny", **overrides), notes


def count_tokens(path):
    """About how many training tokens are in the shards at `path`, by the size of the files."""
    files = [path]
    if path.is_dir():
        files = [file for file in shards_below(path) if split_of(file.relative_to(path)) != "val"]
    return sum(file.stat().st_size for file in files) // 2


def find_start(cfg, state_class):
    """(path, contents) of the checkpoint that a run resumes from or evaluates; (None, None) where there is none."""
    if cfg.resume:
        return checkpoint.find(cfg.resume, cfg.log_dir, state_class)
    source = Path(cfg.init_from)
    if not cfg.eval_only or not os.path.exists(source):
        return None, None
    if source.is_dir():
        # a Hugging Face folder is no log folder, even if checkpoints lie beside its weights
        if (source / "model.safetensors").exists() or not checkpoint.files(source):
            return None, None
        return checkpoint.newest(source, state_class)
    if source.suffix != ".pt":
        return None, None
    content = checkpoint.read_pt(source)
    return (source, checkpoint.read(source, state_class)) if "format_version" in content else (None, None)


def context_of(source):
    """The context of a model that is no checkpoint of this program, in tokens; None where it does not say."""
    if source.startswith("gpt2"):
        return 1024  # all of OpenAI's sizes
    with contextlib.suppress(OSError, ValueError, AttributeError):
        context = json.loads(Path(source, "config.json").read_text(encoding="utf-8")).get("n_positions")
        return context if type(context) is int and context > 0 else None
    return None


def merge(cls, before, overrides):
    """The config with the values `before`, a dict, and `overrides` on top.

    What followed from a value that is overridden follows from the new one.
    """
    before = dict(before)
    changed = {name for name, value in overrides.items() if name in before and before[name] != value}
    if "model" in changed:
        before |= dict.fromkeys(("n_layer", "n_head", "n_embd", "max_lr", "min_lr"))
    if "optimizer" in changed:
        before |= dict.fromkeys(("max_lr", "min_lr", "warmup_steps", "schedule", "decay_fraction", "weight_decay"))
    if "max_lr" in changed and before["min_lr"] == cls(**{**before, "min_lr": None}).min_lr:
        before["min_lr"] = None
    if "max_steps" in overrides:
        before["epochs"] = None
    return cls(**{**before, **overrides})


def read_config(cls, preset, overrides):
    """The config in the file `overrides["config"]`, the config.json of a run, with `overrides` on top.

    Where a run writes, what it resumes from and whether it only evaluates or profiles is not taken from it. Raises
    `UserError`, also where a preset or a resume is asked for at the same time.
    """
    path = overrides["config"]
    if preset != "auto" or overrides.get("resume"):
        other = f"--preset {preset}" if preset != "auto" else f"--resume {overrides['resume']}"
        raise UserError(f"--config {path} and {other} both give the config of the run: leave one out")
    try:
        recorded = dict(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"--config {path} is not the config.json of a run ({reason:.200})") from None
    own = ("log_dir", "resume", "eval_only", "profile", "config")
    defaults = {f.name: f.default for f in fields(cls)}
    before = {**defaults, **{k: v for k, v in recorded.items() if k in defaults and k not in own}}
    if {"data", "val_data"} & overrides.keys():
        before["sample_prompt"] = None  # it may be the beginning of the other data
    try:
        cls(**before)  # an error here is the file's, not the flags'
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return merge(cls, before, overrides)


def eval_config(cfg, overrides, saved):
    """The config of an evaluation of the checkpoint `saved`: that of its run, with the flags on top."""
    before = {f.name: saved["train_config"].get(f.name, f.default) for f in fields(cfg)}
    if "data" in overrides:
        before["val_data"] = None
    return merge(type(cfg), before, {**overrides, "eval_only": True, "resume": None, "log_dir": cfg.log_dir,
                                     "preset": before["preset"]})


def resume_config(cfg, overrides, saved, path, world_size):
    """The config in the checkpoint `saved` with the flags given beside --resume, which may not change data or model."""
    other_run = Path(cfg.log_dir, "log.txt")
    if other_run.exists() and other_run.parent.resolve() != path.parent.resolve():
        raise UserError(f"--log_dir {cfg.log_dir} holds another run than {path}: give a new folder or none")
    before = saved["train_config"]
    before = {f.name: before.get(f.name, f.default) for f in fields(cfg)}  # older ones may not have all
    with checkpoint.naming(path):
        type(cfg)(**before)  # an error here is the checkpoint's, not the flags'
    for f in fields(cfg):
        moved = f.name in ("data", "val_data")  # they may lie elsewhere by now: their contents are compared
        if f.metadata["locked_on_resume"] and not moved and overrides.get(f.name, before[f.name]) != before[f.name]:
            raise UserError(f"--{f.name} {overrides[f.name]} contradicts {path}, which has {before[f.name]}: "
                            "leave it out, or start a new run")
    now = {name: getattr(cfg, name) for name in ("log_dir", "resume", "eval_only")}
    cfg = merge(type(cfg), before, {**overrides, **now, "preset": before["preset"]})
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


def describe_length(cfg, shards, tokens):
    """Lines that say how long the run is, with a WARNING where the length is unlikely to be intended."""
    epochs = cfg.max_steps * cfg.total_batch_size / tokens
    notes = [f"{count(shards, 'train shard')}, {tokens:,} tokens; {cfg.max_steps:,} steps of "
             f"{cfg.total_batch_size:,} = {epochs:.2f} epochs"]
    if epochs > 50:
        notes.append(f"WARNING: the data will be read {epochs:,.0f} times and memorized: --epochs sets the length by "
                     "the data, --preset tiny takes a model for small texts")
    if cfg.warmup_steps >= cfg.max_steps:
        top = cfg.max_lr * cfg.max_steps / cfg.warmup_steps
        notes.append(f"WARNING: --warmup_steps {cfg.warmup_steps} of --max_steps {cfg.max_steps}: the learning rate "
                     f"only rises, to {top:.2g} of --max_lr {cfg.max_lr:.2g}")
    return notes
