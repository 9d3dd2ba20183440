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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file, sha256

ROOT = Path(__file__).resolve().parent
KINDS = {"train": "loss", "val": "loss", "hella": "acc_norm"}  # the kinds of row in log.txt, and what each holds
METRICS = {"train": ("lr", "grad_norm", "tokens_per_sec", "seconds"), "val": ("bits_per_byte",)}  # of metrics.jsonl

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

    Returns `{"train": {"step", "loss", "lr", "grad_norm", "tokens_per_sec", "seconds"}, "val": {"step", "loss",
    "bits_per_byte"}, "hella": {"step", "acc_norm"}, "config": the contents of config.json}`, arrays sorted by step,
    `nan` where a number is missing or was not finite. Only log.txt has to exist. Where a step appears twice the last
    row counts. A last line without its newline belongs to a run that is still writing, and is ignored. Raises
    `UserError`, with file and line, for a log that is missing, empty or malformed.
    """
    log_dir = Path(log_dir)
    log_file = log_dir if log_dir.is_file() else log_dir / "log.txt"
    if not log_file.is_file():
        raise UserError(f"no log at {log_file}: train first (python train_gpt2.py), or give the --log_dir of a run")
    rows = {kind: {} for kind in KINDS}
    for number, line in _whole_lines(log_file):
        try:
            step, kind, value = line.split()
            rows[kind][int(np.int64(int(step)))] = float(value)  # a step that 64 bits cannot hold is refused
        except (ValueError, KeyError, OverflowError):
            raise _bad_line(log_file, number, line, "STEP train|val|hella VALUE") from None
    if not any(rows.values()):
        raise UserError(f"{log_file} has no rows yet: wait for the run's first step")
    log = {}
    for kind, name in KINDS.items():
        steps = sorted(rows[kind])
        log[kind] = {"step": np.array(steps, dtype=np.int64), name: np.array([rows[kind][s] for s in steps], float)}
    _read_metrics(log_file.with_name("metrics.jsonl"), log)
    log["config"] = _read_config(log_file.with_name("config.json"))
    return log


def _whole_lines(path):
    """(number, line) of each complete line that is not blank, one at a time, because logs get long."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n") and line.strip():
                yield number, line[:-1]


def _bad_line(path, number, line, form):
    return UserError(f"{path}, line {number}: {line[:60]!r} is not of the form `{form}`: is this the right file?")


def _read_metrics(path, log):
    """Add the arrays of `METRICS` to `log`, for the steps that it has; `nan` where metrics.jsonl has no number."""
    index = {}
    for kind, names in METRICS.items():
        index[kind] = {step: i for i, step in enumerate(log[kind]["step"].tolist())}
        log[kind].update({name: np.full(len(index[kind]), math.nan) for name in names})
    for number, line in _whole_lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
            kind = row["kind"]
            i = index[kind].get(row["step"]) if kind in METRICS else None
            for name in METRICS[kind] if i is not None else ():
                if row.get(name) is not None:
                    log[kind][name][i] = float(row[name])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise _bad_line(path, number, line, '{"step": ..., "kind": ..., ...}') from None


def _read_config(path):
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or move it away to continue without it") from error
    return config if isinstance(config, dict) else {}


def tokens_per_step(log):
    """Tokens per step of a log from `read_log`, over all ranks; None where the run left no config.json."""
    return log["config"].get("config", {}).get("total_batch_size")


