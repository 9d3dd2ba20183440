"""How many cores this process may use, and pools that make do with fewer threads than they ask for."""

import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path


def cpu_quota(mounted="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """Cores' worth of CPU time that this process's control groups give it (docker --cpus, a limit of Kubernetes), a
    float; inf where there is no limit. Both versions of control groups, a container's own view and the host's.
    """
    quotas = [math.inf]
    with suppress(OSError, ValueError):
        for line in Path(own).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if "cpu" in controllers.split(","):
                root, quota, period = Path(mounted, "cpu"), "cpu.cfs_quota_us", "cpu.cfs_period_us"
            elif not controllers:  # version 2: "200000 100000", or "max 100000"
                root, quota, period = Path(mounted), "cpu.max", "cpu.max"
            else:
                continue
            for folder in (Path(group), *Path(group).parents):
                folder = root / str(folder).lstrip("/")
                with suppress(OSError, ValueError):
                    microseconds = float((folder / quota).read_text().split()[0])
                    quotas.append(microseconds / float((folder / period).read_text().split()[-1]))
    return min(quota for quota in quotas if quota > 0)  # version 1 has -1 for no limit


def cores():
    """Cores that this process may use: by its affinity, less where a quota gives less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(allowed, cpu_quota()))


class ThreadPool(ThreadPoolExecutor):
    """A pool that works with as many threads as may be started, or in the caller's, where `ulimit -u` allows none."""

    def submit(self, function, /, *args, **kwargs):
        try:
            return super().submit(function, *args, **kwargs)
        except NoThread:
            self._work_queue.get_nowait()  # the function, which no thread will take
            future = Future()
            try:
                future.set_result(function(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            return future

    def _adjust_thread_count(self):
        try:
            super()._adjust_thread_count()
        except RuntimeError:  # can't start new thread
            if not self._threads:
                raise NoThread from None


class NoThread(Exception):
    """A pool has no thread and cannot start one."""
