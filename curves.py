"""Reads the logs of runs and draws them: loss, HellaSwag, learning rate, gradient norm and tokens/s.

    python curves.py log                              # -> curves.png, and a summary line
    python curves.py log other_run --out both.png     # overlaid; a legend says which is which
    python curves.py log --against reference/tiny.txt # is this run what it should be? exit status 0 yes, 1 no
    python curves.py run1 run2 run3 --make_reference reference/tiny.txt

A reference file is plain text, one value a line: `STEP KIND MEAN SD [SOURCE]`. KIND is `val` (validation loss),
`hella` (HellaSwag acc_norm) or `train` (mean loss of the steps since the reference's row before); SD is the standard
deviation over seeds; SOURCE, words to the end of the line, names a published value. A line `tokens_per_step N` gives
the batch size that steps count in. Lines that begin with # are comment.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file

KINDS = {"train": "loss", "val": "loss", "hella": "acc_norm"}  # the kinds of row in log.txt, and what each holds

# Published scores of the models that a 124M run is measured against.
GPT2_VAL_LOSS = 3.2924  # OpenAI's GPT-2 124M on the FineWeb-Edu validation shard (llm.c's and build-nanogpt's figure)
GPT2_HELLASWAG = 0.2945  # OpenAI's GPT-2 124M, acc_norm on the 10,042 validation questions (the same two)
GPT3_HELLASWAG = 0.337  # GPT-3 125M, zero-shot (Brown et al. 2020, table H.1); trained on 300B tokens

BAND = 4.0  # a run is in a reference's band within this many standard deviations: one run in a few hundred is not

# Okabe and Ito's colours, which colour-blind readers can tell apart, those that show on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
INK = "#333333"

# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def read_log(log_dir):
    """The log of the run in `log_dir` (or of a `log.txt` by itself) as NumPy arrays, by kind of row.

    Returns `{"train": {"step", "loss", "lr", "grad_norm", "tokens_per_sec", "seconds"}, "val": {"step", "loss"},
    "hella": {"step", "acc_norm"}, "config": what config.json holds}`, arrays in the order of steps, `nan` where a
    number is missing or was not finite. Only log.txt has to exist. A step that stands twice counts as last written.
    A last line without its end is a run still writing, and is left out. Raises `UserError` on a log that is
    missing, empty or no log, with file and line.
    """
    log_dir = Path(log_dir)
    log_file = log_dir if log_dir.is_file() else log_dir / "log.txt"
    if not log_file.is_file():
        raise UserError(f"no log at {log_file}: give the folder of a run (its --log_dir), which holds log.txt")
    rows = {kind: {} for kind in KINDS}
    for number, line in _whole_lines(log_file):
        try:
            step, kind, value = line.split()
            rows[kind][int(np.int64(int(step)))] = float(value)  # more digits than 64 bits hold are no step
        except (ValueError, KeyError, OverflowError):
            raise _bad_line(log_file, number, line, "STEP train|val|hella VALUE") from None
    if not any(rows.values()):
        raise UserError(f"{log_file} has no rows yet: wait for the run's first step")
    log = {}
    for kind, name in KINDS.items():
        steps = sorted(rows[kind])
        log[kind] = {"step": np.array(steps, dtype=np.int64), name: np.array([rows[kind][s] for s in steps], float)}
    log["train"].update(_metrics(log_file.with_name("metrics.jsonl"), log["train"]["step"]))
    log["config"] = _config(log_file.with_name("config.json"))
    return log


def _whole_lines(path):
    """(number, line) of each line that was written to its end, blank ones left out; one at a time, as logs get long."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n") and line.strip():
                yield number, line[:-1]


def _bad_line(path, number, line, form):
    return UserError(f"{path}, line {number}: {line[:60]!r} is not of the form `{form}`: is this a run's log?")


