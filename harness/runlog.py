"""What a run says as it goes: rows for log.txt, metrics.jsonl, console and tracker, and what is made of them.

`RunLog.write` takes every row everywhere; what is shown of it is declared in harness/rows.py. The functions below it
make rows of a run's figures. Only rank 0 writes. Knows steps and figures, no models.
"""

import bz2
import contextlib
import errno
import gc
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from harness import checkpoint, code, commands, machine, rows, rundir, tokenizer
from harness.cli import UserError, count, duration, say
from harness.files import DISK_FULL, atomic_file, sync, tolerate_full_disk

WINDOW = 20  # updates whose mean loss says where a run stands
ESTIMATE_AFTER = 5  # updates, after which their time is known well enough to say when the run will end
INDENT = "\n" + 13 * " "  # under what follows "step   250 | "


class RunLog:
    """The log of one run. `drawing` is the module that draws curves. Files are written once `open` was called."""

    def __init__(self, cfg, rt, drawing):
        self.cfg, self.rt, self.drawing = cfg, rt, drawing
        # {kind: (steps, values in log.txt)}, and bits per byte of the validations
        self.history = {name: ([], []) for name in ("train", "val", "hella", "bits_per_byte")}
        self.last = {}  # {kind: its newest row}
        self.logged = set()  # (step, kind) of the rows that the files had when they were opened
        self.losses = deque(maxlen=100)  # of recent updates, less those that were skipped
        self.lowest = math.inf  # mean of `WINDOW` of them so far
        self.update_seconds = deque(maxlen=20)
        self.first_step = 0  # that this process makes
        self.record = self.text = self.bar = None
        self.error = None  # a `UserError`, once a file cannot be written for another reason than a full disk
        self.tracker = NoTracker()
        self.plotted = time.monotonic()

    def start_tracker(self, tracker_id):
        """Start the tracker, on rank 0; `UserError` where it cannot. `tracker_id` is that of the run to continue."""
        if self.cfg.tracker != "none":
            self.tracker = Tracker(self.cfg, tracker_id)

    def add_earlier(self, rows):
        """Take in the rows of the run that is resumed, those before its step."""
        for row in rows:
            self._remember(row)
            self.logged.add((row["step"], row["kind"]))

    def open(self):
        """Open both files, to write from now on."""
        if self.rt.rank == 0:
            folder = Path(self.cfg.log_dir)
            self.record, self.text = LineFile(folder / "metrics.jsonl"), LineFile(folder / "log.txt")

    def has(self, step, kind):
        """Whether the files had a row of this kind at the step that the run resumed from."""
        return (step, kind) in self.logged

    def write(self, step, kind, **values):
        """Log one row: any kind, any values that JSON can hold, also tensors."""
        row = {"step": step, "kind": kind, **values}
        self._remember(row)
        if self.record is not None:
            try:
                self.record.add(rows.to_json(row))  # first, so that no row of log.txt is without its record
                if line := rows.log_line(row):
                    self.text.add(line)
            except OSError as error:
                self.error = UserError(f"{self.cfg.log_dir}: the log cannot be written ({error.strerror}): see to its "
                                       f"disk, then resume with {commands.resume(self.cfg.log_dir)}")
        if (figures := rows.tracked(row)) or kind == "sample":
            self.tracker.log(step, figures, values.get("texts"))
        self._show(row)

    def _remember(self, row):
        kind = row["kind"]
        self.last[kind] = row
        shown = {kind: row.get(rows.shown_key(kind))}
        if kind == "val":
            shown["bits_per_byte"] = row.get("bits_per_byte")  # older rows have none
        for name, value in shown.items():
            if value is not None:
                steps, values = self.history.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
        if kind == "train" and not row.get("skipped") and math.isfinite(row["loss"]):
            self.losses.append(row["loss"])
            if len(self.losses) >= WINDOW:
                self.lowest = min(self.lowest, statistics.fmean(list(self.losses)[-WINDOW:]))

    def _show(self, row):
        """Show a row on the console, an update in the progress bar where there is one."""
        step, kind = row["step"], row["kind"]
        if self.bar is not None and kind in ("train", "val"):
            self.bar.show(bar_figures(row), seconds_left(self, step + (kind == "train")))
        line = rows.console_line(row)
        if line and not (kind == "train" and self.bar is not None):
            if kind == "val" and self.cfg.eval_only:
                line += f" ({row['bits_per_byte']:.4f} bits per byte)"
            self.rt.print(line)
        for i, text in enumerate(row.get("texts", ())):
            self.rt.print(f"step {step:5d} | sample {i}: {text.replace(chr(10), INDENT)}")

    def close_bar(self):
        """Leave the bar where it is, so that what follows stands below it."""
        if self.bar is not None:
            self.bar.close()

    def sync(self):
        """Flush both files to disk, so that no checkpoint is ahead of them. `OSError` where it is full."""
        if self.error is None:  # else a log that lacks rows is better than no checkpoint
            self.record.sync()
            self.text.sync()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close_bar()
        self.tracker.finish()
        for file in (self.record, self.text):
            if file is not None:
                file.close()


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a run
# ---------------------------------------------------------------------------------------------------------------------


