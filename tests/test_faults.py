"""Nothing is lost: torn files, full disks, numbers that are not finite, memory that runs out, hostile input.

Kills, signals and damaged newest checkpoints in whole runs stand in test_resume.py and test_ranks.py; the long versions
of what is here are scripts/kill_anywhere.py, scripts/fuzz.py and scripts/soak.py.
"""

import contextlib
import errno
import importlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import types
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, error_line, log_rows, make_shards, metric_rows, run_ranks, tiny_flags

import train_gpt2
from harness import checkpoint, fit, runlog
from harness.checkpoint import files as checkpoint_files
from harness.checkpoint import read as read_checkpoint
from harness.cli import UserError, exit_status
from harness.runtime import Runtime

SCRIPTS = Path(__file__).parent / "scripts"
SMALL = {"n_layer": 1, "n_embd": 8, "seq_len": 16, "total_batch_size": 64, "micro_batch_size": 2, "max_steps": 6,
         "val_every": 3, "val_tokens": 64, "checkpoint_every": 2}


def run(argv):
    """(status, stdout, stderr) of the trainer in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = exit_status(train_gpt2.main, [str(word) for word in argv])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The log folder of an undisturbed run with milestones at 2, 4 and 6; not to be written into."""
    log_dir = tmp_path_factory.mktemp("finished") / "log"
    assert run(tiny_flags(data, log_dir, **SMALL))[0] == 0
    return log_dir


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of it as a kill after step 5 leaves it."""
    log_dir = tmp_path / "log"
    shutil.copytree(finished, log_dir)
    (log_dir / "model_00006.pt").unlink()
    shutil.rmtree(log_dir / "hf")
    return log_dir


def resume(log_dir):
    return run(["--resume", "--log_dir", log_dir])


# --- Torn and altered files ------------------------------------------------------------------------------------------


def test_the_newest_good_checkpoint_outlives_bad_newer_ones(stopped, finished):
    """Falling back on a checkpoint that pruning then deletes, or keeping bad files in its place."""
    for step in (4, 2):
        (stopped / f"model_{step:05d}.pt").rename(stopped / f"rolling_{step:05d}.pt")
    torn = stopped / "rolling_00005.pt"
    torn.write_bytes((stopped / "rolling_00004.pt").read_bytes()[:-100])
    checkpoint = torch.load(stopped / "rolling_00004.pt", weights_only=True)
    del checkpoint["position"]
    torch.save(checkpoint, stopped / "rolling_00004.pt")
    flags = ["--resume", "--log_dir", stopped, "--keep_checkpoints", 1, "--checkpoint_every", 0, "--save_minutes", 1e-9]
    status, _, err = run(flags)
    assert status == 0
    assert "rolling_00005.pt" in err and "rolling_00004.pt" in err and "has no position" in err
    assert log_rows(stopped) == log_rows(finished)
    assert [file.name for file in checkpoint_files(stopped)] == ["model_00006.pt", "rolling_00005.pt"]
    assert read_checkpoint(stopped / "rolling_00005.pt")["step"] == 5
    assert len(list(stopped.glob("archive/*/rolling_00005.pt"))) == 1


def set_at(path, value):
    """A change to a checkpoint: the entry at `path` becomes `value`, or goes where that is `...`."""
    def change(checkpoint):
        for key in path[:-1]:
            checkpoint = checkpoint[key]
        if value is ...:
            del checkpoint[path[-1]]
        else:
            checkpoint[path[-1]] = value

    return change


ADAMW = ("optimizer", "adamw")


@pytest.mark.parametrize("change", [
    set_at(ADAMW, ...),
    set_at(ADAMW, {}),
    set_at((*ADAMW, "state"), 3),
    set_at((*ADAMW, "state", 1), ...),
    set_at((*ADAMW, "state", 0, "exp_avg"), torch.zeros(3)),  # a fused kernel would write past its end
    set_at((*ADAMW, "state", 0, "exp_avg_sq"), ...),
    set_at((*ADAMW, "state", 0, "step"), "x"),
    set_at(("config", "n_head"), 3),
    set_at(("config", "surprise"), 1),
    set_at(("train_config", "seq_len"), 0),
    set_at(("train_config", "total_batch_size"), "many"),
    set_at(("model", "transformer.ln_f.bias"), torch.zeros(9)),
    set_at(("data", "train"), [["toy", 1, 2]]),
    set_at(("micro_batch_size",), 3),
])
def test_an_altered_checkpoint_is_refused_in_one_line(stopped, change):
    """A sound file with other contents: a traceback, memory overwritten, or weights quietly replaced by new ones."""
    file = stopped / "model_00004.pt"
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)
    before = (stopped / "log.txt").read_text()
    status, _, err = resume(stopped)
    assert status == 2 and len(err.splitlines()) == 1, err
    assert (stopped / "log.txt").read_text() == before


def test_garbled_logs_are_cut_back(stopped, finished):
    """A resume that trips over lines that a power cut or an editor left, or keeps them."""
    with open(stopped / "log.txt", "a") as log:
        log.write("3 train abc\n" + "9" * 5000 + " train 1.0\n\0\0\0\n3 val\n5 tra")
    with open(stopped / "metrics.jsonl", "a") as metrics:
        metrics.write("[" * 100_000 + '\n{"step": "x", "kind": []}\n{"step": 1e999, "kind": "val"}\n[]\n{"step": 3, "k')
    assert resume(stopped)[0] == 0
    assert log_rows(stopped) == log_rows(finished)
    assert all(row["step"] <= 6 for row in metric_rows(stopped))


def test_shards_that_cannot_be_read_are_named(data, tmp_path):
    """A torn, foreign or hostile shard that is trained on, run as code, or answered by a traceback."""
    def header(text):
        return b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    whole = (data / "toy_train_000001.npy").read_bytes()
    pickled = io.BytesIO()
    np.save(pickled, np.array([Bomb()], dtype=object), allow_pickle=True)
    cases = {
        "empty": b"", "short": whole[:-2], "long": whole + b"\0\0", "half a token": whole[:-1], "header": whole[:60],
        "pickle": pickled.getvalue(), "open quote": header("{'descr': '''") + whole[128:],
        "brackets": header("(" * 110) + whole[128:], "negative": header(
            "{'descr': '<u2', 'fortran_order': False, 'shape': (-9,), }") + whole[128:],
        "huge": header("{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,), }") + whole[128:],
        "ids": whole[:128] + b"\xff" * (len(whole) - 128), "folder": None, "broken link": None,
    }
    for name, content in cases.items():
        folder = tmp_path / name
        shutil.copytree(data, folder)
        shard = folder / "toy_train_000001.npy"
        shard.unlink()
        if name == "folder":
            shard.mkdir()
        elif name == "broken link":
            shard.symlink_to("nowhere")
        else:
            shard.write_bytes(content)
        status, _, err = run(tiny_flags(folder, tmp_path / "log", **SMALL))
        assert status == 2 and len(err.splitlines()) == 1, (name, status, err)
        assert shard.name in err or name == "folder", err
    assert not (tmp_path / "executed").exists()


# --- Full disk -------------------------------------------------------------------------------------------------------


class SmallFile:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= taken
        self.file.write(memoryview(data)[:taken])
        if taken < len(data) and not isinstance(self.file, io.RawIOBase):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what a buffered file does
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_at_a_checkpoint(data, finished, tmp_path, monkeypatch):
    """A run that dies with torch's "unexpected pos" on a full disk, or takes the last good checkpoint with it."""
    inner = checkpoint.atomic_file

    @contextlib.contextmanager
    def full_for_4(path, *args, **options):
        with inner(path, *args, **options) as file:
            yield SmallFile(file, 3_000_000) if path.name == "model_00004.pt" else file

    monkeypatch.setattr(checkpoint, "atomic_file", full_for_4)
    status, _, err = run(tiny_flags(data, tmp_path / "log", **SMALL))
    assert status == 0
    assert "the disk is full" in err and "model_00004.pt" in err and len(err.splitlines()) == 1
    names = [file.name for file in checkpoint_files(tmp_path / "log")]
    assert names == ["model_00006.pt", "model_00002.pt"] and not list((tmp_path / "log").rglob("*.tmp"))
    assert log_rows(tmp_path / "log") == log_rows(finished)


