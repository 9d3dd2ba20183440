"""Tests of --tracker: the real Weights & Biases package, offline."""

import sys

import pytest
from helpers import make_shards, tiny_flags

import train_gpt2
from harness.cli import UserError

KEYS = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_sec", "val/loss", "samples"}


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
    """Guards the names that dashboards are built on, an offline run, and one run id over a resume."""
    logged, inits = records
    flags = {"tracker": "wandb", "sample_every": 4, "sample_tokens": 2, "max_steps": 4}
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", **flags))
    assert set().union(*(values for _, values in logged)) == KEYS
    assert [step for step, values in logged if "train/loss" in values] == [0, 1, 2, 3]
    assert [step for step, values in logged if "val/loss" in values] == [0, 4]
    assert any((tmp_path / "log" / "wandb").glob("offline-run-*/*.wandb"))
    logged.clear()
    train_gpt2.main(["--resume", "--log_dir", str(tmp_path / "log"), "--max_steps", "6"])
    (_, first), (options, second) = inits
    assert options["id"] == first == second
    assert [step for step, values in logged if "train/loss" in values] == [4, 5]


def test_absent_package_is_told_before_anything_moves(monkeypatch, tmp_path):
    """Guards the line that says what to install, and the old run in the folder."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    log = tmp_path / "log"
    log.mkdir()
    (log / "log.txt").write_text("0 train 1.000000\n")
    with pytest.raises(UserError, match="pip install wandb"):
        train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), log, tracker="wandb"))
    assert (log / "log.txt").read_text() == "0 train 1.000000\n"


def test_no_login_is_told_before_anything_moves(monkeypatch, tmp_path):
    """Guards the old run in the folder, which a tracker that cannot start must not send to the archive."""
    wandb = pytest.importorskip("wandb")

    def refused(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refused)
    log = tmp_path / "log"
    log.mkdir()
    (log / "log.txt").write_text("0 train 1.000000\n")
    with pytest.raises(UserError, match="wandb login"):
        train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), log, tracker="wandb"))
    assert (log / "log.txt").read_text() == "0 train 1.000000\n" and not (log / "archive").exists()


def test_off_by_default(monkeypatch, tmp_path):
    """Guards against a tracker that phones home unasked."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=1))
    assert not (tmp_path / "log" / "wandb").exists()