def _metrics(path, steps):
    """What metrics.jsonl knows of the train rows at `steps`, one float array a name, `nan` where it knows nothing."""
    names = ("lr", "grad_norm", "tokens_per_sec", "seconds")
    place = {step: i for i, step in enumerate(steps.tolist())}
    table = np.full((len(names), len(steps) + 1), math.nan)  # one place more for steps that are not asked for
    for number, line in _whole_lines(path) if path.is_file() else ():
        try:
            row = json.loads(line)
            if row["kind"] == "train":
                values = [math.nan if row.get(name) is None else float(row[name]) for name in names]
                table[:, place.get(row["step"], -1)] = values
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise _bad_line(path, number, line, '{"step": ..., "kind": ..., ...}') from None
    return dict(zip(names, table[:, :-1]))


def _config(path):
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): restore it, or move it away to do without it") from error
    return config if isinstance(config, dict) else {}


def tokens_per_step(log):
    """Tokens a step of a log from `read_log`, all ranks together; None where the run left no config.json."""
    return log["config"].get("config", {}).get("total_batch_size")


def on_fineweb_edu(log):
    """Whether the run's validation loss is of FineWeb-Edu, and so may be held against GPT-2's on it."""
    config = log["config"].get("config", {})
    data = Path(str(config.get("val_data") or config.get("data") or ""))
    return any("fineweb" in part and "edu" in part for part in (data.name.lower(), data.parent.name.lower()))