def open_log(run, plan, seconds):
    """Begin to write: make room in --log_dir, take in the rows of a run that is resumed, write config.json and code/.

    `seconds`: {"start": ..., "compile": ...}, the first rows.
    """
    cfg, rt, log, state = run.cfg, run.rt, run.log, run.state
    resumed_at = state.step if plan.checkpoint_path else None
    if resumed_at is not None:
        run.saved_as = plan.checkpoint_path.resolve(), state.step
    rt.on_rank0(log.start_tracker, state.tracker_id)  # if this fails, log/ is untouched
    state.tracker_id = log.tracker.id
    state.best_id = rt.on_rank0(checkpoint.best_id_of, cfg.log_dir, state)
    if "val_tokens" in plan.changed:  # losses of other text say nothing about the best so far
        state.best_val_loss = state.best_id = None
    if note := rt.on_rank0(rundir.archive_old_run, cfg.log_dir, resumed_at, state.best_id):
        rt.print(note)
    best_is_lost = state.best_id and not rt.on_rank0(os.path.exists, os.path.join(cfg.log_dir, "best.pt"))
    if best_is_lost and state.val_loss != state.best_val_loss:
        state.best_val_loss = state.best_id = None
        rt.print("WARNING: best.pt is gone, or is not this run's: the best one from here on counts; without any "
                 "hf/ gets the last model")
    if resumed_at is not None:
        log.add_earlier(rt.on_rank0(rows.trim_rows, cfg.log_dir, state.step))
    log.open()
    if best_is_lost and state.best_val_loss is not None:  # the model that is resumed is the best one
        checkpoint.save(run, "best.pt")
    rt.on_rank0(write_config, run)
    begins = cfg.init_from != "scratch" and not state.step
    for kind, figure in seconds.items():
        known = {"weights_sha256": checkpoint.weights_sha256(state.model)} if begins and kind == "start" else {}
        log.write(state.step, kind, seconds=figure, **known)
    if plan.changed:
        log.write(state.step, "config", **plan.changed)
    if changed := rt.on_rank0(code.keep_code, run):
        rt.print(f"note: train_gpt2.py has changed during this run; the old one is kept as {changed['kept']}")
        log.write(state.step, "code", **changed)


def write_config(run):
    """Write config.json: the resolved config, and what the figures of the run depend on beside it."""
    cfg, rt, source = run.cfg, run.rt, run.log.drawing.data_source
    own = tokenizer.of(run.state.model)
    record = {"data_source": {"train": source(cfg.data), "val": source(cfg.val_data or cfg.data)},
              "code_sha256": code.code_sha256(run),
              "tokenizer": {"name": str(own), "size": own.size, "sha256": own.fingerprint},
              "config": asdict(cfg), "asked": cfg.all_asked, "changes": cfg.changes,
              "parameters": run.state.model.num_parameters(), "world_size": rt.world_size, "device": rt.notes,
              **rt.numerics(), "git_commit": code.git_commit(), "versions": machine.versions()}
    path = Path(cfg.log_dir, "config.json")
    with tolerate_full_disk("config.json is not written"), atomic_file(path, "w") as file:
        json.dump(record, file, indent=1)


