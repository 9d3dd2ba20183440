"""Reads the logs of runs: draws them, tabulates them, compares them with a reference and with each other.

    python curves.py log                              # writes curves.png and prints a summary
    python curves.py log other_run --out both.png     # several runs in one figure, with a legend
    python curves.py log --against                    # is this run as good as it should be? exit status 0 yes, 1 no
    python curves.py log --against reference/tiny.txt # the same, against a reference of your choice
    python curves.py log_*/ --table --out runs.tsv    # one line per run: how they differ, and the result
    python curves.py a1 a2 a3 --versus b1 b2 b3       # is A better than B, by how much, and how sure is that?

A reference is a text file. Its header lines `data NAME` and `tokens_per_step N` say which data its runs were trained
and validated on, and how many tokens a step has; `tokenizer NAME` is their vocabulary, GPT-2's where it is left out;
`optimizer NAME` and `schedule NAME`, which may be left out, say how they were trained. Every other line is one value,
`STEP KIND MEAN SD [SOURCE]`: KIND is `val` (validation loss), `hella` (HellaSwag acc_norm) or `train` (mean loss of the
steps since the previous row); SD is the standard deviation over runs; SOURCE, words to the end of the line, says where
a published value comes from. Lines that begin with # are comments.
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("curves.py"))  # python -P leaves it out
    from harness.cli import quiet_imports
    quiet_imports()

import csv
import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np

from harness import stats
from harness.cli import Parser, UserError, exit_status, say
from harness.files import atomic_file, is_locked, read_json, sha256
from harness.rows import bad_line, read_rows, row_of

ROOT = Path(__file__).resolve().parent

# The small panels of a figure, three a row: (kind of row, key, title). A metric of your own is one more line here; a
# list of numbers draws a line for each. Losses need no line: every kind of row that has one stands in the large panel.
PANELS = [
    ("train", "lr", "learning rate"),
    ("train", "grad_norm", "gradient norm"),
    ("train", "tokens_per_sec", "tokens/s"),
]
KEYS = {  # of a log, there even where no row has them; the first of each is what log.txt shows
    "train": ("loss", "lr", "grad_norm", "tokens_per_sec", "seconds"),
    "val": ("loss", "bits_per_byte"),
    "hella": ("acc_norm",),
}

# Published scores that a 124M run is measured against.
GPT2_VAL_LOSS = 3.2924  # OpenAI's GPT-2 124M on the FineWeb-Edu validation shard (llm.c's and build-nanogpt's figure)
GPT2_HELLASWAG = 0.2945  # OpenAI's GPT-2 124M, acc_norm on the 10,042 validation questions (the same two)
GPT3_HELLASWAG = 0.337  # GPT-3 125M, zero-shot (Brown et al. 2020, table H.1); trained on 300B tokens
EDU_10B_VAL_LOSS = 3.07  # GPT-2 124M trained on 10B tokens of FineWeb-Edu (reference/fineweb_edu_10B.txt)
EDU_10B_HELLASWAG = 0.307  # the same run

# The sources that manifests record and the usual folder names, by the name that references use. FineWeb and FineWeb-Edu
# are two data sets: a loss on one says nothing about a loss on the other.
DATA_NAMES = {
    "fineweb-edu": r"HuggingFaceFW/fineweb-edu( .*)?|kjj0/finewebedu\d+B-gpt2|edu[_-]?fineweb.*|fineweb[_-]?edu.*",
    "fineweb": r"HuggingFaceFW/fineweb( .*)?|kjj0/fineweb\d+B-gpt2|fineweb(\d+B)?|fineweb_(train|val)_.*",
}
BUNDLED_TEXT = "bundled input.txt"

# Fields of the config that cannot change a result: where things lie, when a run is looked at and saved, what computes
# it, and the other ways to say its length (max_steps holds what they came to). All others may change it.
NEUTRAL = {
    "preset", "config", "resume", "eval_only", "log_dir", "cache_dir", "hellaswag_path", "allow_incomplete",
    "val_every", "hellaswag_every", "sample_every", "sample_prompt", "num_samples", "sample_tokens", "checkpoint_every",
    "save_minutes", "keep_checkpoints", "max_skipped", "profile", "tracker", "wandb_project", "device", "deterministic",
    "compile", "memory_budget", "micro_batch_size", "dist_timeout", "epochs", "max_tokens", "minutes",
}

BAND = 4.0  # a run is in a reference's band within this many standard deviations: hardly any healthy run is not

# Okabe and Ito's colours, which colour-blind readers can tell apart, those that show on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
INK = "#333333"


# === Reading ======================================================================================


def read_log(log_dir):
    """The log of the run in `log_dir` (or of a `log.txt` by itself) as NumPy arrays, by kind of row.

    Returns `{kind: {"step": ..., key: ...}, "config": the contents of config.json}` with every kind and every key that
    the run has logged, and those of `KEYS` always. Numbers are float arrays, `nan` where one is missing; lists and
    words are arrays of objects. Sorted by step; where a step appears twice the last row counts. A last line without its
    newline belongs to a run that is still writing, and is ignored. Raises `UserError`, with file and line, for a log
    that is missing, empty or malformed.
    """
    rows = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(log_dir, strict=True):
        rows[row["kind"]][row["step"]].update(row)
    path = Path(log_dir)
    if not rows and not path.is_file() and not (path / "log.txt").is_file():
        raise UserError(f"no log at {path}/log.txt: train first (python train_gpt2.py), or give the --log_dir of a run")
    if not rows.keys() - {"start", "compile", "config"}:
        raise UserError(f"{path} has no rows yet: wait for the run's first step")
    log = {}
    for kind in KEYS | rows:
        ordered = [row for _, row in sorted(rows[kind].items())]
        names = dict.fromkeys(KEYS.get(kind, ())) | {name: None for row in ordered for name in row}
        log[kind] = {name: _column([row.get(name) for row in ordered]) for name in names if name != "kind"}
        log[kind]["step"] = np.array([row["step"] for row in ordered], dtype=np.int64)
    log["config"] = read_json((path.parent if path.is_file() else path) / "config.json") or {}
    return log


def _column(values):
    """One key's values as an array of floats, nan for None; of objects where there are lists or words among them."""
    try:
        return np.array([math.nan if value is None else value for value in values], dtype=float)
    except (TypeError, ValueError, OverflowError):
        return np.fromiter(values, dtype=object, count=len(values))


