"""Logs are read as written, figures show what they say, and references tell a good run from a bad one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from scripts import make_reference

import curves
from harness.cli import UserError, exit_status
from harness.files import folder_lock
from train_gpt2 import TrainConfig


def write_run(folder, losses, val=(), hella=(), source=None, **config):
    """A run's folder as the trainer leaves it: `losses` by step, `val` and `hella` as {step: value}.

    `source`: the data's source as config.json records it; older runs do not.
    """
    folder.mkdir(parents=True)
    rows = [(step, "train", f"{loss:.6f}") for step, loss in enumerate(losses)]
    rows += [(step, "val", f"{loss:.4f}") for step, loss in dict(val).items()]
    rows += [(step, "hella", f"{score:.4f}") for step, score in dict(hella).items()]
    (folder / "log.txt").write_text("".join(f"{step} {kind} {value}\n" for step, kind, value in rows))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(len(losses)):
            row = {"lr": 1e-3 * step, "grad_norm": 0.5, "tokens_per_sec": 2000.0, "seconds": 0.5}
            print(json.dumps({"step": step, "kind": "train", **row}), file=file)
        print(json.dumps({"step": len(losses), "kind": "checkpoint", "seconds": 1.0}), file=file)
    config = {"total_batch_size": 1024, "max_steps": len(losses), "data": "input.txt", **config}
    config = {"config": config, "device": ["device cpu (2 threads)"], "parameters": 16_000_000, "world_size": 1}
    if source:
        config["data_source"] = {"train": source, "val": source}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def falling(steps=40, end=5.0, seed=0):
    noise = np.random.default_rng(seed).normal(0, 0.02, steps)
    return end + 6 * np.exp(-np.arange(steps) / 8) + noise


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def panel(figure, label):
    return next(ax for ax in figure.axes if ax.get_label() == label)


def test_log_is_read_row_by_row(tmp_path):
    """Catches swapped columns, rows misaligned between the two logs, and nan refused as malformed."""
    run = write_run(tmp_path / "run", [10.5, float("nan"), float("inf"), 7.25], {0: 10.9, 4: 7.1}, {4: 0.2561})
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "kind": "train", "lr": 0.1, "grad_norm": 2.0, "tokens_per_sec": 5, "seconds": 1}\n'
        '{"step": 0, "kind": "val", "loss": 10.9, "seconds": 1}\n'
        '{"step": 4, "kind": "val", "loss": 7.1, "bits_per_byte": 2.25}\n'
        '{"step": 9, "kind": "val", "loss": 6.1, "bits_per_byte": 2.0}\n'
        '{"step": 3, "kind": "train", "lr": 0.3, "grad_norm": null}\n'
    )
    log = curves.read_log(run)
    np.testing.assert_array_equal(log["train"]["step"], [0, 1, 2, 3])
    np.testing.assert_array_equal(log["train"]["loss"], [10.5, np.nan, np.inf, 7.25])
    np.testing.assert_array_equal(log["train"]["lr"], [0.1, np.nan, np.nan, 0.3])
    np.testing.assert_array_equal(log["train"]["grad_norm"], [2.0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(log["val"]["loss"], [10.9, 7.1, 6.1])  # the last one was killed before log.txt
    np.testing.assert_array_equal(log["val"]["bits_per_byte"], [np.nan, 2.25, 2.0])
    assert "validation loss 6.1000 (best 6.1000 at step 9); 2.0000 bits per byte" in curves.summary(run)
    np.testing.assert_array_equal(log["hella"]["step"], [4])
    np.testing.assert_array_equal(log["hella"]["acc_norm"], [0.2561])
    assert log["config"]["config"]["total_batch_size"] == 1024


def test_live_and_foreign_logs_are_read(tmp_path):
    """Catches reading a run that is still writing, a log.txt alone, and rows that a restart wrote a second time."""
    run = write_run(tmp_path / "run", [10.0, 9.0, 8.0])
    with open(run / "log.txt", "a", newline="") as file:
        file.write("1 train 9.500000\r\n3 train 7.1")  # a second row for step 1; a torn line: 7.1 of 7.123456
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "ki\x00\xff')
    log = curves.read_log(run)
    np.testing.assert_array_equal(log["train"]["loss"], [10.0, 9.5, 8.0])
    (run / "metrics.jsonl").unlink()
    (run / "config.json").unlink()
    alone = curves.read_log(run / "log.txt")
    np.testing.assert_array_equal(alone["train"]["loss"], log["train"]["loss"])
    assert np.isnan(alone["train"]["lr"]).all() and alone["config"] == {} and curves.data_name(alone) is None
    curves.plot(run)


@pytest.mark.parametrize("file, text, message", [
    ("log.txt", "0 train 10.0\n1 train nine\n", "line 2"),
    ("log.txt", "0 train 10.0\nTraceback (most recent call last):\n", "line 2"),
    ("log.txt", "0.5 train 10.0\n", "line 1"),
    ("log.txt", "12345678901234567890 train 10.0\n", "line 1"),
    ("metrics.jsonl", '{"step": 0, "kind": "val"}\n[1, 2]\n', "line 2"),
    ("metrics.jsonl", "loss 3\n", "line 1"),
    ("config.json", "{", "config.json is damaged"),
])
def test_bad_logs_are_named_with_file_and_line(tmp_path, file, text, message):
    """Catches a traceback, or silently skipped rows, for a file that is not a log."""
    run = write_run(tmp_path / "run", [10.0, 9.0])
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        curves.read_log(run)
    assert file in str(error.value)
    (tmp_path / "empty").mkdir()
    for start, message in ((None, "no log at .*log.txt: train first"), ('"kind": "start"', "no rows yet: wait")):
        if start:
            (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 0, "kind": "start", "seconds": 1.0}\n')
        with pytest.raises(UserError, match=message):
            curves.read_log(tmp_path / "empty")


def with_rows(run, *rows):
    """Add rows of the user's own to the record of a run."""
    with open(run / "metrics.jsonl", "a") as file:
        for row in rows:
            print(json.dumps(row), file=file)
    return run