def test_a_full_disk_at_the_logs(data, finished, tmp_path, monkeypatch):
    """Rows lost, torn or written twice while there is no space, or a checkpoint that knows more than the log."""
    inner, lines = runlog.LineFile.__init__, []

    def small(self, path):
        inner(self, path)
        self.file = SmallFile(self.file, 130)
        lines.append(self)

    def room_again(step, *args):
        if step == 4:
            for line in lines:
                line.file.room = 10**9
        return train_lr(step, *args)

    train_lr = train_gpt2.lr_at
    monkeypatch.setattr(runlog.LineFile, "__init__", small)
    monkeypatch.setattr(train_gpt2, "lr_at", room_again)
    status, _, err = run(tiny_flags(data, tmp_path / "log", **SMALL))
    assert status == 0 and "its rows wait in memory" in err
    assert log_rows(tmp_path / "log") == log_rows(finished)
    names = [file.name for file in checkpoint_files(tmp_path / "log")]
    assert names == ["model_00006.pt"]  # none while rows were missing
    assert [row["file"] for row in metric_rows(tmp_path / "log", "checkpoint")] == ["model_00006.pt"]


@pytest.fixture
def mounted(tmp_path):
    """`mount(MiB, options)` of a small file system of its own, where the machine lets us."""
    places = []

    def mount(size, options=""):
        place = tmp_path / f"disk {len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m{options}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no small file system can be mounted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_on_a_small_disk(data, finished, mounted, tmp_path):
    """A whole run on a disk that holds two checkpoints of three: it must end in one line, and go on after."""
    disk = mounted(12)
    status, _, err = run(tiny_flags(data, disk / "log", cache_dir=tmp_path / "cache", **SMALL))
    assert status == 2 and "model_00006.pt" in err.splitlines()[-1] and "--resume" in err.splitlines()[-1]
    assert [file.name for file in checkpoint_files(disk / "log")] == ["model_00004.pt", "model_00002.pt"]
    assert not list(disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert resume(disk / "log")[0] == 0
    assert log_rows(disk / "log") == log_rows(finished)


def test_no_picture_is_worth_a_run(data, finished, tmp_path, monkeypatch):
    """Curves that cannot be drawn ending a run of days, before the checkpoint that is due at the same step."""
    log_dir = tmp_path / "log"
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    status, out, _ = run(tiny_flags(data, log_dir, **SMALL))
    assert status == 0 and "WARNING: curves.png is not drawn" in out
    assert [p.name for p in sorted(log_dir.glob("*.pt"))] == [p.name for p in sorted(finished.glob("*.pt"))]
    assert (log_dir / "hf" / "model.safetensors").exists() and not (log_dir / "curves.png").exists()


def test_no_start_without_space_or_leave_to_write(data, mounted, finished):
    """A traceback, or a run of a week that can save nothing."""
    disk = mounted(1)
    status, _, err = run(tiny_flags(data, disk / "log", cache_dir=finished / "cache", **SMALL))
    assert status == 2 and str(disk / "log") in err and len(err.splitlines()) == 1
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    status, _, err = run(tiny_flags(data, disk / "log", cache_dir=finished / "cache", **SMALL))
    assert status == 2 and str(disk / "log") in err and len(err.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_console_that_takes_nothing_more(data, finished, tmp_path):
    """Output redirected to the disk that fills: no reason to stop a run."""
    command = [sys.executable, train_gpt2.__file__, *tiny_flags(data, tmp_path / "lög", **SMALL)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}  # nor are letters that it lacks
    with open("/dev/full", "w") as stdout:
        end = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)
    assert end.returncode == 0, end.stderr
    assert log_rows(tmp_path / "lög") == log_rows(finished)


# --- Numbers that are not finite -------------------------------------------------------------------------------------


def poison(trainer, steps, rank=0, where="loss", value=float("nan")):
    """Make the loss, or one gradient, `value` in the last micro-step of `steps` on one rank."""
    import torch

    inner, state_of = trainer.F.cross_entropy, []

    def step_noted(run):
        state_of[:] = [run.state]
        return step(run)

    def poisoned(logits, *args, **kwargs):
        loss = inner(logits, *args, **kwargs)
        if torch.is_grad_enabled() and state_of[0].step in steps and int(os.environ.get("RANK", 0)) == rank:
            if where == "loss":
                return loss * value
            logits.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([5]), value))
        return loss

    step, trainer.train_step = trainer.train_step, step_noted
    trainer.F = types.SimpleNamespace(**{**vars(trainer.F), "cross_entropy": poisoned})


