"""Where two features meet: an export and a redone step, a log folder and the user's own, an error inside the loop."""

import gc
import json
import math
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, log_rows, make_shards, metric_rows, run_trainer, tiny_flags
from test_checkpoint import same

import convert
import train_gpt2
from harness import rundir
from harness.cli import UserError, parse_args
from harness.runlog import diverged
from train_gpt2 import GPT, GPTConfig, TrainConfig, train


@pytest.fixture
def data(tmp_path):
    return make_shards(tmp_path / "data", train=(9000, 7000))


def weights(source):
    return convert.read_source(source).tensors


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_export_of_a_step_that_was_made_again_is_the_new_one(data, tmp_path):
    """Catches hf/ of another model of the same step: the last milestone deleted, the end made again at another rate."""
    flags = tiny_flags(data, tmp_path / "log", max_steps=6, checkpoint_every=3, val_every=0)
    assert run_trainer(flags).returncode == 0
    old = weights(tmp_path / "log" / "model_00006.pt")
    (tmp_path / "log" / "model_00006.pt").unlink()
    assert run_trainer(["--resume", "--log_dir", tmp_path / "log", "--max_lr", "5e-3"]).returncode == 0
    new, exported = weights(tmp_path / "log" / "model_00006.pt"), weights(tmp_path / "log" / "hf")
    assert same(exported, new) and not same(exported, old)


def test_a_resume_into_another_folder_saves_there(data, tmp_path):
    """Catches "saved" and "done" with nothing written: a checkpoint of another folder counted as this one's."""
    assert run_trainer(tiny_flags(data, tmp_path / "a", max_steps=4, val_every=0)).returncode == 0
    done = run_trainer(["--resume", tmp_path / "a" / "model_00004.pt", "--log_dir", tmp_path / "b"])
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "b"), weights(tmp_path / "a"))


def test_the_best_of_another_continuation_is_not_exported(tmp_path):
    """Catches best.pt of a later run that was resumed from before it, exported as the best of this one."""
    data = make_shards(tmp_path / "data", high=300)  # so that the loss falls
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16), seed=5).save_pretrained(tmp_path / "start")
    flags = tiny_flags(data, tmp_path / "log", init_from=tmp_path / "start", n_layer=None, n_head=None, n_embd=None,
                       max_steps=6, val_every=2, checkpoint_every=2, max_lr=1e-2)
    assert run_trainer(flags).returncode == 0
    best = torch.load(tmp_path / "log" / "best.pt", weights_only=True)
    assert best["step"] == 6
    done = run_trainer(["--resume", tmp_path / "log" / "model_00002.pt", "--max_lr", "1", "--min_lr", "1"])
    assert done.returncode == 0, done.stderr
    losses = {row["step"]: row["loss"] for row in metric_rows(tmp_path / "log", "val") if row["step"]}
    now = torch.load(tmp_path / "log" / "best.pt", weights_only=True)
    assert now["step"] == min(losses, key=losses.get) and now["val_loss"] == min(losses.values())
    assert same(weights(tmp_path / "log" / "hf"), weights(tmp_path / "log" / "best.pt"))
    (archive,) = (tmp_path / "log" / "archive").iterdir()
    assert same(weights(archive / "best.pt"), best["model"])


def other_activation(trainer):
    trainer.F.gelu = lambda x, approximate: trainer.F.relu(x).square()


def test_other_code_for_the_same_weights_is_said(data, tmp_path):
    """Catches a resume, and a sample, under a model of equal shapes that computes something else: GELU made ReLU^2."""
    flags = tiny_flags(data, tmp_path / "log", max_steps=4, val_every=0)
    assert run_trainer(flags, other_activation).returncode == 0
    done = run_trainer(["--resume", "--log_dir", tmp_path / "log", "--max_steps", "6"])
    assert done.returncode == 0 and done.stderr.count("was written by other code") == 1, done.stderr
    done = run_trainer(["--resume", "--log_dir", tmp_path / "log", "--max_steps", "8"])
    assert done.returncode == 0 and not done.stderr


# --- the user's own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "log.txt", "metrics.jsonl", "hf/config.json", "code/mine.py",
                                  "best.pt", "model_00001.pt", "curves.png"])
def test_a_folder_of_the_users_is_refused(name, data, tmp_path):
    """Catches a user's file that is moved or written over since it has the name of one that a run writes."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"model_type": "bert"}')
    before = sorted(p for p in (tmp_path / "mine").rglob("*"))
    line = error_line(run_trainer(tiny_flags(data, tmp_path / "mine", max_steps=1)))
    assert f"holds {name.split('/')[0]}, which no run of this program wrote: give another folder" in line
    assert sorted(p for p in (tmp_path / "mine").rglob("*")) == before
    assert path.read_text() == '{"model_type": "bert"}'


@pytest.mark.parametrize("name, line", [("metrics.jsonl", '{"step": 0, "kind": "start"'), ("log.txt", "0 val 10.8")])
def test_a_log_torn_in_its_first_line_is_a_runs(name, line, tmp_path):
    """Catches a run that was killed within its first row and whose folder is then refused as somebody else's."""
    for end in range(len(line) + 1):
        (tmp_path / name).write_text(line[:end])
        rundir.refuse_foreign_files(tmp_path)
    for foreign in ('{"a": 1}', "12 apples", "0 words of mine"):
        (tmp_path / name).write_text(foreign)
        with pytest.raises(UserError, match="no run of this program wrote"):
            rundir.refuse_foreign_files(tmp_path)