def test_a_log_has_every_kind_and_key_that_was_logged(tmp_path):
    """Catches a kind, list, text, string for nan or null of the user's own that makes the whole log be refused."""
    run = with_rows(
        write_run(tmp_path / "run", [10.0, 9.0]),
        {"step": 0, "kind": "train", "loss": 10.0, "norms": [1.0, "nan"], "note": "slow", "lr": None},
        {"step": 1, "kind": "train", "loss": "nan", "ema": "-inf", "norms": [3, 4], "lr": "odd"},
        {"step": 2, "kind": "val2", "loss": 8.5, "parts": {"a": 1}}, {"step": 1, "kind": "val2", "loss": "inf"},
        {"step": 2, "kind": "config", "x": 1}, {"step": 2, "kind": "loss", "step2": 10**400})
    log = curves.read_log(run)
    np.testing.assert_array_equal(log["train"]["loss"], [10.0, np.nan])
    np.testing.assert_array_equal(log["train"]["norms"], [[1, np.nan], [3, 4]])
    np.testing.assert_array_equal(log["train"]["ema"], [np.nan, -np.inf])
    assert log["train"]["note"].tolist() == ["slow", None] and log["train"]["lr"].tolist() == [None, "odd"]
    np.testing.assert_array_equal(log["val2"]["step"], [1, 2])
    np.testing.assert_array_equal(log["val2"]["loss"], [np.inf, 8.5])
    assert log["val2"]["parts"].tolist() == [None, {"a": 1}] and log["config"]["config"]["data"] == "input.txt"
    curves.plot(run)
    (run / "log.txt").unlink()
    np.testing.assert_array_equal(curves.read_log(run)["val2"]["loss"], [np.inf, 8.5])
    (tmp_path / "own").mkdir()
    own = with_rows(tmp_path / "own", {"step": 0, "kind": "start"}, {"step": 7, "kind": "mine", "loss": 5.0})
    assert curves.summary(own).endswith("own: step 7") and cells(curves.table([own]))["own"]["state"] == "stopped at 7"
    assert lines(panel(curves.plot(own), "loss"))["mine"].get_xydata().tolist() == [[7, 5]]
    (run / "theirs.txt").write_text("0 train 5.0\n")
    np.testing.assert_array_equal(curves.read_log(run / "theirs.txt")["train"]["loss"], [5.0])


def test_what_a_user_logs_is_drawn_where_it_is_asked_for(tmp_path, monkeypatch):
    """Catches a second validation set without a curve, and a fourth panel, or one of lists, that stops the figure."""
    rows = [{"step": s, "kind": "val2", "loss": 9.0 - s / 10, "words": "x"} for s in range(0, 40, 10)]
    rows += [{"step": s, "kind": "train", "norms": [s, 2.0 * s, 1.0], "shift": -s} for s in range(20, 40)]
    rows += [{"step": 10, "kind": "spike", "loss": 50.0}]
    run = with_rows(write_run(tmp_path / "run", falling(), {0: 10.9, 40: 5.1}), *rows)
    (run / "log.txt").write_text((run / "log.txt").read_text() + "40 val3 3.0\n")
    loss = panel(curves.plot([run]), "loss")
    assert lines(loss)["val2"].get_xydata().tolist() == [[0, 9], [10, 8], [20, 7], [30, 6]]
    assert {lines(loss)[name].get_color() for name in ("train", "validation", "val2")} == set(curves.COLOURS[:3])
    assert loss.get_ylim()[1] < 12  # a spike is no validation
    assert "_run val2" in lines(panel(curves.plot([run, write_run(tmp_path / "other", falling())]), "loss"))
    own = [("train", "norms", "by layer"), ("train", "shift", "shift"), ("val2", "loss", "second"),
           ("val2", "words", "none"), ("nobody", "logs", "this")]
    monkeypatch.setattr(curves, "PANELS", curves.PANELS + own)
    figure = curves.plot([run], tmp_path / "c.png")
    drawn = {key: len(panel(figure, key).lines) for _, key, _ in curves.PANELS if key != "loss"}
    assert drawn == {"lr": 1, "grad_norm": 1, "tokens_per_sec": 1, "norms": 3, "shift": 1, "words": 0, "logs": 0}
    assert panel(figure, "norms").lines[1].get_xydata()[-1].tolist() == [39, 78]
    assert panel(figure, "shift").get_ylim()[0] < -30


def test_smoothing_is_a_mean_that_skips_nan_and_keeps_the_start():
    """Catches the cumulative sums against off-by-one windows, by a plain loop."""
    values = falling(100)
    values[[3, 50, 51]] = np.nan, np.inf, np.nan
    got = curves.smooth(values, 20)
    for i in range(100):
        half = min(10, i // 4)
        near = values[i - half : i + half + 1]
        near = near[np.isfinite(near)]
        assert got[i] == pytest.approx(near.mean()) if len(near) else np.isnan(got[i])
    assert got[0] == values[0]


def test_figure_shows_the_log(tmp_path):
    """Catches the figure's data, labels, token axis and file."""
    losses = falling()
    run = write_run(tmp_path / "run", losses, {0: 10.9, 20: 5.6, 40: 5.1}, {40: 0.26})
    out = tmp_path / "picture" / "curves.png"
    figure = curves.plot([run], out)
    assert out.read_bytes().startswith(b"\x89PNG") and [f.name for f in out.parent.iterdir()] == ["curves.png"]
    loss = panel(figure, "loss")
    raw, smoothed = loss.lines[:2]
    np.testing.assert_allclose(raw.get_ydata(), losses, atol=1e-6)
    np.testing.assert_allclose(smoothed.get_ydata(), curves.smooth(losses, 1), atol=1e-6)
    np.testing.assert_array_equal(lines(loss)["validation"].get_xydata(), [[0, 10.9], [20, 5.6], [40, 5.1]])
    assert loss.get_xlabel() == "step" and loss.get_ylabel() == "loss (nats per token)"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "validation"]
    low, high = loss.get_ylim()
    assert low < losses.min() and high > losses.max()  # a short run is shown whole
    (tokens,) = loss.child_axes
    tokens.apply_aspect(None)
    figure.draw_without_rendering()
    assert tokens.get_xlabel() == "tokens (thousands)"
    assert tokens.get_xlim()[1] == pytest.approx(loss.get_xlim()[1] * 1024 / 1e3)
    np.testing.assert_allclose(panel(figure, "lr").lines[0].get_ydata(), 1e-3 * np.arange(40))
    assert "median 2,000" in panel(figure, "tokens_per_sec").get_title(loc="left")
    title = "run  ·  16M parameters  ·  step 40  ·  40.96 thousand tokens  ·  CPU, 2 threads"
    assert figure.get_suptitle() == title


def test_title_names_the_hardware(tmp_path):
    """Catches the title of a run on several GPUs, and of another program's log without config.json."""
    run = write_run(tmp_path / "run", falling())
    config = json.loads((run / "config.json").read_text())
    config |= {"device": ["device cuda:0 (NVIDIA H100 80GB HBM3, cuDNN 91501)"], "world_size": 8}
    (run / "config.json").write_text(json.dumps(config))
    assert curves.plot(run).get_suptitle().endswith("8 x NVIDIA H100 80GB HBM3")
    (run / "config.json").unlink()
    assert curves.plot(run).get_suptitle().split() == ["run", "·", "step", "39"]