def tokens_per_step(log):
    """Tokens per step of a log from `read_log`, over all ranks; None where the run left no config.json."""
    return log["config"].get("config", {}).get("total_batch_size")


def data_name(log, split="train"):
    """What a run was trained on (or validated on, `split="val"`), in the words of a reference's `data` line, or None.

    Taken from config.json's `data_source`, {"train": ..., "val": ...}; of older runs by `data_source`.
    """
    source = (log["config"].get("data_source") or {}).get(split)
    if source is None:
        config = log["config"].get("config", {})
        path = split == "val" and config.get("val_data") or config.get("data")
        source = path and data_source(path)
    return next((name for name, known in DATA_NAMES.items() if re.fullmatch(known, source or "", re.I)), source)


def data_source(path):
    """Where the data at `path` comes from: its manifest's source, `BUNDLED_TEXT`, or the name of the folder or file."""
    path = Path(path)
    if path.suffix == ".txt":
        # The tiny preset falls back to the bundled text where the working directory has no input.txt.
        bundled = sha256(path) == sha256(ROOT / "input.txt") if path.is_file() else str(path) == "input.txt"
        return BUNDLED_TEXT if bundled else path.name
    folder = path.parent if path.suffix in (".npy", ".bin") else path
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return path.name


def smooth(values, window):
    """Centred running mean of about `window` values, fewer near the start; ignores what is not finite.

    The window grows with the distance from the start, so that it does not smear the steep first steps.
    """
    finite = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    i = np.arange(len(values))
    half = np.minimum(window // 2, i // 4)
    low, high = i - half, np.minimum(i + half + 1, len(values))
    n = count[high] - count[low]
    return np.where(n > 0, total[high] - total[low], math.nan) / np.maximum(n, 1)


# === Runs, and in what they differ ================================================================


@dataclass
class Run:
    """One run, and how it is drawn."""

    path: Path
    name: str
    log: dict
    colour: str
    scale: float  # from steps to the x axis: 1, or tokens where runs differ in batch size
    by_contents: bool = False  # whether data is compared by its SHA-256: where all runs have it

    @property
    def config(self):
        return self.log["config"].get("config", {})

    def x(self, kind):
        return self.log[kind]["step"] * self.scale

    def lines(self, kind, key):
        """[(x, y)] of what the rows hold: one line, one for each number of a list, none for words or nothing."""
        if key not in self.log.get(kind, {}):
            return []
        x, values = self.x(kind), self.log[kind][key]
        if values.dtype == object:  # some rows have lists
            kept = [i for i, value in enumerate(values) if isinstance(value, list)]
            try:
                x, values = x[kept], np.array([values[i] for i in kept] or [[]], dtype=float)
            except (TypeError, ValueError):
                return []
        return [(x, line) for line in np.atleast_2d(values.T)] if values.ndim < 3 else []

    def numbers(self, kind, key):
        """The values of a key in the order of steps, floats; empty where the run has no numbers there."""
        lines = self.lines(kind, key)
        return lines[0][1] if len(lines) == 1 else np.empty(0)

    def steps(self):
        """Completed updates."""
        return int(max([_last_step(self.log), *(self.log["train"]["step"][-1:] + 1)]))

    def diverged(self):
        """Whether the run ended without a finite loss, in a skipped update, or far above where it began."""
        loss, skipped = self.numbers("train", "loss"), self.numbers("train", "skipped")
        ends = [*loss[-1:], *self.numbers("val", "loss")[-1:]]
        return not np.isfinite(ends).all() or any(skipped[-1:] > 0) or any(loss[-1:] > 1.5 * loss[:1])

    def state(self):
        """What became of it: diverged, done, running, or stopped at a step."""
        if self.diverged():
            return "diverged"
        if self.steps() >= self.config.get("max_steps", math.inf):
            return "done"
        return "running" if is_locked(self.path) else f"stopped at {self.steps()}"

    def code(self):
        """A fingerprint of the code that ran: code/ and the hash in config.json, else the commit; None without."""
        files = sorted((self.path / "code").glob("train_gpt2*.py"))  # more than one where a resume ran another
        if not files:
            return re.sub(r"(?<=^\w{10})\w+", "", self.log["config"].get("git_commit") or "") or None
        known = self.log["config"].get("code_sha256", "").encode()
        return hashlib.sha256(b"".join([*(file.read_bytes() for file in files), known])).hexdigest()[:8]

    def data_sha256(self):
        """{split: SHA-256 of its contents}, which a run knows by its first checkpoints."""
        rows = self.log.get("checkpoint", {}).get("data_sha256", [])
        return {split: known for row in rows if row for split, known in row.items() if known}

    def settings(self):
        """{name: value} of all that may change the result but the seed: config without `NEUTRAL`, data, dtype, code."""
        record = self.log["config"]
        values = {name: value for name, value in self.config.items() if name not in NEUTRAL}
        values["val_data"] = values.get("val_data") or values.get("data")
        for name, split in (("data", "train"), ("val_data", "val")):
            source = (record.get("data_source") or {}).get(split) or ""
            if "/" in source or source == BUNDLED_TEXT:  # other sources are no more than the name of a file
                values[name] = source
            if self.by_contents and (known := self.data_sha256().get(split)):  # wherever they lie
                values[name] = f"of SHA-256 {known[:8]}"
        start = self.log.get("start", {})
        if "weights_sha256" in start and start["step"][0] == 0 and start["weights_sha256"][0]:
            values["init_from"] = f"weights {start['weights_sha256'][0][:8]}"
        values["dtype"] = record.get("dtype", values.get("dtype"))  # as it was chosen
        known = record.get("tokenizer") or {"name": values.get("tokenizer") or "gpt2"}  # as it was found or learned
        values["tokenizer"] = "gpt2" if known["name"].lower().startswith("gpt") else " ".join(map(str, known.values()))
        changes = [{name: value for name, value in change.items() if name not in NEUTRAL | {"data", "val_data"}}
                   for change in record.get("changes") or []]  # by a resume: {"step": s, field: [before, after]}
        return values | {"changes": [change for change in changes if len(change) > 1] or None, "code": self.code()}


def differences(configs):
    """{name: its value in each config} of the names in which the dicts differ."""
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: of_each for name, of_each in values.items() if any(value != of_each[0] for value in of_each)}


