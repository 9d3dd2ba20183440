"""harness/profile.py: which updates are profiled, what a run that ends early leaves."""

import json

import pytest
import torch

from harness.profile import Profile
from harness.runtime import Runtime

pytestmark = pytest.mark.quick


def run_updates(profile, count, start=0):
    """`count` updates as the training loop makes them; each is one product and one call under its own name."""
    profile.step(start)
    for update in range(start + 1, start + count + 1):
        with torch.profiler.record_function(f"update {update}"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        profile.step(update)


def traced_updates(folder):
    names = {event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    return sorted(int(name.split()[1]) for name in names if name.startswith("update "))


def test_updates_3_to_n_plus_2_are_profiled(tmp_path, capsys):
    """Catches a profile that starts an update early or late, and one that goes on to the end of the run."""
    profile = Profile(2, tmp_path, Runtime())
    run_updates(profile, 6)
    assert traced_updates(tmp_path) == [3, 4]
    table = (tmp_path / "profile.txt").read_text()
    assert table.startswith("profile of updates 3 to 4 of this process") and "aten::mm" in table
    printed = capsys.readouterr().out
    assert table in printed and "trace.json" in printed
    profile.close()  # changes nothing any more
    assert (tmp_path / "profile.txt").read_text() == table and not list(tmp_path.glob(".*"))


def test_a_run_that_ends_early_leaves_what_was_profiled(tmp_path):
    """Catches a short or stopped run without any profile."""
    profile = Profile(10, tmp_path, Runtime())
    run_updates(profile, 5)
    assert not (tmp_path / "trace.json").exists()
    profile.close()
    assert traced_updates(tmp_path) == [3, 4, 5]
    (row,) = [line for line in (tmp_path / "profile.txt").read_text().splitlines() if "aten::mm" in line]
    assert row.split()[-1] == "3"  # calls


@pytest.mark.parametrize("updates, rank, made", [(0, 0, 5), (3, 1, 5), (3, 0, 1), (3, 0, 2)])
def test_nothing_is_written_without_a_profile(tmp_path, updates, rank, made):
    """Catches files of every rank, and an empty profile where no update was made under it."""
    rt = Runtime()
    rt.rank = rank
    profile = Profile(updates, tmp_path, rt)
    run_updates(profile, made)
    profile.close()
    assert list(tmp_path.iterdir()) == []
