"""What a run writes as it goes: log.txt, metrics.jsonl, config.json, the console, curves.png and a tracker.

Only rank 0 writes; on other ranks every method returns without doing anything. Knows steps and figures, no models.
"""

import contextlib
import errno
import gc
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from harness import checkpoint, machine
from harness.cli import UserError, say
from harness.files import DISK_FULL, atomic_file, tolerate_full_disk
from harness.shards import BackgroundHashes


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
        self.seconds = {"train": deque(maxlen=20)}  # of recent updates and of the last evaluation of each kind
        self.recent_losses, self.spike_step = deque(maxlen=100), -100
        self.bits_per_byte = None  # of the last validation
        self.logged = set()  # (step, kind) that the files had when they were opened
        self.plotted = time.monotonic()
        self.hashes = None  # of the data, see `watch_data`

    def start_tracker(self, tracker_id):
        """Start the tracker, on rank 0; `UserError` where it cannot. `tracker_id` is that of the run to continue."""
        if self.cfg.tracker == "wandb":
            config = asdict(self.cfg)
            self.tracker = WandbTracker(self.cfg.wandb_project, self.cfg.log_dir, config, tracker_id)

    def open(self, step, note, rows, kinds):
        """Open both logs of a run that starts at `step`, with what `rundir.archive_old_run` returned."""
        if note:
            self.rt.print(note)
        for at, kind, value in rows:
            self._remember(at, kind, value)
        self.first_step, self.logged = step, {(step, kind) for kind in kinds}
        self.active = self.rt.rank == 0
        if not self.active:
            return
        folder = Path(self.cfg.log_dir)
        self.text, self.metrics = Lines(folder / "log.txt"), Lines(folder / "metrics.jsonl")
        source = self.drawing.data_source
        record = {"data_source": {"train": source(self.cfg.data), "val": source(self.cfg.val_data or self.cfg.data)},
                  "config": asdict(self.cfg), "parameters": self.parameters, "world_size": self.rt.world_size,
                  "device": self.rt.notes, "git_commit": machine.git_commit(), "versions": machine.versions()}
        with tolerate_full_disk("config.json is not written"), atomic_file(folder / "config.json", "w") as file:
            json.dump(record, file, indent=1)

    def has(self, step, kind):
        """Whether the files had a row of this kind at the step that the run resumed from."""
        return (step, kind) in self.logged

    def compiling(self, function, *args):
        """`function(*args)`, which compiles the model: announced, timed and logged."""
        started = time.perf_counter()
        if self.rt.compile:
            self.rt.print("compiling: a minute or so, a few seconds where the kernels are cached")
        result = function(*args)
        self.row(self.first_step, "compile", seconds=time.perf_counter() - started)
        return result

    def start_training(self, step, micro_batch_size):
        """Say what a step is, and show a progress bar from `step` on where the console is a terminal."""
        cfg, ranks = self.cfg, self.rt.world_size
        micro_steps = cfg.total_batch_size // (cfg.seq_len * ranks * micro_batch_size)
        self.rt.print(f"{self.parameters:,} parameters; a step is {ranks} ranks x {micro_steps} micro-steps x "
                      f"{micro_batch_size} rows x {cfg.seq_len} tokens")
        if self.active and sys.stderr.isatty():
            self.bar = Bar(total=cfg.max_steps, initial=step, dynamic_ncols=True, bar_format=Bar.LAYOUT)

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
        `data_seconds` is what the loader kept the loop waiting of it.
        """
        step, data_seconds = state.step - 1, state.loader.take_seconds()
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
            figures = {"loss": f"{loss:.3f}", "tok/s": f"{rate:,.0f}", "lr": f"{lr:.1e}"}
            self.bar.show(figures | ({"mfu": f"{mfu:.0%}"} if mfu else {}), self.seconds_left(step + 1))
            self.bar.update()
        else:
            self.rt.print(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                          f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.0f}")
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
                         f"sequences begin with {ids[:8]}, all of them are in {self.cfg.log_dir}/metrics.jsonl: look "
                         f"at them or lower --max_lr {self.cfg.max_lr:g}")

    def _warn_of_spike(self, state, loss):
        """A line and a row where the loss lies six standard deviations above its mean over the last 100 steps."""
        step, recent = state.step - 1, self.recent_losses
        if len(recent) == recent.maxlen:
            mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
            if loss > mean + 6 * deviation and step >= self.spike_step + recent.maxlen:
                self.spike_step = step
                ids = self._sequence_ids(state.loader, step)
                self.row(step, "spike", loss=loss, mean=mean, deviation=deviation, sequence_ids=ids)
                self.rt.print(f"step {step:5d} | WARNING: the loss jumped to {loss:.4f} from {mean:.4f} +- "
                              f"{deviation:.4f}; its sequences begin with {ids[:4]}, all of them are in metrics.jsonl")
        recent.append(loss)

    def val(self, step, loss, bits_per_byte, tokens, seconds):
        self.row(step, "val", loss, f"{loss:.4f}", loss=loss, bits_per_byte=bits_per_byte, tokens=tokens,
                 seconds=seconds)
        self.tracker.log(step, {"val/loss": loss, "val/bits_per_byte": bits_per_byte})
        self.bits_per_byte = bits_per_byte
        self.seconds["val"] = seconds
        if self.bar is not None:
            self.bar.show({"val": f"{loss:.4f}"})
        self.rt.print(f"step {step:5d} | validation loss: {loss:.4f}")

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
            self.rt.print(f"step {step:5d} | sample {i}: {text}")

    def seconds_left(self, step):
        """Estimate from recent updates and the evaluations still to come; None before anything was measured."""
        cfg, recent = self.cfg, self.seconds["train"]
        if not recent:
            return None
        left = (cfg.max_steps - step) * statistics.median(recent)
        for kind, every in (("val", cfg.val_every), ("hella", cfg.hellaswag_every), ("sample", cfg.sample_every)):
            if every and kind in self.seconds:
                left += self.seconds[kind] * (-(-cfg.max_steps // every) - (step - 1) // every)
        return left

    def watch_data(self, train_shards, val_shards, saved_data):
        """Hash the data in the background, for the checkpoints; compare it with `saved_data` of the one resumed from.

        Where that takes long the run begins meanwhile, and ends at its next checkpoint if the data has changed.
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

    def export(self, state, resumed_at):
        """Write hf/ and the last curves; a run that was finished already keeps the hf/ that it has."""
        started, folder = time.perf_counter(), Path(self.cfg.log_dir, "hf")
        if state.not_gpt2:
            self.rt.print(f"no {folder} is written: this model is not GPT-2, {state.not_gpt2}")
        elif state.step != resumed_at or not (folder / "model.safetensors").exists():
            fix = f"python train_gpt2.py {checkpoint.resume_command(self.cfg.log_dir)}"
            with tolerate_full_disk(f"{folder} is not written; everything else is saved", fix):
                state.raw_model.save_pretrained(folder, step=state.step)
        self.curves(state.step, last=True)
        self.row(state.step, "export", seconds=time.perf_counter() - started)

    def stopped(self, step, stop):
        """The last words of a run that a signal has stopped."""
        self.rt.print(f"stopped by {stop} at step {step}, saved; "
                      f"resume with: python train_gpt2.py {checkpoint.resume_command(self.cfg.log_dir)}")

    def done(self, step, best_val_loss, resumed_at, seconds):
        """The last words: what was done and where everything is."""
        folder = Path(self.cfg.log_dir)
        best = "" if best_val_loss is None else f", best validation loss {best_val_loss:.4f}"
        if self.bits_per_byte is not None:
            best += f" ({self.bits_per_byte:.4f} bits per byte at the end)"
        since = ""
        if resumed_at is not None:
            since = " since the resume" if step > resumed_at else ", nothing left to train"
        tokens = step * self.cfg.total_batch_size
        self.rt.print(f"done: {step:,} steps, {tokens:,} tokens{best}; {seconds:.0f} s{since}")
        self.rt.print(f"look:   {folder}/curves.png, {folder}/log.txt")
        self.rt.print(f"sample: python sample.py --model {shlex.quote(self.cfg.log_dir)}")
        if (folder / "hf").exists():
            self.rt.print(f"share:  {folder}/hf is a Hugging Face folder")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        self.tracker.finish()
        if self.hashes is not None:
            self.hashes.close()
        if self.active:
            self.text.file.close()
            self.metrics.file.close()


class Bar(tqdm):
    """tqdm with the time left that it is given, since evaluations take time too, and figures in a fixed order."""

    LAYOUT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}]{figures}"
    ORDER = ("loss", "val", "tok/s", "lr", "mfu")

    def __init__(self, *args, **kwargs):
        self.figures, self.seconds_left = {}, None
        super().__init__(*args, **kwargs)

    def show(self, figures, seconds_left=None):
        self.figures |= figures
        self.seconds_left = self.seconds_left if seconds_left is None else seconds_left

    @property
    def format_dict(self):
        left = "?" if self.seconds_left is None else tqdm.format_interval(self.seconds_left)
        figures = "".join(f" {name} {self.figures[name]}" for name in self.ORDER if name in self.figures)
        return super().format_dict | {"left": left, "figures": figures}


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

    def log(self, step, values, texts=None):
        if texts is not None:
            values["samples"] = self.table(columns=["step", "text"], data=[[step, text] for text in texts])
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()