def test_what_a_kill_leaves_in_code_and_hf_goes(tmp_path):
    """Catches a folder that is refused since its code/ was not written to the end, and temporary files that stay."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kind": "start", "seconds": 1.0}\n')
    left = [tmp_path / "code" / ".train_gpt2.py.29b9edd1.tmp", tmp_path / "hf" / ".generation_config.json.5cfd06b4.tmp"]
    for file in left:
        file.parent.mkdir()
        file.touch()
    with rundir.lock(tmp_path):
        assert not any(file.exists() for file in left)


def test_temporary_files_of_others_stay(tmp_path):
    """Catches a pattern that deletes the user's own hidden .tmp files with those of a run that was killed."""
    names = [".mine.12345678.tmp", ".notes.20251130.tmp", ".config.json.abcd1234.tmp", ".rolling_00005.pt.abcd_234.tmp"]
    for name in names:
        (tmp_path / name).touch()
    with rundir.lock(tmp_path):
        assert sorted(p.name for p in tmp_path.glob(".*.tmp")) == names[:2]


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_a_run_that_diverges_says_so_once(data, tmp_path, capsys):
    """Catches a run at ten times its rate whose last words offer it to be shared, without a word about it."""
    train_gpt2.main(tiny_flags(data, tmp_path / "log", max_steps=14, max_lr=10, warmup_steps=0, val_every=0))
    out = capsys.readouterr().out
    assert out.count("WARNING: the run diverges") == 1 and len(metric_rows(tmp_path / "log", "diverged")) == 1
    assert "is a Hugging Face folder (of a run that diverged at step" in out and "\nmore: " not in out


def test_what_diverges():
    """Catches noise, a first loss a little above ln V, and a rise that stays below it, each taken for the other."""
    rng = np.random.default_rng(0)
    assert diverged([10.83] * 5, math.inf, 50257) is None and diverged([10.83] * 4 + [900.0], math.inf, 50257)
    noisy = list(3.3 + 0.3 * rng.standard_normal(100))
    assert diverged(noisy, 3.2, 50257) is None and diverged([4.4] * 100, 3.3, 50257)


def test_no_sample_of_a_model_that_computes_nan(data, tmp_path):
    """Catches a traceback out of the sampler, and a run that dies of it before --max_skipped ends it in one line."""
    done = run_trainer(tiny_flags(data, tmp_path / "log", max_lr=1e20, warmup_steps=0, val_every=0, sample_every=2,
                                  max_skipped=3))
    assert "updates in a row (--max_skipped)" in error_line(done)


# --- an error inside the loop -----------------------------------------------------------------------------------------


def refuse(*args):
    raise UserError("the data cannot be read (Input/output error)")


def spoil(trainer):
    """Let no data be read any more once four updates are complete."""
    inner = trainer.runlog.log_update

    def log_update(run, *args):
        inner(run, *args)
        if run.state.step == 4:
            trainer.Shards.read = refuse

    trainer.runlog.log_update = log_update


def fail_after_four(trainer):
    inner = trainer.runlog.LineFile.add

    def add(self, line):
        if '"step": 4, "kind": "train"' in line:
            raise OSError(5, "Input/output error")
        inner(self, line)

    trainer.runlog.LineFile.add = add


@pytest.mark.parametrize(("fault", "said"), [(spoil, "cannot be read"), (fail_after_four, "the log cannot be written")])
def test_a_disk_that_fails_saves_first(data, tmp_path, fault, said):
    """Catches ten minutes lost to one bad read or write, or a traceback. (One rank of two: test_ranks.py.)"""
    assert run_trainer(tiny_flags(data, tmp_path / "straight", max_steps=8)).returncode == 0
    end = run_trainer(tiny_flags(data, tmp_path / "log", max_steps=8), fault)
    assert f"{said} (Input/output error)" in error_line(end)
    (saved,) = (tmp_path / "log").glob("rolling_*.pt")
    assert torch.load(saved, weights_only=True)["step"] >= 4
    assert run_trainer(["--resume", "--log_dir", tmp_path / "log"]).returncode == 0
    lost = [] if fault is spoil else [(4, "train")]  # the row that could not be written
    assert log_rows(tmp_path / "log") == [row for row in log_rows(tmp_path / "straight") if row[:2] not in lost]
    assert same(weights(tmp_path / "log"), weights(tmp_path / "straight"))


# --- a guest ----------------------------------------------------------------------------------------------------------


class Cycle:
    def __init__(self):
        self.me = self


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc")
@pytest.mark.parametrize("fails", [False, True])
def test_train_leaves_nothing_behind(fails, data, tmp_path, monkeypatch):
    """Catches garbage of the whole process that is never freed again, a file a shard that stays open, and deterministic
    algorithms for whoever called `train`."""
    import signal
    import threading

    def open_files():
        gc.collect()
        return sum(os.path.realpath(f"/proc/self/fd/{n}").endswith(".npy") for n in os.listdir("/proc/self/fd"))

    def determinism():
        return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.set_deterministic_debug_mode("warn")
    if fails:
        monkeypatch.setattr(train_gpt2, "train_step", lambda run: (_ for _ in ()).throw(UserError("as in a step")))
    mine = Cycle()
    gone, before = weakref.ref(mine), (threading.active_count(), signal.getsignal(signal.SIGTERM))
    cfg = parse_args(TrainConfig, train_gpt2.PRESETS, tiny_flags(data, tmp_path / "log", max_steps=2), 0, "")
    if fails:
        with pytest.raises(UserError):
            train(cfg)
    else:
        assert json.dumps(train(cfg)["val"])
    del mine
    assert determinism() == (1, True)
    torch.set_deterministic_debug_mode("default")
    assert open_files() == 0 and gc.get_freeze_count() == 0 and gone() is None
    assert (threading.active_count(), signal.getsignal(signal.SIGTERM)) == before