def test_published_scores_are_drawn_where_they_mean_something(tmp_path):
    """Catches GPT-2's FineWeb-Edu loss drawn over another data set's, and a wrong figure."""
    text = write_run(tmp_path / "text", falling(), {40: 5.1})
    web = write_run(tmp_path / "web", falling(end=3.0), {40: 3.3}, {40: 0.3}, data="edu_fineweb10B")
    kept = write_run(tmp_path / "kept", falling(end=3.0), {40: 3.3}, data="mine.txt", val_data="edu_fineweb10B")
    other = write_run(tmp_path / "other", falling(end=3.0), {40: 3.3}, data="edu_fineweb10B", val_data="mine.txt")

    def baselines(ax):
        flat = [line for line in ax.lines if len(line.get_xdata()) == 2]
        written = [text.get_text() for text in ax.texts] or [line.get_label() for line in flat]
        return sorted(line.get_ydata()[0] for line in flat), written

    figure = curves.plot([web])
    of_loss = ["GPT-2 124M (OpenAI)  3.2924", "124M, 10B of FineWeb-Edu  3.07"]
    assert baselines(panel(figure, "loss")) == ([3.07, 3.2924], of_loss)
    legend = [text.get_text() for text in panel(figure, "loss").get_legend().get_texts()]
    assert legend == ["train", "validation", *of_loss]
    values, written = baselines(panel(figure, "hella"))
    assert values == [0.25, 0.2945, 0.307, 0.337]
    assert written == ["GPT-3 125M  0.337", "124M, 10B of FineWeb-Edu  0.307", "GPT-2 124M  0.2945", "chance  0.25"]
    rows = curves.read_reference(ROOT / "reference" / "fineweb_edu_10B.txt")["rows"]
    last = {row["kind"]: row["mean"] for row in rows if row["step"] == 19073}
    assert round(last["val"], 2) == 3.07 and round(last["hella"], 3) == 0.307  # the lines are the reference's last rows
    assert baselines(panel(curves.plot([kept]), "loss"))[0] == [3.07, 3.2924]
    for runs in ([text], [other], [web, text]):
        assert baselines(panel(curves.plot(runs), "loss")) == ([], [])
    assert "hella" not in [ax.get_label() for ax in curves.plot([text]).axes]


@pytest.mark.parametrize("source, name", [
    ("HuggingFaceFW/fineweb-edu sample-10BT", "fineweb-edu"),
    ("kjj0/finewebedu10B-gpt2", "fineweb-edu"),
    ("HuggingFaceFW/fineweb sample-10BT", "fineweb"),
    ("kjj0/fineweb100B-gpt2", "fineweb"),
    ("HuggingFaceFW/fineweb-2 deu_Latn", "HuggingFaceFW/fineweb-2 deu_Latn"),
    ("documents", "documents"),
])
def test_data_is_named_by_its_source(tmp_path, monkeypatch, source, name):
    """Catches runs judged by another data set's: recorded source first, then manifest, then folder name."""
    monkeypatch.chdir(tmp_path)
    recorded = curves.read_log(write_run(tmp_path / "recorded", [10.0], source=source, data="edu_fineweb10B"))
    assert curves.data_name(recorded) == curves.data_name(recorded, "val") == name
    (tmp_path / "edu_fineweb10B").mkdir()
    old = curves.read_log(write_run(tmp_path / "old", [10.0], data="edu_fineweb10B"))
    assert curves.data_name(old) == "fineweb-edu"
    (tmp_path / "edu_fineweb10B" / "manifest.json").write_text(json.dumps({"source": source}))
    assert curves.data_name(old) == name
    one = curves.read_log(write_run(tmp_path / "one", [10.0], data="edu_fineweb10B/edufineweb_train_000001.npy"))
    assert curves.data_name(one) == name