def describe_validation(shards, cfg):
    """A line on what is validated. `UserError` if none of its tokens counts."""
    tokens = sum(shards.targets(i) for i in range(len(shards)))
    whole = ", the whole split" if shards.is_whole else ""
    if not shards.masked:
        return f"validation on {tokens:,} tokens{whole}"
    counted = sum(int(shards.counted([i]).sum()) for i in range(len(shards)))
    if not counted:
        raise UserError(f"--val_tokens {cfg.val_tokens}: they are all in prompts, which do not count: give more, or "
                        "--loss_on all")
    return f"validation on {tokens:,} tokens{whole}, of which {counted:,} count, those of completions"


def start_bar(run):
    """Say what is trained and how, and show a progress bar where the console is a terminal. Its clock runs from now on.
    """
    cfg, log, step, model = run.cfg, run.log, run.state.step, run.state.model
    shape = model.config
    size = ((run.rt.world_size, "rank"), (run.micro_steps, "micro-step"), (run.micro_batch_size, "row"),
            (cfg.seq_len, "token"))
    run.rt.print(f"{count(shape.n_layer, 'layer')} of {count(shape.n_head, 'head')}, width {shape.n_embd}, "
                 f"{shape.vocab_size:,} token ids: {model.num_parameters():,} parameters\n"
                 f"{cfg.optimizer}, {cfg.schedule} schedule, learning rate up to {cfg.max_lr:g}; "
                 f"a step is {' x '.join(count(*part) for part in size)}")
    log.first_step = step
    if run.rt.rank == 0 and sys.stderr.isatty():
        log.bar = Bar(total=cfg.max_steps, initial=step, dynamic_ncols=True)


