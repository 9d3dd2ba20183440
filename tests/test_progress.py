"""What a user sees of a run: the bar, the time left, samples, commands to continue with, warnings of jumps."""

import os
import re
import sys
from collections import deque
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TRAINER, Terminal, make_shards, metric_rows, tiny_flags

import train_gpt2
from harness import checkpoint, commands
from harness.cli import duration, parse_args
from harness.runlog import Bar, RunLog, jumped, seconds_left
from train_gpt2 import TrainConfig

# --- the time left ---------------------------------------------------------------------------------------------------


def test_durations_in_words():
    """Catches units that nobody can read at a glance: 13,211 s, 75:12:09."""
    words = {4: "4 s", 59.4: "59 s", 100: "1 min 40 s", 3599: "59 min 59 s", 3600: "1 h 0 min", 12_000: "3 h 20 min",
             86_399: "1 day 0 h", 190_800: "2 days 5 h", 15_768_000: "182 days 12 h"}
    assert {seconds: duration(seconds) for seconds in words} == words


def test_the_time_left_counts_every_evaluation_to_come():
    """Catches an estimate that leaves out, or counts twice, the evaluation that is due now or the one at the end."""
    for max_steps, val, hella, sample in product((1, 7, 12), (0, 1, 4, 6), (0, 5), (0, 3, 20)):
        cfg = TrainConfig(max_steps=max_steps, val_every=val, hellaswag_every=hella, sample_every=sample)
        log = RunLog(cfg, None, None)
        log.last |= {"val": {"seconds": 100.0}, "hella": {"seconds": 1000.0}, "sample": {"seconds": 10_000.0}}
        log.update_seconds.extend([1.0, 1.0, 1.0, 50.0, 1.0])  # one update that was slow says nothing
        for step in range(1, max_steps + 1):
            due = max_steps - step
            for s in range(step, max_steps + 1):  # the loop: evaluations that are due, then an update
                for every, seconds in ((val, 100), (hella, 1000), (sample, 10_000)):
                    due += seconds * bool(every and (s % every == 0 or s == max_steps))
            assert seconds_left(log, step) == due, (cfg, step)


# --- the bar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_bar_is_left_at_any_width(columns):
    """Catches the figures that pushed the bar itself off a terminal of 80 columns."""
    bar = Bar(total=19_073, initial=12_345, ncols=columns, file=open(os.devnull, "w"))  # noqa: SIM115
    bar.show({"mfu": "45%", "lr": "6.0e-4", "val": "3.2912", "loss": "3.301", "tok/s": "1.23M"}, 12_345)
    line = str(bar)
    bar.close()
    assert len(line) <= columns and len(line.split("|")[1]) >= Bar.NARROWEST, line
    shown = ["loss 3.301", "val 3.2912", "tok/s 1.23M", "lr 6.0e-4", "mfu 45%"]
    assert all(figure in line for figure in shown) or columns < 120, line
    assert line.endswith(tuple(" ".join(shown[:n]) for n in range(1, 6))), line
    assert "<3:25:45" in line


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_on_a_terminal(columns, tmp_path):
    """Catches the bar of a real run: its width, its figures, no `mfu` on a CPU, and the line that says how long."""
    argv = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=20)
    terminal = Terminal([sys.executable, TRAINER, *argv], columns=columns)
    assert terminal.finish() == 0, terminal.text
    text = terminal.text
    bars = [line for line in re.split(r"[\r\n]+", text) if "%|" in line]
    assert bars and all(len(bar.split("|")[1]) >= Bar.NARROWEST for bar in bars), bars
    assert all(len(line.replace("\x1b[A", "")) <= columns for line in bars), bars
    assert re.search(r"loss \d+\.\d+ val \d+\.\d+ tok/s \S+ lr \d\.\de-\d", bars[-1]), bars[-1]
    assert "mfu" not in text and "-loss" not in text
    assert len(re.findall(r"step     4 \| about (\d+ min )?\d+ s from here", text)) == 1
    assert text.index("compiled") < text.index("; a step is") < text.index("%|")
    assert "20/20" in bars[-1] and "<00:00]" in bars[-1]


def test_what_a_run_prints_without_a_terminal(tmp_path, capsys):
    """Catches samples of several lines that run into the margin, "1 train shards", and commands that do not work here.

    The tests' working folder is not the project's, as that of a user who starts the script by its path.
    """
    argv = tiny_flags(make_shards(tmp_path / "data", high=300), tmp_path / "log", sample_every=10, sample_tokens=3,
                      sample_prompt="To be,\nor not\n", num_samples=1)
    train_gpt2.main(argv)
    out = capsys.readouterr().out
    assert "step    10 | sample 0: To be,\n             or not\n             " in out
    assert "1 train shard, " in out
    assert re.search(r"step     4 \| about \d+ s from here\n", out)
    assert f"sample: {commands.script('sample.py', '--model', tmp_path / 'log')}\n" in out
    assert f"share:  {tmp_path / 'log' / 'hf'} is a Hugging Face folder" in out


