"""harness/profile.py: which updates are profiled, what the table counts, what a run that ends early leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from harness.profile import Profile, kernel_table
from harness.runtime import Runtime


def run_updates(profile, count, start=0):
    """`count` updates as the training loop makes them; each is one product and one call under its own name."""
    changed = [profile.step(start)]
    for update in range(start + 1, start + count + 1):
        with torch.profiler.record_function(f"update {update}"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        changed.append(profile.step(update))
    return changed


def traced_updates(folder):
    names = {event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    return sorted(int(name.split()[1]) for name in names if name.startswith("update "))


def test_updates_3_to_n_plus_2_are_profiled(tmp_path, capsys):
    """Guards a profile that starts an update early or late, and one that goes on to the end of the run."""
    profile = Profile(2, tmp_path, Runtime())
    slow = run_updates(profile, 6)  # where the loop's clock starts anew
    assert slow == [False, False, True, False, True, False, False]
    assert traced_updates(tmp_path) == [3, 4]
    table = (tmp_path / "profile.txt").read_text()
    assert table.startswith("profile of updates 3 to 4 of this process") and "aten::mm" in table
    printed = capsys.readouterr().out
    assert table in printed and "trace.json" in printed
    profile.close()  # changes nothing any more
    assert (tmp_path / "profile.txt").read_text() == table and not list(tmp_path.glob(".*"))


def test_a_run_that_ends_early_leaves_what_was_profiled(tmp_path):
    """Guards against a short or stopped run without any profile, and against figures divided by updates not made."""
    profile = Profile(10, tmp_path, Runtime())
    run_updates(profile, 5)
    assert not (tmp_path / "trace.json").exists()
    profile.close()
    assert traced_updates(tmp_path) == [3, 4, 5]
    (row,) = [line for line in (tmp_path / "profile.txt").read_text().splitlines() if line.endswith("aten::mm")]
    assert row.split()[2] == "1"  # calls an update


@pytest.mark.parametrize("updates, rank, made", [(0, 0, 5), (3, 1, 5), (3, 0, 1), (3, 0, 2)])
def test_nothing_is_written_without_a_profile(tmp_path, updates, rank, made):
    """Guards files of every rank, and an empty profile where no update was made under it."""
    rt = Runtime()
    rt.rank = rank
    profile = Profile(updates, tmp_path, rt)
    run_updates(profile, made)
    profile.close()
    assert list(tmp_path.iterdir()) == []


def row(name, device_us, cpu_us, count, device=DeviceType.CUDA, annotation=False):
    return SimpleNamespace(key=name, self_device_time_total=device_us, self_cpu_time_total=cpu_us, count=count,
                           device_type=device, is_user_annotation=annotation)


def test_kernels_are_counted_once():
    """Guards shares that count a kernel, the operator that launched it and the region around both."""
    averages = [row("gemm", 6000, 0, 8), row("softmax", 2000, 0, 4),
                row("aten::mm", 6000, 900, 8, DeviceType.CPU), row("ProfilerStep", 9000, 0, 1, annotation=True)]
    lines = kernel_table(averages, updates=2, seconds=0.010).splitlines()
    assert lines[1].split() == ["75.0%", "3.00", "4", "gemm"] and lines[2].split() == ["25.0%", "1.00", "2", "softmax"]
    assert lines[3:] == ["all 2: 4.0 ms an update, 80% of the time"]


def test_the_ten_dearest_and_the_sum_of_all():
    """Guards shares of the ten in place of all, and lines of a thousand characters."""
    averages = [row("x" * 200, 0, 100 * i, 1, DeviceType.CPU) for i in range(1, 13)]
    lines = kernel_table(averages, updates=1, seconds=1.0).splitlines()
    assert "operator on the CPU" in lines[0] and len(lines) == 12 and max(map(len, lines)) < 125
    assert lines[1].split()[0] == f"{12 / 78:.1%}" and lines[-1].startswith("all 12: 7.8 ms an update")