def test_bundled_text_is_known_by_its_bytes(tmp_path, monkeypatch):
    """Catches a text of the user's own that is called input.txt and judged by the bundled one's reference."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", [10.0], data="input.txt")
    assert curves.data_name(curves.read_log(run)) == "bundled input.txt"  # the preset's fallback
    (tmp_path / "input.txt").write_bytes((ROOT / "input.txt").read_bytes())
    assert curves.data_name(curves.read_log(run)) == "bundled input.txt"
    (tmp_path / "input.txt").write_text("my own words")
    assert curves.data_name(curves.read_log(run)) == "input.txt"


def test_runs_of_different_batches_share_an_axis_of_tokens(tmp_path):
    """Catches runs compared step by step where their steps differ in tokens."""
    small = write_run(tmp_path / "small", falling(), {40: 5.1})
    large = write_run(tmp_path / "large", falling(seed=1), {40: 5.0}, total_batch_size=4096)
    loss = panel(curves.plot([small, large]), "loss")
    drawn = lines(loss)
    assert loss.get_xlabel() == "tokens (thousands)" and not loss.child_axes
    assert drawn["_small validation"].get_xydata().tolist() == [[40.96, 5.1]]
    assert drawn["_large validation"].get_xydata().tolist() == [[163.84, 5.0]]
    assert drawn["small"].get_color() != drawn["large"].get_color()
    logs = [write_run(tmp_path / name / "log", falling(), {40: 5.1}) for name in "ab"]
    assert {str(log) for log in logs} <= set(lines(panel(curves.plot(logs), "loss")))  # distinguished by their paths


def test_a_diverged_run_is_drawn_and_labelled(tmp_path):
    """Catches axis limits of nan, and steps that silently disappear."""
    run = write_run(tmp_path / "run", [9.0, float("nan"), float("inf")], {0: float("nan")})
    loss = panel(curves.plot([run]), "loss")
    assert lines(loss)["not finite (2 steps)"].get_xdata().tolist() == [1, 2]
    assert np.isfinite(loss.get_ylim()).all()
    assert curves.main([str(run), "--out", str(tmp_path / "c.png")]) == 0
    started = write_run(tmp_path / "started", [], {0: 10.9})
    curves.plot([started])
    curves.plot([started, write_run(tmp_path / "also", [], {0: 10.9}, total_batch_size=4096)])
    worst = write_run(tmp_path / "worst", [float("nan")] * 3)
    assert np.isfinite(panel(curves.plot([worst]), "loss").get_ylim()).all()


def test_a_long_run_is_not_flattened_by_its_first_steps(tmp_path):
    """Catches the view of a 10B-token run, most of whose fall from 11 happens in the first hundredth."""
    losses = 3.3 + 7.6 * np.exp(-np.arange(19073) / 60)
    figure = curves.plot([write_run(tmp_path / "run", losses, {0: 10.9, 19073: 3.3})])
    assert panel(figure, "loss").get_ylim()[1] < 3.5


def test_a_long_run_takes_little_memory(tmp_path):
    """Catches the trainer's memory: 100 MB for the noisy curve of a 10B-token run."""
    losses = np.random.default_rng(0).normal(5, 0.1, 19_073)
    runs = [str(write_run(tmp_path / f"run{n}", losses[:n], {0: 5.0})) for n in (100, 19_073)]
    code = (
        "import curves, resource\n"
        f"for run in {runs}:\n"
        f"    curves.plot(run, {str(tmp_path / 'c.png')!r})\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 60, "MB"


def test_drawing_touches_no_global_state(tmp_path):
    """Catches the trainer's process: no matplotlib or torch at import, no pyplot, settings left unchanged."""
    run = write_run(tmp_path / "run", falling(), {40: 5.1})
    code = (
        "import sys, curves\n"
        "assert not {'matplotlib', 'torch', 'tiktoken'} & sys.modules.keys()\n"
        "import matplotlib; before = [matplotlib.rcParams[name] for name in curves.STYLE]\n"
        f"curves.plot({str(run)!r}, {str(tmp_path / 'c.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert before == [matplotlib.rcParams[name] for name in curves.STYLE]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_users_settings_of_matplotlib_do_not_matter(tmp_path):
    """Catches a picture that is lost to a notebook's backend which is not installed here, or to LaTeX that is not."""
    run = write_run(tmp_path / "run", falling(), {40: 5.1})
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: 7\n")
    pictures = []
    for env in ({}, {"MPLBACKEND": "absent", "MATPLOTLIBRC": str(tmp_path)}):
        picture = tmp_path / f"{len(env)}.png"
        done = subprocess.run([sys.executable, ROOT / "curves.py", run, "--out", picture], env=os.environ | env,
                              capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]
    code = "import curves; curves._import_matplotlib(); import matplotlib; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"MPLBACKEND": "svg"},
                          capture_output=True, text=True)
    assert done.stdout == "svg\n", "a backend that is there is taken from nobody"


@pytest.fixture
def seeds(tmp_path):
    """Four runs of one configuration that differ as seeds do."""
    runs = []
    for seed, off in enumerate((-0.01, 0.0, 0.0, 0.01)):
        run = tmp_path / f"seed{seed}"
        runs.append(str(write_run(run, falling() + off, {0: 10.9, 20: 5.5 + off, 40: 5.0 + off}, seed=seed)))
    return runs


def against(run, tmp_path, capsys, reference):
    """(exit status, what is printed) of `curves.py RUN --against REFERENCE`."""
    capsys.readouterr()
    status = curves.main([str(run), "--against", reference, "--out", str(tmp_path / "c.png")])
    return status, capsys.readouterr().out


def test_reference_band_tells_runs_apart(tmp_path, seeds, capsys):
    """Catches a band that is wrong: figures, exit status and words, for good, bad, broken and cut-off runs."""
    reference = str(tmp_path / "reference.txt")
    make_reference.make_reference(seeds, reference)
    rows = {(row["step"], row["kind"]): row for row in curves.read_reference(reference)["rows"]}
    assert curves.read_reference(reference)["data"] == "bundled input.txt"
    assert list(rows) == [(0, "val"), (20, "train"), (20, "val"), (40, "train"), (40, "val")]
    assert rows[40, "val"]["mean"] == pytest.approx(5.0)
    assert rows[40, "val"]["margin"] == pytest.approx(4 * np.std([-0.01, 0, 0, 0.01], ddof=1), abs=4e-4)
    assert rows[40, "train"]["mean"] == pytest.approx(falling()[20:40].mean(), abs=1e-4)
    assert rows[0, "val"]["margin"] == rows[40, "val"]["margin"]  # a standard deviation of 0 is not believed

    for name, steps, end, due, words in (
        ("good", 40, {40: 5.0}, 0, ["outside the band: 0 of 5 rows"]), ("half", 20, {}, 0, ["0 of 3 rows"]),
        ("worse", 40, {40: 5.05}, 1, ["above", "outside the band: 1 of 5 rows"]),
        ("better", 40, {40: 4.95}, 1, ["below"]), ("broken", 40, {40: float("nan")}, 1, ["nan"]),
    ):
        run = write_run(tmp_path / name, falling()[:steps], {0: 10.9, 20: 5.5, **end})
        status, said = against(run, tmp_path, capsys, reference)
        assert status == due and all(word in said for word in words), name
    loss = panel(curves.plot(seeds[0], against=reference), "loss")
    (bars,) = loss.collections
    margin = rows[40, "val"]["margin"]
    np.testing.assert_allclose(bars.get_segments()[2], [[40, 5 - margin], [40, 5 + margin]])
    assert loss.get_legend().get_texts()[-1].get_text() == "reference (bundled input.txt)"


def write_small(tmp_path, end=5.0, vals=None, **config):
    return str(write_run(tmp_path / "small", falling(), vals or {0: 10.9, 20: 5.5, 40: end}, **{"seed": 9, **config}))


def bare(run):
    (Path(run) / "config.json").unlink()
    return run


def write_edu(tmp_path, **config):
    return str(write_run(tmp_path / "edu", falling(), {40: 5.0}, **{"data": "edu_fineweb10B", **config}))


EDU, WEB = (str(ROOT / "reference" / name) for name in ("fineweb_edu_10B.txt", "fineweb_10B.txt"))


@pytest.mark.parametrize("make, message", [
    (lambda tmp, runs: [], "no log at log/log.txt: train first (python train_gpt2.py)"),
    (lambda tmp, runs: [*runs[:2], "r.txt"], "at least 3"),
    (lambda tmp, runs: [*runs[:2], runs[0], "r.txt"], "different seeds"),
    (lambda tmp, runs: [*runs, write_small(tmp, max_lr=1), "r.txt"], "max_lr is - and 1"),
    (lambda tmp, runs: [*runs, write_small(tmp, data="my.txt"), "r.txt"], "and my.txt"),
    (lambda tmp, runs: [*runs, write_small(tmp, max_steps=50), "r.txt"], "max_steps is 40 and 50"),
    (lambda tmp, runs: [*runs, write_small(tmp, end=float("nan")), "r.txt"], "not finite"),
    (lambda tmp, runs: ["nowhere", "--table"], "no log at nowhere"),
    (lambda tmp, runs: [*runs, "--table", "--out", "t.png"], "end it in .tsv, .csv or .md"),
    (lambda tmp, runs: [*runs, "--table", "--against"], "not allowed with argument"),
    (lambda tmp, runs: [*runs, "--versus", runs[0]], "a run was given twice"),
    (lambda tmp, runs: [*runs[:2], "--versus", runs[2], write_small(tmp, seed=2)], "seeds are [2, 2]"),
    (lambda tmp, runs: [*runs[:2], "--versus", runs[2], write_small(tmp, max_lr=1)], "max_lr is - and 1: runs"),
    (lambda tmp, runs: [*runs[:2], "--versus", runs[2], bare(write_small(tmp))], "has no config.json of a run"),
    (lambda tmp, runs: [runs[0], "--versus", write_small(tmp, val_data="my.txt")], "val_data differ"),
    (lambda tmp, runs: [runs[0], "--versus", write_small(tmp, val_tokens=64)], "val_tokens differ"),
    (lambda tmp, runs: [runs[0], "--versus", write_small(tmp, vals={0: 9.0, 30: 5.0})], "beyond step 0 in common"),
    (lambda tmp, runs: [runs[0], "--versus", write_small(tmp, vals={20: 5.0}, optimizer="muon")], "at their end"),
    (lambda tmp, runs: [*runs[:2], "--versus", *runs[2:], "--out", "v.tsv"], "end it in .png"),
    (lambda tmp, runs: [runs[0], "--out", "c.exe"], "end it in .png"),
    (lambda tmp, runs: [runs[0], "--against", "nowhere.txt"], "no reference file at nowhere.txt"),
    (lambda tmp, runs: [runs[0], "--against", f"{runs[0]}/log.txt"], "log.txt, line 1"),
    (lambda tmp, runs: ["--against", runs[0]], "LOG_DIR stands before --against"),
    (lambda tmp, runs: [runs[0], "--against", EDU], "was trained on bundled input.txt, and "),
    (lambda tmp, runs: [write_edu(tmp, val_data="my.txt"), "--against"], "was validated on my.txt"),
    (lambda tmp, runs: [write_edu(tmp), "--against", WEB], "losses on different data cannot be compared"),
    (lambda tmp, runs: [write_edu(tmp), "--against"], "1024 tokens per step"),
    (lambda tmp, runs: [write_edu(tmp, data="my.jsonl"), "--against"], "trained on my.jsonl: choose a reference"),
    (lambda tmp, runs: [f"{write_edu(tmp)}/log.txt", "--against"], "1024 tokens per step"),
    (lambda tmp, runs: [write_edu(tmp, data=None), "--against"], "cannot tell which data"),
    (lambda tmp, runs: [runs[0], "--out", f"{runs[0]}/log.txt/c.png"], "cannot be written"),
])
def test_mistakes_are_reported_in_one_line(tmp_path, seeds, monkeypatch, capsys, make, message):
    """Catches tracebacks, comparisons that mean nothing, and files left behind by a call that failed."""
    arguments = make(tmp_path, seeds)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    main = make_reference.main if arguments[-1:] == ["r.txt"] else curves.main
    assert exit_status(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_dead_run_is_outside_its_reference(tmp_path, capsys):
    """Catches a run that died on its random weights, or passed through nan, called as good as the reference."""
    tiny = {"total_batch_size": 2048, "max_steps": 75, "optimizer": "muon", "schedule": "cosine"}
    reference = str(ROOT / "reference" / "tiny_gpt2.txt")
    losses = np.interp(np.arange(75), [0, 12, 37, 62, 74], [10.8, 6.55, 5.04, 4.75, 4.75])
    vals = {0: 10.84, 25: 5.34, 50: 5.0, 75: 4.87}
    for name, steps, shown, words in (
        ("died", [10.8, 10.8, np.nan, np.nan], {0: 10.84}, ["reached 4 of 75 steps", "since it is not finite"]),
        ("stopped", [10.8] * 4, {0: 10.84}, ["reached 4 of 75 steps", "at step 0, is no evidence"]),
        ("began", [], {0: 10.84}, ["reached 0 of 75 steps", "at step 0, is no evidence"]),
        ("hole", np.where(np.arange(75) < 20, np.nan, losses), vals, ["since it is not finite"]),
        ("inf", losses, {**vals, 25: np.inf}, ["since it is not finite", "inf   reference"]),
    ):
        status, text = against(write_run(tmp_path / name, steps, shown, **tiny), tmp_path, capsys, reference)
        assert status == 1 and all(word in text for word in words), text
        count = re.search(r"outside the band: (\d+) of (\d+) rows", text)
        assert count[1] == count[2]
    status, text = against(write_run(tmp_path / "half", losses[:60], {0: 10.84, 25: 5.34}, **tiny), tmp_path, capsys,
                           reference)
    assert "reached 60 of 75 steps" in text and "of 4 rows" in text


def test_losses_of_another_vocabulary_are_not_compared(tmp_path):
    """Catches a loss of 4.3 a token of 3.3 characters called better than 4.9 a token of 4."""
    flags = {"total_batch_size": 2048, "max_steps": 75, "source": "bundled input.txt"}
    runs = [write_run(tmp_path / name, falling(75), {0: 8.3, 75: 4.3}, **flags) for name in ("gpt2", "own")]
    record = json.loads((runs[1] / "config.json").read_text())
    own = {"name": "a vocabulary of 4,096 tokens", "size": 4096, "sha256": "0" * 64}
    (runs[1] / "config.json").write_text(json.dumps({**record, "tokenizer": own}))
    assert curves.pick_reference(runs[0]).name == "tiny_gpt2.txt" and curves.pick_reference(runs[1]).name == "tiny.txt"
    with pytest.raises(UserError, match="has the vocabulary a vocabulary of 4,096.*runs with gpt2: losses a token"):
        curves.compare(runs[1], ROOT / "reference" / "tiny_gpt2.txt")
    assert curves.compare(runs[0], ROOT / "reference" / "tiny_gpt2.txt")


def test_another_schedule_is_compared_at_its_end(tmp_path, capsys):
    """Catches a healthy run on a flat-then-linear schedule called bad since it stands above a cosine on its way."""
    other = {"total_batch_size": 2048, "max_steps": 75, "optimizer": "muon", "schedule": "wsd"}
    reference = str(ROOT / "reference" / "tiny_gpt2.txt")
    run = write_run(tmp_path / "run", falling(75), {0: 10.84, 25: 6.0, 50: 5.5, 75: 4.87}, **other)
    status, text = against(run, tmp_path, capsys, reference)
    assert status == 0 and "0 of 1 rows" in text
    assert "compared at its end only: it has schedule wsd, not cosine" in text
    half = write_run(tmp_path / "half", falling(50), {0: 10.84, 25: 6.0, 50: 5.5}, **other)
    with pytest.raises(UserError, match="shares no row .*reached 50 of 75 steps; compared at its end only"):
        curves.compare(half, reference)
    (tmp_path / "old.txt").write_text(re.sub("(optimizer|schedule) .*\n", "", Path(reference).read_text()))
    assert "of 7 rows" in against(run, tmp_path, capsys, str(tmp_path / "old.txt"))[1]  # as before it had such lines


def cells(rows):
    """{run: {column: cell}} of a table."""
    return {Path(row[0]).name: dict(zip(rows[0], row)) for row in rows[1:]}


def test_table_has_a_line_for_each_run(tmp_path, capsys):
    """Catches wrong figures, columns that do not differ, runs that differ in more than seeds taken for one group."""
    for i, (lr, seed, end) in enumerate([(1e-3, 1, 5.0), (2e-3, 1, 5.2), (1e-3, 2, 5.1), (1e-3, 3, 5.2)]):
        run = write_run(tmp_path / f"log_{i}", falling(), {0: 10.9, 20: 4.9 + i, 40: end}, {40: 0.25 + seed / 100},
                        max_lr=lr, seed=seed, val_every=20, log_dir=f"log_{i}")
        with_rows(run, {"step": 40, "kind": "val", "loss": end, "bits_per_byte": end / 2, "seconds": 10},
                  {"step": 39, "kind": "train", "loss": 5.0, "memory_reserved_gb": 8.26, "tokens_per_sec": 4000})
    runs = [str(tmp_path / f"log_{i}") for i in range(4)]
    rows = curves.table(runs)
    again = write_run(tmp_path / "again", falling(), {40: 9.0}, {40: 0.2}, max_lr=1e-3, seed=3, val_every=20)
    with_rows(again, {"step": 40, "kind": "val", "bits_per_byte": 4.0})
    assert cells(curves.table([again, *runs]))["mean of 3 of 4"]["val"] == "5.1000 ± 0.1000"  # a seed counts once
    assert rows[0] == ["run", "max_lr", "seed", "tokens", "state", "val", "best val", "bits/byte", "hella", "tok/s",
                       "minutes", "GB"]
    assert [Path(row[0]).name for row in rows[1:]] == ["log_0", "log_2", "log_3", "mean of 3 of 3", "log_1"]
    assert rows[1][1:] == ["0.001", "1", "40960", "done", "5.0000", "4.9000", "2.5000", "0.2600", "2000", "0.5", "8.3"]
    assert cells(rows)["mean of 3 of 3"]["val"] == "5.1000 ± 0.1000"
    assert cells(rows)["mean of 3 of 3"]["hella"] == "0.2700 ± 0.0100"
    for name, start in (("t.tsv", "run\tmax_lr\tseed\t"), ("t.csv", "run,max_lr,"), ("t.md", "| run | max_lr |")):
        assert curves.main([*runs, str(tmp_path), "--table", "--out", str(tmp_path / name)]) == 0
        lines = (tmp_path / name).read_text().splitlines()
        assert lines[0].startswith(start) and len(lines) == 6 + (name == "t.md")
    printed = capsys.readouterr()
    assert f"left out: no log at {tmp_path}/log.txt" in printed.err and "mean of 3 of 3 " in printed.out


def test_table_says_what_became_of_a_run(tmp_path):
    """Catches a run that is not finite shown as done, a stopped one as running, and other code under one name."""
    vals = {0: 10.9, 40: 5.0}
    far = [10.8, 900.0, 330.0]
    write_run(tmp_path / "done", falling(), vals)
    write_run(tmp_path / "stopped", falling(30), {0: 10.9}, max_steps=40)
    write_run(tmp_path / "running", falling(30), {0: 10.9}, max_steps=40)
    write_run(tmp_path / "nan", [*falling(39), np.nan], {0: 10.9, 20: 6.0, 40: np.nan})
    write_run(tmp_path / "far", far, {0: 10.8, 3: 330.0})
    with_rows(write_run(tmp_path / "skipping", falling(9), {0: 10.9}, max_steps=40),
              {"step": 8, "kind": "train", "loss": 6.0, "grad_norm": "nan", "skipped": True})
    (tmp_path / "theirs.txt").write_text("0 train 10.0\n1 train 9.0\n")
    (tmp_path / "stopped" / ".lock").touch()  # of a run that was killed
    for name, source, known in (("done", "a", "1"), ("stopped", "a", "1"), ("running", "b", "1"), ("nan", "a", "2")):
        (tmp_path / name / "code").mkdir()
        (tmp_path / name / "code" / "train_gpt2.py").write_text(source)
        record = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(record | {"code_sha256": known}))
    (tmp_path / "skipping" / "code").mkdir()
    for name in ("train_gpt2.py", "train_gpt2_until_00005.py"):  # a resume ran other code
        (tmp_path / "skipping" / "code" / name).write_text("a")
    changed = json.loads((tmp_path / "far" / "config.json").read_text())
    changed["changes"] = [{"step": 2, "log_dir": ["a", "b"]}, {"step": 2, "max_lr": [1, 9], "compile": [True, False]}]
    (tmp_path / "far" / "config.json").write_text(json.dumps(changed))
    with folder_lock(tmp_path / "running", "--log_dir"):
        table = cells(curves.table([tmp_path / name for name in (
            "done", "stopped", "running", "nan", "far", "skipping", "theirs.txt")]))
    assert {name: row["state"] for name, row in table.items()} == {
        "done": "done", "stopped": "stopped at 30", "running": "running", "nan": "diverged", "far": "diverged",
        "skipping": "diverged", "theirs.txt": "stopped at 2"}
    assert table["nan"]["val"] == "nan" and table["nan"]["best val"] == "6.0000"
    assert table["far"]["changes"] == "[{'step': 2, 'max_lr': [1, 9]}]" and table["done"]["changes"] == "-"
    assert table["done"]["bits/byte"] == table["done"]["hella"] == "-"
    code = {name: row["code"] for name, row in table.items()}
    assert code["done"] == code["stopped"] != "-"
    assert len({code[name] for name in ("done", "running", "nan", "far", "skipping")}) == 5
    assert table["theirs.txt"]["tokens"] == table["theirs.txt"]["max_steps"] == "-"


def write_group(tmp_path, name, ends, hella=None, **config):
    """Runs that differ in their seeds, 1, 2, ...; `ends`: their last validation losses."""
    runs = []
    for seed, end in enumerate(ends, 1):
        run = write_run(tmp_path / f"{name}_{seed}", falling(), {0: 10.9, 20: end + 1, 30: end + 0.2, 40: end},
                        {40: hella[seed - 1]} if hella else {}, **{"seed": seed, **config})
        with_rows(run, *({"step": step, "kind": "val", "loss": loss, "bits_per_byte": loss / 2.5}
                         for step, loss in ((20, end + 1), (30, end + 0.2), (40, end))))
        runs.append(str(run))
    return runs


def test_versus_says_which_is_better_and_by_how_much(tmp_path):
    """Catches a wrong mean, deviation, interval (Welch's, worked out here), verdict, sign of HellaSwag's, or cost."""
    a, b = [4.80, 4.83, 4.79], [5.02, 4.98, 5.00, 5.04]
    text = "\n".join(curves.versus(write_group(tmp_path, "a", a, [0.31, 0.32, 0.33], max_lr=2e-3, min_lr=0.1 * 3e-3),
                                   write_group(tmp_path, "b", b, [0.30, 0.31, 0.29, 0.30], max_lr=1e-3)))
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(va + vb)
    gap = np.mean(a) - np.mean(b)
    assert "they differ in max_lr (0.002 | 0.001), min_lr (0.0003 | -)\n" in text
    assert "A: a_1 (seed 1), a_2 (seed 2), a_3 (seed 3)\n" in text
    assert "validation loss after 40,960 of 40,960 tokens" in text
    assert f"A: n 3, mean {np.mean(a):.4f}, sd {np.std(a, ddof=1):.4f}" in text
    assert f"A - B: {gap:+.4f} ± {half:.4f} (95% interval by Welch's t test)\n" in text
    assert f"A is better by {-gap:.4f} ± {half:.4f}" in text
    # the mean of A falls from 5.0067 at 30 steps to 4.8067 at 40: B's 5.01 lies before that
    reached = 1024 * (30 - 10 * (np.mean(b) - np.mean(a) - 0.2) / 0.8)
    assert f"A reaches B's 5.0100 after {reached:,.0f} of 40,960 tokens: 1.3 x fewer tokens" in text
    assert "B does not reach A's 4.8067" in text
    assert f"bits per byte after 40,960 of 40,960 tokens\n  A: n 3, mean {np.mean(a) / 2.5:.4f}" in text
    hella = text[text.index("HellaSwag"):]
    assert "A - B: +0.0200 ± " in hella and "A is better by 0.0200" in hella and "B does not reach A's 0.3200" in hella


def test_versus_cannot_tell_noise_from_a_change(tmp_path):
    """Catches verdicts that noise alone brings about: of 100 splits of ten equal runs about 95 must be undecided."""
    rng = np.random.default_rng(3)
    runs = write_group(tmp_path, "run", rng.normal(5, 0.02, 10))
    undecided = 0
    for _ in range(100):
        order = rng.permutation(runs).tolist()
        lines = curves.versus(order[:5], order[5:])
        undecided += any("cannot tell" in line for line in lines[3:9])
        assert "they differ in nothing but seeds" in lines
    assert 90 <= undecided <= 100
    hurt = write_group(tmp_path, "hurt", rng.normal(5.2, 0.02, 5), n_layer=2)
    assert any(line.startswith("  A is better by 0.") for line in curves.versus(runs[:5], hurt))


def test_versus_pairs_equal_seeds_and_counts_what_it_would_take(tmp_path):
    """Catches pairs by position in place of seed, and a number of seeds that is off by far."""
    ends, gaps = np.array([4.9, 5.1, 5.0, 5.2]), np.array([0.051, 0.049, 0.05, 0.052])
    a, b = write_group(tmp_path, "a", ends), write_group(tmp_path, "b", ends + gaps, max_lr=1)
    text = "\n".join(curves.versus(a, b[::-1]))
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / 2
    assert f"; by pairs of equal seeds -0.0505 ± {half:.4f}" in text
    seeds = int(re.search(r"cannot tell: a difference of 0.0505 would take about (\d+) seeds a group", text)[1])
    tries = np.random.default_rng(0).normal([[[0]], [[0.0505]]], ends.std(ddof=1), (2, seeds, 2000))
    assert 0.77 < np.mean(stats.ttest_ind(*tries, equal_var=False).pvalue < 0.05) < 0.84  # 4 of 5, as it says
    same = "\n".join(curves.versus(a[:2], write_group(tmp_path, "c", ends[:2] + 1e-5, max_lr=2)))
    assert "would take more than 1,000 seeds a group" in same


def test_versus_of_one_run_says_nothing_about_noise(tmp_path):
    """Catches an interval, or a verdict, made of one run a group."""
    (a,), (b,) = write_group(tmp_path, "a", [4.8]), write_group(tmp_path, "b", [5.0], max_lr=1)
    text = "\n".join(curves.versus([a], [b]))
    assert "A - B: -0.2000, which says nothing about noise" in text and "better" not in text and "sd" not in text
    assert "A: n 1, mean 4.8000\n" in text and "A reaches B's 5.0000" in text


def test_versus_compares_only_what_can_be_compared(tmp_path):
    """Catches losses of two tokenizers or schedules set side by side, and bits per byte of two texts."""
    def compared(a, b):
        return "\n".join(curves.versus(a, b))

    a = write_group(tmp_path, "a", [4.8, 4.9])
    early = write_group(tmp_path, "early", [4.7, 4.9], max_lr=2)
    log = Path(early[0], "log.txt")
    log.write_text(re.sub(r"40 val .*\n", "", log.read_text()))
    record = Path(early[0], "metrics.jsonl")
    record.write_text("".join(line for line in record.open() if not re.search(r'"step": [34]0, "kind": "val', line)))
    text = compared(a, early)  # at the last that all four have
    assert "loss after 30,720 of 40,960 tokens" in text and "bits per byte after 20,480 of 40,960 tokens" in text
    muon = write_group(tmp_path, "muon", [4.6, 4.7], optimizer="muon", schedule="wsd", max_steps=30)
    text = compared(a, muon)
    assert "compared at their ends only, since they differ in max_steps, optimizer, schedule" in text
    assert "validation loss after 40,960 of 40,960 and 30,720 of 30,720 tokens" in text
    assert "A does not reach" not in text and "A reaches B's 4.8500 after" in text and ": at least" not in text
    text = compared(muon, a)
    assert "A reaches B's 4.8500 after 30,720 of 30,720 tokens: 1.3 x fewer tokens" in text
    own = write_group(tmp_path, "own", [3.8, 3.9], tokenizer="2048")
    assert "validation loss: not compared, since tokenizer differ; bits per byte: not" in own_texts(a, own, None, None)
    assert "bits per byte: not compared, since tokenizer differ" in own_texts(a, own, None, "cd")
    assert "validated on different texts (give both the same --val_data)" in own_texts(a, own, "ab", "cd")
    for run, vocabulary in zip((*a, *own), ("GPT-2's vocabulary",) * 2 + ("a vocabulary of 2,048 tokens",) * 2):
        config = json.loads(Path(run, "config.json").read_text())
        config["tokenizer"] = {"name": vocabulary, "size": 1, "sha256": "ef"}
        Path(run, "config.json").write_text(json.dumps(config))
    assert "tokenizer" not in compared(a, early)  # of a version that did not record it
    text = own_texts(a, own, "ab", "ab")
    assert "validation loss: not compared" in text and "bits per byte after 40,960" in text and "B is better by" in text


def own_texts(a, b, *hashes):
    """What `versus` says of groups whose val rows carry the hash of a text, or none, or why it refuses."""
    for runs, text in zip((a, b), hashes):
        for run in runs if text else ():
            with_rows(Path(run), *({"step": step, "kind": "val", "text_sha256": text, "bytes": 999}
                                   for step in (0, 20, 30, 40)))
    try:
        return "\n".join(curves.versus(a, b))
    except UserError as error:
        return str(error)


def test_what_cannot_change_a_result_is_named_as_the_config_names_it():
    """Catches a flag that gets another name and then keeps runs apart that differ in nothing else."""
    assert curves.NEUTRAL - {field.name for field in fields(TrainConfig)} <= {"max_tokens", "minutes"}


def test_versus_gives_no_verdict_on_what_is_not_finite(tmp_path):
    """Catches a run that diverged left out of its group, or compared at an evaluation before it did."""
    a = write_group(tmp_path, "a", [4.8, 4.9])
    b = write_group(tmp_path, "b", [4.6], max_lr=1)
    died = write_run(tmp_path / "died", [10.8, np.nan], {0: 10.9}, max_lr=1, seed=2, max_steps=40)
    text = "\n".join(curves.versus(a, [*b, str(died)]))
    assert "B: n 2, mean nan" in text and "no verdict: died is not finite" in text and "better" not in text


def test_versus_draws_means_and_bands(tmp_path, monkeypatch):
    """Catches a band that is no standard deviation, a legend over the curves, and ticks between steps."""
    figures, draw = [], curves._draw_token_axis
    monkeypatch.setattr(curves, "_draw_token_axis", lambda ax, *rest: (figures.append(ax), draw(ax, *rest)))
    a = write_group(tmp_path, "a", [4.8, 4.9], [0.3, 0.3])
    b = write_group(tmp_path, "b", [5.0, 5.2], [0.3, 0.3], max_lr=1)
    assert curves.main([*a, "--versus", *b, "--out", str(tmp_path / "v.png")]) == 0
    loss, hella = figures
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG") and hella.get_ylabel() == "HellaSwag"
    np.testing.assert_allclose(lines(loss)["A: a, n 2"].get_xydata(), [[20, 5.85], [30, 5.05], [40, 4.85]])
    edge = loss.collections[1].get_paths()[0].vertices
    assert edge[:, 1].max() == pytest.approx(6.1 + np.std([6, 6.2], ddof=1))
    figure = loss.figure
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in figures]
    assert figure.legends and not any(box.overlaps(figure.legends[0].get_window_extent()) for box in boxes)
    assert all(float(tick).is_integer() for tick in loss.get_xticks())