def check_alike(runs):
    """Raise `UserError` unless the runs differ in nothing that may change a result but their seeds, and do in those."""
    for run in runs:
        if not tokens_per_step(run.log):
            raise UserError(f"{run.path} has no config.json of a run: cannot tell how it differs from others")
    differ = differences([run.settings() for run in runs])
    seeds = differ.pop("seed", [run.config.get("seed") for run in runs])
    if differ:
        found = (f"{name} is {' and '.join(dict.fromkeys(map(_cell, values)))}" for name, values in differ.items())
        raise UserError(f"the runs' {', '.join(found)}: runs in one group may differ in nothing but seeds")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs' seeds are {seeds}: runs in one group need different seeds")


def _runs(log_dirs):
    """The runs of `log_dirs`, and the unit of the x axis where it counts tokens; None where it counts steps."""
    log_dirs = [log_dirs] if isinstance(log_dirs, str | os.PathLike) else list(log_dirs)
    if not log_dirs:
        raise UserError("no log folder was given: name at least one")
    logs = [read_log(log_dir) for log_dir in log_dirs]
    names = [Path(log_dir).resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = [str(log_dir) for log_dir in log_dirs]
    per_step = [tokens_per_step(log) for log in logs]
    unit = None
    if None not in per_step and len(set(per_step)) > 1:
        unit = _unit(max(n * _last_step(log) for n, log in zip(per_step, logs)))
    scales = [n / unit[0] if unit else 1.0 for n in per_step]
    runs = [Run(*run) for run in zip(map(Path, log_dirs), names, logs, cycle(COLOURS), scales)]
    by_contents = all(run.data_sha256() for run in runs)
    return [replace(run, by_contents=by_contents) for run in runs], unit


def _last_step(log):
    """The last step of the kinds in `KEYS`; of a user's own where there are no others."""
    known = [log[kind]["step"][-1] for kind in KEYS if len(log[kind]["step"])]
    return int(max(known or [rows["step"][-1] for kind, rows in log.items() if kind not in (*KEYS, "config")]))


# === Drawing ======================================================================================


def plot(log_dirs, path=None, against=None):
    """Draw the runs of `log_dirs` (one folder or several) in one matplotlib `Figure` and return it.

    `path`: also save it there, in the format of its suffix (`.png`, `.svg`, `.pdf`). `against`: a reference file, drawn
    as a band. No pyplot and no global state, so that a trainer can draw while it trains. Errors as in `read_log` and
    `read_reference`.
    """
    reference = read_reference(against) if against else None
    runs, unit = _runs(log_dirs)
    slim_rows = -(-len(PANELS) // 3)
    with _figure(path, (10, 4.76 + 1.44 * slim_rows)) as figure:
        grid = figure.add_gridspec(1 + slim_rows, 6, height_ratios=(3.3, *[1] * slim_rows))
        hella = any(len(run.log["hella"]["step"]) for run in runs)
        large = [figure.add_subplot(grid[0, : 4 if hella else 6], label="loss")]
        _draw_loss(large[0], runs)
        if hella:
            large.append(figure.add_subplot(grid[0, 4:], label="hella"))
            _draw_hellaswag(large[1], runs)
        for ax, kind in zip(large, ("val", "hella")):
            if reference:
                _draw_band(ax, reference, kind, unit)
            _draw_token_axis(ax, runs, unit)
        if len(runs) == 1:
            large[0].legend(loc="upper right")
        else:  # beside the panel: inside it would cover the ends of the higher curves
            large[0].legend(loc="upper left", bbox_to_anchor=(1, 1), title="lines: train, dots: validation",
                            alignment="left")
        for i, (kind, key, title) in enumerate(PANELS):
            column = 2 * (i % 3)
            _draw_slim(figure.add_subplot(grid[1 + i // 3, column : column + 2], label=key), runs, kind, key, title)
        figure.suptitle(_headline(runs), x=0.012, ha="left", fontsize=11.5, fontweight="bold")
    return figure


@contextmanager
def _figure(path, size):
    """A figure to draw in, saved at `path` (unless that is None) in the format of its suffix."""
    _import_matplotlib()
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # not the user's settings, which may ask for LaTeX
        figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.02)
        yield figure
        if path is not None:
            kind = Path(path).suffix.lstrip(".").lower()
            if kind not in figure.canvas.get_supported_filetypes():
                raise UserError(f"{path} does not end in a picture format: end it in .png, .svg or .pdf")
            with _writing(path) as file:
                figure.savefig(file, format=kind)


def _import_matplotlib():
    """Import it late: half a second that importing this file for `read_log` should not cost.

    subtle: where MPLBACKEND names a backend that is not installed, as a notebook's in another environment, the import
    fails, though nothing here needs it.
    """
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
        import matplotlib

        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as the import does


STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#BBBBBB", "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#ECECEC", "xtick.color": "#999999", "ytick.color": "#999999",
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
    "agg.path.chunksize": 1000,  # points of a curve drawn at once: all of a long run's would take 100 MB
}


def _unit(tokens):
    """(size, name, label of an axis) of the largest unit that is at most `tokens`."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if size <= tokens:
            return size, f"{name} ", f"tokens ({name}s)"
    return 1, "", "tokens"


def _headline(runs):
    """The model, its progress and its hardware, in one line."""
    if len(runs) > 1:
        return f"{len(runs)} runs"
    record, n, last = runs[0].log["config"], tokens_per_step(runs[0].log), _last_step(runs[0].log)
    size, name, _ = _unit((n or 0) * last)
    size_of_model = f"{record['parameters'] / 1e6:.4g}M parameters" if "parameters" in record else ""
    tokens = f"{n * last / size:.4g} {name}tokens" if n else ""
    parts = [runs[0].name, size_of_model, f"step {last:,}", tokens, _hardware(record)]
    text = "  ·  ".join(part for part in parts if part)
    return text.encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot be drawn


def _hardware(config):
    """`8 x NVIDIA H100 80GB HBM3`, from the trainer's notes in config.json; empty where there are none."""
    name = next(iter(config.get("device", [])), "").removeprefix("device ")
    if found := re.fullmatch(r"(\w+)\S* \((.+?)(, cuDNN .*)?\)", name):
        name = found[2] if found[1] == "cuda" else f"{found[1].upper()}, {found[2]}"
    ranks = config.get("world_size", 1)
    return f"{ranks} x {name}" if name and ranks > 1 else name


def _draw_loss(ax, runs):
    """Training loss, raw and smoothed, validation losses, and published losses where they are of the same data."""
    alone = len(runs) == 1
    shown = []  # what the y axis must have room for
    for run in runs:
        # The first steps of a long run fall so far that a y axis with room for them would flatten all the rest.
        start = max(0, int(0.03 * _last_step(run.log)) - 30)
        steps, raw = run.log["train"]["step"], run.log["train"]["loss"]
        smoothed = smooth(raw, len(raw) // 40)
        ax.plot(run.x("train"), raw, color=run.colour, lw=0.8, alpha=0.4 if alone else 0.15)
        ax.plot(run.x("train"), smoothed, color=run.colour, lw=1.8, label="train" if alone else run.name)
        finite = np.isfinite(raw)
        shown.append(smoothed[steps >= start])
        if finite.any():
            shown.append(np.percentile(raw[finite], [0.2]))
        sets = [kind for kind in run.log if row_of(kind).per == "model" and len(run.lines(kind, "loss")) == 1]
        for i, kind in enumerate(sets):  # of validation data
            steps, losses = run.log[kind]["step"], run.log[kind]["loss"]
            shown.append(losses[steps >= start])
            name = "validation" if kind == "val" else kind
            joined = alone and len(steps) > 10  # a line between few points would be far from the curve
            ax.plot(run.x(kind), losses, color=COLOURS[(i + 1) % len(COLOURS)] if alone else run.colour,
                    lw=0.8 if joined else 0, marker="osD^v"[i % 5], ms=4.5 if len(steps) <= 30 else 3.0,
                    label=name if alone else f"_{run.name} {name}")
        if not finite.all():
            broken = run.x("train")[~finite]
            ax.plot(broken, np.full(len(broken), 0.985), "x", color=run.colour, ms=5,
                    transform=ax.get_xaxis_transform(), label=f"not finite ({len(broken)} steps)")
    if all(data_name(run.log, "val") == "fineweb-edu" for run in runs):
        # Named in the legend: early in a run the two lines are too close to each other to be labelled in place.
        ax.axhline(GPT2_VAL_LOSS, color=INK, lw=1, ls="--", label=f"GPT-2 124M (OpenAI)  {GPT2_VAL_LOSS}")
        ax.axhline(EDU_10B_VAL_LOSS, color=INK, lw=1, ls=":", label=f"124M, 10B of FineWeb-Edu  {EDU_10B_VAL_LOSS}")
        shown.append([EDU_10B_VAL_LOSS])
    shown = np.concatenate(shown)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        margin = 0.06 * np.ptp(shown) or 0.5
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
    ax.set_ylabel("loss (nats per token)")


def _draw_hellaswag(ax, runs):
    """HellaSwag accuracy (acc_norm) of the runs, with chance level and published scores."""
    from matplotlib.patheffects import withStroke

    for run in runs:
        hella = run.log["hella"]
        ax.plot(run.x("hella"), hella["acc_norm"], color=COLOURS[1] if len(runs) == 1 else run.colour, lw=1,
                marker="o", ms=4.5 if len(hella["step"]) <= 30 else 3.0, label=run.name)
    for y, name, below in ((GPT3_HELLASWAG, "GPT-3 125M", False),
                           (EDU_10B_HELLASWAG, "124M, 10B of FineWeb-Edu", False),
                           (GPT2_HELLASWAG, "GPT-2 124M", True), (0.25, "chance", True)):
        # labelled at the left, where a run has not reached the line yet
        ax.axhline(y, color=INK, lw=1, ls=(0, (5, 3)), label=f"_{name}")
        ax.annotate(f"{name}  {y}", xy=(0, y), xycoords=("axes fraction", "data"), xytext=(6, -3 if below else 3),
                    textcoords="offset points", va="top" if below else "bottom", fontsize=9,
                    path_effects=[withStroke(linewidth=3, foreground="white")])
    values = np.concatenate([run.log["hella"]["acc_norm"] for run in runs])
    ax.set_ylim(min(0.24, np.nanmin(values, initial=1) - 0.005), max(0.345, np.nanmax(values, initial=0) + 0.005))
    ax.set_ylabel("HellaSwag accuracy (acc_norm)")


def _draw_slim(ax, runs, kind, key, title):
    """One of `PANELS`; a few extreme values may leave the panel, because they would flatten the rest."""
    from matplotlib.ticker import EngFormatter

    tops, negative = [], False
    for run in runs:
        lines = run.lines(kind, key)
        for (x, values), alpha in zip(lines, np.linspace(1, 0.3, len(lines))):
            ax.plot(x, values, color=run.colour, lw=1.4 if key == "lr" else 0.7, alpha=alpha)
            finite = values[np.isfinite(values)]
            if len(finite):
                tops.append(finite.max() if key == "lr" else 1.25 * np.percentile(finite, 98))
                negative |= finite.min() < 0
    if tops and max(tops) > 0 and not negative:
        ax.set_ylim(0, 1.08 * max(tops))
    if key == "tokens_per_sec" and len(runs) == 1 and tops:
        title += f", median {np.nanmedian(runs[0].log[kind][key]):,.0f}"
    ax.set_title(title, loc="left", fontsize=10)
    ax.tick_params(labelsize=9)
    ax.locator_params(nbins=4)
    ax.locator_params(axis="x", integer=runs[0].scale == 1)  # no step 2.5
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_sec" else "{x:g}")


def _draw_band(ax, reference, kind, unit):
    """The rows of `reference` (from `read_reference`) of one kind: a grey band, or error bars where they are few."""
    rows = [row for row in reference["rows"] if row["kind"] == kind]
    if not rows:
        return
    x = np.array([row["step"] for row in rows]) * (reference["tokens_per_step"] / unit[0] if unit else 1)
    mean, margin = (np.array([row[name] for row in rows]) for name in ("mean", "margin"))
    label = f"reference ({reference['data']})"
    if len(rows) > 10:  # a band between few points would be far from the curve
        ax.fill_between(x, mean - margin, mean + margin, color="#999999", alpha=0.35, lw=0, label=label)
    else:
        ax.errorbar(x, mean, margin, color="#666666", fmt="D", ms=4, capsize=4, label=label)


def _draw_token_axis(ax, runs, unit):
    """Steps below and tokens above; tokens only where runs differ in tokens per step (`unit` is not None)."""
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.set_xlim(left=-0.01 * ax.get_xlim()[1])
    ax.set_xlabel(unit[2] if unit else "step")
    ax.locator_params(axis="x", integer=unit is None)  # no step 2.5
    n, *others = {tokens_per_step(run.log) for run in runs}
    if n and not others:
        size, _, label = _unit(n * max(_last_step(run.log) for run in runs))
        top = ax.secondary_xaxis("top", functions=(lambda steps: steps * n / size, lambda tokens: tokens * size / n))
        top.set_xlabel(label)
        top.spines["top"].set_visible(False)


@contextmanager
def _writing(path, mode="wb", **options):
    """Open `path` as `atomic_file` does; `UserError` where it cannot be written."""
    try:
        with atomic_file(path, mode, **options) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name a file somewhere else") from error


# === Comparing with a reference ===================================================================

HEADER = re.compile(r"(data|tokens_per_step|tokenizer|optimizer|schedule)\s+(.*\S)\s*")
ROW = re.compile(r"(\d{1,12})\s+(train|val|hella)\s+(\d+\.?\d*)\s+(\d+\.?\d*)(?:\s+(.*\S))?\s*")


def read_reference(path):
    """A reference file (see the top of this file) as a dict of its header lines, and `rows`.

    Each row is a dict: `step`, `kind`, `mean`, `margin` (half the band's width, `BAND` standard deviations) and
    `source` (words, or empty). Raises `UserError`, with file and line, for a file that is missing or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no reference file at {path}: reference/ has some; LOG_DIR stands before --against")
    reference = {"rows": []}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        header, row = HEADER.fullmatch(line), ROW.fullmatch(line)
        if header:
            reference[header[1]] = header[2]
        elif row and float(row[4]) > 0:
            reference["rows"].append({"step": int(row[1]), "kind": row[2], "mean": float(row[3]),
                                      "margin": BAND * float(row[4]), "source": row[5] or ""})
        elif line.strip() and not line.startswith("#"):
            raise bad_line(path, number, line, "STEP train|val|hella MEAN SD [SOURCE]")
    if not (reference["rows"] and "data" in reference and reference.get("tokens_per_step", "").isdecimal()):
        raise UserError(f"{path} is not a reference: it needs lines `data NAME`, `tokens_per_step N` and a row or more")
    return reference | {"tokens_per_step": int(reference["tokens_per_step"])}


def pick_reference(log_dir):
    """The file in reference/ whose runs had the data of the run in `log_dir` and, if there are several, its vocabulary.

    Raises `UserError` where there is none.
    """
    (run,), _ = _runs(log_dir)
    name, own = data_name(run.log), run.settings()["tokenizer"]
    files = [Path(os.path.relpath(file)) for file in sorted((ROOT / "reference").glob("*.txt"))]
    known = {file: read_reference(file) for file in files}
    matching = [file for file, reference in known.items() if reference["data"] == name]
    if not matching:
        found = f"{log_dir} was trained on {name}" if name else f"cannot tell which data {log_dir} was trained on"
        files = ", ".join(f"{file} (runs on {reference['data']})" for file, reference in known.items())
        raise UserError(f"{found}: choose a reference of the same data, --against FILE, from {files}")
    return max(matching, key=lambda file: known[file].get("tokenizer", "gpt2") == own)


def _measured(log, steps):
    """{(step, kind): value} of a log, with `train` averaged from each of `steps` to the next, as references do."""
    values = {}
    for kind in ("val", "hella"):
        steps_and_values = (log[kind][name].tolist() for name in ("step", KEYS[kind][0]))
        values |= {(step, kind): value for step, value in zip(*steps_and_values)}
    train, before = log["train"], 0
    for step in sorted(set(steps)):
        here = (train["step"] >= before) & (train["step"] < step)
        if step > before and here.sum() == step - before:
            values[step, "train"] = float(train["loss"][here].mean())
        before = step
    return values


def compare(log_dir, reference_file):
    """Compare the run in `log_dir` with a reference: its rows, each with `value` and `inside` (bool), and notes.

    Rows that the run has not reached are left out. So are, where optimizer or schedule are known to be others, all but
    those at the run's end, since on the way a healthy run may stand far off. No row of a run that is not finite, or of
    which only step 0 can be compared, is inside. Raises `UserError` when no row is left, and when a comparison would
    mean nothing: the run is known to have other data or another vocabulary, or has another batch size, so that its
    steps differ.
    """
    reference = read_reference(reference_file)
    (run,), _ = _runs(log_dir)
    for split, done in (("train", "trained"), ("val", "validated")):
        name = data_name(run.log, split)
        if name not in (None, reference["data"]):
            raise UserError(f"{log_dir} was {done} on {name}, and {reference_file} is of runs on {reference['data']}: "
                            "losses on different data cannot be compared; give --against a reference of the same data")
    n, expected = tokens_per_step(run.log), reference["tokens_per_step"]
    if n is not None and n != expected:
        raise UserError(f"{log_dir} has {n} tokens per step and {reference_file} {expected}: steps cannot be compared")
    own, theirs = run.settings().get("tokenizer"), reference.get("tokenizer", "gpt2")
    if run.config and own != theirs:
        raise UserError(f"{log_dir} has the vocabulary {own}, and {reference_file} is of runs with {theirs}: losses a "
                        "token cannot be compared; --versus compares bits per byte")
    notes = []
    if data_name(run.log) is None:
        notes.append(f"cannot tell which data {log_dir} was trained on; on other data this comparison means nothing")
    last = max(row["step"] for row in reference["rows"])
    if (length := run.config.get("max_steps", last)) != last:
        notes.append(f"its schedule has {length} steps and the reference's {last}: on the way they may differ")
    if run.steps() < last:
        notes.append(f"reached {run.steps()} of {last} steps")
    values = _measured(run.log, [row["step"] for row in reference["rows"]])
    rows = [row | {"value": values[row["step"], row["kind"]]} for row in reference["rows"]
            if (row["step"], row["kind"]) in values]
    ours = {name: run.config[name] for name in ("optimizer", "schedule") if name in run.config.keys() & reference}
    others = [f"{name} {value}, not {reference[name]}" for name, value in ours.items() if value != reference[name]]
    if others:
        notes.append(f"compared at its end only: it has {', '.join(others)}")
        rows = [row for row in rows if row["step"] == run.config.get("max_steps") and row["kind"] != "train"]
    if not rows:
        raise UserError(f"{log_dir} shares no row with {reference_file} ({'; '.join(notes)}): train longer")
    sound = all(np.isfinite(run.numbers(kind, keys[0])).all() for kind, keys in KEYS.items())
    if not sound:
        notes.append("outside, since it is not finite")
    elif not any(row["step"] for row in rows):
        sound = False
        notes.append("outside, since the loss of random weights, at step 0, is no evidence")
    return [row | {"inside": sound and abs(row["value"] - row["mean"]) <= row["margin"]} for row in rows], notes


# === One line per run =============================================================================

FIGURES = {  # columns of a table, and their formats
    "tokens": ".0f", "state": "", "val": ".4f", "best val": ".4f", "bits/byte": ".4f", "hella": ".4f", "tok/s": ".0f",
    "minutes": ".1f", "GB": ".1f",
}


def figures(run):
    """{column of a table: value}, None for what the run does not have."""
    def last(kind, key):
        return next(iter(run.numbers(kind, key)[::-1]), None)

    def of_finite(function, values):
        return function(values[np.isfinite(values)]) if np.isfinite(values).any() else None

    val, bits, n = run.numbers("val", "loss"), last("val", "bits_per_byte"), tokens_per_step(run.log)
    return {
        "tokens": n and n * run.steps(),
        "state": run.state(),
        "val": last("val", "loss"),
        "best val": of_finite(np.min, val),
        "bits/byte": None if bits is None or math.isnan(bits) and math.isfinite(val[-1]) else bits,
        "hella": last("hella", "acc_norm"),
        "tok/s": of_finite(np.median, run.numbers("train", "tokens_per_sec")),
        "minutes": sum(np.nansum(run.numbers(kind, "seconds")) for kind in run.log if kind != "config") / 60 or None,
        "GB": of_finite(np.max, run.numbers("train", "memory_reserved_gb")),
    }


def table(log_dirs):
    """Rows of cells, all strings: a header, a line per run; after runs that differ in their seeds alone mean and sd."""
    runs, errors = [], []
    for log_dir in log_dirs:
        try:
            runs += _runs(log_dir)[0]
        except UserError as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for error in errors:
        say(f"left out: {error}", sys.stderr)
    settings = [run.settings() for run in runs]
    found = ("dtype", "changes", "code")
    configs = [run.config | {name: own[name] for name in found} for run, own in zip(runs, settings)]
    columns = [name for name in differences(configs) if name not in ("config", "resume", "log_dir")]
    groups = defaultdict(list)
    for run, config, own in zip(runs, configs, settings):
        same = {name: value for name, value in own.items() if name != "seed"} if run.config else str(run.path)
        groups[json.dumps(same, sort_keys=True)].append((run, config, figures(run)))
    rows = [["run", *columns, *FIGURES]]
    for group in groups.values():
        for run, config, found in group:
            cells = [_cell(config.get(name)) for name in columns]
            rows.append([str(run.path), *cells, *(_cell(found[name], form) for name, form in FIGURES.items())])
        longest = max(run.steps() for run, _, _ in group)
        kept = {config.get("seed"): found for run, config, found in group  # a seed that was run twice counts once
                if run.steps() == longest and not run.diverged()}
        if len(kept) > 1:
            cells = [_mean_cell([found[name] for found in kept.values()], form) for name, form in FIGURES.items()]
            rows.append([f"mean of {len(kept)} of {len(group)}", *[""] * len(columns), *cells])
    return rows


def _cell(value, form=""):
    if isinstance(value, float):
        form = form or ".10g"  # 0.0003, not 0.00030000000000000003
    return "-" if value is None else format(value, form) if form else " ".join(str(value).split())


def _mean_cell(values, form):
    if not form or None in values:
        return ""
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"


def write_table(rows, path):
    """Write the rows of `table` to a .tsv, .csv or .md file."""
    kind = Path(path).suffix
    if kind not in (".tsv", ".csv", ".md"):
        raise UserError(f"{path} does not end in a format for tables: end it in .tsv, .csv or .md")
    with _writing(path, "w", encoding="utf-8", newline="") as file:
        if kind == ".md":
            rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
            file.writelines("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
        else:
            csv.writer(file, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n").writerows(rows)


# === Is A better than B? ==========================================================================

METRICS = [  # (kind of row, key, words, sign that makes less better)
    ("val", "loss", "validation loss", 1),
    ("val", "bits_per_byte", "bits per byte", 1),
    ("hella", "acc_norm", "HellaSwag", -1),
]
ON_THE_WAY = {  # where these differ, one run may stand far above another and still end below it
    "optimizer", "schedule", "decay_fraction", "warmup_steps", "max_steps", "total_batch_size", "changes"}


def versus(log_dirs, others, path=None):
    """Compare two groups of runs, A and B, each of which differ in nothing but their seeds: lines of text.

    `path`: also draw them there. Raises `UserError`, naming what differs, for runs that are no such groups, and where
    no number of the two can be compared.
    """
    runs, unit = _runs([*log_dirs, *others])
    groups = {"A": runs[: len(log_dirs)], "B": runs[len(log_dirs) :]}
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("a run was given twice: A stands before --versus, B after it")
    lines = []
    for name, group in groups.items():
        check_alike(group)
        named = (f"{run.name} (seed {run.config.get('seed')})" for run in group)
        lines.append(f"{name}: {', '.join(named)}")
    differ = differences([group[0].settings() for group in groups.values()])
    differ.pop("seed", None)
    words = [f"{name} ({_cell(a)} | {_cell(b)})" for name, (a, b) in differ.items()]
    lines.append(f"they differ in {', '.join(words) or 'nothing but seeds'}")
    ends_only = sorted(differ.keys() & ON_THE_WAY)
    if ends_only:
        lines.append(f"compared at their ends only, since they differ in {', '.join(ends_only)}")
    drawn = {}
    for kind, key, words, sign in METRICS:
        a, b = (_evaluations(group, kind, key) for group in groups.values())
        if not a and not b:
            continue
        reason = _not_comparable(runs, key, differ)
        lengths = [tokens_per_step(group[0].log) * group[0].config.get("max_steps", 0) for group in groups.values()]
        ends = lengths if ends_only else [max(a.keys() & b.keys(), default=0)] * 2
        if not reason and not (ends[0] and ends[0] in a and ends[1] in b):
            reason = "not all runs have an evaluation " + ("at their end" if ends_only else "beyond step 0 in common")
        if reason:
            lines.append(f"{words}: not compared, since {reason}")
            continue
        drawn[words] = (a, b)
        at = dict.fromkeys(f"{end:,} of {length:,}" for end, length in zip(ends, lengths))
        lines.append(f"{words} after {' and '.join(at)} tokens")
        lines += [f"  {line}" for line in _verdict(groups, a[ends[0]], b[ends[1]], sign)]
        for name, other, curve, end, goal in ("A", "B", a, ends, b[ends[1]]), ("B", "A", b, ends[::-1], a[ends[0]]):
            lines += [f"  {_cost(name, other, curve, end, goal.mean(), sign, ends_only)}"]
    if not drawn:
        raise UserError("; ".join(line for line in lines if "not compared" in line) or "the runs have no evaluation")
    if path:
        _draw_groups(groups, drawn, unit, path)
    return lines


def _evaluations(group, kind, key):
    """{tokens: the runs' values there} at the evaluations that all runs have; nan for one that diverged before."""
    each = []
    for run in group:
        tokens, shown = run.log[kind]["step"] * tokens_per_step(run.log), run.log[kind][KEYS[kind][0]]
        each.append({t: value for t, value, known in zip(tokens.tolist(), run.numbers(kind, key), shown)
                     if not (math.isnan(value) and math.isfinite(known))})  # a value of an older version is missing
    lasting = [set(values) for values, run in zip(each, group) if not run.diverged()] or map(set, each)
    return {t: np.array([values.get(t, math.nan) for values in each]) for t in sorted(set.intersection(*lasting))}


def _not_comparable(runs, key, differ):
    """Why the groups' values of `key` mean different things; None where they do not."""
    if key == "acc_norm":
        asked = {tuple(run.numbers("hella", "questions")[-1:]) for run in runs}
        texts = {hashed[-1] for run in runs for hashed in [run.log["hella"].get("questions_sha256", [None])]} - {None}
        return "they were asked different questions" if len(asked) > 1 or len(texts) > 1 else None
    rows = [run.log["val"] for run in runs]
    names = ("text_sha256", "text_bytes", "bytes")
    texts = {tuple(str(row[name][-1]) for name in names if name in row) for row in rows}
    if len(texts - {()}) > 1:  # () is of an older run
        return "they validated on different texts (give both the same --val_data)"
    other = differ.keys() & ({"val_data", "val_tokens", "tokenizer"} if key == "loss" or () in texts else set())
    return f"{' and '.join(sorted(other))} differ" if other else None


def _verdict(groups, a, b, sign):
    """Lines: n, mean and standard deviation of the values of each group, and whether one is better."""
    for name, values in zip(groups, (a, b)):
        spread = f", sd {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        yield f"{name}: n {len(values)}, mean {values.mean():.4f}{spread}"
    gap = a.mean() - b.mean()
    if not math.isfinite(gap):
        names = [run.name for run, value in zip(sum(groups.values(), []), [*a, *b]) if not math.isfinite(value)]
        yield f"no verdict: {', '.join(names)} is not finite"
        return
    better = "A" if sign * gap < 0 else "B"
    if min(len(a), len(b)) < 2:
        yield f"A - B: {gap:+.4f}, which says nothing about noise: that takes 2 runs per group or more, other seeds"
        return
    _, half = stats.difference(a, b)
    seeds = [[run.config.get("seed") for run in group] for group in groups.values()]
    pairs = ""
    if sorted(seeds[0]) == sorted(seeds[1]):
        paired = stats.difference(a[np.argsort(seeds[0])], b[np.argsort(seeds[1])], paired=True)
        pairs = f"; by pairs of equal seeds {paired[0]:+.4f} ± {paired[1]:.4f}"
    yield f"A - B: {gap:+.4f} ± {half:.4f} (95% interval by Welch's t test){pairs}"
    needed = stats.seeds_needed(a, b)
    if abs(gap) > half:
        yield f"{better} is better by {abs(gap):.4f} ± {half:.4f}"
    elif needed <= 1000:
        yield f"cannot tell: a difference of {abs(gap):.4f} would take about {needed} seeds a group to show"
    else:
        yield f"cannot tell: a difference of {abs(gap):.4f} would take more than 1,000 seeds a group to show"


def _cost(name, other, curve, ends, goal, sign, ends_only):
    """After how many tokens the mean of a group reaches what the other group ends at, as a line."""
    means = np.array([values.mean() for tokens, values in curve.items() if tokens <= ends[0]])
    reached = stats.first_below(np.array(list(curve))[: len(means)], sign * means, sign * goal)
    if reached is None:
        return f"{name} does not reach {other}'s {goal:.4f}"
    fewer = ends[1] / max(reached, 1)
    least = "at least " if ends_only and reached < ends[0] else ""  # its rate had not come down yet
    return (f"{name} reaches {other}'s {goal:.4f} after {reached:,.0f} of {ends[0]:,} tokens" +
            (f": {least}{fewer:.1f} x fewer tokens" if fewer >= 1.05 else ""))


def _draw_groups(groups, drawn, unit, path):
    """The mean of each group, with a band of a standard deviation, for each of the metrics that can be compared."""
    if len(drawn) > 1:
        drawn.pop("bits per byte", None)  # the same curve as the loss
    with _figure(path, (10, 5)) as figure:
        for i, (words, curves) in enumerate(drawn.items(), 1):
            ax = figure.add_subplot(1, len(drawn), i, label=words)
            for (name, group), curve, colour in zip(groups.items(), curves, COLOURS):
                shown = [tokens for tokens in curve if tokens or len(curve) < 3]  # step 0 would flatten the rest
                x = np.array(shown) / tokens_per_step(group[0].log) * group[0].scale
                mean, n = np.array([curve[tokens].mean() for tokens in shown]), len(group)
                prefix = os.path.commonprefix([run.name for run in group]).rstrip("-_. ") or group[0].name
                ax.plot(x, mean, color=colour, lw=1.8, marker="o", ms=3, label=f"{name}: {prefix}, n {n}")
                if n > 1:
                    sd = np.array([curve[tokens].std(ddof=1) for tokens in shown])
                    ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, lw=0)
            ax.set_ylabel(words)
            _draw_token_axis(ax, sum(groups.values(), []), unit)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=2)


# === Command line =================================================================================


def summary(log_dir):
    """A run in one line: its progress and its results."""
    log = read_log(log_dir)
    n, last = tokens_per_step(log), _last_step(log)
    parts = [f"step {last:,}"]
    if n:
        parts.append(f"{n * last:,} tokens")
    if len(loss := log["train"]["loss"]):
        smoothed = smooth(loss, max(20, len(loss) // 40))[-1] if math.isfinite(loss[-1]) else loss[-1]
        parts.append(f"smoothed train loss {smoothed:.4f}")
    on_edu = data_name(log, "val") == "fineweb-edu"
    for kind, words, best, beats, baseline in (
        ("val", "validation loss", np.nanargmin, np.less_equal, GPT2_VAL_LOSS if on_edu else None),
        ("hella", "HellaSwag", np.nanargmax, np.greater_equal, GPT2_HELLASWAG),
    ):
        steps, values = log[kind]["step"], log[kind][KEYS[kind][0]]
        if not len(values):
            continue
        parts.append(f"{words} {values[-1]:.4f}")
        if np.isfinite(values).any():
            parts[-1] += f" (best {values[best(values)]:.4f} at step {steps[best(values)]:,})"
        if baseline is not None:
            reached = steps[beats(values, baseline)]
            when = f"reached at step {reached[0]:,}" if len(reached) else "not reached"
            parts[-1] += f", GPT-2 124M's {baseline} {when}"
        if kind == "val" and math.isfinite(bits := log["val"]["bits_per_byte"][-1]):
            parts.append(f"{bits:.4f} bits per byte")
    return f"{log_dir}: " + "; ".join(parts)


def main(argv=None):
    parser = Parser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Exit status: 0; with --against 1 when a run leaves the reference's band; 2 for a mistake in the call.",
    )
    parser.add_argument("log_dirs", nargs="*", metavar="LOG_DIR", default=["log"],
                        help="folder of a run, or its log.txt [log]")
    parser.add_argument("--out", metavar="FILE",
                        help="picture to write: .png, .svg or .pdf [curves.png]; with --table: .tsv, .csv or .md")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--against", metavar="FILE", nargs="?", const="",
                      help="compare the runs with a reference; without FILE the one in reference/ of the same data")
    task.add_argument("--table", action="store_true", help="one line per run, and means of runs that differ in seeds")
    task.add_argument("--versus", metavar="LOG_DIR", nargs="+",
                      help="is the group of runs before this flag better than the one after it?")
    args = parser.parse_args(argv)
    out = args.out or "curves.png"
    if args.table:
        rows = table(args.log_dirs)
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if args.out:
            write_table(rows, args.out)
            print(f"wrote {args.out}")
        return 0
    if args.versus:
        print(*versus(args.log_dirs, args.versus, out), f"wrote {out}", sep="\n")
        return 0
    references = [] if args.against is None else [args.against or pick_reference(run) for run in args.log_dirs]
    compared = [compare(log_dir, reference) for log_dir, reference in zip(args.log_dirs, references)]
    band = references[0] if len(set(references)) == 1 else None  # one figure has room for one band
    plot(args.log_dirs, out, band)
    for log_dir in args.log_dirs:
        print(summary(log_dir))
    for log_dir, reference, (rows, notes) in zip(args.log_dirs, references, compared):
        _report(log_dir, reference, rows, notes)
    print(f"wrote {out}")
    return 0 if all(row["inside"] for rows, _ in compared for row in rows) else 1


def _report(log_dir, reference_file, rows, notes):
    """Print what `compare` found."""
    print(f"{log_dir} against {reference_file}, of runs on {read_reference(reference_file)['data']}:")
    for note in notes:
        print(f"  {note}")
    for row in rows:
        side = "below" if row["value"] < row["mean"] else "above"  # a loss that is not finite is above too
        inside = abs(row["value"] - row["mean"]) <= row["margin"]
        line = (f"  step {row['step']:6d} {row['kind']:5} {row['value']:8.4f}   reference {row['mean']:.4f} "
                f"± {row['margin']:.4f}   {'in the band' if inside else side:11}  {row['source']}")
        print(line.rstrip())
    print(f"  outside the band: {sum(not row['inside'] for row in rows)} of {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