@pytest.mark.parametrize("where, value", [("loss", float("nan")), ("gradient", float("inf"))])
def test_a_number_that_is_not_finite_never_reaches_the_weights(data, tmp_path, monkeypatch, where, value):
    """One bad batch that turns a run of a week into NaN; a skip that stops the clock or hides the batch."""
    monkeypatch.setattr(train_gpt2, "train_step", train_gpt2.train_step)  # put back what `poison` changes
    monkeypatch.setattr(train_gpt2, "F", train_gpt2.F)
    poison(train_gpt2, steps={2, 3}, where=where, value=value)
    log_dir = tmp_path / "log"
    status, out, _ = run(tiny_flags(data, log_dir, **SMALL))
    assert status == 0 and out.count("not finite: update skipped") == 2
    at_2, at_4, at_6 = (read_checkpoint(log_dir / f"model_{step:05d}.pt") for step in (2, 4, 6))
    for name, before in at_2["model"].items():
        assert torch.equal(before, at_4["model"][name])
        assert torch.isfinite(at_6["model"][name]).all()
    assert at_4["step"] == 4 and at_4["position"] == 4 * 4  # data read, step counted
    assert not torch.equal(at_4["model"]["transformer.wte.weight"], at_6["model"]["transformer.wte.weight"])
    rows = metric_rows(log_dir, "train")
    assert [row["skipped"] for row in rows] == [False, False, True, True, False, False]
    loader = train_gpt2.DataLoaderLite(data, 4, 16)
    assert rows[3]["sequence_ids"] == loader.sequence_ids(3 * 4, 4).tolist()
    loader.close()
    assert sorted(kind for step, kind, _ in log_rows(log_dir) if step == 3) == ["train", "val"]