def data_name(log, split="train"):
    """What a run was trained on (or validated on, `split="val"`), in the words of a reference's `data` line, or None.

    Taken from config.json's `data_source`, {"train": ..., "val": ...}; of older runs from the manifest of their data
    if it is still there, else from its name.
    """
    config = log["config"].get("config", {})
    source = (log["config"].get("data_source") or {}).get(split)
    if source is None:
        path = config.get("data") if split == "train" else config.get("val_data") or config.get("data")
        source = data_source(path) if path else None
    for name, sources in DATA_NAMES.items():
        if source and re.fullmatch(sources, source, re.IGNORECASE):
            return name
    return source


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
        figure = Figure(figsize=(10, 6.2), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.02)
        grid = figure.add_gridspec(2, 6, height_ratios=(3.3, 1))
        hella = any(len(run.log["hella"]["step"]) for run in runs)
        panels = [figure.add_subplot(grid[0, : 4 if hella else 6], label="loss")]
        _draw_loss(panels[0], runs)
        if hella:
            panels.append(figure.add_subplot(grid[0, 4:], label="hella"))
            _draw_hellaswag(panels[1], runs)
        for ax, kind in zip(panels, ("val", "hella")):
            if reference:
                _draw_band(ax, reference, kind, unit)
            _draw_token_axis(ax, runs, unit)
        alone = len(runs) == 1
        panels[0].legend(loc="upper right", title=None if alone else "lines: train, dots: validation", alignment="left")
        for column, name in enumerate(SLIM):
            _draw_slim(figure.add_subplot(grid[1, 2 * column : 2 * column + 2], label=name), runs, name)
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
SLIM = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_sec": "tokens/s"}
UNITS = {1e9: "billion", 1e6: "million", 1e3: "thousand", 1: ""}  # of tokens


@dataclass
class Run:
    """One run and how it is drawn."""

    name: str
    log: dict
    colour: str
    val_colour: str
    scale: float  # from steps to the x axis: 1, or tokens where runs differ in batch size

    def x(self, kind):
        return self.log[kind]["step"] * self.scale


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
    runs = []
    for name, log, n, colour in zip(names, logs, per_step, cycle(COLOURS)):
        val_colour = colour if len(logs) > 1 else COLOURS[1]
        runs.append(Run(name, log, colour, val_colour, n / unit if unit else 1.0))
    return runs, unit


def _last_step(log):
    return max(int(log[kind]["step"][-1]) for kind in KINDS if len(log[kind]["step"]))


def _unit(tokens):
    """The largest of `UNITS` that is at most `tokens`."""
    return max((size for size in UNITS if size <= tokens), default=1)


def _token_label(unit):
    return f"tokens ({UNITS[unit]}s)" if UNITS[unit] else "tokens"


def _headline(runs):
    """The model, its progress and its hardware, in one line."""
    if len(runs) > 1:
        return f"{len(runs)} runs"
    log = runs[0].log
    config, n, last = log["config"], tokens_per_step(log), _last_step(log)
    parts = [runs[0].name, f"step {last:,}"]
    if n:
        unit = _unit(n * last)
        parts.append(" ".join(f"{n * last / unit:.4g} {UNITS[unit]} tokens".split()))
    if isinstance(config.get("parameters"), int):
        parts.insert(1, f"{config['parameters'] / 1e6:.4g}M parameters")
    if hardware := _hardware(config):
        parts.append(hardware)
    return "  ·  ".join(parts).encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot be drawn


def _hardware(config):
    """`8 x NVIDIA H100 80GB HBM3`, from the trainer's notes in config.json; empty where there are none."""
    note = next(iter(config.get("device", [])), "")
    if found := re.fullmatch(r"device (\S+) \((.+?)(, cuDNN .*)?\)", note):
        name = found[2] if found[1].startswith("cuda") else f"{found[1].upper()}, {found[2]}"
    else:
        name = note.removeprefix("device ")
    ranks = config.get("world_size", 1)
    return f"{ranks} x {name}" if name and ranks > 1 else name