def test_four_runs_keep_their_ends_in_sight(tmp_path):
    """Catches a legend that covers curves, ticks at step 2.5, and one step's loss called smoothed."""
    losses = np.linspace(10, 8, 10)
    runs = [str(write_run(tmp_path / f"run{i}", losses + i, {0: 10.9, 10: 9.0 + i}, {10: 0.3})) for i in range(4)]
    figure = curves.plot(runs)
    figure.draw_without_rendering()
    loss = panel(figure, "loss")
    legend = loss.get_legend().get_window_extent()
    assert not any(ax.get_window_extent().overlaps(legend) for ax in figure.axes)
    for ax in figure.axes:
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
    twenty = write_run(tmp_path / "twenty", [10.0] * 15 + [5, 6, 7, 8, 9])
    assert "smoothed train loss 7.0000" in curves.summary(twenty)
    ended = write_run(tmp_path / "ended", [10.0] * 15 + [float("nan")], {0: 10.9, 16: float("nan")})
    assert "smoothed train loss nan; validation loss nan (best 10.9000 at step 0)" in curves.summary(ended)


# csabapalfi/build-nanogpt, log/train-2x-h100-epoch-1.log
PUBLIC_VAL = {1000: 4.1544, 2000: 3.6690, 3000: 3.5023, 4000: 3.4153, 5000: 3.3528, 6000: 3.3106, 8000: 3.2380,
              10000: 3.1896, 12000: 3.1479, 14000: 3.1188, 16000: 3.0963, 18000: 3.0820, 19073: 3.0717}