def test_one_bad_rank_makes_all_skip_and_too_many_stop(data, tmp_path):
    """Ranks that part ways over one rank's NaN; a run that goes on for ever without learning."""
    before = partial(poison, steps=range(2, 9), rank=1)
    ends = run_ranks(tiny_flags(data, tmp_path / "log", max_skipped=3, **SMALL), 2, before=before)
    line = error_line(ends[0])
    assert ends[1].returncode == 2 and not ends[1].stderr.strip()
    rows = metric_rows(tmp_path / "log", "train")
    assert [row["skipped"] for row in rows] == [False, False, True, True, True]
    assert "step 4" in line and str(rows[-1]["sequence_ids"][:8]) in line
    at_2, at_4 = (read_checkpoint(tmp_path / "log" / f"model_{step:05d}.pt") for step in (2, 4))
    assert all(torch.equal(at_2["model"][name], at_4["model"][name]) for name in at_2["model"])
    assert at_4["skipped_in_a_row"] == 2


# --- Out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, found", [(64, 64), (63, 32), (20, 16), (1, 1), (0, None)])
def test_the_micro_batch_search_halves_until_all_ranks_fit(monkeypatch, limit, found):
    """A size that only this rank can hold, that does not divide the batch, or an out-of-memory at a size not chosen; a
    search that never ends, or a traceback, where the model is too large."""
    tried = []
    monkeypatch.setattr(fit, "try_micro_batch", lambda _, __, B, cfg, rt: (tried.append(B) or True, None))
    rt = Runtime()
    rt.device, rt.world_size = types.SimpleNamespace(type="cuda"), 8
    rt.gather = lambda value: [value, (tried[-1] <= limit, None)]  # another rank has no more memory
    cfg = train_gpt2.TrainConfig(total_batch_size=524288, seq_len=1024, micro_batch_size=0)
    if found:
        assert train_gpt2.find_micro_batch(None, None, cfg, rt) == found
    else:
        with pytest.raises(UserError, match="--micro_batch_size 1,"):
            train_gpt2.find_micro_batch(None, None, cfg, rt)
    assert tried == [64 >> i for i in range(len(tried))]


def test_out_of_memory_later_tells_the_command_to_go_on(data, tmp_path, monkeypatch):
    """Advice that is refused (a half that does not divide), or half a step that is saved."""
    inner = train_gpt2.train_step

    def starved(run):
        if run.state.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner(run)

    monkeypatch.setattr(train_gpt2, "train_step", starved)
    flags = {**SMALL, "total_batch_size": 16 * 15, "micro_batch_size": 15}
    status, _, err = run(tiny_flags(data, tmp_path / "it's a log", **flags))
    assert status == 2 and len(err.splitlines()) == 1
    assert [file.name for file in checkpoint_files(tmp_path / "it's a log")] == ["model_00002.pt"]
    command = shlex.split(err[err.index("--resume") :])
    assert command[-1] == "5"
    monkeypatch.setattr(train_gpt2, "train_step", inner)
    assert run(command)[0] == 0
    assert [step for step, kind, _ in log_rows(tmp_path / "it's a log") if kind == "train"] == list(range(6))


