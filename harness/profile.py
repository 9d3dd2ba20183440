"""Where an update's time goes: some updates of a run under torch.profiler.

`trace.json` opens in https://ui.perfetto.dev; `profile.txt` has the operators and kernels that took the most time.
"""

import os
import sys
from pathlib import Path

import torch

from harness.cli import say
from harness.files import atomic_file, tolerate_full_disk


class Profile:
    """`updates` updates of this process under the profiler; the run continues. Rank 0 alone is profiled.

    The first `skip` are left out, since they allocate memory and look for kernels.
    """

    def __init__(self, updates, log_dir, rt, skip=2):
        self.folder, self.rt, self.skip = Path(log_dir), rt, skip
        self.updates = updates if rt.rank == 0 else 0
        self.profiler, self.done = None, 0

    def step(self, completed):
        """To be called with the number of updates that this process has completed, before the first and after each.

        Starting and stopping take seconds: keep them out of an update's time.
        """
        if self.profiler is not None:
            self.done += 1
            if self.done == self.updates:
                self.close()
        elif self.updates and completed == self.skip:
            self.rt.synchronize()
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def close(self):
        """Write what was profiled, also where the run ends before the last update that was to be."""
        if self.profiler is None:
            return
        self.rt.synchronize()
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if not self.done:
            return
        by = "self_device_time_total" if self.rt.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=80)
        text = f"profile of updates {self.skip + 1} to {self.skip + self.done} of this process\n{table}"
        self.rt.print(text)
        with tolerate_full_disk("profile.txt is not written"), atomic_file(self.folder / "profile.txt", "w") as file:
            file.write(text + "\n")
        trace = self.folder / "trace.json"
        unfinished = trace.with_name(".trace.json.profiler.tmp")
        profiler.export_chrome_trace(str(unfinished))  # on a full disk it logs an error of its own, and raises nothing
        if unfinished.exists():
            os.replace(unfinished, trace)
            self.rt.print(f"wrote {trace}, for https://ui.perfetto.dev")
        else:
            say(f"WARNING: {trace} is not written", sys.stderr)
