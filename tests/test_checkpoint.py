"""Checkpoints: written and read by one schema, found and pruned by name; files that are damaged or hostile."""

import os
import pickle
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness import checkpoint, files
from harness.cli import UserError

pytestmark = pytest.mark.quick


@dataclass
class State:
    """A state as the trainer's: what has a state dict, and plain values."""

    model: torch.nn.Module
    optimizer: dict
    scaler: torch.amp.GradScaler
    step: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    skipped_in_a_row: int = 0
    tracker_id: str | None = None


@dataclass
class StateWithMore(State):
    """That of a user who added an average of the weights, a list and a counter."""

    ema: torch.nn.Module | None = None
    seen: list | None = None
    restarts: int = 3


def content(step=5, **changes):
    """What a trainer writes. The model is none in particular."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}.weight": torch.randn((9, 8), generator=generator) for i in range(5)}
    return {
        "format_version": 1, "model": weights, "config": {"n_layer": 5}, "step": step,
        "val_loss": None, "best_val_loss": 1.5,
        "optimizer": {"adamw": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "scaler": {},
        "train_config": {"log_dir": "log"}, "position": 40, "micro_batch_size": 4, "world_size": 1,
        "skipped_in_a_row": 0, "tracker_id": None, "data": {}, "dtype": "float32", "compiled": True,
        "threads": 2, "tokenizer": None, "not_gpt2": None, **changes,
    }


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_written_is_read(tmp_path):
    """Catches a key that is written and not read, or checked under another name or type."""
    path = tmp_path / "model_00005.pt"
    checkpoint.write(path, content())
    assert same(checkpoint.read(path, State), {**content(), "tokenizer": None, "probe": None})
    assert [p.name for p in tmp_path.iterdir()] == ["model_00005.pt"]


def made(seed, state_class=State, **more):
    """A state with a model and an optimizer that has made a step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return state_class(model, {"adamw": optimizer}, torch.amp.GradScaler("cpu", enabled=False), step=seed, **more)


def header():
    return checkpoint.Header(1, {}, {}, position=0, micro_batch_size=1, world_size=1, data={})


def test_a_new_field_is_saved_and_restored_and_older_files_open(tmp_path):
    """Catches a value that is declared in the state and not saved, checked or restored; and, for a file without it,
    another value than the one it was made with."""
    old, path = made(2), tmp_path / "model_00002.pt"
    checkpoint.write(path, checkpoint.contents(old, header()))
    new = made(5, StateWithMore, ema=torch.nn.Linear(3, 2))
    average = new.ema.weight.clone()
    checkpoint.restore(new, checkpoint.read(path, StateWithMore))
    assert (new.step, new.restarts, new.seen) == (2, 3, None) and torch.equal(new.ema.weight, average)

    new.seen, new.restarts = [1, 2], 4
    checkpoint.write(path, checkpoint.contents(new, header()))
    again = made(7, StateWithMore, ema=torch.nn.Linear(3, 2))
    checkpoint.restore(again, checkpoint.read(path, StateWithMore))
    assert (again.step, again.restarts, again.seen) == (2, 4, [1, 2]) and torch.equal(again.ema.weight, average)
    slots, restored = (state.optimizer["adamw"].state_dict()["state"] for state in (new, again))
    assert same(slots, restored) and again.optimizer["adamw"].param_groups[0]["lr"] == pytest.approx(0.7)

    torch.save({**checkpoint.contents(new, header()), "seen": 3}, path)
    with pytest.raises(UserError, match="its seen is 3"):
        checkpoint.read(path, StateWithMore)
    assert same(checkpoint.read(path)["model"], new.model.state_dict()), "a model is read without the state"


def test_files_of_before_keep_opening(tmp_path):
    """Catches a new key that shuts out the checkpoints written before it: they have None there."""
    later = dict.fromkeys(("dtype", "compiled", "threads", "not_gpt2", "tokenizer", "probe"))
    old = {k: v for k, v in content().items() if k not in later}
    torch.save(old, tmp_path / "model_00005.pt")
    assert same(checkpoint.read(tmp_path / "model_00005.pt", State), {**old, **later})


@pytest.mark.parametrize(("change", "named"), [
    ({"step": -1}, "step is -1"), ({"step": 1.5}, "step is 1.5"), ({"step": True}, "step is True"),
    ({"format_version": 2}, "format_version 2"), ({"optimizer": None}, "optimizer is None"),
    ({"threads": "2"}, "threads is '2'"), ({"model": {"a": 3}}, "'a' of type int"),
    ({"model": {"a": torch.empty(3, device="meta")}}, "tensor a"),
])
def test_wrong_content_is_named(change, named, tmp_path):
    """Catches a checkpoint with a value of the wrong kind reaching the trainer."""
    torch.save({**content(), **change}, tmp_path / "model_00005.pt")
    with pytest.raises(UserError, match=named) as error:
        checkpoint.read(tmp_path / "model_00005.pt", State)
    assert "model_00005.pt" in str(error.value)


