"""What a run writes as it goes: log.txt, metrics.jsonl, config.json, the console, curves.png and a tracker.

Only rank 0 writes; on other ranks every method returns without doing anything. Knows steps and figures, no models.
"""

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

from harness import checkpoint, commands, machine
from harness.cli import UserError, say
from harness.files import DISK_FULL, atomic_file, tolerate_full_disk
from harness.fingerprints import BackgroundHashes

ESTIMATE_AFTER = 5  # updates, after which their time is known well enough to say when the run will end


class RunLog:
    """The log of one run. `curves` is the module that draws; `parameters` and `flops_per_token` are the model's.

    Console and tracker work from the start; the files once `open` was called.
    """

    def __init__(self, cfg, rt, parameters, flops_per_token, curves):
        self.cfg, self.rt, self.drawing = cfg, rt, curves
        self.parameters, self.flops_per_token = parameters, flops_per_token
        self.history = {"train": ([], []), "val": ([], []), "hella": ([], [])}
        self.active = False  # whether this process writes the files
        self.tracker, self.bar = NoTracker(), None
        self.first_step = 0  # that this process makes
        self.exported = None  # (step, whether it is the best one) of the model in hf/
        self.seconds = {"train": deque(maxlen=20)}  # of recent updates and of the last evaluation of each kind
        self.recent_losses, self.spike_step = deque(maxlen=100), -100
        self.bits_per_byte = None  # of the last validation
        self.logged = set()  # (step, kind) that the files had when they were opened
        self.plotted = time.monotonic()
        self.hashes = None  # of the data, see `watch_data`

    def start_tracker(self, tracker_id):
        """Start the tracker, on rank 0; `UserError` where it cannot. `tracker_id` is that of the run to continue."""
        if self.cfg.tracker != "none":
            self.tracker = Tracker(self.cfg, tracker_id)

    def open(self, step, note, rows, kinds):
        """Open both logs of a run that starts at `step`, with what `rundir.archive_old_run` returned."""
        if note:
            self.rt.print(note)
        for at, kind, value in rows:
            self._remember(at, kind, value)
        self.first_step, self.logged = step, {(step, kind) for kind in kinds}
        losses = [loss for loss in self.history["train"][1] if math.isfinite(loss)]
        self.recent_losses.extend(losses)
        self.active = self.rt.rank == 0
        if not self.active:
            return
        folder = Path(self.cfg.log_dir)
        self.text, self.metrics = Lines(folder / "log.txt"), Lines(folder / "metrics.jsonl")
        source = self.drawing.data_source
        record = {"data_source": {"train": source(self.cfg.data), "val": source(self.cfg.val_data or self.cfg.data)},
                  "config": asdict(self.cfg), "asked": self.cfg.all_asked, "parameters": self.parameters,
                  "world_size": self.rt.world_size, "device": self.rt.notes, **self.rt.numerics(),
                  "git_commit": machine.git_commit(), "versions": machine.versions()}
        with tolerate_full_disk("config.json is not written"), atomic_file(folder / "config.json", "w") as file:
            json.dump(record, file, indent=1)

    def has(self, step, kind):
        """Whether the files had a row of this kind at the step that the run resumed from."""
        return (step, kind) in self.logged

    def timing(self, function, *args):
        """`function(*args)`, which compiles the model: announced, timed and logged."""
        started = time.perf_counter()
        if self.rt.compile:
            self.rt.print("compiling: a minute or more the first time, a few seconds after that")
        result = function(*args)
        self.row(self.first_step, "compile", seconds=time.perf_counter() - started)
        return result

    def start_training(self, step, micro_batch_size):
        """Say what a step is, and show a progress bar from `step` on where the console is a terminal.

        Called when everything is compiled, so that the bar's clock runs with the updates.
        """
        self.first_step = step
        cfg, ranks = self.cfg, self.rt.world_size
        micro_steps = cfg.total_batch_size // (cfg.seq_len * ranks * micro_batch_size)
        size = ((ranks, "rank"), (micro_steps, "micro-step"), (micro_batch_size, "row"), (cfg.seq_len, "token"))
        self.rt.print(f"{self.parameters:,} parameters; a step is {' x '.join(count(*part) for part in size)}")
        if self.active and sys.stderr.isatty():
            self.bar = Bar(total=cfg.max_steps, initial=step, dynamic_ncols=True)

    def row(self, step, kind, value=None, text=None, **values):
        """One row: to metrics.jsonl, and where `text` is given `step kind text` to log.txt."""
        self._remember(step, kind, value)
        if self.active:
            for name, number in values.items():
                if isinstance(number, float) and not math.isfinite(number):
                    values[name] = None  # JSON has no nan
            self.metrics.add(json.dumps({"step": step, "kind": kind, **values}))
            if text is not None:
                self.text.add(f"{step} {kind} {text}")

    def _remember(self, step, kind, value):
        if kind in self.history:
            self.history[kind][0].append(step)
            self.history[kind][1].append(value)

    def train(self, state, stats, seconds):
        """The row of the update that made `state`: what `train_step` returned, and how long it took.

        `seconds` runs from one wait for the device to the next, so it is the time an update really takes;
        `data_seconds` is what reads that came late kept the loop waiting of it.
        """
        if self.hashes is not None:
            self.hashes.ready()  # ends the run where the data turns out to be other data
        step, data_seconds, state.loader.seconds = state.step - 1, state.loader.seconds, 0.0
        loss, lr, norm = stats["loss"], stats["lr"], stats["grad_norm"]
        if stats["skipped"]:
            stats = stats | {"sequence_ids": self._sequence_ids(state.loader, step)}
        rate, peak = self.cfg.total_batch_size / seconds, machine.peak_flops(self.rt.device)
        mfu = rate * self.flops_per_token / (peak * self.rt.world_size) if peak else None
        allocated, reserved = machine.peak_memory_gb(self.rt.device)
        self.row(step, "train", loss, f"{loss:.6f}", **stats, seconds=seconds, data_seconds=data_seconds,
                 tokens_per_sec=rate, mfu=mfu, memory_allocated_gb=allocated, memory_reserved_gb=reserved)
        self.tracker.log(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm,
                                "train/tokens_per_sec": rate})
        self.seconds["train"].append(seconds)
        if self.bar is not None:
            figures = {"loss": f"{loss:.3f}", "tok/s": tqdm.format_sizeof(rate), "lr": f"{lr:.1e}".replace("e-0", "e-")}
            self.bar.show(figures | ({"mfu": f"{mfu:.0%}"} if mfu else {}), self.seconds_left(step + 1))
            self.bar.update()
        else:
            self.rt.print(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                          f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.0f}")
        if state.step == self.first_step + ESTIMATE_AFTER and state.step < self.cfg.max_steps:
            self.rt.print(f"step {step:5d} | about {duration(self.seconds_left(state.step))} from here")
        if stats["skipped"]:
            self._skipped(step, state.skipped_in_a_row, stats["sequence_ids"])
        else:
            self._warn_of_spike(state, loss)

    def _sequence_ids(self, loader, step):
        sequences = self.cfg.total_batch_size // self.cfg.seq_len
        return loader.sequence_ids(step * sequences, sequences).tolist()

    def _skipped(self, step, in_a_row, ids):
        self.rt.print(f"step {step:5d} | WARNING: loss or gradient is not finite: update skipped")
        if in_a_row >= self.cfg.max_skipped:
            self.rt.fail(f"step {step}: {in_a_row} updates in a row (--max_skipped) had no finite loss or gradient; "
                         f"their sequences are in {self.cfg.log_dir}/metrics.jsonl and begin with {ids[:8]}: look at "
                         f"them, or lower --max_lr {self.cfg.max_lr:g}")

    def _warn_of_spike(self, state, loss):
        """A line and a row where the loss lies six standard deviations above its mean over the last 100 steps.

        At most one in a hundred steps: what follows a jump is part of it.
        """
        step, recent = state.step - 1, self.recent_losses
        if len(recent) == recent.maxlen:
            mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
            if loss > mean + 6 * deviation and step >= self.spike_step + recent.maxlen:
                self.spike_step = step
                ids = self._sequence_ids(state.loader, step)
                self.row(step, "spike", loss=loss, mean=mean, deviation=deviation, sequence_ids=ids)
                self.rt.print(f"step {step:5d} | WARNING: the loss jumped to {loss:.4f}; over the last {len(recent)} "
                              f"steps it was {mean:.4f} +- {deviation:.4f}. The step's sequences are in metrics.jsonl; "
                              f"they begin with {ids[:4]}")
        recent.append(loss)

    def val(self, step, loss, bits_per_byte, tokens, seconds):
        self.row(step, "val", loss, f"{loss:.4f}", loss=loss, bits_per_byte=bits_per_byte, tokens=tokens,
                 seconds=seconds)
        self.tracker.log(step, {"val/loss": loss, "val/bits_per_byte": bits_per_byte})
        self.bits_per_byte = bits_per_byte
        self.seconds["val"] = seconds
        if self.bar is not None:
            self.bar.show({"val": f"{loss:.3f}"})
        in_bits = f" ({bits_per_byte:.4f} bits per byte)" if self.cfg.eval_only else ""
        self.rt.print(f"step {step:5d} | validation loss: {loss:.4f}{in_bits}")

    def hella(self, step, counts, seconds):
        shares = {k: counts[k] / counts["questions"] for k in ("acc", "acc_norm", "acc_norm_char")}
        score = shares["acc_norm"]
        self.row(step, "hella", score, f"{score:.4f}", **shares, questions=counts["questions"], seconds=seconds)
        self.tracker.log(step, {"val/hellaswag": score})
        self.seconds["hella"] = seconds
        self.rt.print(f"step {step:5d} | hellaswag accuracy: {score:.4f} ({seconds:.1f}s)")

    def samples(self, step, texts, seconds):
        self.row(step, "sample", texts=texts, seconds=seconds)
        self.tracker.log(step, {}, texts)
        self.seconds["sample"] = seconds
        for i, text in enumerate(texts):
            indented = text.replace("\n", "\n" + 13 * " ")  # under what follows "step   250 | "
            self.rt.print(f"step {step:5d} | sample {i}: {indented}")

    def seconds_left(self, step):
        """Estimate from recent updates and the evaluations still to come; None before anything was measured.

        `step` updates are complete, and the evaluations after them are still to come.
        """
        cfg, recent = self.cfg, self.seconds["train"]
        if not recent:
            return None
        left = (cfg.max_steps - step) * statistics.median(recent)
        for kind, every in (("val", cfg.val_every), ("hella", cfg.hellaswag_every), ("sample", cfg.sample_every)):
            if every and kind in self.seconds:
                left += self.seconds[kind] * (-(-cfg.max_steps // every) - (step - 1) // every)  # the last is extra
        return left

    def watch_data(self, train_shards, val_shards, saved_data):
        """Hash the data in the background, for the checkpoints; compare it with `saved_data` of the one resumed from.

        Where that takes long the run begins meanwhile, and ends as soon as the hash shows that the data has changed.
        """
        self.hashes = BackgroundHashes({"train": train_shards, "val": val_shards}, self.cfg.cache_dir, saved_data)
        if saved_data:
            self.hashes.wait(10)

    def sync(self):
        """Have both logs on the disk: a checkpoint may not know more than they do. OSError where it is full."""
        self.metrics.sync()
        self.text.sync()

    def curves(self, step, last=False):
        """Draw curves.png after the evaluations of `step`, at most every 30 s, and at the `last` one."""
        evaluated = self.history["val"][0][-1:] == [step] or self.history["hella"][0][-1:] == [step]
        if self.active and (last or (step and evaluated and time.monotonic() - self.plotted > 30)):
            try:
                self.drawing.plot([self.cfg.log_dir], Path(self.cfg.log_dir) / "curves.png")
            except Exception as error:  # whatever it is: no picture is worth a run
                self.rt.print(f"WARNING: curves.png is not drawn ({type(error).__name__}: {error})")
            gc.collect()  # a figure's objects refer to one another in circles, 10 MB each
            self.plotted = time.monotonic()

    def export(self, state, save_pretrained, exported_step):
        """Write hf/ unless it holds the model that it should, and the last curves.

        That is the best one where a fine-tuning run validates, else the last. `save_pretrained(folder, weights, step=,
        card=)` writes it, with the model's own weights for None; `exported_step(folder)` reads that step back.
        """
        started, folder = time.perf_counter(), Path(self.cfg.log_dir, "hf")
        step, weights = state.step, None
        best = self._best_checkpoint()
        if best:
            step, weights = best["step"], best["model"]
        self.exported = step, best is not None
        if exported_step(folder) != step:
            why = f"{folder} is not written; everything else is saved"
            with tolerate_full_disk(why, commands.resume(self.cfg.log_dir)):
                try:
                    save_pretrained(folder, weights, step=step, card=self._card(step))
                except UserError as error:  # a model that is not GPT-2 any more
                    self.rt.print(f"no {folder}: {error}")
                    self.exported = None
        self.curves(state.step, last=True)
        self.row(state.step, "export", model_step=self.exported and step, seconds=time.perf_counter() - started)

    def _best_checkpoint(self):
        """What is in best.pt, None where there is none: only fine-tuning runs that validate write it."""
        path = Path(self.cfg.log_dir, "best.pt")
        if self.cfg.init_from == "scratch" or not path.exists():
            return None
        try:
            return checkpoint.read(path)
        except UserError as error:
            self.rt.print(f"WARNING: {error}; hf/ gets the last model")
            return None

    def _card(self, step):
        """Facts for the model card of the model after `step` updates; None for what is not known."""
        def at(kind):
            value = dict(zip(*self.history[kind])).get(step)
            return value if value is not None and math.isfinite(value) else None

        return {
            "tokens": step * self.cfg.total_batch_size,
            "data": self.drawing.data_source(self.cfg.data),
            "init_from": None if self.cfg.init_from == "scratch" else self.cfg.init_from,
            "val_loss": at("val"),
            "hellaswag": at("hella"),
            "device": self.rt.notes[0] if self.rt.notes else None,
            "commit": machine.git_commit(),
            "command": commands.as_started(),
        }

    def stopped(self, step, stop):
        """The last words of a run that a signal has stopped."""
        self._close_bar()
        self.rt.print(f"stopped by {stop} at step {step}, saved; resume with: {commands.resume(self.cfg.log_dir)}")

    def done(self, step, best_val_loss, resumed_at, seconds):
        """The last words: what was done and where everything is."""
        if self.bar is not None:
            self.bar.show({}, 0)  # seconds left, now that the last evaluation is over
        self._close_bar()
        folder = Path(self.cfg.log_dir)
        best = "" if best_val_loss is None else f", best validation loss {best_val_loss:.4f}"
        if self.bits_per_byte is not None:
            best += f" ({self.bits_per_byte:.4f} bits per byte at the end)"
        since = ""
        if resumed_at is not None:
            since = " since the resume" if step > resumed_at else ", nothing left to train"
        tokens = step * self.cfg.total_batch_size
        self.rt.print(f"done: {step:,} steps, {tokens:,} tokens{best}; {seconds:.0f} s{since}")
        self.rt.print(f"look:   {folder / 'curves.png'}, {folder / 'log.txt'}")
        model_step, is_best = self.exported or (step, False)
        model = folder / "hf" if is_best else folder  # sample.py takes the newest checkpoint of a log folder
        self.rt.print(f"sample: {commands.script('sample.py', '--model', model)}")
        if is_best:
            self.rt.print(f"share:  {folder / 'hf'} is the best model, after {model_step:,} of {step:,} steps, as a "
                          f"Hugging Face folder; {folder / 'best.pt'} is its checkpoint")
        elif self.exported:
            self.rt.print(f"share:  {folder / 'hf'} is a Hugging Face folder")

    def _close_bar(self):
        """Leave the bar where it is, so that what follows stands below it."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._close_bar()
        self.tracker.finish()
        if self.hashes is not None:
            self.hashes.close()
        if self.active:
            self.text.file.close()
            self.metrics.file.close()


def count(number, thing):
    """1 rank, 2 ranks."""
    return f"{number} {thing}{'s' if number != 1 else ''}"


def duration(seconds):
    """Seconds in words that a person would use, such as 45 s, 1 min 40 s, 3 h 20 min, 2 days 5 h."""
    seconds = round(seconds)
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds // 86400
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days, hours = divmod(hours, 24)
    return f"{days} day{'s' if days > 1 else ''} {hours} h"


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


class Lines:
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

    def sync(self):
        if self.waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self.file.fileno())


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
