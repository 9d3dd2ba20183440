"""harness/threads.py: the cores that a process may use, and pools where threads cannot be started."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness import threads
from harness.runtime import Runtime

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("own", "files", "quota"), [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # inside a container, version 2
    ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
    ("0::/user.slice/job\n", {"user.slice/cpu.max": "200000 100000", "user.slice/job/cpu.max": "max 100000"}, 2.0),
    ("5:cpu,cpuacct:/docker/1f\n0::/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ("5:cpuset:/a\n4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, float("inf")),
    ("0::/\n", {}, float("inf")), ("nonsense", {}, float("inf")), (None, {}, float("inf")),
])
def test_quotas_of_control_groups(tmp_path, own, files, quota):
    """Catches 64 threads that take turns on the two cores which `docker --cpus 2` allows."""
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path, tmp_path / "own") == quota


@pytest.mark.parametrize(("quota", "named", "expected"), [(1.5, False, 2), (1.5, True, 4), (64, False, 4)])
def test_torch_has_no_more_threads_than_the_quota(monkeypatch, quota, named, expected):
    """Catches a quota that is not asked for, one that raises the threads, and OMP_NUM_THREADS that is overruled."""
    before = torch.get_num_threads()
    monkeypatch.setattr("harness.device.cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    try:
        torch.set_num_threads(4)
        rt = Runtime.start("cpu", "float32")
        assert torch.get_num_threads() == rt.numerics()["threads"] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("may_start", [0, 1, 3])
def test_a_pool_makes_do_with_the_threads_it_gets(monkeypatch, may_start):
    """Catches `RuntimeError: can't start new thread` where `ulimit -u` is small, and work done twice."""
    inner, done = ThreadPoolExecutor._adjust_thread_count, []

    def limited(self):
        if len(self._threads) == may_start:
            raise RuntimeError("can't start new thread")
        inner(self)

    monkeypatch.setattr(ThreadPoolExecutor, "_adjust_thread_count", limited)
    with threads.ThreadPool(8) as pool:
        assert list(pool.map(lambda i: (done.append(i), i * i)[1], range(50))) == [i * i for i in range(50)]
        assert len(pool._threads) <= may_start
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result()
    assert sorted(done) == list(range(50))
    assert threading.active_count() < 20 and 1 <= threads.cores() <= os.cpu_count()
