"""What a run is going to do: its resume point, preset, data and batch, found and checked before anything is written.

Rank 0 makes the plan, every rank gets it. What it needs of the commands is handed in; it knows no model class.
"""

import contextlib
import copy
import filecmp
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness import checkpoint, commands, rundir, text, tokenizer
from harness.cli import UserError, check_values, count
from harness.fingerprints import compare_fingerprints
from harness.fit import divisors
from harness.runlog import find_tracker
from harness.shards import Shards, find_shards, kind_of_data, shards_below, split_of

ONCE = {"log_dir", "resume", "eval_only", "profile", "config"}  # of one command: never taken from an earlier run
LENGTHS = {"max_steps", "epochs", "max_tokens", "minutes"}  # of which one is asked for
PATHS = {"data", "val_data", "tokenizer", "init_from", "log_dir", "cache_dir", "hellaswag_path", "config", "resume"}
SHAPE = {"n_layer", "n_head", "n_embd"}
FOLLOWS = {  # what an earlier run's value takes with it where another one is asked for
    **{name: LENGTHS - {name} for name in LENGTHS},
    "model": {*SHAPE, "max_lr", "min_lr"},
    "optimizer": {"max_lr", "min_lr", "warmup_steps", "schedule", "decay_fraction", "weight_decay"},
    "data": {"sample_prompt"},  # which may be how the old data begins
    "val_data": {"sample_prompt"},
}
NEEDS = {  # flags that change nothing where another one has this value
    "hellaswag_path": ("hellaswag_every", 0), "hellaswag_limit": ("hellaswag_every", 0),
    "sample_prompt": ("sample_every", 0), "num_samples": ("sample_every", 0), "sample_tokens": ("sample_every", 0),
    "val_tokens": ("val_every", 0), "keep_checkpoints": ("save_minutes", 0), "decay_fraction": ("schedule", "cosine"),
    "wandb_project": ("tracker", "none"),
}
FEW_TOKENS = 50_000_000  # shards with fewer are for a small model: the 124M one would read them for hundreds of epochs


@dataclass
class Plan:
    """What rank 0 found out before the run starts."""

    cfg: object  # the resolved `TrainConfig`
    checkpoint_path: Path | None  # to resume from
    checkpoint: dict | None  # what is in it, on rank 0, which has read it
    saved_data: dict | None  # the fingerprints of the data in it
    checkpoint_numerics: dict  # its `Runtime.numerics`, as far as it has them
    changed: dict  # {field: [value so far, value from here]} of a resume
    train_files: list  # (file, offset in bytes, tokens) each, see `find_shards`
    val_files: list | None
    data_fingerprints: dict  # of both splits
    tokenizer: tokenizer.Tokenizer  # of the data and the model
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
        lines = [*self.notes]
        for name, now in rt.numerics().items():
            before = self.checkpoint_numerics.get(name)
            if None not in (before, now) and before != now:
                lines.append(f"note: {name} {before} so far, {now} from here: the losses will differ slightly from "
                             "those of an uninterrupted run")
        return "\n".join([*lines, ", ".join(rt.notes)])

    def check(self, rt):
        """Raise `UserError` where this rank's machine cannot do what rank 0 has planned: it has other data, say."""
        if self.cfg.memory_budget < 1 and not rt.compile:
            raise UserError(f"--memory_budget {self.cfg.memory_budget}: it needs torch.compile, which is off: leave it "
                            "out")
        try:
            same = fingerprints(self.train_files, self.val_files, self.cfg) == self.data_fingerprints
            reason = "" if same else " (they differ)"
        except UserError as error:
            same, reason = False, f" ({error})"
        if not same:
            raise UserError(f"--data {self.cfg.data}: rank {rt.rank} does not find rank 0's files there{reason}: every "
                            "machine needs the same, on a disk that all share or copied to the same path")