# --- Hostile input, and everything at random -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["it's \"quoted\"; $(touch pwned) %s{0}", "-naïve Ω 日本",
                                  pytest.param("caf\udce9", marks=pytest.mark.skipif(
                                      sys.platform in ("win32", "darwin"), reason="every name there is text"))])
def test_any_folder_name_will_do(data, finished, tmp_path, monkeypatch, name):
    """Paths that break a quoting, a format, a glob or UTF-8; the commands that are printed must work as they stand."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, f"data {name}")
    flags = tiny_flags(f"data {name}", "x", **SMALL)
    flags[flags.index("--log_dir") : flags.index("--log_dir") + 2] = [f"--log_dir={name}"]
    status, out, _ = run(flags)
    assert status == 0 and log_rows(name) == log_rows(finished)
    shown = f"data {name}".encode("utf-8", "backslashreplace").decode()
    assert f"- Data: {shown}\n" in Path(name, "hf", "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in out.splitlines() if ".py " in line]
    assert [words[0] for words in commands] == ["sample:", "more:"]
    assert all({name, f"--model={name}", f"--log_dir={name}"} & {*words} for words in commands)
    assert not (tmp_path / "pwned").exists()


def test_a_path_too_long_and_a_model_too_large_are_lines(data, tmp_path, monkeypatch):
    """Tracebacks of pathlib (a path of 300 letters) and of torch's allocator."""
    for changes in ({"data": "a" * 300}, {"val_data": "a/" * 3000}, {"resume": "a" * 300}, {"init_from": "a" * 300}):
        flags = {**SMALL, **changes}
        status, _, err = run(tiny_flags(flags.pop("data", data), tmp_path / "log", **flags))
        assert status == 2 and len(err.splitlines()) == 1 and "aaa" in err.replace("/", ""), (changes, err[-300:])
    monkeypatch.setattr(train_gpt2, "GPT", lambda *args: torch.empty(2**60))
    status, _, err = run(tiny_flags(data, tmp_path / "log", **SMALL))
    assert status == 2 and len(err.splitlines()) == 1 and "memory" in err, err[-300:]


def test_kills_are_aimed_at_what_is_there():
    """Catches a script of kills that a renamed function has made miss: it would report no fault."""
    from scripts.kill_anywhere import PHASES

    for module, name in filter(None, PHASES.values()):
        attrgetter(name)(importlib.import_module(module))


@pytest.mark.slow  # what they have found so far has tests of its own
@pytest.mark.skipif(os.name != "posix", reason="needs fork, signals and limits of POSIX")
@pytest.mark.parametrize("script, flags", [
    ("kill_anywhere.py", ["--kills", "3", "--variants", "one rank", "--seed", "3"]),
    ("fuzz.py", ["--commands", "8", "--files", "10", "--seed", "2"]),
])
def test_short_versions_of_the_long_scripts(script, flags):
    """Whatever nobody thought of; and scripts that rot."""
    end = subprocess.run([sys.executable, SCRIPTS / script, *flags], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert end.returncode == 0, end.stdout + end.stderr


def test_memory_of_validation_does_not_grow(tmp_path):
    """Catches small tensors kept between large ones: malloc could not reuse the logits' memory."""
    code = f"""
import resource, types, train_gpt2 as t
from harness.runtime import Runtime
from helpers import make_shards
runtime = Runtime().choose("cpu", "float32")
model = t.GPT(t.GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16))
shards = t.Shards(t.find_shards(make_shards({str(tmp_path)!r}, val=[128 * 4 * 30 + 1]), "val"), 128)
peaks = []
for batches in (2, 30):
    cfg = t.TrainConfig(seq_len=128, val_tokens=128 * 4 * batches)
    run = types.SimpleNamespace(rt=runtime, state=types.SimpleNamespace(model=model), compiled=model, cfg=cfg,
                                micro_batch_size=4)
    t.validate(run, shards)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] / peaks[0])
"""
    pytest.importorskip("resource")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5
