"""The folder of a run on unusual disks: no locks, an archive elsewhere or in the way, damaged files."""

import ctypes
import errno
import importlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from helpers import log_rows, make_shards, run_trainer, tiny_flags

import fineweb
import train_gpt2
from harness import rundir
from harness.cli import UserError


def lacking(real, name, is_lacking=lambda *args: True):
    """`real`, but for calls that are lacking by their arguments, which raise the error called `name`."""
    def call(*args, **kwargs):
        if is_lacking(*args):
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(*args, **kwargs)

    return call


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def is_file(handle):
    return stat.S_ISREG(os.fstat(handle).st_mode)


@pytest.mark.skipif(os.name != "posix", reason="calls of POSIX")
@pytest.mark.parametrize(("call", "name", "is_lacking"), [
    ("os.fsync", "EINVAL", is_file), ("os.fsync", "ENOSYS", is_file), ("os.fsync", "EBADF", is_folder),
    ("os.fsync", "EINVAL", is_folder), ("mmap.mmap", "ENODEV", lambda *_: True),
    *(("fcntl.flock", name, lambda *_: True) for name in (
        "ENOSYS", "EINVAL", "ENOLCK", "EOPNOTSUPP", "EIO", "EBADF")),
    ("builtins.open", "EOPNOTSUPP", lambda file, mode="r", *_: "a" in mode),
])
def test_a_file_system_that_lacks_a_call(call, name, is_lacking, tmp_path, monkeypatch, capsys):
    """Catches a traceback, or `cannot be written (No locks available)`, which sends people to another disk for nothing,
    where FUSE, NFS, SMB or an object store does not have what other disks have: a run and its resume end well, or in a
    line before anything is begun; shards are made. Missing locks are said."""
    module, _, function = call.rpartition(".")
    real = getattr(importlib.import_module(module), function)
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("What is said here is said of all. " * 99)
    monkeypatch.setattr(call, lacking(real, name, is_lacking))
    flags = tiny_flags("a.txt", "log", max_steps=2, checkpoint_every=1, val_every=0)
    assert fineweb.main(["--source", "a.txt", "--out", "shards", "--shard_size", "200"]) in (0, None)
    if call == "builtins.open":
        with pytest.raises(UserError, match=r"--log_dir log cannot be written \(.*not supported\): give another one"):
            train_gpt2.main(flags)
        assert not Path("log").exists()
        return
    capsys.readouterr()
    train_gpt2.main(flags)
    err = capsys.readouterr().err
    has_no_locks = call == "fcntl.flock" and name != "ENOSYS"  # for that one filelock has locks of its own
    assert err.count("WARNING: the file system of --log_dir log has no locks") == has_no_locks, err
    assert not has_no_locks or os.strerror(getattr(errno, name)) in err
    Path("log", "model_00002.pt").unlink()
    train_gpt2.main(["--resume"])
    assert [row[0] for row in log_rows("log")] == [0, 1] and Path("log", "hf", "config.json").exists()
    assert not [*Path().rglob("*.tmp")]


def old_run(folder):
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("0 train 1.000000\n")
    (folder / "model_00001.pt").write_bytes(b"precious")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    return folder


def test_an_archive_on_another_disk(tmp_path, monkeypatch):
    """Catches a link in place of `archive`: a rename across devices fails, and the run used to die of it."""
    log, real_rename = old_run(tmp_path / "log"), os.rename
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (log / "archive").symlink_to(elsewhere, target_is_directory=True)

    def rename(source, target, **options):
        if str(target).startswith(str(log / "archive")):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real_rename(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), log, max_steps=1, val_every=0))
    (archive,) = elsewhere.iterdir()
    assert (archive / "model_00001.pt").read_bytes() == b"precious" and (archive / "hf" / "config.json").exists()
    assert [row[0] for row in log_rows(log)] == [0]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_an_archive_that_is_no_folder_is_one_line(kind, tmp_path):
    """Catches a traceback, and an old run that is half moved."""
    log = old_run(tmp_path / "log")
    if kind == "file":
        (log / "archive").write_text("")
    else:
        (log / "archive").symlink_to(tmp_path / "nowhere" / "deep")
    before = {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match="the run in .*log cannot be moved to .*archive"):
        train_gpt2.main(tiny_flags(make_shards(tmp_path / "data"), log, max_steps=1))
    assert {p: p.read_bytes() for p in log.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize("content, moved", [(None, False), ({}, False), ({"training_step": None}, False),
                                            ({"training_step": 3}, False), ({"training_step": 4}, True)])
def test_an_export_that_was_killed_stops_no_resume(content, moved, tmp_path):
    """Catches the traceback of a resume from step 3 over an hf/ that a kill left without its config.json."""
    (tmp_path / "hf").mkdir()
    if content is not None:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    assert bool(rundir.archive_old_run(tmp_path, step=3)) == moved
    assert (tmp_path / "hf").exists() != moved


def test_a_refused_start_leaves_no_folder(tmp_path):
    """Catches empty log folders, one for each mistyped command."""
    flags = tiny_flags(tmp_path / "no such data", tmp_path / "log")
    assert run_trainer(flags).returncode == 2 and not (tmp_path / "log").exists()
    (tmp_path / "log").mkdir()
    assert run_trainer(flags).returncode == 2 and (tmp_path / "log").exists(), "the user's own stays"


def give_up_root(trainer):
    """Let permissions count for this process, as they do for every user but root (`man 2 capset`)."""
    if os.geteuid() == 0:
        version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        nothing = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version_3, nothing) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities")
@pytest.mark.parametrize(("closed", "mode"), [
    ("log", 0o555), ("cache", 0o555), ("text.txt", 0), ("data", 0), ("data/toy_train_000001.npy", 0),
    ("log/model_00002.pt", 0)])
def test_what_may_not_be_written_or_read_is_one_line(closed, mode, tmp_path):
    """Catches a traceback where a folder is read-only or a file is somebody else's; nothing is lost by it."""
    shards, text = make_shards(tmp_path / "data"), tmp_path / "text.txt"
    text.write_text("Some words, and others. " * 400)
    data = text if closed in ("cache", "text.txt") else shards
    flags = tiny_flags(data, tmp_path / "log", cache_dir=tmp_path / "cache", max_steps=2, val_every=0)
    if closed.startswith("log"):
        train_gpt2.main(flags)
        flags = ["--resume", "--log_dir", tmp_path / "log", "--cache_dir", tmp_path / "cache", "--max_steps", 3]
    (tmp_path / "cache").mkdir(exist_ok=True)
    path = tmp_path / closed
    path.chmod(mode)
    try:
        result = run_trainer(flags, before=give_up_root)
    finally:
        path.chmod(0o755)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert str(path) in result.stderr and "Permission denied" in result.stderr
    if closed.startswith("log"):
        assert run_trainer(flags, before=give_up_root).returncode == 0
