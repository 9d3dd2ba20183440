"""Exact resume: runs that are killed anywhere and resumed must leave what an undisturbed run leaves.

Every kill is a real one, of a process of its own, at a spot that is the same each time. Shuffle and dropout are on,
the data ends an epoch inside step 7, and validation, HellaSwag and samples come every four steps.
"""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    error_line,
    finish,
    log_rows,
    make_shards,
    metric_rows,
    run_trainer,
    start_ranks,
    strike,
    tiny_flags,
    write_questions,
)

import train_gpt2
from harness import fingerprints, rundir
from harness.checkpoint import newest as newest_checkpoint
from harness.cli import exit_status
from train_gpt2 import GPT, GPTConfig

STEPS = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data, a benchmark of two questions and `straight`, the log folder of an undisturbed run."""
    home = tmp_path_factory.mktemp("resume")
    make_shards(home / "data", train=(500, 477), high=5000)  # 31 + 29 sequences of 16: 7.5 steps of 8
    make_shards(home / "other", train=(500, 477), high=5000, seed=1)
    write_questions(home / "questions.jsonl")
    done = run_trainer(flags(home, "straight"))
    assert done.returncode == 0, done.stderr
    return home


def flags(home, log_dir, **changes):
    return tiny_flags(home / "data", home / log_dir, **{
        "n_embd": 16, "cache_dir": home / "cache", "max_steps": STEPS, "dropout": 0.2, "max_lr": 1e-2, "val_every": 4,
        "hellaswag_every": 4, "hellaswag_path": home / "questions.jsonl", "sample_every": 4, "sample_tokens": 3,
        "num_samples": 1, "checkpoint_every": 3, "save_minutes": 0, **changes})


def resumed(home, log_dir, before=None, **changes):
    """Resume the run in `log_dir`, by nothing but --resume, the folder and `changes`."""
    given = {"resume": "newest", "log_dir": home / log_dir, **changes}
    return run_trainer([word for name, value in given.items() for word in (f"--{name}", value)], before)


def assert_same(home, log_dir, straight="straight"):
    """The folder's logs, last weights, optimizer and bookkeeping are the undisturbed run's, to the last bit."""
    ours, due = home / log_dir, home / straight
    assert (ours / "log.txt").read_text() == (due / "log.txt").read_text()
    for kind in ("train", "val", "hella", "sample"):
        timeless = [[{k: v for k, v in row.items() if k in ("step", "loss", "lr", "grad_norm", "texts", "acc_norm")}
                     for row in metric_rows(folder, kind)] for folder in (ours, due)]
        assert timeless[0] == timeless[1], kind
    ours, due = (newest_checkpoint(folder)[1] for folder in (ours, due))
    assert_equal(*({k: v for k, v in c.items() if k not in ("train_config", "world_size")} for c in (ours, due)))
    assert {"model.safetensors", "config.json"} <= {p.name for p in (home / log_dir / "hf").iterdir()}
    assert (home / log_dir / "curves.png").stat().st_size > 1000
    assert not list((home / log_dir).rglob(".*.tmp")), "what a kill left half-written must go"


def assert_equal(a, b, where="checkpoint"):
    if isinstance(a, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def test_an_undisturbed_run_leaves_what_it_should(home):
    """Rows that are missing, doubled or at the wrong step; files that are not there."""
    rows = log_rows(home / "straight")
    assert [s for s, kind, _ in rows if kind == "train"] == list(range(STEPS))
    assert [s for s, kind, _ in rows if kind == "val"] == [0, 4, 8, 12]
    assert [s for s, kind, _ in rows if kind == "hella"] == [4, 8, 12]
    assert [row["step"] for row in metric_rows(home / "straight", "sample")] == [4, 8, 12]
    names = {p.name for p in (home / "straight").iterdir()}
    assert {"model_00003.pt", "model_00006.pt", "model_00009.pt", "model_00012.pt", "log.txt", "metrics.jsonl",
            "config.json", "curves.png", "hf"} <= names
    checkpoint = torch.load(home / "straight" / "model_00012.pt", weights_only=True)
    assert {"model", "config", "step", "val_loss", "best_val_loss", "optimizer", "scaler", "train_config", "position",
            "micro_batch_size", "skipped_in_a_row", "tracker_id", "format_version"} <= checkpoint.keys()
    assert (checkpoint["step"], checkpoint["position"]) == (STEPS, STEPS * 8)
    assert not any("_orig_mod" in name or "module." in name for name in checkpoint["model"])


KILLS = {  # two kills, each (function, call): the third start runs to the end
    "in steps": [("train_step", 6), ("train_step", 5)],
    "before and in a milestone": [("checkpoint.write", 2), ("checkpoint.os.fsync", 3)],
    "before a checkpoint has its name, and after": [("checkpoint.os.replace", 6), ("checkpoint.prune", 1)],
    "in an evaluation": [("validate", 3), ("hellaswag.evaluate", 1)],
    "in samples, and between logs": [("write_samples", 2), ("runlog.rows.log_line", 1)],
    "while a resume trims the logs": [("train_step", 9), ("runlog.rows.trim_rows", 1), ("checkpoint.os.replace", 2)],
    "after the last checkpoint": [("runlog.export", 1), ("runlog.draw_curves", 1)],
}


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("name", KILLS)
def test_killed_twice_equals_straight(home, name):
    """Data replayed or skipped, other dropout masks, rows lost or doubled, an evaluation left out or made twice."""
    log_dir = name.replace(" ", "_").replace(",", "")
    for i, (function, call) in enumerate(KILLS[name]):
        before = partial(strike, name=function, call=call)
        done = resumed(home, log_dir, before) if i else run_trainer(flags(home, log_dir), before)
        assert done.returncode == -signal.SIGKILL, (function, done.returncode, done.stdout, done.stderr)
    with open(home / log_dir / "log.txt", "a") as text, open(home / log_dir / "metrics.jsonl", "a") as metrics:
        text.write("11 trai")
        metrics.write('{"step": 11, "ki')
    done = resumed(home, log_dir)
    assert done.returncode == 0, done.stderr
    assert_same(home, log_dir)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("auto", [False, True])
def test_a_signal_saves_and_a_resume_is_exact(home, auto):
    """A run that dies unsaved on Ctrl-C, or does not say how to resume. (Other signals and places: test_ranks.py.)

    `auto`: one command line for a job that is requeued, failing at its first start, or starting over at its second.
    """
    name = f"sigint_{auto}"
    argv = flags(home, name, **({"resume": "auto"} if auto else {}))
    done = run_trainer(argv, partial(strike, name="train_step", call=5, number=signal.SIGINT))
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.startswith("stopped by Ctrl-C at step 5, saved") and "Traceback" not in done.stderr
    assert said.endswith(f"train_gpt2.py --resume --log_dir {home / name}")
    assert (home / name / "rolling_00005.pt").exists()
    assert (run_trainer(argv) if auto else resumed(home, name)).returncode == 0
    assert not (home / name / "archive").exists()
    assert_same(home, name)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_before_the_first_step_is_no_fault(home):
    """A traceback for a Ctrl-C while the data is still looked at, or an old run moved by it."""
    done = run_trainer(flags(home, "early"), partial(strike, name="make_plan", call=1, number=signal.SIGINT))
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "train_gpt2.py: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_fine_tuned_run_resumes_and_keeps_its_best(home):
    """best.pt lost or taken from a later run; a resume that needs, or loads again, what the run began from."""
    GPT(GPTConfig(block_size=20, n_layer=2, n_head=2, n_embd=16), seed=5).save_pretrained(home / "start")
    changes = {"init_from": home / "start", "n_layer": None, "n_head": None, "n_embd": None, "max_lr": 1e-3,
               "hellaswag_every": 0, "sample_every": 0, "val_every": 3}
    assert run_trainer(flags(home, "tuned", **changes)).returncode == 0
    run_trainer(flags(home, "tuned_twice", **changes), partial(strike, name="train_step", call=9))
    (home / "start").rename(home / "moved")
    assert resumed(home, "tuned_twice").returncode == 0
    assert_same(home, "tuned_twice", "tuned")
    best, again = (torch.load(home / d / "best.pt", weights_only=True) for d in ("tuned", "tuned_twice"))
    assert_equal(best["model"], again["model"])
    losses = {int(row["step"]): row["loss"] for row in metric_rows(home / "tuned", "val") if row["step"]}
    assert best["val_loss"] == min(losses.values()) and best["step"] == min(losses, key=losses.get)
    # hf/ is the best model, and a resume of the finished run that is made worse on purpose leaves it there
    rate = {"max_lr": 0.5, "min_lr": 0.5}
    done = resumed(home, "tuned", max_steps=STEPS + 4, **rate)
    step = best["step"]
    assert done.returncode == 0, done.stderr
    assert f"is the best model, after {step} of {STEPS + 4} steps" in done.stdout and "best.pt is its" in done.stdout
    assert f"sample.py --model {home / 'tuned' / 'hf'}\n" in done.stdout
    exported = GPT.from_pretrained(home / "tuned" / "hf").state_dict()
    assert_equal(exported, best["model"])
    assert json.loads((home / "tuned" / "hf" / "config.json").read_text())["training_step"] == step
    best = bytearray((home / "tuned" / "best.pt").read_bytes())
    best[best.index(b"/data/0") + 200] ^= 1  # of a weight: the sizes and CRC-32 in its zip stay as they were
    (home / "tuned" / "best.pt").write_bytes(best)
    shutil.rmtree(home / "tuned" / "hf")
    done = resumed(home, "tuned")
    assert done.returncode == 0 and "fails its checksum" in done.stdout, done.stderr
    assert json.loads((home / "tuned" / "hf" / "config.json").read_text())["training_step"] == STEPS + 4
    (home / "tuned" / "best.pt").write_bytes(b"torn")
    done = resumed(home, "tuned")
    assert done.returncode == 0 and "hf/ gets the last model" in done.stdout, done.stderr
    assert json.loads((home / "tuned" / "hf" / "config.json").read_text())["training_step"] == STEPS + 4


# --- the rules of --resume -------------------------------------------------------------------------------------------


def copied(home, name):
    shutil.copytree(home / "straight", home / name)
    return home / name


def test_an_older_checkpoint_archives_what_came_later(home):
    """Catches rows and checkpoints of two histories in one folder, the later one lost, a torn best.pt in the way."""
    folder = copied(home, "older")
    (folder / "notes.txt").write_text("mine")
    (folder / "best.pt").write_bytes(b"PK torn")
    done = resumed(home, "older", resume=folder / "model_00006.pt")
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "archive").iterdir()
    assert str(archive) in done.stdout
    archived = {p.name for p in archive.iterdir()}
    assert {"model_00009.pt", "model_00012.pt", "best.pt", "hf", "log.txt", "metrics.jsonl"} <= archived
    assert not (folder / "best.pt").exists()
    assert (archive / "log.txt").read_text() == (home / "straight" / "log.txt").read_text()
    assert (folder / "notes.txt").read_text() == "mine"
    assert_same(home, "older")


def test_resume_of_a_file_stays_in_its_folder(home):
    """`--resume log_a/model_6.pt` that continues in the default folder `log`."""
    folder = copied(home, "stays")
    done = run_trainer(["--resume", folder / "model_00009.pt", "--max_steps", "13", "--sample_every", "0"], cwd=home)
    assert done.returncode == 0, done.stderr
    assert (folder / "model_00013.pt").exists() and not (home / "log").exists()


REFUSED = {"total_batch_size": (64, 128), "seq_len": (8, 16), "seed": (7, 1337), "shuffle": (False, True),
           "n_layer": (3, 2), "n_embd": (32, 16), "dropout": (0.0, 0.2), "optimizer": ("muon", "adamw"),
           "weight_decay": (0.0, 0.1), "beta2": (0.9, 0.95), "grad_clip": (0.0, 1.0), "init_from": ("gpt2", "scratch"),
           "model": ("gpt2-xl", "gpt2")}


def test_flags_that_contradict_the_checkpoint_are_refused(home, capsys):
    """A resume with another order of the data or another model, taken or passed over in silence."""
    folder = copied(home, "refused")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    for name, (given, saved) in REFUSED.items():
        flag = [f"--{name}", str(given)] if given is not False else [f"--no-{name}"]
        assert exit_status(train_gpt2.main, ["--resume", "--log_dir", str(folder), *flag]) == 2
        line = capsys.readouterr().err
        assert f"--{name}" in line and str(given) in line and str(saved) in line, line
    argv = ["--resume", "--log_dir", str(folder), "--data", str(home / "other")]
    assert exit_status(train_gpt2.main, argv) == 2
    line = capsys.readouterr().err
    assert str(home / "other") in line and str(home / "data") in line
    argv = ["--resume", "--log_dir", str(folder), "--val_data", str(home / "other")]
    assert exit_status(train_gpt2.main, argv) == 2  # one curve of two validation sets
    line = capsys.readouterr().err
    assert f"--val_data {home / 'other'}" in line and "for val" in line
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_longer_run_continues_a_finished_one(home):
    """--max_steps ignored beside --resume, or rows of the first part touched; data that moved, refused."""
    folder = copied(home, "longer")
    shutil.copytree(home / "data", home / "data_moved")
    done = resumed(home, "longer", data=home / "data_moved", max_steps=15, val_every=5, micro_batch_size=8)
    assert done.returncode == 0, done.stderr
    first, rows = log_rows(home / "straight"), log_rows(folder)
    assert rows[: len(first)] == first
    assert [s for s, kind, _ in rows[len(first) :] if kind == "train"] == [12, 13, 14]
    assert [s for s, kind, _ in rows if kind == "val"] == [0, 4, 8, 12, 15]
    assert metric_rows(folder, "train")[-1]["lr"] == pytest.approx(
        train_gpt2.lr_at(14, train_gpt2.TrainConfig(max_lr=1e-2, warmup_steps=3, max_steps=15)))
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["max_steps"], config["dropout"], config["data"]) == (15, 0.2, str(home / "data_moved"))
    assert (folder / "model_00012.pt").exists() and (folder / "model_00015.pt").exists()


def test_a_finished_run_completes_what_is_missing(home):
    """A finished job that is requeued: trained on, exported into nothing, or refused."""
    folder = copied(home, "finished")
    (folder / "hf" / "model.safetensors").unlink()  # it comes last: what a kill in the export leaves
    (folder / "curves.png").unlink()
    lines = folder.joinpath("log.txt").read_text().splitlines(keepends=True)
    folder.joinpath("log.txt").write_text("".join(line for line in lines if not line.startswith("12 hella")))
    weights = (folder / "model_00012.pt").stat().st_mtime_ns
    done = resumed(home, "finished")
    assert done.returncode == 0, done.stderr
    assert sorted(folder.joinpath("log.txt").read_text().splitlines(keepends=True)) == sorted(lines)
    assert (folder / "hf" / "model.safetensors").exists() and (folder / "curves.png").exists()
    assert (folder / "model_00012.pt").stat().st_mtime_ns == weights


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_the_export_is_of_the_step_that_it_should_be(home):
    """An `hf/` of the old step beside "done": a longer run, killed between its last checkpoint and its export."""
    folder = copied(home, "export")
    assert json.loads((folder / "hf" / "config.json").read_text())["training_step"] == STEPS
    done = resumed(home, folder.name, partial(strike, name="runlog.export", call=1), max_steps=STEPS + 2)
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)
    done = resumed(home, folder.name)
    assert done.returncode == 0 and "nothing left to train" in done.stdout, done.stderr
    assert json.loads((folder / "hf" / "config.json").read_text())["training_step"] == STEPS + 2
    last = torch.load(folder / f"model_{STEPS + 2:05d}.pt", weights_only=True)["model"]
    assert_equal(GPT.from_pretrained(folder / "hf").state_dict(), last)
    written = (folder / "hf" / "model.safetensors").stat().st_mtime_ns
    assert resumed(home, folder.name).returncode == 0
    assert (folder / "hf" / "model.safetensors").stat().st_mtime_ns == written, "it was what it should be"


def test_a_final_rate_of_zero_is_kept(home):
    """`--min_lr 0` forgotten by `--resume --max_lr`; a minimum that followed from the rate no longer following it."""
    for min_lr, due in ((0.0, 0.0), (None, 2e-3)):
        argv = flags(home, "minimum", min_lr=min_lr, max_steps=1, val_every=0, hellaswag_every=0, sample_every=0)
        assert run_trainer(argv).returncode == 0
        assert resumed(home, "minimum", max_lr=2e-2, max_steps=2).returncode == 0
        config = json.loads((home / "minimum" / "config.json").read_text())["config"]
        assert (config["max_lr"], config["min_lr"]) == (2e-2, pytest.approx(due))


def test_a_torn_milestone_is_written_again(home):
    """A last milestone that stays torn, since the state was read from a rolling checkpoint of the same step."""
    folder = copied(home, "milestone")
    last = folder / f"model_{STEPS:05d}.pt"
    content = last.read_bytes()
    (folder / f"rolling_{STEPS:05d}.pt").write_bytes(content)
    last.write_bytes(content[: len(content) // 2])
    done = resumed(home, folder.name)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(last, weights_only=True)["model"],
                 torch.load(home / "straight" / last.name, weights_only=True)["model"])


def _other_numerics(trainer):
    torch.set_num_threads(2)
    trainer.machine.pick_dtype = lambda device, wanted="auto": ("bfloat16", "as on another CPU")


def test_what_changes_the_digits_is_said(home):
    """"Exact on the CPU" that holds for one number of threads and one dtype, without a word where they are others."""
    folder = copied(home, "numerics")
    record = json.loads((folder / "config.json").read_text())
    assert (record["dtype"], record["compiled"], record["threads"]) == ("float32", False, 1)
    same, other = resumed(home, folder.name), resumed(home, folder.name, _other_numerics)
    assert same.returncode == other.returncode == 0 and "note:" not in same.stdout
    for change in ("threads 1 so far, 2 from here", "dtype float32 so far, bfloat16 from here"):
        assert f"note: {change}: the losses will differ slightly" in other.stdout, other.stderr


# --- data that changed -----------------------------------------------------------------------------------------------


def test_changed_data_is_refused_before_anything_moves(tmp_path):
    """Words replaced in the middle of a text, with the same length and both ends, that a resume trained on silently."""
    data, log = tmp_path / "my.txt", tmp_path / "log"
    data.write_text("".join(f"{i:05d} these are plain words of mine\n" for i in range(12_000)))
    argv = tiny_flags(data, log, max_steps=6, checkpoint_every=3, seed=3)
    assert run_trainer(argv).returncode == 0
    text = data.read_text()
    middle = len(text) // 2 - 40_000
    changed = text[middle : middle + 60_000].replace("plain", "other")
    data.write_text(text[:middle] + changed + text[middle + 60_000 :])
    assert data.stat().st_size == len(text) and data.read_text() != text
    before = {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != ".lock"}
    line = error_line(run_trainer(["--resume", log / "model_00003.pt"]))
    assert "other contents" in line and "start a new run" in line
    assert {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert not (log / "archive").exists()


def _impatient(trainer):
    wait = fingerprints.BackgroundHashes.wait
    fingerprints.BackgroundHashes.wait = lambda self, seconds: wait(self, 0)


def test_changed_data_that_is_noticed_late_ends_the_run(tmp_path):
    """A hash that takes longer than a resume waits for it: the run trained on until its next checkpoint."""
    data, log = make_shards(tmp_path / "data", train=(200_000,)), tmp_path / "log"
    assert run_trainer(tiny_flags(data, log, max_steps=4)).returncode == 0
    tokens = np.load(data / "toy_train_000001.npy")
    tokens[80_000:120_000] = 7
    np.save(data / "toy_train_000001.npy", tokens)
    line = error_line(run_trainer(["--resume", "--log_dir", log, "--max_steps", 100_000, "--save_minutes", 0],
                                  before=_impatient))
    assert "the train data is not what the checkpoint was trained with: toy_train_000001.npy has other" in line
    assert [file.name for file in log.glob("*.pt")] == ["model_00004.pt"]


# --- the log folder --------------------------------------------------------------------------------------------------


def test_a_new_run_archives_the_old_one_and_nothing_else(home):
    """A run that was lost by forgetting --resume, or a user's own file moved."""
    folder = copied(home, "again")
    mine = {"notes.txt": "mine", "model_best.pt": "mine too", ".gitkeep": ""}
    for name, text in mine.items():
        (folder / name).write_text(text)
    old = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*")
           if p.is_file() and p.name not in {*mine, ".lock"}}
    for times in (1, 2):  # also twice within a second
        done = run_trainer(flags(home, "again", max_steps=1, val_every=0, hellaswag_every=0, sample_every=0))
        assert done.returncode == 0 and "archive" in done.stdout
        assert len(list((folder / "archive").iterdir())) == times
    (first,) = (d for d in (folder / "archive").iterdir() if (d / "model_00012.pt").exists())
    assert {p.relative_to(first): p.read_bytes() for p in first.rglob("*") if p.is_file()} == old
    assert all((folder / name).read_text() == text for name, text in mine.items())
    assert [s for s, kind, _ in log_rows(folder)] == [0]


def _wait_in_step(trainer, file):
    inner = trainer.train_step

    def wait(*args):
        Path(file).write_text("here")
        while Path(file).exists():
            trainer.time.sleep(0.01)
        return inner(*args)

    trainer.train_step = wait


def test_a_folder_in_use_is_refused(home, capsys):
    """Two runs that write one log: a job started twice."""
    flag = home / "in_step"
    (running,) = start_ranks(flags(home, "shared", max_steps=1), before=partial(_wait_in_step, file=flag))
    while not flag.exists() and running.is_alive():
        running.join(0.02)
    log = (home / "shared" / "log.txt").read_text()
    for argv in (flags(home, "shared"), ["--resume", "--log_dir", home / "shared"]):
        line = error_line(run_trainer(argv))
        assert "shared" in line and "in use" in line
    assert (home / "shared" / "log.txt").read_text() == log
    flag.unlink()
    assert finish(running).returncode == 0
    with rundir.lock(home / "shared"):  # free again
        pass