def test_commands_are_spelled_for_the_working_folder(tmp_path, monkeypatch):
    """Catches last lines that name train_gpt2.py where it is not, folders with blanks in their names, and a `python` in
    place of the torchrun that started eight ranks."""
    monkeypatch.chdir(ROOT)
    assert commands.resume("log") == "python train_gpt2.py --resume"
    command = "python train_gpt2.py --resume --log_dir 'my log' --max_steps 5"
    assert commands.resume("my log", "--max_steps", 5) == command
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "8"), ("GROUP_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert commands.resume("log") == "torchrun --standalone --nproc_per_node=8 train_gpt2.py --resume"
    assert commands.script("sample.py") == "python sample.py"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # whose other machine is not known
    assert commands.resume("log") == "python train_gpt2.py --resume"
    monkeypatch.chdir(ROOT / "tests")
    assert commands.script("sample.py") == f"python {os.path.join('..', 'sample.py')}"
    monkeypatch.chdir(tmp_path)
    word = commands.script("train_gpt2.py").split()[1]
    assert os.path.samefile(word, ROOT / "train_gpt2.py")


# --- losses that jump ------------------------------------------------------------------------------------------------


def test_a_poisoned_batch_is_reported_once(tmp_path, capsys):
    """Catches the line and the row about a loss that jumps, in a real run, and a line for each of its steps."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, 115 * 64 + 1, dtype=np.uint16)
    tokens[110 * 64 + 1 : 112 * 64] = rng.integers(40_000, 50_000, 2 * 64 - 1)  # targets of steps 110 and 111
    data = make_shards(tmp_path / "data")
    np.save(data / "toy_train_000001.npy", tokens)
    argv = tiny_flags(data, tmp_path / "log", shuffle=False, max_steps=115, max_lr=1e-2, val_every=0, n_layer=1,
                      total_batch_size=64)
    train_gpt2.main(argv)
    (row,) = metric_rows(tmp_path / "log", "spike")
    losses = [r["loss"] for r in metric_rows(tmp_path / "log", "train")]
    assert row["step"] == 110 and row["loss"] == losses[110] and row["sequence_ids"] == list(range(440, 444))
    assert row["mean"] == pytest.approx(np.mean(losses[10:110])) and row["deviation"] == pytest.approx(
        np.std(losses[10:110], ddof=1))
    out = capsys.readouterr().out
    assert out.count("WARNING: the loss jumped to") == 1 and "step   110 | WARNING" in out
    assert len(losses) == 115, "nothing is skipped for it"


def test_jumps_are_reported_once_in_a_hundred_steps():
    """Catches a console flooded by a run that diverges, and a jump that is never reported again."""
    losses, steps = deque(maxlen=100), [-100]
    for step in range(400):
        loss = 3.0 + 0.01 * (step % 7) + 50.0 * (step in (99, 100, 101, 150, 201, 330))
        if jumped(loss, losses, step - steps[-1]):
            steps.append(step)
        losses.append(loss)
    assert steps[1:] == [100, 201, 330]


def test_a_jump_is_remembered_by_a_resume():
    """Catches a second report of one jump, by a run that was killed within the hundred steps after it."""
    earlier = [{"step": step, "kind": "train", "loss": 3.0 + 0.01 * (step % 7)} for step in range(112)]
    earlier.insert(111, {"step": 110, "kind": "spike", "loss": 50.0})
    log = RunLog(TrainConfig(), SimpleNamespace(rank=1), None)
    log.add_earlier(earlier)
    assert jumped(50.0, log.losses, 112 - log.last["spike"]["step"]) is None
    assert jumped(50.0, log.losses, 210 - log.last["spike"]["step"])


# --- from Python -----------------------------------------------------------------------------------------------------


def test_what_train_returns(tmp_path):
    """Catches a result without bits per byte (those before a resume too), or with another model."""
    flags = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=4, val_every=2)
    resumed = ["--resume", "--log_dir", str(tmp_path / "log"), "--max_steps", "6"]
    first = train_gpt2.train(parse_args(TrainConfig, train_gpt2.PRESETS, flags, 0, ""))
    both = train_gpt2.train(parse_args(TrainConfig, train_gpt2.PRESETS, resumed, 0, ""))
    records = [row for row in metric_rows(tmp_path / "log") if row["kind"] == "val"]
    assert both["bits_per_byte"] == ([0, 2, 4, 6], [row["bits_per_byte"] for row in records])
    assert both["val"][0] == [0, 2, 4, 6] and both["train"][0] == [0, 1, 2, 3, 4, 5]
    saved = checkpoint.read(tmp_path / "log" / "model_00006.pt")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in both["model"].state_dict().items())
    assert not torch.equal(first["model"].transformer.wte.weight, both["model"].transformer.wte.weight)
