"""Where an update's time goes: some updates of a run under torch.profiler, as a trace and as a table.

`trace.json` opens in https://ui.perfetto.dev; `profile.txt` has the kernels that took the most time.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType

from harness.cli import say
from harness.files import atomic_file, tolerate_full_disk

ROWS, NAME_WIDTH = 10, 90


class Profile:
    """`updates` updates of this process under the profiler, from its `first` one (counted from 1); the run continues.

    The first two are left out, since they allocate memory and look for kernels. Rank 0 alone is profiled; where
    `updates` is 0 nothing is. On a device whose kernels the profiler does not see the table has the CPU's operators.
    """

    def __init__(self, updates, log_dir, rt, first=3):
        self.folder, self.rt = Path(log_dir), rt
        self.first, self.last = first, first + updates - 1
        self.active = updates > 0 and rt.rank == 0
        self.profiler = None
        self.done = 0  # updates that were profiled

    def step(self, completed):
        """To be called with the number of updates that this process has completed, before the first and after each.

        Returns whether the profiler was started or stopped, which takes seconds: they are no part of an update's time.
        """
        if not self.active:
            return False
        if self.profiler is not None:
            self.done += 1
            if completed < self.last:
                return False
            self.close()
            return True
        if completed < self.first - 1:
            return False
        self.rt.synchronize()
        self.profiler = torch.profiler.profile()
        self.profiler.start()
        self.began = time.perf_counter()
        return True

    def close(self):
        """Write what was profiled, also where the run ends before the last update that was to be."""
        self.active = False
        if self.profiler is None:
            return
        self.rt.synchronize()
        seconds = time.perf_counter() - self.began
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if not self.done:
            return
        last = self.first + self.done - 1
        text = (f"profile of updates {self.first} to {last} of this process, {1000 * seconds / self.done:,.1f} ms each "
                f"with the profiler on\n{kernel_table(profiler.key_averages(), self.done, seconds)}")
        self.rt.print(text)
        with tolerate_full_disk("profile.txt is not written"), atomic_file(self.folder / "profile.txt", "w") as file:
            file.write(text + "\n")
        self._write_trace(profiler)

    def _write_trace(self, profiler):
        trace = self.folder / "trace.json"
        unfinished = trace.with_name(".trace.json.profiler.tmp")
        profiler.export_chrome_trace(str(unfinished))  # on a full disk it logs an error of its own, and raises nothing
        if unfinished.exists():
            os.replace(unfinished, trace)
            self.rt.print(f"wrote {trace}, for https://ui.perfetto.dev")
        else:
            say(f"WARNING: {trace} is not written", sys.stderr)


def kernel_table(averages, updates, seconds):
    """The dearest kernels of `updates` updates that took `seconds`, with their shares of all kernels' time.

    `averages`: what `torch.profiler.profile.key_averages` returns. Without kernels of a device its rows are the CPU's
    operators, each without those that it calls.
    """
    kernels = [(row.self_device_time_total, row.count, row.key) for row in averages
               if row.device_type != DeviceType.CPU and not row.is_user_annotation]
    what = "kernel"
    if not kernels:
        kernels = [(row.self_cpu_time_total, row.count, row.key) for row in averages]
        what = "operator on the CPU"
    total = sum(time for time, _, _ in kernels)  # microseconds
    lines = [f" share  ms an update   calls  {what}"]
    for spent, count, name in sorted(kernels, reverse=True)[:ROWS]:
        if len(name) > NAME_WIDTH:
            name = name[: NAME_WIDTH - 3] + "..."
        share = spent / total if total else 0.0
        lines.append(f"{share:6.1%}  {spent / 1000 / updates:12,.2f}  {count / updates:6,.0f}  {name}")
    busy = total / 1e6 / seconds
    lines.append(f"all {len(kernels)}: {total / 1000 / updates:,.1f} ms an update, {busy:.0%} of the time")
    return "\n".join(lines)
