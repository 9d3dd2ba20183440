"""Reads the logs of runs and draws them: loss, HellaSwag, learning rate, gradient norm and tokens/s.

    python curves.py log                              # writes curves.png and prints a summary
    python curves.py log other_run --out both.png     # several runs in one figure, with a legend
    python curves.py log --against                    # is this run as good as it should be? exit status 0 yes, 1 no
    python curves.py log --against reference/tiny.txt # the same, against a reference of your choice
    python curves.py run1 run2 run3 --make_reference reference/tiny.txt

A reference is a text file. Its header lines `data NAME` and `tokens_per_step N` say which data its runs were trained
and validated on, and how many tokens a step is. Every other line is one value, `STEP KIND MEAN SD [SOURCE]`: KIND is
`val` (validation loss), `hella` (HellaSwag acc_norm) or `train` (mean loss of the steps since the previous row); SD is
the standard deviation over runs; SOURCE, words to the end of the line, says where a published value comes from. Lines
that begin with # are comments.
"""

if __name__ == "__main__":
    from harness.cli import quiet_imports
    quiet_imports()

import json
import math
import os
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file, sha256
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

BAND = 4.0  # a run is in a reference's band within this many standard deviations: hardly any healthy run is not

# Okabe and Ito's colours, which colour-blind readers can tell apart, those that show on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
INK = "#333333"

# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


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
    if not rows.keys() & KEYS.keys():
        raise UserError(f"{path} has no rows yet: wait for the run's first step")
    log = {}
    for kind in KEYS | rows:
        ordered = [row for _, row in sorted(rows[kind].items())]
        names = dict.fromkeys(KEYS.get(kind, ())) | {name: None for row in ordered for name in row}
        log[kind] = {name: _column([row.get(name) for row in ordered]) for name in names if name != "kind"}
        log[kind]["step"] = np.array([row["step"] for row in ordered], dtype=np.int64)
    log["config"] = _read_config((path.parent if path.is_file() else path) / "config.json")
    return log


def _column(values):
    """One key's values as an array of floats, nan for None; of objects where there are lists or words among them."""
    try:
        return np.array([math.nan if value is None else value for value in values], dtype=float)
    except (TypeError, ValueError, OverflowError):
        return np.fromiter(values, dtype=object, count=len(values))


def _read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or move it away to continue without it") from error
    return config if isinstance(config, dict) else {}


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


def thin(x, y, columns=700):
    """The points of a curve that a picture can show: the lowest and the highest in each of `columns` intervals of x.

    All points would look the same and take time and memory (9 MB for 1,000 noisy points) that grow with the run. `x`
    must be increasing. Values that are not finite are kept only where an interval has no others.
    """
    if len(x) <= 2 * columns:
        return x, y
    finite = np.isfinite(y)
    column = ((x - x[0]) * (columns / (x[-1] - x[0]))).astype(int)
    by_value = np.lexsort((np.where(finite, y, math.nan), column))  # nan sorts last
    first = np.flatnonzero(np.diff(column, prepend=-1))
    highest = first + np.maximum(np.add.reduceat(finite.astype(int), first), 1) - 1
    kept = np.unique(np.concatenate(([0, len(x) - 1], by_value[first], by_value[highest])))
    return x[kept], y[kept]


# ---------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------