def log_update(run, stats, seconds):
    """Log the update that a run has just made: what `train_step` returned, and how long it took.

    `seconds` runs from one wait for the device to the next, so it is the time an update really takes; `data_seconds`
    of it the loop waited for reads that came late. Ends all ranks after `max_skipped` skipped updates in a row.
    """
    cfg, rt, log, step = run.cfg, run.rt, run.log, run.state.step - 1
    first, size = step * (cfg.total_batch_size // cfg.seq_len), cfg.total_batch_size // cfg.seq_len
    loss, skipped, before = stats["loss"], stats["skipped"], list(log.losses)
    if skipped:
        stats = stats | {"sequence_ids": run.loader.sequence_ids(first, size).tolist()}
    rate, peak = cfg.total_batch_size / seconds, machine.peak_flops(rt.device)
    mfu = rate * run.state.model.flops_per_token(cfg.seq_len) / (peak * rt.world_size) if peak else None
    allocated, reserved = machine.peak_memory_gb(rt.device)
    log.update_seconds.append(seconds)
    log.write(step, "train", **stats, seconds=seconds, data_seconds=run.loader.seconds, tokens_per_sec=rate, mfu=mfu,
              memory_allocated_gb=allocated, memory_reserved_gb=reserved)
    if log.bar is not None:
        log.bar.update()
    if step + 1 == log.first_step + ESTIMATE_AFTER and step + 1 < cfg.max_steps:
        rt.print(f"step {step:5d} | about {duration(seconds_left(log, step + 1))} from here")
    if skipped:
        rt.print(f"step {step:5d} | WARNING: loss or gradient is not finite: update skipped")
        if run.state.skipped_in_a_row >= cfg.max_skipped:
            rt.fail(f"step {step}: {run.state.skipped_in_a_row} updates in a row (--max_skipped) had no finite loss or "
                    f"gradient; their sequences are in {cfg.log_dir}/metrics.jsonl and begin with "
                    f"{stats['sequence_ids'][:8]}: look at them, or lower --max_lr {cfg.max_lr:g}")
    elif jump := jumped(loss, before, step - log.last.get("spike", {"step": -len(before)})["step"]):
        ids = run.loader.sequence_ids(first, size).tolist()
        log.write(step, "spike", loss=loss, mean=jump[0], deviation=jump[1], sequence_ids=ids)
        rt.print(f"step {step:5d} | WARNING: the loss jumped to {loss:.4f}; over the last {len(before)} steps it was "
                 f"{jump[0]:.4f} +- {jump[1]:.4f}. The step's sequences are in metrics.jsonl; they begin with "
                 f"{ids[:4]}")
    level = diverged(list(log.losses), log.lowest, run.state.model.config.vocab_size)
    if level and "diverged" not in log.last:  # said once
        log.write(step, "diverged", loss=level)
        rt.print(f"step {step:5d} | WARNING: the run diverges: the mean loss of its last updates is {level:.4f}: lower "
                 f"--max_lr {cfg.max_lr:g}")


def diverged(losses, lowest, vocab_size):
    """The mean of the last up to `WINDOW` losses if the run that made them diverges, else None.

    That is a nat above what guessing costs, ln of the vocabulary's size, or the first loss, where weights of other text
    begin higher; or a nat above the `lowest` mean of `WINDOW` losses.
    """
    if len(losses) < 5:
        return None
    mean = statistics.fmean(losses[-WINDOW:])
    return mean if mean > min(max(math.log(vocab_size), losses[0]), lowest) + 1 else None


def jumped(loss, before, steps_since_last):
    """(mean, standard deviation) of the losses `before` where `loss` lies six deviations above them, else None.

    At most once in a hundred steps: what follows a jump is part of it.
    """
    if len(before) < 100 or steps_since_last < 100:
        return None
    mean, deviation = statistics.fmean(before), statistics.stdev(before)
    return (mean, deviation) if loss > mean + 6 * deviation else None


def seconds_left(log, step):
    """Estimate from recent updates and the evaluations still to come; None before anything was measured.

    `step` updates are complete, and the evaluations after them are still to come.
    """
    cfg = log.cfg
    if not log.update_seconds:
        return None
    left = (cfg.max_steps - step) * statistics.median(log.update_seconds)
    for kind, every in (("val", cfg.val_every), ("hella", cfg.hellaswag_every), ("sample", cfg.sample_every)):
        if every and kind in log.last:  # the last evaluation is extra
            left += log.last[kind].get("seconds", 0) * (-(-cfg.max_steps // every) - (step - 1) // every)
    return left


def draw_curves(run, last=False):
    """Draw curves.png after the evaluations of a step, at most every 30 s, and at the `last` one."""
    log, step = run.log, run.state.step
    evaluated = any(log.last.get(kind, {"step": None})["step"] == step for kind in ("val", "hella"))
    if log.record is None or not (last or (step and evaluated and time.monotonic() - log.plotted > 30)):
        return
    try:
        log.drawing.plot([run.cfg.log_dir], Path(run.cfg.log_dir) / "curves.png")
    except Exception as error:  # whatever it is: no picture is worth a run
        run.rt.print(f"WARNING: curves.png is not drawn ({type(error).__name__}: {error})")
    gc.collect()  # a figure's objects refer to one another in circles, 10 MB each
    log.plotted = time.monotonic()


def export(run, holds):
    """Write hf/ unless it is there, and log it. `holds(folder, tensors, step)`: whether it is that model's export.

    That is the best model where a fine-tuning run validates, else the last.
    """
    cfg, state, log = run.cfg, run.state, run.log
    started, folder, step = time.perf_counter(), Path(cfg.log_dir, "hf"), state.step
    best = read_best(run)
    if best:
        step = best["step"]
    weights = best["model"] if best else state.model.state_dict()
    is_written = True
    if not holds(folder, weights, step):
        with tolerate_full_disk(f"{folder} is not written; everything else is saved", commands.resume(cfg.log_dir)):
            try:
                state.model.save_pretrained(folder, weights, step=step, card=model_card(run, step))
            except UserError as error:  # a model that is not GPT-2 any more
                run.rt.print(f"no {folder}: {error}")
                is_written = False
    log.write(state.step, "export", model_step=step if is_written else None, best=best is not None,
              seconds=time.perf_counter() - started)


def read_best(run):
    """What is in best.pt, None where there is none: only fine-tuning runs that validate write it."""
    path = Path(run.cfg.log_dir, "best.pt")
    if run.state.best_id is None or checkpoint.contents_id(path) != run.state.best_id:
        return None
    try:
        return checkpoint.read(path, type(run.state))
    except UserError as error:
        run.rt.print(f"WARNING: {error}; hf/ gets the last model")
        return None


def model_card(run, step):
    """Facts for the model card of the model after `step` updates; None for what is not known."""
    cfg, log = run.cfg, run.log

    def at(kind):
        value = dict(zip(*log.history[kind])).get(step)
        return value if value is not None and math.isfinite(value) else None

    return {
        "tokens": step * cfg.total_batch_size,
        "data": log.drawing.data_source(cfg.data),
        "init_from": None if cfg.init_from == "scratch" else cfg.init_from,
        "val_loss": at("val"),
        "hellaswag": at("hella"),
        "command": commands.as_started(),
    }


def last_words(run, resumed_at, seconds):
    """What was done and where everything is. `resumed_at`: the step of the resume, None for a new run."""
    cfg, rt, log, state = run.cfg, run.rt, run.log, run.state
    if log.bar is not None:
        log.bar.show({}, 0)  # seconds left, now that the last evaluation is over
    log.close_bar()
    folder = Path(cfg.log_dir)
    best = "" if state.best_val_loss is None else f", best validation loss {state.best_val_loss:.4f}"
    val = log.last.get("val", {})
    if run.val_shards and val.get("step") == state.step and val["bits_per_byte"] is not None:
        bits = val["bits_per_byte"]
        best += f" ({bits:.4f} bits per byte at the end{yardstick(run)})"
    since = ""
    if resumed_at is not None:
        since = " since the resume" if state.step > resumed_at else ", nothing left to train"
    tokens = state.step * cfg.total_batch_size
    failing = ""
    if state.skipped_in_a_row or not all(math.isfinite(row.get("loss", 0)) for row in (val, log.last.get("train", {}))):
        failing = " (of a run whose loss is not finite)"
    elif "diverged" in log.last and diverged(list(log.losses), log.lowest, state.model.config.vocab_size):
        failing = f" (of a run that diverged at step {log.last['diverged']['step']:,})"
    rt.print(f"done: {count(state.step, 'step')}, {tokens:,} tokens{best}; {duration(seconds)}{since}")
    rt.print(f"look:   {folder / 'curves.png'}, {folder / 'log.txt'}")
    exported = log.last.get("export", {})
    model = folder / "hf" if exported.get("best") else folder  # sample.py takes the newest checkpoint of a log folder
    rt.print(f"sample: {commands.script('sample.py', '--model', model)}{failing}")
    if exported.get("best"):
        at = f"after {exported['model_step']:,} of {state.step:,} steps"
        rt.print(f"share:  {folder / 'hf'} is the best model, {at}, as a Hugging Face folder; "
                 f"{folder / 'best.pt'} is its checkpoint")
    elif exported.get("model_step") is not None:
        if cfg.init_from != "scratch" and state.best_val_loss is not None and state.best_id is None:
            rt.print("note:   no validation was better than that of the weights it began from; hf/ is the last model")
        rt.print(f"share:  {folder / 'hf'} is a Hugging Face folder{failing}")
    if not failing:
        rt.print(f"more:   {commands.resume(cfg.log_dir, '--max_steps', 2 * state.step)}")


def yardstick(run):
    """What bzip2 needs for the validation text after the training text, as words; none for more than 1M tokens."""
    train, val, own = run.loader.shards, run.val_shards, tokenizer.of(run.state.model)
    if train.tokens + val.tokens > 1_000_000 or val.masked:
        return ""
    train, val = train.text(own), val.text(own)
    packed = len(bz2.compress(train + val)) - len(bz2.compress(train))
    return f"; bzip2 needs {8 * packed / len(val):.2f}" if packed > 0 else ""


def bar_figures(row):
    """{name: text} of the figures that the progress bar shows of a row."""
    if row["kind"] == "val":
        return {"val": f"{row['loss']:.3f}"}
    figures = {"loss": f"{row['loss']:.3f}", "tok/s": tqdm.format_sizeof(row["tokens_per_sec"]),
               "lr": f"{row['lr']:.1e}".replace("e-0", "e-")}
    return figures | ({"mfu": f"{row['mfu']:.0%}"} if row["mfu"] else {})


class Bar(tqdm):
    """tqdm with the time left that it is given, since evaluations take time too, and figures in a fixed order.

    Figures that would leave no room for the bar itself are left out, from the last one on.
    """

    LAYOUT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}]{figures}"
    ORDER = ("loss", "val", "tok/s", "lr", "mfu")
    NARROWEST = 5  # columns of a bar

    def __init__(self, *args, **kwargs):
        self.figures, self.seconds_left = {}, None
        super().__init__(*args, bar_format=self.LAYOUT, **kwargs)

    def show(self, figures, seconds_left=None):
        self.figures |= figures
        self.seconds_left = self.seconds_left if seconds_left is None else seconds_left

    @property
    def format_dict(self):
        known = super().format_dict
        left = "?" if self.seconds_left is None else tqdm.format_interval(self.seconds_left)
        figures = ""
        for name in self.ORDER:
            more = f"{figures} {name} {self.figures[name]}" if name in self.figures else figures
            line = tqdm.format_meter(**known | {"left": left, "figures": more, "bar_format": self.LAYOUT.replace(
                "{bar}", "")})
            if known["ncols"] and len(line) + self.NARROWEST > known["ncols"]:
                break
            figures = more
        return known | {"left": left, "figures": figures}


class LineFile:
    """A file that grows by whole lines at once. What a full disk does not take waits for the next try."""

    def __init__(self, path):
        self.path, self.waiting, self.warned = path, b"", False
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the run)

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

    def close(self):
        self.file.close()

    def sync(self):
        if self.waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        sync(self.file.fileno())