def test_a_version_that_is_not_known_is_named_before_its_keys(tmp_path):
    """Catches a checkpoint of a later version being called damaged, or no checkpoint, for keys that it renamed."""
    torch.save({"format_version": 2, "weights": {}}, tmp_path / "model_00005.pt")
    with pytest.raises(UserError, match="format_version 2, and this program reads 1"):
        checkpoint.read(tmp_path / "model_00005.pt")


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_no_room_for_a_checkpoint(tmp_path, capsys):
    """Catches a full disk that torch reports as a RuntimeError of its own, and what such a write leaves behind."""
    import resource

    big = content(model={f"{n}": torch.zeros(n) for n in (100, 10_000, 1_000_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in 100, 20_000, 1_000_000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with files.tolerate_full_disk("it is not written"):
                checkpoint.write(tmp_path / "model_00005.pt", big)
            with pytest.raises(UserError) as error, files.tolerate_full_disk("it is not written", "--resume"):
                checkpoint.write(tmp_path / "model_00005.pt", big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        reason = "a file reached the size limit of this shell (ulimit -f): it is not written"
        assert capsys.readouterr().err == f"WARNING: {reason}\n"
        assert str(error.value) == f"{reason}. Make room, then run --resume"
        assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError), files.tolerate_full_disk("it is lost"):  # which is no full disk
        raise PermissionError(13, "Permission denied")


# names ---------------------------------------------------------------------------------------------------------
def test_newest_is_by_number_and_good(tmp_path, capsys):
    """Catches order by name or time, best.pt taken for the newest, and a bad file that ends the search."""
    for name in ("model_00020.pt", "rolling_00020.pt", "rolling_100000.pt", "model_99999.pt", "best.pt", "model_x.pt"):
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in checkpoint.files(tmp_path)]
    assert names == ["rolling_100000.pt", "model_99999.pt", "model_00020.pt", "rolling_00020.pt"]
    with pytest.raises(UserError, match="none of the 4 checkpoints"):
        checkpoint.newest(tmp_path)

    checkpoint.write(tmp_path / "model_00020.pt", content(20))
    torch.save({k: v for k, v in content().items() if k not in ("format_version", "position")},
               tmp_path / "model_99999.pt")
    capsys.readouterr()
    path, read = checkpoint.newest(tmp_path)
    assert path.name == "model_00020.pt" and read["step"] == 20
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "rolling_100000.pt is not a checkpoint: it is empty" in warnings[0]
    assert "model_99999.pt" in warnings[1] and "has no format_version, position" in warnings[1]


def test_names_and_steps():
    """Catches names that their own reader does not know, and steps beyond five digits."""
    for step in (0, 5, 99_999, 1_000_000):
        for name in (checkpoint.milestone_name(step), checkpoint.rolling_name(step)):
            assert checkpoint.step_of(Path("log") / name) == step
    assert checkpoint.milestone_name(5) == "model_00005.pt" and checkpoint.rolling_name(5) == "rolling_00005.pt"
    assert [checkpoint.step_of(name) for name in ("best.pt", "model_5.pt", "model_00005.pt.tmp")] == [None] * 3


def test_find_is_what_resume_means(tmp_path):
    """Catches `auto` that fails in an empty folder, another folder's run, a missing file taken for a fresh start."""
    assert checkpoint.find("auto", tmp_path, State) == (None, None)
    checkpoint.write(tmp_path / "a" / "model_00005.pt", content(5))
    checkpoint.write(tmp_path / "a" / "rolling_00007.pt", content(7))
    cases = [
        ("newest", tmp_path / "a", "rolling_00007.pt"), ("auto", tmp_path / "a", "rolling_00007.pt"),
        (str(tmp_path / "a"), "b", "rolling_00007.pt"), (str(tmp_path / "a" / "model_00005.pt"), "b", "model_00005.pt"),
    ]
    for resume, log_dir, name in cases:
        path, read = checkpoint.find(resume, log_dir, State)
        assert path.name == name and read["step"] == checkpoint.step_of(path)
    for resume in ("newest", str(tmp_path / "gone.pt"), "x" * 5000):
        with pytest.raises(UserError, match="--resume auto|is not there: give a checkpoint"):
            checkpoint.find(resume, tmp_path, State)


def test_find_reads_a_file_once(tmp_path, monkeypatch):
    """Catches a resume that verifies and loads 1.5 GB twice."""
    checkpoint.write(tmp_path / "model_00005.pt", content())
    calls = []

    def count(holder, name):
        inner = getattr(holder, name)

        def counted(*args, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(holder, name, counted)

    count(zipfile.ZipFile, "testzip")
    count(torch, "load")
    checkpoint.find("newest", tmp_path, State)
    assert calls == ["testzip", "load"]


def test_prune_deletes_rolling_checkpoints_only(tmp_path):
    """Catches a milestone, the best model or a user's file deleted, or the newest instead of the oldest."""
    names = ["best.pt", "model_00001.pt", "model_00009.pt", "rolling_mine.pt",
             *(f"rolling_{step:05d}.pt" for step in (2, 3, 100000))]
    for name in names:
        (tmp_path / name).touch()
    checkpoint.prune(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == set(names) - {"rolling_00002.pt"}


# damage and malice ---------------------------------------------------------------------------------------------
def test_damaged_checkpoints_are_found(tmp_path):
    """500 files cut, flipped, overwritten or spliced: each is refused by name, or reads as it was written.

    Every bit of the zip's directory of one record is among them: torch takes a record marked there as a folder for
    uninitialised memory, and no checksum covers that.
    """
    written = content(model={f"layer.{i}.weight": torch.full((9, 8), i / 7) for i in range(15)})
    path = tmp_path / "model_00005.pt"
    torch.save(written, path)
    good = path.read_bytes()
    rng = random.Random(0)
    entry = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02") + 1000)
    cases = [("flip", entry + i // 8, i % 8) for i in range(46 * 8)]
    kinds = ("cut", "flip", "drop", "splice")
    cases += [(rng.choice(kinds), rng.randrange(len(good)), rng.randrange(8)) for _ in range(500 - len(cases))]
    refused = 0
    for kind, at, bit in cases:
        bad = bytearray(good)
        if kind == "cut":
            del bad[at:]
        elif kind == "flip":
            bad[at] ^= 1 << bit
        elif kind == "drop":
            del bad[at : at + 1 + 40 * bit]
        else:
            bad[at : at + 64] = good[(start := rng.randrange(len(good))) : start + 64]
        path.write_bytes(bad)
        try:
            assert same(checkpoint.read_pt(path), written), (kind, at, bit)
        except UserError as error:
            assert "model_00005.pt" in str(error)
            refused += 1
    assert refused > 300


class Hostile:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def rewritten(path, change):
    """Rewrite the zip at `path` with `change(records)`, a dict of name and bytes, applied."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(name), data)


def test_hostile_pickles_are_refused_and_not_run(tmp_path):
    """Catches code in a checkpoint being run: by pickle's REDUCE, under the name that is let in, and in old formats."""
    trap = tmp_path / "trap"
    call = (os.system, (f"touch {trap}",))
    path = tmp_path / "model_00005.pt"
    for hostile in (Hostile(call), content(extra=Hostile(call)), content(extra=Hostile((eval, ("1",))))):
        torch.save(hostile, path)
        with pytest.raises(UserError, match="refers to code"):
            checkpoint.read_pt(path)

    def reduce(records):
        name = next(name for name in records if name.endswith("data.pkl"))
        command = f"touch {trap}".encode()
        records[name] = b"\x80\x02cos\nGPTConfig\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."

    torch.save({"model": {}, "config": {}}, path)
    rewritten(path, reduce)
    with pytest.raises(UserError, match="model_00005.pt cannot be read as a checkpoint"):
        checkpoint.read_pt(path)

    path.write_bytes(pickle.dumps(Hostile(call)))
    with pytest.raises(UserError, match="torch before 1.6"):
        checkpoint.read_pt(path)
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="must be rewritten"):
        checkpoint.read_pt(path)
    assert not trap.exists()


def test_a_git_lfs_pointer_is_named(tmp_path):
    """Catches "not a zip" for a file that was never downloaded."""
    path = tmp_path / "model_00005.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1535\n")
    with pytest.raises(UserError, match=re.escape(f"{path} is a Git LFS pointer")):
        checkpoint.read_pt(path)


def test_naming_adds_the_file(tmp_path):
    """Catches a traceback, or an error without its file, for a checkpoint that does not fit the model."""
    for error in (KeyError("n_layer"), TypeError("unexpected rope_base"), UserError("tensor a is missing")):
        with pytest.raises(UserError, match="^some.pt.*(n_layer|rope_base|tensor a)"), checkpoint.naming("some.pt"):
            raise error
    with pytest.raises(RuntimeError), checkpoint.naming("some.pt"):
        raise RuntimeError("CUDA out of memory")  # says nothing about the file