def smooth(values, window):
    """Running mean over about `window` neighbours on both sides, narrower where the run begins; ignores `nan`.

    A window that grows with the distance from the start does not smear the first steps' fall.
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
    """The points of a curve that show in a picture: the lowest and the highest in each of `columns` parts of its x.

    A drawing of all points would look the same, and take memory (9 MB for 1,000 noisy points) and time that grow
    with the run. `x` rises. What is not finite stays only where a part has nothing else.
    """
    if len(x) <= 2 * columns:
        return x, y
    finite = np.isfinite(y)
    column = ((x - x[0]) * (columns / (x[-1] - x[0]))).astype(int)
    by_value = np.lexsort((np.where(finite, y, math.nan), column))  # nan comes last
    first = np.flatnonzero(np.diff(column, prepend=-1))
    highest = first + np.maximum(np.add.reduceat(finite.astype(int), first), 1) - 1
    kept = np.unique(np.concatenate(([0, len(x) - 1], by_value[first], by_value[highest])))
    return x[kept], y[kept]


# ---------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------


def plot(log_dirs, path=None, against=None):
    """Draw the runs of `log_dirs` (one folder or several) over each other and return the matplotlib `Figure`.

    `path`: write it there too, as its ending says (`.png`, `.svg`, `.pdf`), whole or not at all. `against`: a
    reference file, drawn as a band. The figure belongs to no global state (no pyplot), so that a trainer may draw
    while it trains. Errors as in `read_log` and `read_reference`.
    """
    import matplotlib
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
        _save(figure, Path(path))
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
    """One run on the way to paper."""

    name: str
    log: dict
    colour: str
    val_colour: str
    dash: str  # tells runs apart when there are more of them than colours
    scale: float  # steps to the units of the x axis: 1, or tokens where runs differ in tokens a step

    def x(self, kind):
        return self.log[kind]["step"] * self.scale


def _runs(log_dirs):
    """The runs of `log_dirs`, and the unit of tokens when x is tokens and not steps, else None."""
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
    styles = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in COLOURS]
    runs = []
    for name, log, n, (colour, dash) in zip(names, logs, per_step, cycle(styles)):
        val_colour = colour if len(logs) > 1 else COLOURS[1]
        runs.append(Run(name, log, colour, val_colour, dash, n / unit if unit else 1.0))
    return runs, unit


def _last_step(log):
    return max(int(log[kind]["step"][-1]) for kind in KINDS if len(log[kind]["step"]))


def _unit(tokens):
    """The largest of `UNITS` that is at most `tokens`."""
    return max((size for size in UNITS if size <= tokens), default=1)


def _token_label(unit):
    return f"tokens ({UNITS[unit]}s)" if UNITS[unit] else "tokens"


def _headline(runs):
    """What was run and how far it is, in one line."""
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
    return "  ·  ".join(parts).encode(errors="backslashreplace").decode()  # a name that is no text cannot be drawn


def _hardware(config):
    """`8 x NVIDIA H100 80GB HBM3`, from what the trainer notes in config.json; empty where it noted nothing."""
    note = next(iter(config.get("device", [])), "")
    if found := re.fullmatch(r"device (\S+) \((.+?)(, cuDNN .*)?\)", note):
        name = found[2] if found[1].startswith("cuda") else f"{found[1].upper()}, {found[2]}"
    else:
        name = note.removeprefix("device ")
    ranks = config.get("world_size", 1)
    return f"{ranks} x {name}" if name and ranks > 1 else name


def _draw_loss(ax, runs):
    """Training loss, raw and smoothed, and validation loss; OpenAI's too where the validation data are the same."""
    alone = len(runs) == 1
    lows, highs = [], []
    for run in runs:
        train, val = run.log["train"], run.log["val"]
        smoothed = smooth(train["loss"], len(train["loss"]) // 40)
        each, mean = thin(run.x("train"), train["loss"]), thin(run.x("train"), smoothed)
        ax.plot(*each, color=run.colour, lw=0.8, alpha=0.4 if alone else 0.15)
        ax.plot(*mean, color=run.colour, ls=run.dash, lw=1.8, label="train" if alone else run.name)
        ax.plot(*thin(run.x("val"), val["loss"]), color=run.val_colour, lw=0.8 if alone else 0, marker="o",
                ms=_dot_size(val["step"]), label="validation" if alone else f"_{run.name} validation")
        lost = run.x("train")[~np.isfinite(train["loss"])]
        if len(lost):
            crosses = thin(lost, np.full(len(lost), 0.985))
            ax.plot(*crosses, "x", color=run.colour, ms=5, transform=ax.get_xaxis_transform(),
                    label=f"not finite ({len(lost)} steps)")
        # The first steps of a long run fall far, and drawn whole they would flatten all the rest.
        shown = max(0, int(0.03 * _last_step(run.log)) - 30)
        kept = [a["loss"][a["step"] >= shown] for a in ({"step": train["step"], "loss": smoothed}, val)]
        kept = np.concatenate(kept)[np.isfinite(np.concatenate(kept))]
        if len(kept):
            raw = train["loss"][np.isfinite(train["loss"])]
            lows.append(min(kept.min(), np.percentile(raw, 0.2) if len(raw) else math.inf))
            highs.append(kept.max())
    if all(on_fineweb_edu(run.log) for run in runs):
        _draw_baseline(ax, GPT2_VAL_LOSS, f"GPT-2 124M (OpenAI)  {GPT2_VAL_LOSS}", below=True)
        lows.append(GPT2_VAL_LOSS)
    if highs:
        margin = 0.06 * (max(highs) - min(lows)) or 0.5
        ax.set_ylim(min(lows) - margin, max(highs) + margin)
    ax.set_ylabel("loss (nats per token)")


def _draw_hellaswag(ax, runs):
    """HellaSwag accuracy (acc_norm) of the runs, with chance, GPT-2's and GPT-3's."""
    for run in runs:
        hella = run.log["hella"]
        ax.plot(*thin(run.x("hella"), hella["acc_norm"]), color=run.val_colour, lw=1, marker="o",
                ms=_dot_size(hella["step"]), label=run.name)
    _draw_baseline(ax, GPT3_HELLASWAG, f"GPT-3 124M  {GPT3_HELLASWAG}")
    _draw_baseline(ax, GPT2_HELLASWAG, f"GPT-2 124M  {GPT2_HELLASWAG}")
    _draw_baseline(ax, 0.25, "chance  0.25", below=True)
    values = np.concatenate([run.log["hella"]["acc_norm"] for run in runs])
    ax.set_ylim(min(0.24, np.nanmin(values, initial=1) - 0.005), max(0.345, np.nanmax(values, initial=0) + 0.005))
    ax.set_ylabel("HellaSwag accuracy (acc_norm)")


def _dot_size(steps):
    return 4.5 if len(steps) <= 30 else 3.0


def _draw_baseline(ax, y, label, below=False):
    """A dashed line at `y` with its name on it, at the left, where no run has come to it yet."""
    from matplotlib.patheffects import withStroke

    ax.axhline(y, color=INK, lw=1, ls=(0, (5, 3)), label=f"_{label}")
    ax.annotate(label, xy=(0, y), xycoords=("axes fraction", "data"), xytext=(6, -3 if below else 3),
                textcoords="offset points", va="top" if below else "bottom", fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")])


def _draw_slim(ax, runs, name):
    """One of `SLIM`, drawn without the few values that would flatten the rest."""
    from matplotlib.ticker import EngFormatter

    tops = []
    for run in runs:
        values = run.log["train"][name]
        ax.plot(*thin(run.x("train"), values), color=run.colour, ls=run.dash, lw=1.4 if name == "lr" else 0.7)
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
    """The band of `reference` (from `read_reference`) for `kind`, in grey."""
    rows = [row for row in reference["rows"] if row["kind"] == kind]
    if not rows:
        return
    x = np.array([row["step"] for row in rows]) * (reference["tokens_per_step"] / unit if unit else 1)
    mean, margin = (np.array([row[name] for row in rows]) for name in ("mean", "margin"))
    if len(rows) > 1:
        ax.fill_between(x, mean - margin, mean + margin, color="#999999", alpha=0.35, lw=0, label="reference")
    else:
        ax.errorbar(x, mean, margin, color="#666666", fmt="D", ms=4, capsize=4, label="reference")


def _draw_token_axis(ax, runs, unit):
    """Steps below and tokens above; tokens alone where runs differ in tokens a step (`unit` is not None)."""
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


def _save(figure, path):
    kind = path.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path} does not end in a kind of picture: end it in .png, .svg or .pdf")
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format=kind)
    except PermissionError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another place in --out") from None


