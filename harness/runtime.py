"""The processes of one run: which one this is, what they agree on, and the signals that ask them to stop.

Launched by torchrun or srun there are several, otherwise one, for which every verb here is a plain call.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness import machine
from harness.cli import UserError, say

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def place():
    """(rank, local rank, world size): as torchrun tells it, or srun in a step of several tasks, or alone."""
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return 0, 0, 1
    try:
        return tuple(int(env[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"{error}: the launcher must set {', '.join(names)} to whole numbers") from None


class Ranks:
    """This process among the `world_size` of its run. Leaving its `with` block leaves the process group."""

    def __init__(self, rank=0, local_rank=0, world_size=1, dist_timeout=600.0):
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.signal = 0  # number of the first stop signal that came to this process
        self.control = None  # group for small things on the CPU, in which rank 0 may take hours
        if world_size > 1:
            self._join(dist_timeout)

    def _join(self, seconds):
        os.environ.setdefault("MASTER_PORT", "29500")
        address = os.environ.get("MASTER_ADDR")
        if not address:
            self.refuse("MASTER_ADDR is not set: use torchrun, or set it to the first machine's name as "
                        "docs/train.sbatch does")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size,
                                    timeout=timedelta(seconds=seconds))
            self.control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank {self.rank} of {self.world_size} found no other ranks at {address}:"
                            f"{os.environ['MASTER_PORT']} within --dist_timeout {seconds:g} s: check that all were "
                            f"started, that the address is rank 0's and the port open ({str(error)[:200]})") from None

    def sum(self, values):
        """Element-wise sum of a list of numbers over all ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, values):
        """Element-wise mean of a list of numbers over all ranks, in fp64."""
        return [total / self.world_size for total in self.sum(values)]

    def gather(self, value):
        """Every rank's `value`, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def first(self, work):
        """`work()` of rank 0, for every rank; the others wait as long as it takes. Its `UserError` ends them all."""
        told = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except UserError as error:
                told[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1] is not None:
            self.refuse(told[1])
        return told[0]

    def together(self, work):
        """`work()` on every rank; a `UserError` of any ends them all, printed once."""
        result = trouble = None
        try:
            result = work()
        except UserError as error:
            trouble = error
        if found := [error for error in self.gather(trouble) if error]:
            self.refuse(found[0])
        return result

    def refuse(self, message):
        """End all ranks, which all call this, with one line from rank 0 and status 2."""
        raise UserError(message) if self.rank == 0 else SystemExit(2)

    def print(self, text):
        if self.rank == 0:
            with tqdm.external_write_mode():  # a progress bar makes room
                say(text)

    def signals_seen(self):
        """One number a stop signal, 1.0 where it came to this process, for `sum` or `mean` to bring together."""
        return [float(self.signal == number) for number in STOP_SIGNALS]

    def stopping(self, seen=None):
        """The signal that asks this run to stop, the same on all ranks, or 0. `seen`: all ranks', where it is known."""
        seen = self.sum(self.signals_seen()) if seen is None else seen
        return next((number for number, count in zip(STOP_SIGNALS, seen) if count), 0)

    @contextlib.contextmanager
    def signals(self):
        """Note SIGINT, SIGTERM and SIGUSR1 in `self.signal` for the loop to act on; a second SIGINT leaves at once."""
        seen = []

        def note(number, frame):
            if number == signal.SIGINT and number in seen:
                os._exit(128 + number)
            seen.append(number)
            self.signal = seen[0]

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.world_size == 1:
            return
        if kind is None or issubclass(kind, UserError | SystemExit):
            dist.destroy_process_group()
        elif issubclass(kind, RuntimeError) and re.search("onnection|peer|NCCL|socket|imed out", str(error)):
            print(f"rank {self.rank}: lost another rank, or waited --dist_timeout for it; the other ranks' first error "
                  f"is the cause\n({str(error)[-300:]})", file=sys.stderr, flush=True)
            os._exit(1)  # the group is broken: a tidy exit would wait for it


class Runtime(Ranks):
    """Where this process runs: rank, device and dtype, and verbs that do nothing where they do not apply.

    From `Ranks`: `first(work)` is done by rank 0 for all, `together(work)` by all, and in both a mistake of
    the user's ends all with one line, as `refuse(message)` does; `sum`, `mean`, `gather`, `barrier`, `print`.
    """

    device, dtype, compile = torch.device("cpu"), torch.float32, False  # until they are chosen

    @classmethod
    def start(cls, device="auto", dtype="auto", compile=False, deterministic=False, dist_timeout=600.0,
              cache_dir=None):
        """Join the other ranks, if any, and choose the device. `UserError` for what is not there."""
        return cls(*place(), dist_timeout).choose(device, dtype, compile, deterministic, cache_dir)

    def choose(self, device="auto", dtype="auto", compile=False, deterministic=False, cache_dir=None):
        """Settle device, dtype, compiling and determinism; `self.notes` tells what was picked and why."""
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in have if have[k]) if device == "auto" else device
        if not have[kind]:
            raise UserError(f"--device {kind}: this machine or build of torch has none; take --device auto")
        self.notes = []
        if cache_dir:  # before anything imports inductor, which settles on a folder then
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache_dir).absolute() / "inductor"))
        if kind == "cuda":
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
            index = self.local_rank % torch.cuda.device_count()
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
            name, cudnn = torch.cuda.get_device_name(index), torch.backends.cudnn.version()
            self.notes.append(f"device {self.device} ({name}, cuDNN {cudnn})")
        else:
            self.device = torch.device(kind)
            self.notes.append(f"device {kind}" + f" ({torch.get_num_threads()} threads)" * (kind == "cpu"))
        if kind == "cpu" or deterministic:
            # on the CPU always: inductor's embedding backward adds atomically otherwise, and it costs nothing
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if kind == "cpu":
            machine.keep_freed_memory()
        picked, why = machine.pick_dtype(self.device, dtype)
        self.dtype = getattr(torch, picked)
        self.notes.append(f"{picked} ({why})")
        missing = machine.compile_lacks(self.device) if compile else []
        self.compile = compile and not missing
        self.notes.append("compiled" if self.compile else "not compiled")
        if missing:
            self.notes.append(f"WARNING: torch.compile, about twice as fast, wants {' and '.join(missing)}")
        return self

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