def make_plan(cfg, world_size, fetch_hellaswag, state_class, tokenizer_of_model=None):
    """Find the resume point, the preset and the data, and check that they fit; writes nothing but the cache.

    `fetch_hellaswag(cache_dir)` returns the benchmark's path. `state_class`: what a checkpoint to resume from must
    hold. `tokenizer_of_model(source)` returns the `Tokenizer` of what `--init_from` names. Raises `UserError`.
    """
    asked = cfg.asked
    if os.path.realpath(cfg.cache_dir) == os.path.realpath(cfg.log_dir):
        raise UserError(f"--cache_dir and --log_dir are both {cfg.log_dir}: give two folders")
    with checkpoint.naming(f"--cache_dir {cfg.cache_dir}"):
        Path(cfg.cache_dir).mkdir(parents=True, exist_ok=True)
    if cfg.tracker != "none" and not cfg.eval_only:
        find_tracker(cfg.tracker)  # before anything that takes time

    # 1. The config: that of the checkpoint from which the run starts, or of a preset.
    path, saved = find_start(cfg, state_class)
    resumes = saved and cfg.resume
    if resumes:
        cfg, notes = resume_config(cfg, saved, path, world_size), [f"resuming from {path}"]
    elif saved:
        cfg, notes = eval_config(cfg, saved, path), [f"{path}, after {count(saved['step'], 'update')}"]
    else:
        cfg, notes = resolve_preset(cfg, world_size)
        if cfg.eval_only and "seq_len" not in asked:
            cfg = settle(cfg, seq_len=context_of(cfg.init_from) or cfg.seq_len)
    context = saved["config"].get("block_size") if saved else context_of(cfg.init_from)
    if context and cfg.seq_len > context:
        raise UserError(f"--seq_len {cfg.seq_len} is beyond the context of {path or cfg.init_from}, {context}: lower "
                        "it")
    bundled = commands.ROOT / cfg.data  # the tiny preset's text, for runs started elsewhere
    if "data" not in asked and not Path(cfg.data).exists() and bundled.is_file():
        cfg = settle(cfg, data=str(bundled))

    # 2. The data, in the vocabulary of the model if that exists already.
    own = None
    if saved:
        check_shape(cfg, saved["config"], path)
        own = tokenizer.from_json(saved["tokenizer"], path) if saved["tokenizer"] else tokenizer.gpt2_tokenizer()
    elif cfg.init_from != "scratch":
        own = tokenizer_of_model(cfg.init_from)
    if own:
        check_tokenizer(asked, own, path or cfg.init_from, saved)
    train_files, val_files, own = text.find_splits(
        cfg.data, cfg.val_data, cfg.cache_dir, cfg.allow_incomplete, val=cfg.val_every > 0 or cfg.eval_only,
        vocabulary=cfg.tokenizer, asked="tokenizer" in asked, own=own, text_column=cfg.text_column)
    if not saved:
        cfg = note_vocabulary(cfg, own)
    check_seq_len(cfg, train_files, val_files, world_size)
    data_fingerprints = fingerprints(train_files, val_files, cfg)
    if resumes:
        check_same_data(cfg, saved, path, data_fingerprints)
    if cfg.sample_prompt is None:
        cfg = settle(cfg, sample_prompt=first_words(first_part(val_files or train_files), own))

    # 3. Batch and length; what the console says of them.
    changed = {}
    if cfg.eval_only:  # nothing is trained, so only the shape of a micro-batch is left of the batch
        unit = cfg.seq_len * world_size
        cfg = settle(cfg, total_batch_size=max(1, cfg.total_batch_size // unit) * unit)
        check_batch(cfg, world_size)
    else:
        cfg, why = find_length(cfg, train_files, saved)
        if saved and cfg.max_steps < saved["step"] and (given := LENGTHS & asked.keys()):
            raise UserError(f"--{min(given)} {asked[min(given)]} ends at step {cfg.max_steps}: {path} has "
                            f"{saved['step']} updates already: give more, or --resume an older checkpoint")
        check_batch(cfg, world_size)
        if saved:
            cfg, changed = note_changes(cfg, saved, notes)
        if cfg.max_steps:
            notes += describe_length(cfg, train_files, why)
        notes += [f"note: --{name} changes nothing, since --{other} is {value}"
                  for name, (other, value) in NEEDS.items() if name in asked and getattr(cfg, other) == value]
        notes += describe_vocabulary(first_part(train_files), own)
        if any(name.endswith(".mask") for name, *_ in data_fingerprints["train"]):
            notes.append("the loss is taken on completions alone (--loss_on all: on prompts too)")
        if cfg.sample_every:
            notes.append(f"samples continue {cfg.sample_prompt!r}")
    benchmark = None
    if cfg.hellaswag_every or (cfg.eval_only and "hellaswag_every" not in asked):
        try:
            benchmark = Path(cfg.hellaswag_path) if cfg.hellaswag_path else fetch_hellaswag(cfg.cache_dir)
        except UserError as error:
            notes.append(f"WARNING: no HellaSwag in this run: {error}")
    numerics = {name: saved[name] for name in ("dtype", "compiled", "threads")} if resumes else {}
    return Plan(cfg, path, saved, saved and saved["data"], numerics, changed, train_files, val_files,
                data_fingerprints, own, benchmark, notes)


def check_tokenizer(asked, own, source, saved):
    """`UserError` if --tokenizer, where it was `asked` for, is not that of the model in `source`, `own`."""
    if (choice := asked.get("tokenizer")) is None:
        return
    before = saved["train_config"] if saved else {}
    if size := tokenizer.size_to_learn(choice):  # what was learned may have fewer
        same = own.size == size or choice in (before.get("tokenizer"), (before.get("asked") or {}).get("tokenizer"))
    else:
        same = tokenizer.chosen(choice) == own
    if not same:
        raise UserError(f"--tokenizer {choice} contradicts {source}, which has {own}: leave it out")


def check_shape(cfg, config, source):
    """`UserError` if a shape was asked for that is not the one of the model `config`, read from `source`."""
    names = cfg.asked.keys() & SHAPE | (SHAPE if "model" in cfg.asked else set())
    for name in sorted(names & config.keys()):
        if getattr(cfg, name) != config[name]:
            flag = name if name in cfg.asked else "model"
            raise UserError(f"--{flag} {cfg.asked[flag]} contradicts {source}, which has {name} {config[name]}: "
                            "leave it out")


def first_part(files):
    """The first of a split's files that has an input and a target: a shard may be empty, or of a single token."""
    return next(part for part in files if part[2] > 1)


def first_ids(part, own, most):
    """The first ids of a file of shards, at most `most` + 1, and which of them count but the first.

    `part` as in `Plan`, `own` its `Tokenizer`.
    """
    with contextlib.closing(Shards([part], min(part[2] - 1, most), own.size)) as shards:
        return shards.read([0])[0].tolist(), shards.counted([0])[0].tolist()


def first_words(part, own):
    """What samples continue where no prompt is given: of pairs the first prompt, with what leads it; else the first
    line of a split that is surely whole, or six words of it. `part` is the first of its files, as in `Plan`.
    """
    ids, counted = first_ids(part, own, 255)
    if not all(counted) and own.end_of_text in ids:
        begin = ids.index(own.end_of_text)
        return own.decode(ids[begin : 1 + [*counted, True].index(True, begin)])
    ids = ids[ids[0] == own.end_of_text :]
    if own.end_of_text in ids:
        ids = ids[: ids.index(own.end_of_text)]
    beginning = b"".join(own.table[id] for id in ids).decode(errors="ignore")
    if beginning.count("\n") > 1:  # a held-out part of a text begins in the middle of a line
        beginning = beginning.partition("\n")[2]
    line, newline, _ = beginning.lstrip().partition("\n")
    words = line.split()
    if len(words) > 6 or len(line) > 80:
        return " ".join(words[:6])[:80]
    return line + newline


def note_vocabulary(cfg, own):
    """`cfg` with the vocabulary that the data or the model turned out to have, and its preset's numbers for that."""
    if own.json is None:
        return follow(cfg, tokenizer="gpt2")
    if kind_of_data(Path(cfg.data)) == "shards":
        return settle(cfg, tokenizer=cfg.data)
    return cfg if cfg.init_from == "scratch" else settle(cfg, tokenizer=cfg.init_from)


def describe_vocabulary(part, own):
    """Lines that say how long the tokens are, with a WARNING where GPT-2's vocabulary was not made for the text."""
    ids, _ = first_ids(part, own, 16_384)
    characters = len(own.decode([id for id in ids if id not in own.special])) / len(ids)
    notes = [f"{own}: {characters:.2f} characters a token"]
    if own.json is None and characters < 1.5:
        notes.append("WARNING: GPT-2's vocabulary was made for English, and tokens this short slow training: "
                     "--tokenizer 8192 learns one from a text, fineweb.py --train_tokenizer 8192 for shards")
    return notes


# --- precedence: which value holds ---


def resolve(cls, given):
    """{field: value} of a config of class `cls` for the keyword arguments `given`, and "asked", those that ask for it.

    The first of these that has a value for a field wins: what is asked for, the run that --config repeats, the preset,
    the default; `cls.values_for(asked)` knows the last two. None is not asked for. "all_asked" adds what that run was
    asked for, as far as it holds. Raises `UserError`.
    """
    now, kept = given, {}
    if "asked" in given:
        # subtle: `dataclasses.replace` passes what it changes, then all other fields, and `asked` is the first of these
        names = list(given)
        now = {name: given[name] for name in names[: names.index("asked")]}
        replaced = set().union(*(FOLLOWS[name] for name in LENGTHS & now.keys()))
        kept = {name: value for name, value in given["asked"].items() if name not in replaced}
    if len(lengths := [f"--{name} {now[name]}" for name in LENGTHS if now.get(name) is not None]) > 1:
        raise UserError(f"{' and '.join(sorted(lengths))} both set the length: give one")
    asked = {name: value for name, value in (kept | now).items() if value is not None}
    if asked.get("preset") == "auto":
        del asked["preset"]
    check_values(cls, asked)
    asked |= {name: os.path.expanduser(asked[name]) for name in PATHS & asked.keys()}  # a shell does not for --data=~/x
    if "config" in asked:
        return repeat(cls, asked)
    return cls.values_for(asked) | {"asked": asked, "all_asked": asked, "changes": []}


def repeat(cls, asked):
    """`resolve` where a run is repeated by its config.json, the file `asked["config"]`."""
    path = asked["config"]
    if other := [f"--{name} {asked[name]}" for name in ("preset", "resume") if name in asked]:
        raise UserError(f"--config {path} and {other[0]} both give the config of the run: leave one out")
    with checkpoint.naming(f"--config {path}"):
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        recorded = {**record["config"], **{name: record.get(name) for name in ("asked", "changes")}}
    return on_top_of(cls, recorded, asked, f"--config {path}")


def on_top_of(cls, recorded, now, where):
    """`resolve` for a run that begins as another one, whose values were `recorded`, with what is asked for `now`.

    Everything that does not follow from that stays as it was, whatever the defaults have become. Older records do not
    have what was "asked". `where` names the record in errors.
    """
    with checkpoint.naming(where):
        before = {f.name: recorded.get(f.name, f.default) for f in fields(cls)}  # older runs may not have all
        check_values(cls, before)
        before |= {name: os.path.expanduser(before[name]) for name in PATHS if before[name]}
        preset = {name: before[name] for name in ("preset", "tokenizer")}
        asked = {name: value for name, value in (recorded.get("asked") or {}).items()
                 if name in before.keys() - ONCE - {"preset"}}
        check_values(cls, asked)
        old = cls.values_for(preset | asked)
        changes = recorded.get("changes") or []
        list(map(describe_change, changes))  # fails for what is none
    shape = cls.values_for(preset | {name: now[name] for name in {"model", *SHAPE} & now.keys()})
    dropped = set(ONCE)
    for name in now:
        is_new = now[name] != before[name] or (name in LENGTHS and name not in asked)
        if name == "model":  # every run has one, but not always its shape
            is_new = any(shape[part] != before[part] for part in SHAPE)
        dropped |= FOLLOWS.get(name, set()) if is_new else set()
    asked = {name: value for name, value in asked.items() if name not in dropped} | now
    new = cls.values_for(preset | asked)
    if "sample_prompt" in dropped - now.keys():
        new["sample_prompt"] = None  # how the new data begins
    changed = {name for name in before if new[name] != old[name]} | dropped | now.keys()
    history = {"asked": now, "all_asked": asked, "changes": changes}
    return before | {name: new[name] for name in changed} | history


def settle(cfg, **values):
    """`cfg` with values that were found out: nobody asked for them, and nothing follows from them."""
    cfg = copy.copy(cfg)
    vars(cfg).update(values)  # the class is frozen
    return cfg


def follow(cfg, **values):
    """`settle`, with what follows from the values, but for what was found out otherwise."""
    asked = {"preset": cfg.preset, "tokenizer": cfg.tokenizer, **cfg.all_asked}
    before, now = type(cfg).values_for(asked), type(cfg).values_for(asked | values)
    follows = {name for name, value in now.items() if value != before[name] == getattr(cfg, name)}
    return settle(cfg, **{name: now[name] for name in follows} | values)


def resolve_preset(cfg, world_size):
    """(config of the preset that `auto` means for the data at hand, lines that say so)."""
    if cfg.preset != "auto":
        source = f" as {cfg.config} has it" if cfg.config else ""
        weights = f", weights of {cfg.init_from}" if cfg.init_from != "scratch" else ""
        notes = [f"preset {cfg.preset}{source}{weights}"]
        for change in cfg.changes:
            notes.append(f"note: that run {describe_change(change)}; this one has the later value from step 0 on")
        return settle(cfg, changes=[]), notes
    folder, files = Path(cfg.data), []
    if "data" in cfg.asked:
        if kind_of_data(folder, cache_dir=cfg.cache_dir) == "shards":
            tokens = sum(part[2] for part in find_shards(folder, "train", whole=True))
        else:
            tokens = 0
        name = "gpt2" if tokens >= FEW_TOKENS else "tiny"
        reason = f"which has {tokens:,} tokens" if tokens else "which is text"
        other = "; --preset gpt2 trains the 124M model on it" if name == "tiny" else ""
        return replace(cfg, preset=name), [f"preset {name}, by --data {folder}, {reason}{other}"]
    manifest = text.read_manifest(folder) if folder.is_dir() else None
    if folder.is_dir() and (manifest is None or manifest["complete"] or cfg.allow_incomplete):
        files = shards_below(folder)
    if any(split_of(file.relative_to(folder)) == "train" for file in files):
        return replace(cfg, preset="gpt2"), [f"preset gpt2: {folder}/ is there"]
    found = f"is not complete ({text.shards_there(manifest)})" if manifest else "is not there"
    made = f"{commands.script('fineweb.py', '--pretokenized')} && {commands.script('train_gpt2.py')}"
    notes = [f"preset tiny on input.txt, since {folder}/ {found}", f"the real run: {made}"]
    if world_size > 1:
        notes = ["=" * 110, f"WARNING: {world_size} ranks will train a TOY: " + notes[0], notes[1], "=" * 110]
    return replace(cfg, preset="tiny"), notes


def find_start(cfg, state_class):
    """(path, contents) of the checkpoint that a run resumes from or evaluates; (None, None) where there is none."""
    if cfg.resume and (found := checkpoint.find(cfg.resume, cfg.log_dir, state_class))[0]:
        return found
    source = Path(cfg.init_from)
    if not cfg.eval_only:
        start, own = Path(os.path.realpath(source)), Path(os.path.realpath(cfg.log_dir))
        inside = start.relative_to(own).parts if own in (start, *start.parents) else ("elsewhere",)
        is_moved = not inside or inside[0] in rundir.RUN_FILES or inside[0].endswith(".pt")
        if cfg.init_from != "scratch" and os.path.exists(start) and is_moved:
            raise UserError(f"--init_from {source} lies in --log_dir {cfg.log_dir}, and a new run moves it away: give "
                            "another --log_dir")
        return None, None
    if cfg.init_from == "scratch" and "init_from" not in cfg.all_asked:
        source = Path(cfg.log_dir)
        if not checkpoint.files(source):
            raise UserError(f"--eval_only: there is no checkpoint in --log_dir {source}: name a model with --init_from "
                            "(scratch: an untrained one)")
    # a Hugging Face folder is no log folder, even if checkpoints lie beside its weights
    if source.is_dir() and not (source / "model.safetensors").exists() and checkpoint.files(source):
        return checkpoint.newest(source, state_class)
    if source.suffix == ".pt" and source.is_file() and "format_version" in (content := checkpoint.read_pt(source)):
        return source, checkpoint.check(content, source, state_class)
    return None, None


def context_of(source):
    """The context of a model that is no checkpoint of this program, in tokens; None where it does not say."""
    if source.startswith("gpt2") and not os.path.exists(source):
        return 1024  # all of OpenAI's sizes
    with contextlib.suppress(OSError, ValueError, AttributeError):
        context = json.loads(Path(source, "config.json").read_text(encoding="utf-8")).get("n_positions")
        return context if type(context) is int and context > 0 else None
    return None


def eval_config(cfg, saved, path):
    """The config of an evaluation of the checkpoint `saved`: that of its run, with the flags on top."""
    values = on_top_of(type(cfg), saved["train_config"], cfg.asked, path)
    if "data" in cfg.asked:
        values["val_data"] = cfg.asked.get("val_data")
    return settle(cfg, **values)


def resume_config(cfg, saved, path, world_size):
    """The config in the checkpoint `saved` with the flags given beside --resume, which may not change data or model."""
    other_run = Path(cfg.log_dir, "log.txt")
    if other_run.exists() and other_run.parent.resolve() != path.parent.resolve():
        raise UserError(f"--log_dir {cfg.log_dir} holds another run than {path}: give a new folder or none")
    now = {**cfg.asked, "log_dir": cfg.log_dir}
    values = on_top_of(type(cfg), saved["train_config"], now, path)
    fixed = {f.name: f.default for f in fields(cfg) if f.metadata["locked_on_resume"]}
    fixed |= {"preset": "auto"} | ({"minutes": None} if "minutes" in now else {})
    if saved["step"] and "warmup_steps" not in now:  # it may be over: nothing changes it now but its own flag
        values["warmup_steps"] = saved["train_config"].get("warmup_steps", values["warmup_steps"])
    values["tokenizer"] = saved["train_config"].get("tokenizer", "gpt2")  # `check_tokenizer` compares what was asked
    for name, default in fixed.items():
        was = saved["train_config"].get(name, default)
        moved = name in ("data", "val_data")  # they may lie elsewhere by now: their contents are compared
        if values[name] != was and not moved:
            raise UserError(f"--{name} {values[name]} contradicts {path}, which has {was}: leave it out, or start a "
                            "new run")
    cfg = settle(cfg, **values)
    if "micro_batch_size" in now:
        return cfg
    if world_size == saved["world_size"]:  # the same bits need the same micro-batch, found or given
        return settle(cfg, micro_batch_size=saved["micro_batch_size"])
    rows = cfg.total_batch_size // cfg.seq_len // world_size
    return settle(cfg, micro_batch_size=cfg.micro_batch_size and math.gcd(cfg.micro_batch_size, rows))


def note_changes(cfg, saved, notes):
    """(`cfg`, whose `changes` get what a resume changes in the config of the checkpoint `saved`; that alone)."""
    before = saved["train_config"] | {"micro_batch_size": cfg.micro_batch_size and saved["micro_batch_size"]}
    changed = {f.name: [before[f.name], getattr(cfg, f.name)] for f in fields(cfg)
               if f.name in before.keys() - ONCE and getattr(cfg, f.name) != before[f.name]}
    if not changed:
        return cfg, {}
    change = {"step": saved["step"], **changed}
    notes.append(f"note: this run {describe_change(change)}")
    return settle(cfg, changes=[*cfg.changes, change]), changed


def describe_change(change):
    """An entry of a config's `changes`, {"step": s, field: [before, after], ...}, in words."""
    pairs = [f"--{name} {values[0]} to {values[1]}" for name, values in change.items() if name != "step"]
    return f"changed {', '.join(pairs)} at step {change['step']:,}"


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


def fingerprints(train_files, val_files, cfg):
    """{"train": ..., "val": ... or None}: what `Shards.fingerprint` makes of each split."""
    found = {"train": None, "val": None}
    for split, files in (("train", train_files), ("val", val_files)):
        if files:
            with contextlib.closing(Shards(files, cfg.seq_len, masked=cfg.loss_on == "completion")) as shards:
                found[split] = shards.fingerprint()
    return found


# --- batches ---


def check_seq_len(cfg, train_files, val_files, world_size):
    """`UserError`, naming one that does, where a split has no file of --seq_len + 1 tokens."""
    longest = {split: max(files, key=lambda part: part[2])
               for split, files in (("training", train_files), ("validation", val_files)) if files}
    split, (file, _, tokens) = min(longest.items(), key=lambda item: item[1][2])
    if cfg.seq_len > tokens - 1:
        rows = cfg.total_batch_size // world_size // max(1, cfg.micro_batch_size)
        fit = max((d for d in divisors(rows) if d < tokens), default=tokens - 1)
        path = Path(cfg.val_data if cfg.val_data and split == "validation" else cfg.data)
        path = file if path in Path(file).parents else path  # a shard in a folder, but not one that a text has become
        raise UserError(f"--seq_len {cfg.seq_len}: {path} has {tokens:,} tokens for {split}, and a sequence takes "
                        f"{cfg.seq_len} + 1: give --seq_len {fit}, or more data")


def check_batch(cfg, world_size):
    """`UserError`, naming values that do, where the batch does not divide into ranks and micro-batches."""
    def nearest(unit):
        low = cfg.total_batch_size // unit * unit
        return f"{low:,} or {low + unit:,}" if low else f"{unit:,}"

    unit = cfg.seq_len * world_size
    if cfg.total_batch_size % unit:
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is no multiple of --seq_len {cfg.seq_len}"
                        f" x {count(world_size, 'rank')}: take {nearest(unit)}")
    rows = cfg.total_batch_size // unit
    if cfg.micro_batch_size and rows % cfg.micro_batch_size:
        closest = sorted(divisors(rows), key=lambda d: abs(d - cfg.micro_batch_size))[:2]
        raise UserError(f"--micro_batch_size {cfg.micro_batch_size} does not divide the {rows} rows that a "
                        f"rank reads a step: take {' or '.join(map(str, sorted(closest)))}, or a "
                        f"--total_batch_size of {nearest(unit * cfg.micro_batch_size)}")


def find_length(cfg, train_files, saved):
    """(`cfg` with the `max_steps` that its length means, why it is so long where nobody gave one). 0: timed later.

    A text without a length is read twice, in at most 1,000 steps; the text that a preset brings has the preset's own.
    """
    if "minutes" in cfg.asked and not saved:
        return settle(cfg, max_steps=0), ""
    steps, why, tokens = cfg.max_steps, "", tokens_in(train_files, cfg.seq_len)
    if cfg.epochs is not None:
        steps = max(1, round(cfg.epochs * tokens / cfg.total_batch_size))
    elif cfg.max_tokens is not None:
        steps = max(1, round(cfg.max_tokens / cfg.total_batch_size))
    elif not (saved or cfg.config or LENGTHS & cfg.asked.keys()) and kind_of_data(cfg.data) == "text":
        own = commands.ROOT / type(cfg).values_for({"preset": cfg.preset})["data"]
        if own.is_file() and not (Path(cfg.data).is_file() and filecmp.cmp(own, cfg.data, shallow=False)):
            steps = min(1000, max(1, round(2 * tokens / cfg.total_batch_size)))
            why = ": two, in at most 1,000 steps, since none of --epochs, --max_steps, --max_tokens, --minutes is given"
    if steps != cfg.max_steps:
        cfg = settle(cfg, max_steps=steps) if saved else follow(cfg, max_steps=steps)
    return cfg, why


def tokens_in(files, T):
    """Tokens in the whole sequences of `T` in a split's files."""
    return sum((n - 1) // T * T for _, _, n in files)


def describe_length(cfg, train_files, why=""):
    """Lines that say how long the run is, with a WARNING where the length is unlikely to be intended."""
    tokens = tokens_in(train_files, cfg.seq_len)
    epochs = cfg.max_steps * cfg.total_batch_size / tokens
    notes = [f"{count(len(train_files), 'train shard')}, {tokens:,} tokens; {count(cfg.max_steps, 'step')} of "
             f"{cfg.total_batch_size:,} = {epochs:.2f} epochs{why}"]
    if epochs > 50:
        notes.append(f"WARNING: the data will be read {epochs:,.0f} times and memorized: --epochs sets the length by "
                     "the data, --preset tiny takes a model for small texts")
    if cfg.warmup_steps >= cfg.max_steps:
        notes.append(f"WARNING: --warmup_steps {cfg.warmup_steps} of --max_steps {cfg.max_steps}: the learning rate "
                     f"only rises, and does not come down from --max_lr {cfg.max_lr:.2g}")
    return notes
