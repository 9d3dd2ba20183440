"""Tests of --tracker: Weights & Biases, the real package offline where it is installed, and Trackio."""

import os
import signal
import subprocess
import sys
import types

import pytest
from helpers import log_rows, make_shards, metric_rows, run_trainer, tiny_flags

import train_gpt2
from harness.cli import UserError

KEYS = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_sec", "val/loss", "val/bits_per_byte", "samples"}
TRACKED = {"sample_every": 4, "sample_tokens": 2, "max_steps": 4}


@pytest.fixture
def records(monkeypatch):
    """What a run logs to the real package, as [(step, values)], and the arguments of its `init`."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, inits, real_init = [], [], wandb.init

    def init(**options):
        run = real_init(**options)
        real_log = run.log

        def log(values, step):
            logged.append((step, values))
            real_log(values, step=step)

        inits.append((options, run.id))
        run.log = log
        return run

    monkeypatch.setattr(wandb, "init", init)
    return logged, inits


def test_offline_run_and_its_resume(records, tmp_path):
    """Catches the names that dashboards are built on, an offline run, and one run id over a resume."""
    logged, inits = records
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", tracker="wandb", **TRACKED))
    assert set().union(*(values for _, values in logged)) == KEYS
    assert [step for step, values in logged if "train/loss" in values] == [0, 1, 2, 3]
    assert [step for step, values in logged if "val/loss" in values] == [0, 4]
    assert any((tmp_path / "log" / "wandb").glob("offline-run-*/*.wandb"))
    logged.clear()
    train_gpt2.main(["--resume", "--log_dir", str(tmp_path / "log"), "--max_steps", "6"])
    (_, first), (options, second) = inits
    assert options["id"] == first == second
    assert [step for step, values in logged if "train/loss" in values] == [4, 5]


def test_trackio_and_its_resume(monkeypatch, tmp_path):
    """Catches calls that Trackio 0.43 takes, by a stand-in with its signatures (the package brings a web server)."""
    calls = []

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, metrics, step=None):
            calls.append((step, set(metrics)))

        def finish(self):
            calls.append("finish")

    def init(project, name=None, group=None, config=None, resume="never"):
        calls.append((project, name, resume, config["n_layer"]))
        return Run(name or "brave-mountain-0")

    def table(columns=None, data=None):
        return columns, data

    module = types.ModuleType("trackio")
    module.init, module.Table = init, table
    monkeypatch.setitem(sys.modules, "trackio", module)
    given = {"tracker": "trackio", "wandb_project": "mine", **TRACKED}
    argv = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", **given)
    train_gpt2.main(argv)
    assert calls[0] == ("mine", None, "allow", 2) and calls[-1] == "finish"
    assert set().union(*(keys for _, keys in calls[1:-1])) == KEYS
    calls.clear()
    train_gpt2.main(["--resume", "--log_dir", str(tmp_path / "log"), "--max_steps", "5"])
    assert calls[0] == ("mine", "brave-mountain-0", "allow", 2)


@pytest.mark.parametrize(("name", "said"), [
    ("wandb", "pip install wandb"), ("trackio", "pip install trackio"), ("wandb", "wandb login")])
def test_a_tracker_that_cannot_start_is_reported_before_anything_moves(name, said, monkeypatch, tmp_path):
    """Catches the old run of the folder sent to the archive, where a package or a login is missing, and no advice."""
    if said == "wandb login":
        wandb = pytest.importorskip("wandb")

        def refused(**options):
            raise wandb.errors.UsageError("No API key configured.")

        monkeypatch.setattr(wandb, "init", refused)
    else:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    log = tmp_path / "log"
    log.mkdir()
    (log / "log.txt").write_text("0 train 1.000000\n")
    with pytest.raises(UserError, match=said):
        train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), log, tracker=name))
    assert (log / "log.txt").read_text() == "0 train 1.000000\n" and not (log / "archive").exists()


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_may_only_warn_once(fails, monkeypatch, tmp_path, capsys):
    """Catches a run against its tracker: whatever it raises, the run ends as it would have without it."""
    def fail(*args, **options):
        raise ConnectionResetError("Connection lost")

    run = types.SimpleNamespace(name="a", log=lambda *a, **o: None, finish=lambda: None)
    setattr(run, fails, fail)
    module = types.ModuleType("trackio")
    module.init, module.Table = lambda **options: run, lambda **options: None
    monkeypatch.setitem(sys.modules, "trackio", module)
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", tracker="trackio", **TRACKED))
    err = capsys.readouterr().err
    warning = "WARNING: --tracker trackio failed (ConnectionResetError: Connection lost)"
    assert err.count(warning) == err.count("\n") == 1
    assert (tmp_path / "log" / "model_00004.pt").exists()


def _kill_the_tracker(trainer):
    inner = trainer.RunLog.train

    def train(self, state, *args):
        if state.step == 3:  # its service is a process of its own, a child of this one
            command = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
            listed = subprocess.run(command, capture_output=True, text=True)
            services = [line.split()[0] for line in listed.stdout.splitlines() if "wandb" in line]
            assert services, listed.stdout
            for pid in services:
                os.kill(int(pid), signal.SIGKILL)
        inner(self, state, *args)

    trainer.RunLog.train = train


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ps --ppid")
def test_a_killed_wandb_costs_nothing(tmp_path):
    """Catches a run whose wandb process is killed: it used to end in ConnectionResetError with nothing saved."""
    pytest.importorskip("wandb")
    argv = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", tracker="wandb", **{**TRACKED, "max_steps": 8})
    done = run_trainer(argv, _kill_the_tracker, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert done.stderr.count("WARNING: --tracker wandb failed") == 1 and "Traceback" not in done.stderr, done.stderr
    assert len([row for row in log_rows(tmp_path / "log") if row[1] == "train"]) == 8
    assert metric_rows(tmp_path / "log", "export")


def test_off_by_default(monkeypatch, tmp_path):
    """Catches a tracker that phones home unasked."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=1))
    assert not (tmp_path / "log" / "wandb").exists()
