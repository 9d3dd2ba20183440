"""Where a run runs: its ranks and what they agree on, signals, device, dtype, determinism, compile cache.

The only place that asks. Launched by torchrun or srun there are several ranks, otherwise one, for which every method
here is a plain call. The control group is for small things on the CPU: rank 0 may take hours between two of them.
"""

import contextlib
import inspect
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness import machine
from harness.cli import UserError, say

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(Exception):
    """A stop signal has reached some rank; raised on all ranks at the same place."""

    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.signal = number


def rank_from_environment():
    """(rank, local rank, world size) as torchrun sets them, or srun in a step of several tasks; else (0, 0, 1)."""
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


class Runtime:
    """This process among the `world_size` of its run, its device and dtype. Leaving `with` leaves the process group."""

    device, dtype, compile = torch.device("cpu"), torch.float32, False  # until `choose`

    def __init__(self, rank=0, local_rank=0, world_size=1, dist_timeout=600.0):
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.distributed = world_size > 1
        self.signal = 0  # the first stop signal that reached this process
        self.control = None  # the group for small things
        self.notes = []  # what `choose` decided, for the console
        if self.distributed:
            self._join(dist_timeout)

    @classmethod
    def start(cls, device="auto", dtype="auto", compile=False, cache_dir=None):
        """A world of one on the device that was asked for: what every command but the trainer needs."""
        return cls().choose(device, dtype, compile, cache_dir=cache_dir)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not self.distributed:
            return
        if kind is None or issubclass(kind, UserError | SystemExit):
            dist.destroy_process_group()
        elif issubclass(kind, RuntimeError) and re.search("onnection|peer|NCCL|socket|imed out", str(error)):
            print(f"rank {self.rank}: lost another rank, or waited --dist_timeout for it; the other ranks' first error "
                  f"is the cause\n({str(error)[-300:]})", file=sys.stderr, flush=True)
            os._exit(1)  # the group is broken: an orderly exit would wait for it

    # --- ranks ---

    def _join(self, seconds):
        os.environ.setdefault("MASTER_PORT", "29500")
        address = os.environ.get("MASTER_ADDR")
        if not address:
            self.fail("MASTER_ADDR is not set: use torchrun, or set it to the first machine's name as "
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
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, values):
        """Element-wise mean of a list of numbers over all ranks, in fp64."""
        return [total / self.world_size for total in self.sum(values)]

    def gather(self, value):
        """Every rank's `value`, in the order of the ranks."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_rank0(self, function, *args):
        """`function(*args)` on rank 0, its result on every rank; the others wait as long as it takes.

        A `UserError` there ends all ranks. Rank 0 gets the very object back, the others a copy.
        """
        result = error = None
        if self.rank == 0:
            try:
                result = function(*args)
            except UserError as caught:
                error = caught
        if self.distributed:
            sent = [result, error]
            dist.broadcast_object_list(sent, src=0, group=self.control)
            if self.rank != 0:
                result, error = sent
        if error is not None:
            self.fail(error)
        return result

    def on_all(self, function, *args):
        """`function(*args)` on every rank; a `UserError` on any of them ends all, reported once."""
        result = error = None
        try:
            result = function(*args)
        except UserError as caught:
            error = caught
        if errors := [error for error in self.gather(error) if error]:
            self.fail(errors[0])
        return result

    def barrier(self):
        """Wait for all ranks, however long they take."""
        if self.distributed:
            dist.barrier(group=self.control)

    def fail(self, message):
        """End all ranks, each of which calls this, with exit status 2 and one line from rank 0."""
        raise UserError(message) if self.rank == 0 else SystemExit(2)

    def clock(self):
        """Rank 0's `time.monotonic()`, by which all ranks decide."""
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        if self.distributed:
            dist.broadcast(now, src=0, group=self.control)
        return now.item()

    def print(self, text):
        """A line on the console, from rank 0 only; a progress bar makes room for it."""
        if self.rank == 0:
            with tqdm.external_write_mode():
                say(text)

    def sync_gradients(self, model, enabled):
        """Context of a forward and backward pass after which DDP averages gradients over ranks, if `enabled`."""
        if self.distributed and not enabled:
            return model.no_sync()
        return contextlib.nullcontext()

    def data_parallel(self, model):
        """`model` in DDP's wrapper, which averages gradients over ranks; on one rank the model itself.

        Its only buffer is the same on every rank, so none is sent at every forward pass.
        """
        if not self.distributed:
            return model
        wrapper = torch.nn.parallel.DistributedDataParallel
        known = inspect.signature(wrapper).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
        return wrapper(model, gradient_as_bucket_view=True, **{sync: False})

    # --- signals ---

    @contextlib.contextmanager
    def catch_signals(self):
        """Note the stop signals that arrive, for `raise_if_stopped`; a second SIGINT leaves at once."""
        received = []

        def note(number, frame):
            if number == signal.SIGINT and number in received:
                os._exit(128 + number)
            received.append(number)
            self.signal = received[0]

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_stopped(self):
        """Raise `Stopped` on all ranks if a stop signal has reached any of them; all ranks call this."""
        number = self.signal
        if self.distributed:
            seen = torch.tensor(int(number))
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control)
            number = seen.item()
        if number:
            raise Stopped(number)

    # --- device ---

    def choose(self, device="auto", dtype="auto", compile=False, deterministic=False, cache_dir=None):
        """Settle device, dtype, compiling and determinism; `self.notes` says what was chosen and why.

        Raises `UserError` for what this machine does not have. Returns the runtime itself.
        """
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in have if have[k]) if device == "auto" else device
        if not have[kind]:
            raise UserError(f"--device {kind}: this machine or build of torch has none; take --device auto")
        self.notes = []
        if cache_dir:  # before anything imports inductor, which reads it then
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache_dir).absolute() / "inductor"))
        if kind == "cuda":
            self._choose_cuda(deterministic)
        else:
            self.device = torch.device(kind)
            threads = f" ({torch.get_num_threads()} threads)" if kind == "cpu" else ""
            self.notes.append(f"device {kind}{threads}")
        if kind == "cpu" or deterministic:
            # on the CPU always: inductor's embedding backward adds atomically otherwise, and it costs nothing
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if kind == "cpu":
            machine.keep_freed_memory()
        name, why = machine.pick_dtype(self.device, dtype)
        self.dtype = getattr(torch, name)
        self.notes.append(f"{name} ({why})")
        missing = machine.missing_for_compile(self.device) if compile else []
        self.compile = compile and not missing
        self.notes.append("compiled" if self.compile else "not compiled")
        if missing:
            self.notes.append(f"WARNING: torch.compile, about twice as fast, needs {' and '.join(missing)}")
        return self

    def _choose_cuda(self, deterministic):
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        index = self.local_rank % torch.cuda.device_count()
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        name = torch.cuda.get_device_name(index)
        self.notes.append(f"device {self.device} ({name}, cuDNN {torch.backends.cudnn.version()})")

    def autocast(self):
        """Context in which the model computes in `dtype`; plain fp32 needs none."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self):
        """Wait for all work that was queued on the device."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


class DeviceCopies:
    """Copies of small CPU tensors of one shape to a device, without waiting for it.

    To CUDA through two pinned buffers in turn. subtle: a buffer may be written again only when its last copy has ended.
    """

    def __init__(self, shape, dtype, device):
        self.device, self.buffers = device, deque()
        if device.type == "cuda":
            for _ in range(2):
                self.buffers.append((torch.empty(shape, dtype=dtype, pin_memory=True), torch.cuda.Event()))

    def __call__(self, tensor):
        if not self.buffers:
            return tensor.to(self.device)
        buffer, copied = self.buffers[0]
        self.buffers.rotate(1)
        copied.synchronize()
        buffer.copy_(tensor)
        on_device = buffer.to(self.device, non_blocking=True)
        copied.record()
        return on_device
