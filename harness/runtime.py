"""Ranks, device and signals of this process as one object, `rt`: the only place that asks where a run runs."""

import torch

from harness.device import Device
from harness.ranks import Ranks


class Runtime(Ranks, Device):
    """Who takes part and what they agree on (`Ranks`), what stops them (`Signals`), where they compute (`Device`)."""

    @classmethod
    def start(cls, device="auto", dtype="auto", compile=False):
        """A world of one on the device that was asked for: what every command but the trainer needs."""
        return cls().choose(device, dtype, compile)

    def __exit__(self, *error):
        self.restore()
        return super().__exit__(*error)

    def choose_for(self, cfg):
        """`choose` with the settings of a `TrainConfig`."""
        return self.choose(cfg.device, cfg.dtype, cfg.compile, cfg.deterministic, cfg.memory_budget)

    def stop_compiling(self, reason):
        """Run uncompiled what torch.compile has wrapped; all ranks call this, with the `reason` for the console."""
        if self.memory_budget < 1:
            self.fail(f"--memory_budget {self.memory_budget}: "
                      f"it needs torch.compile, which failed: leave it out ({reason})")
        torch.compiler.set_stance("force_eager")
        self.compile = False
        self.notes = ["not compiled: torch.compile failed" if note == "compiled" else note for note in self.notes]
        self.print(f"WARNING: torch.compile failed, so the run is not compiled, about half as fast ({reason})")