def _draw_loss(ax, runs):
    """Training loss, raw and smoothed, validation loss, and published losses where they are of the same data."""
    alone = len(runs) == 1
    lows, highs = [], []
    for run in runs:
        train, val = run.log["train"], run.log["val"]
        smoothed = smooth(train["loss"], len(train["loss"]) // 40)
        each, mean = thin(run.x("train"), train["loss"]), thin(run.x("train"), smoothed)
        ax.plot(*each, color=run.colour, lw=0.8, alpha=0.4 if alone else 0.15)
        ax.plot(*mean, color=run.colour, lw=1.8, label="train" if alone else run.name)
        joined = alone and len(val["step"]) > 10  # a line between few points would be far from the curve
        ax.plot(*thin(run.x("val"), val["loss"]), color=run.val_colour, lw=0.8 if joined else 0, marker="o",
                ms=_dot_size(val["step"]), label="validation" if alone else f"_{run.name} validation")
        broken = run.x("train")[~np.isfinite(train["loss"])]
        if len(broken):
            crosses = thin(broken, np.full(len(broken), 0.985))
            ax.plot(*crosses, "x", color=run.colour, ms=5, transform=ax.get_xaxis_transform(),
                    label=f"not finite ({len(broken)} steps)")
        # The first steps of a long run fall so far that a y axis with room for them would flatten all the rest.
        shown = max(0, int(0.03 * _last_step(run.log)) - 30)
        kept = [a["loss"][a["step"] >= shown] for a in ({"step": train["step"], "loss": smoothed}, val)]
        kept = np.concatenate(kept)[np.isfinite(np.concatenate(kept))]
        if len(kept):
            raw = train["loss"][np.isfinite(train["loss"])]
            lows.append(min(kept.min(), np.percentile(raw, 0.2) if len(raw) else math.inf))
            highs.append(kept.max())
    if all(data_name(run.log, "val") == "fineweb-edu" for run in runs):
        # Named in the legend: early in a run the two lines are too close to each other to be labelled in place.
        ax.axhline(GPT2_VAL_LOSS, color=INK, lw=1, ls="--", label=f"GPT-2 124M (OpenAI)  {GPT2_VAL_LOSS}")
        ax.axhline(EDU_10B_VAL_LOSS, color=INK, lw=1, ls=":", label=f"124M, 10B of FineWeb-Edu  {EDU_10B_VAL_LOSS}")
        lows.append(EDU_10B_VAL_LOSS)
    if highs:
        margin = 0.06 * (max(highs) - min(lows)) or 0.5
        ax.set_ylim(min(lows) - margin, max(highs) + margin)
    ax.set_ylabel("loss (nats per token)")


def _draw_hellaswag(ax, runs):
    """HellaSwag accuracy (acc_norm) of the runs, with chance level and published scores."""
    for run in runs:
        hella = run.log["hella"]
        ax.plot(*thin(run.x("hella"), hella["acc_norm"]), color=run.val_colour, lw=1, marker="o",
                ms=_dot_size(hella["step"]), label=run.name)
    _draw_baseline(ax, GPT3_HELLASWAG, f"GPT-3 125M  {GPT3_HELLASWAG}")
    _draw_baseline(ax, EDU_10B_HELLASWAG, f"124M, 10B of FineWeb-Edu  {EDU_10B_HELLASWAG}")
    _draw_baseline(ax, GPT2_HELLASWAG, f"GPT-2 124M  {GPT2_HELLASWAG}", below=True)
    _draw_baseline(ax, 0.25, "chance  0.25", below=True)
    values = np.concatenate([run.log["hella"]["acc_norm"] for run in runs])
    ax.set_ylim(min(0.24, np.nanmin(values, initial=1) - 0.005), max(0.345, np.nanmax(values, initial=0) + 0.005))
    ax.set_ylabel("HellaSwag accuracy (acc_norm)")


def _dot_size(steps):
    return 4.5 if len(steps) <= 30 else 3.0


def _draw_baseline(ax, y, label, below=False):
    """A dashed line at `y`, labelled at the left, where a run has not reached it yet."""
    from matplotlib.patheffects import withStroke

    ax.axhline(y, color=INK, lw=1, ls=(0, (5, 3)), label=f"_{label}")
    ax.annotate(label, xy=(0, y), xycoords=("axes fraction", "data"), xytext=(6, -3 if below else 3),
                textcoords="offset points", va="top" if below else "bottom", fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")])


def _draw_slim(ax, runs, name):
    """One of `SLIM`; a few extreme values may leave the panel, because they would flatten the rest."""
    from matplotlib.ticker import EngFormatter

    tops = []
    for run in runs:
        values = run.log["train"][name]
        ax.plot(*thin(run.x("train"), values), color=run.colour, lw=1.4 if name == "lr" else 0.7)
        finite = values[np.isfinite(values)]
        if len(finite):
            tops.append(finite.max() if name == "lr" else 1.25 * np.percentile(finite, 98))
    if tops and max(tops) > 0:
        ax.set_ylim(0, 1.08 * max(tops))
    title = SLIM[name]
    if name == "tokens_per_sec" and len(runs) == 1 and tops:
        title += f", median {np.nanmedian(runs[0].log['train'][name]):,.0f}"
    ax.set_title(title, loc="left", fontsize=10)
    ax.tick_params(labelsize=9)
    ax.locator_params(nbins=4)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_sec" else "{x:g}")


def _draw_band(ax, reference, kind, unit):
    """The rows of `reference` (from `read_reference`) of one kind: a grey band, or error bars where they are few."""
    rows = [row for row in reference["rows"] if row["kind"] == kind]
    if not rows:
        return
    x = np.array([row["step"] for row in rows]) * (reference["tokens_per_step"] / unit if unit else 1)
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
    if unit:
        ax.set_xlabel(_token_label(unit))
        return
    ax.set_xlabel("step")
    n = tokens_per_step(runs[0].log)
    if not n or any(tokens_per_step(run.log) != n for run in runs):
        return
    size = _unit(n * max(_last_step(run.log) for run in runs))
    top = ax.secondary_xaxis("top", functions=(lambda steps: steps * n / size, lambda tokens: tokens * size / n))
    top.set_xlabel(_token_label(size))
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
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if words[0] == "data":
                reference["data"] = " ".join(words[1:])
                continue
            if words[0] == "tokens_per_step":
                reference["tokens_per_step"] = int(words[1])
                continue
            step, kind, mean, sd, *source = words
            row = {"step": int(step), "kind": kind, "mean": float(mean), "margin": BAND * float(sd)}
            known = kind in KINDS and math.isfinite(row["mean"]) and row["margin"] > 0
        except (ValueError, IndexError):
            known = False
        if not known:
            raise _bad_line(path, number, line, "STEP train|val|hella MEAN SD [SOURCE]")
        reference["rows"].append({**row, "source": " ".join(source)})
    if not (reference["rows"] and reference["data"] and reference["tokens_per_step"]):
        raise UserError(f"{path} is not a reference: it needs lines `data NAME`, `tokens_per_step N` and a row or more")
    return reference


def bundled_references():
    """The references of this project, {file: reference}."""
    files = sorted((ROOT / "reference").glob("*.txt"))
    here = Path.cwd()
    return {f.relative_to(here) if f.is_relative_to(here) else f: read_reference(f) for f in files}


def pick_reference(log_dir):
    """The file in reference/ whose runs had the data of the run in `log_dir`; `UserError` where there is none."""
    name = data_name(read_log(log_dir))
    known = {reference["data"]: file for file, reference in bundled_references().items()}
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
        name = KINDS[kind]
        values |= {(step, kind): value for step, value in zip(log[kind]["step"].tolist(), log[kind][name].tolist())}
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
    keys = [(step, kind) for step in steps for kind in KINDS if all((step, kind) in values for values in measured)]
    table = {key: np.array([values[key] for values in measured]) for key in keys}
    spread = {key: values.std(ddof=1) for key, values in table.items()}
    floor = {kind: np.median([sd for (_, k), sd in spread.items() if k == kind] or [0]) for kind in KINDS}
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
        steps, values = log[kind]["step"], log[kind][KINDS[kind]]
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
    data = read_reference(reference_file)["data"]
    print(f"{log_dir} against {reference_file}, of runs on {data}:")
    if data_name(read_log(log_dir)) is None:
        print(f"  cannot tell which data {log_dir} was trained on; on other data this comparison means nothing")
    for row in rows:
        side = "below" if row["value"] < row["mean"] else "above"  # a loss that is not finite is above too
        line = (f"  step {row['step']:6d} {row['kind']:5} {row['value']:8.4f}   reference {row['mean']:.4f} "
                f"± {row['margin']:.4f}   {'in the band' if row['inside'] else side:11}  {row['source']}")
        print(line.rstrip())
    outside = [row for row in rows if not row["inside"]]
    print(f"  outside the band: {len(outside)} of {len(rows)} rows")
    losses = {row["step"]: row["value"] for row in outside if row["kind"] == "val"}
    for reference in bundled_references().values():
        for row in reference["rows"]:
            loss = losses.get(row["step"], math.nan)
            alike = row["kind"] == "val" and abs(loss - row["mean"]) <= row["margin"]
            if alike and reference["data"] != data:
                print(f"  validation loss {loss:.4f} at step {row['step']} is what runs on {reference['data']} reach, "
                      f"not runs on {data}: check which data the run had")


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