class NoTracker:
    """Stands in where nothing is tracked."""

    id = None

    def log(self, step, values, texts=None):
        pass

    def finish(self):
        pass


def find_tracker(name):
    """The package of a tracker, imported; `UserError` where it is not installed."""
    with contextlib.suppress(ImportError):
        package = importlib.import_module(name)
        if hasattr(package, "init"):  # a folder named wandb/ imports too, as an empty package
            return package
    raise UserError(f"--tracker {name}: the package is not installed: pip install {name}")


class Tracker:
    """A run at Weights & Biases or in Trackio, which has wandb's names. A resume continues it by its id.

    WANDB_MODE=offline works without a network; Trackio keeps everything on this machine and needs no login. Once a
    run has begun its tracker may only warn, and is left alone from then on.
    """

    def __init__(self, cfg, run_id):
        self.name = cfg.tracker
        package = find_tracker(self.name)
        self.table, options = package.Table, {"project": cfg.wandb_project, "resume": "allow", "config": asdict(cfg)}
        options |= {"id": run_id, "dir": cfg.log_dir} if self.name == "wandb" else {"name": run_id}
        try:
            self.run = package.init(**options)
        except (getattr(package, "Error", OSError), OSError, RuntimeError, ValueError) as error:
            # nobody is logged in, there is no network, a folder is read-only
            way_out = " Log in with `wandb login`, or set WANDB_MODE=offline" if self.name == "wandb" else ""
            raise UserError(f"--tracker {self.name}: {error or type(error).__name__}{way_out}") from None
        self.id = self.run.id if self.name == "wandb" else self.run.name

    def log(self, step, values, texts=None):
        if texts is not None:
            values["samples"] = self.table(columns=["step", "text"], data=[[step, text] for text in texts])
        self._call("log", values, step=step)

    def finish(self):
        self._call("finish")

    def _call(self, name, *args, **options):
        if self.run is None:
            return
        try:
            getattr(self.run, name)(*args, **options)
        except Exception as error:  # whatever it is: no tracker is worth a run
            self.run = None
            say(f"WARNING: --tracker {self.name} failed ({type(error).__name__}: {str(error)[:200]}); it gets no more "
                "of this run, whose own logs are complete", sys.stderr)