def plot(log_dirs, path=None, against=None):
    """Draw the runs of `log_dirs` (one folder or several) in one matplotlib `Figure` and return it.

    `path`: also save it there, in the format of its suffix (`.png`, `.svg`, `.pdf`). `against`: a reference file, drawn
    as a band. No pyplot and no global state, so that a trainer can draw while it trains. Errors as in `read_log` and
    `read_reference`.
    """
    import matplotlib  # late: half a second that importing this file for `read_log` should not cost
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference = read_reference(against) if against else None
    runs, unit = _runs(log_dirs)
    with matplotlib.rc_context(STYLE):
        slim_rows = -(-len(PANELS) // 3)
        figure = Figure(figsize=(10, 4.76 + 1.44 * slim_rows), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.02)
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
        alone = len(runs) == 1
        large[0].legend(loc="upper right", title=None if alone else "lines: train, dots: validation", alignment="left")
        for i, (kind, key, title) in enumerate(PANELS):
            column = 2 * (i % 3)
            _draw_slim(figure.add_subplot(grid[1 + i // 3, column : column + 2], label=key), runs, kind, key, title)
        figure.suptitle(_headline(runs), x=0.012, ha="left", fontsize=11.5, fontweight="bold")
    if path is not None:
        kind = Path(path).suffix.lstrip(".").lower()
        if kind not in figure.canvas.get_supported_filetypes():
            raise UserError(f"{path} does not end in a picture format: end it in .png, .svg or .pdf")
        with _writing(path) as file:
            figure.savefig(file, format=kind)
    return figure


STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#BBBBBB", "axes.spines.right": False, "axes.spines.top": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#ECECEC", "xtick.color": "#999999", "ytick.color": "#999999",
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
}


@dataclass
class Run:
    """One run and how it is drawn."""

    name: str
    log: dict
    colour: str
    scale: float  # from steps to the x axis: 1, or tokens where runs differ in batch size

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
    return [Run(*run) for run in zip(names, logs, cycle(COLOURS), scales)], unit


def _last_step(log):
    return max(int(log[kind]["step"][-1]) for kind in KEYS if len(log[kind]["step"]))


def _unit(tokens):
    """(size, name, label of an axis) of the largest unit that is at most `tokens`."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if size <= tokens:
            return size, f" {name}", f"tokens ({name}s)"
    return 1, "", "tokens"


def _headline(runs):
    """The model, its progress and its hardware, in one line."""
    if len(runs) > 1:
        return f"{len(runs)} runs"
    log = runs[0].log
    config, n, last = log["config"], tokens_per_step(log), _last_step(log)
    parts = [runs[0].name]
    if isinstance(config.get("parameters"), int):
        parts.append(f"{config['parameters'] / 1e6:.4g}M parameters")
    parts.append(f"step {last:,}")
    if n:
        size, name, _ = _unit(n * last)
        parts.append(f"{n * last / size:.4g}{name} tokens")
    if hardware := _hardware(config):
        parts.append(hardware)
    return "  ·  ".join(parts).encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot be drawn


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
        ax.plot(*thin(run.x("train"), raw), color=run.colour, lw=0.8, alpha=0.4 if alone else 0.15)
        ax.plot(*thin(run.x("train"), smoothed), color=run.colour, lw=1.8, label="train" if alone else run.name)
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
            ax.plot(*thin(run.x(kind), losses), color=COLOURS[(i + 1) % len(COLOURS)] if alone else run.colour,
                    lw=0.8 if joined else 0, marker="osD^v"[i % 5], ms=4.5 if len(steps) <= 30 else 3.0,
                    label=name if alone else f"_{run.name} {name}")
        if not finite.all():
            broken = run.x("train")[~finite]
            ax.plot(*thin(broken, np.full(len(broken), 0.985)), "x", color=run.colour, ms=5,
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
        ax.plot(*thin(run.x("hella"), hella["acc_norm"]), color=COLOURS[1] if len(runs) == 1 else run.colour, lw=1,
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
            ax.plot(*thin(x, values), color=run.colour, lw=1.4 if key == "lr" else 0.7, alpha=alpha)
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
    """Steps below and tokens above; tokens only where runs differ in tokens a step (`unit` is not None)."""
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.set_xlim(left=-0.01 * ax.get_xlim()[1])
    ax.set_xlabel(unit[2] if unit else "step")
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


# ---------------------------------------------------------------------------------------------------------------
# Comparing with a reference
# ---------------------------------------------------------------------------------------------------------------


def read_reference(path):
    """A reference file (see the top of this file) as `{"data": str, "tokens_per_step": int, "rows": [...]}`.

    Each row is a dict: `step`, `kind`, `mean`, `margin` (half the band's width, `BAND` standard deviations) and
    `source` (words, or empty). Raises `UserError`, with file and line, for a file that is missing or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no reference file at {path}: reference/ has some; LOG_DIR stands before --against")
    reference = {"data": None, "tokens_per_step": None, "rows": []}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, rest = line.partition(" ")
        if name == "data":
            reference["data"] = rest.strip()
        elif name == "tokens_per_step" and rest.strip().isdecimal():
            reference["tokens_per_step"] = int(rest)
        elif line.strip() and not line.startswith("#"):
            row = re.fullmatch(r"(\d{1,12}) +(train|val|hella) +(\d\S*) +(\d\S*) *(.*)", line)
            try:
                step, kind, mean, margin, source = int(row[1]), row[2], float(row[3]), BAND * float(row[4]), row[5]
                if not 0 < margin < math.inf or not math.isfinite(mean):
                    raise ValueError
            except (TypeError, ValueError):
                raise bad_line(path, number, line, "STEP train|val|hella MEAN SD [SOURCE]") from None
            reference["rows"].append({"step": step, "kind": kind, "mean": mean, "margin": margin, "source": source})
    if not (reference["rows"] and reference["data"] and reference["tokens_per_step"]):
        raise UserError(f"{path} is not a reference: it needs lines `data NAME`, `tokens_per_step N` and a row or more")
    return reference


def pick_reference(log_dir):
    """The file in reference/ whose runs had the data of the run in `log_dir`; `UserError` where there is none."""
    name = data_name(read_log(log_dir))
    files = sorted((ROOT / "reference").glob("*.txt"))
    here = Path.cwd()
    files = [file.relative_to(here) if file.is_relative_to(here) else file for file in files]
    known = {read_reference(file)["data"]: file for file in files}
    if name not in known:
        found = f"{log_dir} was trained on {name}" if name else f"cannot tell which data {log_dir} was trained on"
        files = ", ".join(f"{file} (runs on {data})" for data, file in known.items())
        raise UserError(f"{found}: choose a reference of the same data, --against FILE, from {files}, "
                        "or make one with --make_reference")
    return known[name]


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
    """Compare the run in `log_dir` with a reference: a list of its rows, each with `value` and `inside` (bool).

    Rows that the run has not reached are left out. Raises `UserError` when none is left, and when a comparison would
    mean nothing: the run is known to have other data, or has another batch size, so that its steps differ.
    """
    reference = read_reference(reference_file)
    log = read_log(log_dir)
    for split, done in (("train", "trained"), ("val", "validated")):
        name = data_name(log, split)
        if name not in (None, reference["data"]):
            raise UserError(f"{log_dir} was {done} on {name}, and {reference_file} is of runs on {reference['data']}: "
                            "losses on different data cannot be compared; give --against a reference of the same data")
    n, expected = tokens_per_step(log), reference["tokens_per_step"]
    if n is not None and n != expected:
        raise UserError(f"{log_dir} has {n} tokens a step and {reference_file} {expected}: steps cannot be compared")
    values = _measured(log, [row["step"] for row in reference["rows"]])
    rows = []
    for row in reference["rows"]:
        if (row["step"], row["kind"]) in values:
            value = values[row["step"], row["kind"]]
            rows.append({**row, "value": value, "inside": abs(value - row["mean"]) <= row["margin"]})
    if not rows:
        first = min(row["step"] for row in reference["rows"])
        raise UserError(f"{log_dir} shares no row with {reference_file}, whose first is at step {first}: train longer")
    return rows


def make_reference(log_dirs, path):
    """Write mean and standard deviation of runs that differ only in their seeds to `path`, at their evaluations.

    A standard deviation of few runs is itself a rough estimate, so no row gets one below the median of its kind. Raises
    `UserError` for fewer than three runs, for runs of different length, batch or data, and for a seed that comes twice.
    """
    logs = [read_log(log_dir) for log_dir in log_dirs]
    if len(logs) < 3:
        raise UserError(f"{len(logs)} runs were given: a standard deviation takes at least 3, with different seeds")
    for name in ("total_batch_size", "max_steps", "data"):
        found = {str(log["config"].get("config", {}).get(name)) for log in logs}
        if len(found) > 1 or "None" in found:
            found = " and ".join(sorted(found))
            raise UserError(f"the runs' {name} is {found}: a reference takes runs of one configuration")
    seeds = [log["config"]["config"].get("seed") for log in logs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs' seeds are {seeds}: a reference takes runs with different seeds")
    steps = logs[0]["val"]["step"].tolist()
    measured = [_measured(log, steps) for log in logs]
    keys = [(step, kind) for step in steps for kind in KEYS if all((step, kind) in values for values in measured)]
    table = {key: np.array([values[key] for values in measured]) for key in keys}
    spread = {key: values.std(ddof=1) for key, values in table.items()}
    floor = {kind: np.median([sd for (_, k), sd in spread.items() if k == kind] or [0]) for kind in KEYS}
    if not keys or not all(np.isfinite(values).all() for values in table.values()):
        raise UserError("the runs have no evaluation in common, or one that is not finite: train them to the end")
    config = logs[0]["config"]
    with _writing(path, "w", encoding="utf-8", newline="\n") as file:
        print(f"# {len(logs)} runs on {_hardware(config) or 'an unnamed device'}, seeds {sorted(seeds)}, "
              f"{config['config']['max_steps']} steps", file=file)
        print(f"# versions {config.get('versions', 'unknown')}", file=file)
        print("# STEP KIND MEAN SD, as the top of curves.py explains", file=file)
        print(f"data {data_name(logs[0])}", file=file)
        print(f"tokens_per_step {tokens_per_step(logs[0])}", file=file)
        for (step, kind), values in table.items():
            print(f"{step} {kind} {values.mean():.4f} {max(spread[step, kind], floor[kind], 1e-4):.4f}", file=file)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def summary(log_dir):
    """A run in one line: its progress and its results."""
    log = read_log(log_dir)
    n, last = tokens_per_step(log), _last_step(log)
    parts = [f"step {last:,}"]
    if n:
        parts.append(f"{n * last:,} tokens")
    if len(loss := log["train"]["loss"]):
        parts.append(f"smoothed train loss {smooth(loss, len(loss) // 40)[-1]:.4f}")
    on_edu = data_name(log, "val") == "fineweb-edu"
    for kind, words, best, beats, baseline in (
        ("val", "validation loss", np.nanargmin, np.less_equal, GPT2_VAL_LOSS if on_edu else None),
        ("hella", "HellaSwag", np.nanargmax, np.greater_equal, GPT2_HELLASWAG),
    ):
        steps, values = log[kind]["step"], log[kind][KEYS[kind][0]]
        if not np.isfinite(values).any():
            continue
        parts.append(f"{words} {values[-1]:.4f} (best {values[best(values)]:.4f} at step {steps[best(values)]:,})")
        if baseline is not None:
            reached = steps[beats(values, baseline)]
            when = f"reached at step {reached[0]:,}" if len(reached) else "not reached"
            parts[-1] += f", GPT-2 124M's {baseline} {when}"
        if kind == "val" and math.isfinite(bits := log["val"]["bits_per_byte"][-1]):
            parts.append(f"{bits:.4f} bits per byte")
    return f"{log_dir}: " + "; ".join(parts)


def main(argv=None):
    parser = Parser(
        description=__doc__.partition("\n\n")[0],
        epilog="Exit status: 0; with --against 1 when a run leaves the reference's band; 2 for a mistake in the call.",
    )
    parser.add_argument("log_dirs", nargs="*", metavar="LOG_DIR", default=["log"],
                        help="folder of a run, or its log.txt [log]")
    parser.add_argument("--out", metavar="FILE", default="curves.png",
                        help="picture to write: .png, .svg or .pdf [curves.png]")
    parser.add_argument("--against", metavar="FILE", nargs="?", const="",
                        help="compare the runs with a reference; without FILE the one in reference/ of the same data")
    parser.add_argument("--make_reference", "--make-reference", metavar="FILE",
                        help="write a reference from at least three runs that differ in their seeds")
    args = parser.parse_args(argv)
    if args.make_reference:
        make_reference(args.log_dirs, args.make_reference)
        print(f"wrote {args.make_reference}")
        return 0
    references = [] if args.against is None else [args.against or pick_reference(run) for run in args.log_dirs]
    compared = [compare(log_dir, reference) for log_dir, reference in zip(args.log_dirs, references)]
    band = references[0] if len(set(references)) == 1 else None  # one figure has room for one band
    plot(args.log_dirs, args.out, band)
    for log_dir in args.log_dirs:
        print(summary(log_dir))
    for log_dir, reference, rows in zip(args.log_dirs, references, compared):
        _report(log_dir, reference, rows)
    print(f"wrote {args.out}")
    return 0 if all(row["inside"] for rows in compared for row in rows) else 1


def _report(log_dir, reference_file, rows):
    """Print the rows of `compare`, and below them what can be said about a run that left the band."""
    print(f"{log_dir} against {reference_file}, of runs on {read_reference(reference_file)['data']}:")
    if data_name(read_log(log_dir)) is None:
        print(f"  cannot tell which data {log_dir} was trained on; on other data this comparison means nothing")
    for row in rows:
        side = "below" if row["value"] < row["mean"] else "above"  # a loss that is not finite is above too
        line = (f"  step {row['step']:6d} {row['kind']:5} {row['value']:8.4f}   reference {row['mean']:.4f} "
                f"± {row['margin']:.4f}   {'in the band' if row['inside'] else side:11}  {row['source']}")
        print(line.rstrip())
    outside = [row for row in rows if not row["inside"]]
    print(f"  outside the band: {len(outside)} of {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