PUBLIC_HELLA = {1000: 0.2574, 2000: 0.2593, 3000: 0.2716, 4000: 0.2736, 5000: 0.2758, 6000: 0.2805, 8000: 0.2896,
                10000: 0.2939, 12000: 0.2957, 14000: 0.3032, 16000: 0.3034, 18000: 0.3068, 19073: 0.3074}


def test_a_healthy_run_on_fineweb_edu_passes_and_a_sick_one_fails(tmp_path, capsys):
    """Catches FineWeb's 3.28 taken for FineWeb-Edu's: a run that ended there passed, and 3.07 failed."""
    big = {"total_batch_size": 524288, "data": "edu_fineweb10B"}
    out = ["--out", str(tmp_path / "c.png")]
    good = write_run(tmp_path / "good", [10.9], PUBLIC_VAL, PUBLIC_HELLA, **big)
    assert curves.main([str(good), "--against", *out]) == 0
    text = capsys.readouterr().out
    assert "fineweb_edu_10B.txt, of runs on fineweb-edu:" in text and "outside the band: 0 of 26 rows" in text
    assert "GPT-2 124M's 3.2924 reached at step 8,000" in text and "0.2945 reached at step 12,000" in text
    (band,) = panel(curves.plot(good, against=EDU), "loss").collections
    edge = band.get_paths()[0].vertices
    assert band.get_label() == "reference (fineweb-edu)" and edge[:, 1].min() == pytest.approx(3.0717 - 4 * 0.02)
    assert all(row["source"] for row in curves.read_reference(EDU)["rows"] + curves.read_reference(WEB)["rows"])

    rows = [f"{step} val {loss:.4f}" for step, loss in PUBLIC_VAL.items()]
    (tmp_path / "theirs.txt").write_text("\n".join(rows).replace("19073", "19072") + "\n")  # another program's log.txt
    assert curves.main([str(tmp_path / "theirs.txt"), "--against", EDU, *out]) == 0
    text = capsys.readouterr().out
    assert "0 of 12 rows" in text and "cannot tell which data" in text and "on other data this comparison means" in text

    sick = write_run(tmp_path / "sick", [10.9], {**PUBLIC_VAL, 18000: 3.285, 19073: 3.28}, PUBLIC_HELLA, **big)
    assert curves.main([str(sick), "--against", *out]) == 1
    text = capsys.readouterr().out
    assert "val     3.2800   reference 3.0717 ± 0.0800   above" in text and "outside the band: 2 of 26 rows" in text

    web = write_run(tmp_path / "web", [10.9], {19073: 3.28}, {19073: 0.299}, **{**big, "data": "fineweb10B"})
    assert curves.main([str(web), "--against", *out]) == 0
    assert "fineweb_10B.txt, of runs on fineweb:" in capsys.readouterr().out
