"""Rows of a log: what is declared of them, and a resume after the files were cut anywhere."""

import json
import math
import os

import pytest
import torch

from harness import rows
from harness.rows import log_line, read_rows, to_json, trim_rows

pytestmark = pytest.mark.quick

STEP = 2  # of the checkpoint that is resumed from


def straight_run(lost=math.inf):
    """The rows of a run of 3 steps, in its order: values that are not finite, and kinds that `ROWS` does not have."""
    run = [{"step": 0, "kind": "start", "seconds": 1.5}]
    for step in range(4):
        if step % 2 == 0:
            run.append({"step": step, "kind": "val", "loss": math.nan if step == 0 else 10.5 - step, "seconds": 0.5})
            run.append({"step": step, "kind": "val2", "loss": 9.5 - step, "per_layer": [1.0, float("inf")]})
            run.append({"step": step, "kind": "checkpoint", "file": f"rolling_{step:05d}.pt"})
        if step < 3:
            run.append({"step": step, "kind": "train", "loss": lost if step == 1 else 10.25 - step / 4})
            run.append({"step": step, "kind": "spike", "loss": 50.0, "sequence_ids": [step]})
    return run


def written(folder, run, record=True, old=False):
    """The two files as a run writes them; `old`: as versions before harness/rows.py did, null for what is no number."""
    def line(row):
        if not old:
            return to_json(row)
        return json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                           for key, value in row.items()})

    folder.mkdir(exist_ok=True)
    if record:
        (folder / "metrics.jsonl").write_text("".join(line(row) + "\n" for row in run))
    (folder / "log.txt").write_text("".join(log_line(row) + "\n" for row in run if log_line(row)))
    return folder


def resumed(folder, run):
    """Trim the files in `folder` to `STEP`, then write what a run that resumes there does: log.txt and the record."""
    kept = trim_rows(folder, STEP)
    new = [row for row in run if row["step"] > STEP or (row["step"] == STEP and row["kind"] in ("train", "spike"))]
    with open(folder / "metrics.jsonl", "a") as record, open(folder / "log.txt", "a") as text:
        for row in new:
            record.write(to_json(row) + "\n")
            text.write((log_line(row) or "") + "\n" * bool(log_line(row)))
    again = read_rows(folder)
    assert [to_json(row) for row in again[: len(kept)]] == [to_json(row) for row in kept]
    return (folder / "log.txt").read_text(), [to_json(row) for row in again]


@pytest.mark.parametrize("old", [False, True])
def test_a_log_cut_at_any_byte_is_resumed_like_the_straight_run(old, tmp_path, monkeypatch):
    """Catches a row that is lost, doubled or torn where a run was killed while it wrote, or its disk was full."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # 4,000 of them take a minute
    run = straight_run(math.nan if old else math.inf)
    folder = written(tmp_path / "log", run, old=old)
    text, record = (folder / "log.txt").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    all_rows = [to_json(row) for row in read_rows(folder)]
    assert old or all_rows == [to_json(row) for row in run]
    at_checkpoint = record.index(b'"file": "rolling_00002.pt"}\n') + 28  # synced before the checkpoint was written
    for end in range(len(text) + 1):
        (folder / "metrics.jsonl").write_bytes(record)
        (folder / "log.txt").write_bytes(text[:end])
        log, found = resumed(folder, run)
        assert log == text.decode(), end
        assert found == all_rows or old, end
    for end in range(len(record) + 1):
        (folder / "metrics.jsonl").write_bytes(record[:end])
        (folder / "log.txt").write_bytes(text)
        log, found = resumed(folder, run)
        assert log == text.decode(), end
        if end >= at_checkpoint and not old:
            assert found == all_rows, end


def test_a_log_without_a_record_stays(tmp_path):
    """Catches rows of log.txt that a resume deletes since metrics.jsonl is gone, or has never known their kind; a byte
    order mark, as of an editor on Windows, is no part of them."""
    run = straight_run()
    folder = written(tmp_path / "log", run, record=False)
    whole = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(f"\ufeff{whole}1 val3 10.8007\n", encoding="utf-8")
    log, _ = resumed(folder, run)
    lines = log.splitlines()
    assert "1 val3 10.8007" in lines and [line for line in lines if "val3" not in line] == whole.splitlines()


def test_a_kind_of_ones_own_is_one_line(tmp_path, monkeypatch):
    """Catches a list of kinds in a second file: a new kind is logged, shown, trimmed and read by its declaration."""
    monkeypatch.setitem(rows.ROWS, "val2", rows.Row("model", "{loss:.4f}", "second validation loss: {loss:.4f}"))
    row = {"step": 4, "kind": "val2", "loss": torch.tensor(2.5).double()}
    assert rows.console_line(row) == "step     4 | second validation loss: 2.5000"
    assert json.loads(to_json(row)) == {"step": 4, "kind": "val2", "loss": 2.5}
    assert rows.tracked({"step": 4, "kind": "train", "loss": 2.5, "mine": 0.5, "seconds": 9.0}) == {
        "train/loss": 2.5, "train/mine": 0.5}
    folder = written(tmp_path / "log", [row])
    assert (folder / "log.txt").read_text() == "4 val2 2.5000\n"
    assert trim_rows(folder, 4) == [{"step": 4, "kind": "val2", "loss": 2.5}] and trim_rows(folder, 3) == []


def test_numbers_that_are_not_finite_are_json(tmp_path):
    """Catches NaN in a file that calls itself JSON, and nan that comes back as a string or as null."""
    row = {"step": 1, "kind": "train", "loss": math.nan, "norms": [math.inf, 1.0], "text": "nan of it"}
    line = to_json(row)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = rows.from_json(line)
    assert math.isnan(back["loss"]) and back["norms"] == [math.inf, 1.0] and back["text"] == "nan of it"