# ---------------------------------------------------------------------------------------------------------------
# Comparing with a reference
# ---------------------------------------------------------------------------------------------------------------


def read_reference(path):
    """A reference file (see the top of this file) as `{"tokens_per_step": int, "rows": [...]}`.

    Each row is a dict: `step`, `kind`, `mean`, `margin` (half the band's width, `BAND` standard deviations) and
    `source` (words, or empty). Raises `UserError` on a file that is missing or no reference, with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no reference file at {path}: the project's own are in reference/")
    reference = {"tokens_per_step": None, "rows": []}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
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
    if not reference["rows"] or not reference["tokens_per_step"]:
        raise UserError(f"{path} is no reference file: it needs a line `tokens_per_step N` and at least one row")
    return reference


def _measured(log, steps):
    """{(step, kind): value} of a log at `steps`, in the terms of a reference file."""
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
    """Hold the run in `log_dir` against a reference: a list of its rows, each with `value` and `inside` (bool).

    Rows that the run has not come to are left out. Raises `UserError` when nothing is left to compare, or when the
    run's tokens a step are not the reference's, so that their steps are not the same thing.
    """
    log, reference = read_log(log_dir), read_reference(reference_file)
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
    """Write the mean and spread of several runs of one configuration, which differ in their seeds, to `path`.

    The rows stand at the steps of the runs' evaluations. A standard deviation of few runs is itself a rough
    estimate, so no row's is taken smaller than the median over the rows of its kind. Raises `UserError` for fewer
    than three runs, for runs of different length or batch, and for a seed that comes twice.
    """
    logs = [read_log(log_dir) for log_dir in log_dirs]
    if len(logs) < 3:
        raise UserError(f"{len(logs)} runs were given: a spread takes at least 3, with different seeds")
    for name in ("total_batch_size", "max_steps", "data"):
        found = {str(log["config"].get("config", {}).get(name)) for log in logs}
        if len(found) > 1 or "None" in found:
            found = " and ".join(sorted(found))
            raise UserError(f"the runs' {name} is {found}: a reference takes runs of one configuration")
    seeds = [log["config"]["config"].get("seed") for log in logs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs' seeds are {seeds}: a spread takes runs with different seeds")
    steps = logs[0]["val"]["step"].tolist()
    measured = [_measured(log, steps) for log in logs]
    keys = [(step, kind) for step in steps for kind in KINDS if all((step, kind) in values for values in measured)]
    table = {key: np.array([values[key] for values in measured]) for key in keys}
    spread = {key: values.std(ddof=1) for key, values in table.items()}
    floor = {kind: np.median([sd for (_, k), sd in spread.items() if k == kind] or [0]) for kind in KINDS}
    if not keys or not all(np.isfinite(values).all() for values in table.values()):
        raise UserError("the runs have no evaluation in common, or one that is not finite: no reference can be made")
    config = logs[0]["config"]
    with atomic_file(path, "w", encoding="utf-8", newline="\n") as file:
        print(f"# {len(logs)} runs on {_hardware(config) or 'an unnamed device'}, seeds {sorted(seeds)}", file=file)
        print(f"# data {Path(str(config['config']['data'])).name}, {config['config']['max_steps']} steps; "
              f"versions {config.get('versions', 'unknown')}", file=file)
        print("# STEP KIND MEAN SD, as the top of curves.py explains", file=file)
        print(f"tokens_per_step {tokens_per_step(logs[0])}", file=file)
        for (step, kind), values in table.items():
            print(f"{step} {kind} {values.mean():.4f} {max(spread[step, kind], floor[kind], 1e-4):.4f}", file=file)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def summary(log_dir):
    """A run in one line: how far it is and what it has reached."""
    log = read_log(log_dir)
    n, last = tokens_per_step(log), _last_step(log)
    parts = [f"step {last:,}"]
    if n:
        parts.append(f"{n * last:,} tokens")
    if len(loss := log["train"]["loss"]):
        parts.append(f"smoothed train loss {smooth(loss, len(loss) // 40)[-1]:.4f}")
    for kind, words, best, beats, baseline in (
        ("val", "validation loss", np.nanargmin, np.less_equal, GPT2_VAL_LOSS if on_fineweb_edu(log) else None),
        ("hella", "HellaSwag", np.nanargmax, np.greater_equal, GPT2_HELLASWAG),
    ):
        steps, values = log[kind]["step"], log[kind][KINDS[kind]]
        if np.isfinite(values).any():
            parts.append(f"{words} {values[-1]:.4f} (best {values[best(values)]:.4f} at step {steps[best(values)]:,})")
            if baseline is not None:
                reached = steps[beats(values, baseline)]
                when = f"reached at step {reached[0]:,}" if len(reached) else "not reached"
                parts[-1] += f", GPT-2 124M's {baseline} {when}"
    return f"{log_dir}: " + "; ".join(parts)


def main(argv=None):
    parser = Parser(
        description=__doc__.partition("\n\n")[0],
        epilog="Exit status: 0; with --against 1 when a run leaves the reference's band; 2 for a mistake in the call.",
    )
    parser.add_argument("log_dirs", nargs="+", metavar="LOG_DIR", help="folder of a run, or its log.txt")
    parser.add_argument("--out", metavar="FILE", default="curves.png",
                        help="picture to write: .png, .svg or .pdf [curves.png]")
    parser.add_argument("--against", metavar="FILE", help="hold the runs against it, e.g. reference/tiny.txt")
    parser.add_argument("--make_reference", "--make-reference", metavar="FILE",
                        help="write a reference from at least three runs that differ in their seeds")
    args = parser.parse_args(argv)
    if args.make_reference:
        make_reference(args.log_dirs, args.make_reference)
        print(f"wrote {args.make_reference}")
        return 0
    compared = [compare(log_dir, args.against) for log_dir in args.log_dirs] if args.against else []
    plot(args.log_dirs, args.out, args.against)
    for log_dir in args.log_dirs:
        print(summary(log_dir))
    for log_dir, rows in zip(args.log_dirs, compared):
        print(f"{log_dir} against {args.against}:", *map(_verdict, rows), sep="\n")
    print(f"wrote {args.out}")
    outside = sum(not row["inside"] for rows in compared for row in rows)
    if compared:
        print(f"outside the band: {outside} of {sum(map(len, compared))} rows")
    return 1 if outside else 0


def _verdict(row):
    """A row of `compare` in words."""
    if row["inside"]:
        verdict = "in the band"
    else:
        verdict = "below" if row["value"] < row["mean"] else "above"  # a loss that is not finite is above too
    line = f"  step {row['step']:6d} {row['kind']:5} {row['value']:8.4f}   reference {row['mean']:.4f}"
    return f"{line} ± {row['margin']:.4f}   {verdict:11}  {row['source']}".rstrip()


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
