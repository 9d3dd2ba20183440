"""Where a run runs: its ranks and what they agree on, signals, device, dtype, determinism, compile cache.

The only place that asks. Launched by torchrun or srun there are several ranks, otherwise one, for which every method
here is a plain call.

Work may take hours, silence may not. Ranks wait for one another on the control group for as long as the work takes, in
pieces of a second, and look at each other's heartbeats meanwhile: a process that is frozen, or on a machine that lost
its network, ends the others after `dist_timeout`. Exchanges on the default group (gradients, sums, objects), in which
nobody has work left, have `dist_timeout` as torch's own time limit. Not noticed: a main thread that hangs while its
process lives, since the heartbeat thread goes on beating. Taken for silence: a process whose interpreter is blocked for
longer than `dist_timeout` by one call into C that does not release its lock.
"""

import contextlib
import importlib
import inspect
import itertools
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
from harness.cli import UserError, say, say_now

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
STOP_PATIENCE = 10.0  # seconds that a rank which is asked to stop waits for a silent one


class Stopped(Exception):
    """A stop signal has reached some rank; raised on all ranks at the same place. `str` names the signal."""

    def __init__(self, number):
        super().__init__(signal_name(number))
        self.signal = number


class SilentRank(Exception):
    """A rank shows no sign of life, so nothing can be agreed on with it any more."""


def signal_name(number):
    """How users know a signal: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def rank_from_environment():
    """(rank, local rank, world size) as torchrun sets them, or srun in a step of several tasks; else (0, 0, 1)."""
    env = os.environ
    if env.get("WORLD_SIZE") == "1":  # a world of one needs no more; Kubernetes sets RANK beside it, no LOCAL_RANK
        return 0, 0, 1
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


def launcher():
    """The words that start a script on as many ranks as this process is one of, where torchrun did so on one machine.

    Elsewhere ["python"]: what starts a job on several machines is not known here, and `srun` is repeated by its script.
    """
    env = os.environ
    ranks = env.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in env and env.get("GROUP_WORLD_SIZE") == "1" and ranks != "1":
        return ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return ["python"]


class Runtime:
    """This process among the `world_size` of its run, its device and dtype. Leaving `with` leaves the process group."""

    device, dtype, compile = torch.device("cpu"), torch.float32, False  # until `choose`

    def __init__(self, rank=0, local_rank=0, world_size=1, dist_timeout=600.0, distributed=None):
        """`distributed`: whether there is a process group; by default where there are several ranks."""
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.dist_timeout = dist_timeout  # seconds that a rank may be silent
        self.distributed = world_size > 1 if distributed is None else distributed
        self.signal = 0  # the first stop signal that reached this process
        self.control = None  # the group on which ranks wait for each other's work
        self.notes = []  # what `choose` decided, for the console
        if self.distributed:
            self._join()

    @classmethod
    def start(cls, device="auto", dtype="auto", compile=False, cache_dir=None):
        """A world of one on the device that was asked for: what every command but the trainer needs."""
        return cls().choose(device, dtype, compile, cache_dir=cache_dir)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not self.distributed:
            return
        self.heartbeat.close()
        if kind is None or issubclass(kind, UserError | SystemExit):
            # subtle: a thread of gloo that drops the last reference to a tensor needs the interpreter lock, and a
            # group is destroyed with that lock held, waiting for its threads. A sleep gives the lock away, and by now
            # there is nothing else for them to do.
            time.sleep(0.1)
            dist.destroy_process_group()
            self.control = None
        elif issubclass(kind, SilentRank):
            say(f"rank {self.rank}: lost another rank: {error}", sys.stderr)
            os._exit(128 + self.signal if self.signal else 1)
        elif issubclass(kind, RuntimeError) and re.search("onnection|peer|NCCL|socket|imed out", str(error)):
            say(f"rank {self.rank}: lost another rank, or waited --dist_timeout for it; the other ranks' first error "
                f"is the cause\n({str(error)[-300:]})", sys.stderr)
            os._exit(1)  # the group is broken: an orderly exit would wait for it

    # --- ranks ---

    def _join(self):
        os.environ.setdefault("MASTER_PORT", "29500")
        address = os.environ.get("MASTER_ADDR")
        if not address:
            self.fail("MASTER_ADDR is not set: use torchrun, or set it to the first machine's name as "
                      "docs/train.sbatch does")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size,
                                    timeout=timedelta(seconds=self.dist_timeout))
            self.heartbeat = Heartbeat(dist.distributed_c10d._get_default_store(), self.rank, self.world_size)
            self.control = dist.new_group(backend="gloo", timeout=timedelta(days=365))  # `_wait` has the time limit
            self.heartbeat.start()  # now every rank has its key in the store
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank {self.rank} of {self.world_size} found no other ranks at {address}:"
                            f"{os.environ['MASTER_PORT']} within --dist_timeout {self.dist_timeout:g} s: check that "
                            "all were started, that the address is rank 0's and the port open "
                            f"({str(error)[:200]})") from None

    def _wait(self, work):
        """Wait for an operation of the control group: hours if the others work so long, but not for a silent rank."""
        seen, silence = self.heartbeat.seen, [0.0] * self.world_size
        while not work.is_completed():
            began = time.monotonic()
            with contextlib.suppress(RuntimeError):  # it is not completed; if it failed, the last line raises why
                work.wait(timedelta(seconds=1))
            # subtle: 2 s a turn at most, or ranks that were all stopped for a while (Ctrl-Z) would give each other up
            passed = min(time.monotonic() - began, 2.0)
            before, seen = seen, self.heartbeat.seen
            silence = [seconds + passed if then == now else 0.0 for seconds, then, now in zip(silence, before, seen)]
            patience = min(self.dist_timeout, STOP_PATIENCE) if self.signal else self.dist_timeout
            if max(silence) > patience + 3 * self.heartbeat.pause:
                raise SilentRank(self._describe(silence))
        work.wait()

    def _describe(self, silence):
        seconds, limit = max(silence), f"--dist_timeout {self.dist_timeout:g} s"
        if self.signal:
            limit += f", {signal_name(self.signal)} while waiting"
        silent = [rank for rank, s in enumerate(silence) if s == seconds]
        if self.rank in silent:  # not even this rank's own heartbeat comes through
            return f"the group's store, on rank 0's machine, has not answered for {seconds:.0f} s ({limit})"
        some = ", ".join(map(str, silent[:8])) + ", ..." * (len(silent) > 8)
        return f"no sign of life from rank {some} for {seconds:.0f} s ({limit})"

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
        self.barrier()  # the work before it may take long, the exchange itself may not
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
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
            self.barrier()  # as in `gather`
            sent = [result, error]
            dist.broadcast_object_list(sent, src=0)
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
            self._wait(dist.barrier(group=self.control, async_op=True))

    def fail(self, message):
        """End all ranks, each of which calls this, with exit status 2 and one line from rank 0."""
        raise UserError(message) if self.rank == 0 else SystemExit(2)

    def clock(self):
        """Rank 0's `time.monotonic()`, by which all ranks decide."""
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        if self.distributed:
            self._wait(dist.broadcast(now, src=0, group=self.control, async_op=True))
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
    def _handle_signals(self, handler):
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        caught = list(STOP_SIGNALS)
        # nohup ignores SIGHUP. subtle: torchrun takes it nevertheless and then kills ranks that do not leave.
        hup = getattr(signal, "SIGHUP", None)
        if hup and signal.getsignal(hup) is signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ:
            caught.remove(hup)
        before = {number: signal.signal(number, handler) for number in caught}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def catch_signals(self):
        """Context that notes the stop signals which arrive, for `raise_if_stopped`; a second Ctrl-C leaves at once."""
        received = []

        def note(number, frame):
            if number == signal.SIGINT and number in received:
                os._exit(128 + number)
            if not received and self.rank == 0:
                text = "stopping after this step, saving"
                ctrl_c = number == signal.SIGINT
                say_now(f"{text}; Ctrl-C again leaves at once" if ctrl_c else f"{signal_name(number)}: {text}")
            received.append(number)
            self.signal = received[0]

        return self._handle_signals(note)

    def interruptible(self, doing):
        """Context in which a stop signal ends the process at once, since there is nothing to save; `doing`: what.

        subtle: KeyboardInterrupt would not do while torch compiles. The terminal sends SIGINT to the C++ compiler too,
        whose failure is then what the user sees, and some of torch's imports swallow the exception.
        """
        def leave(number, frame=None):
            if self.rank == 0:
                say_now(f"interrupted while {doing}; nothing to save; the same command starts again")
            os._exit(128 + number)

        if self.signal:  # noted just before
            leave(self.signal)
        return self._handle_signals(leave)

    def raise_if_stopped(self):
        """Raise `Stopped` on all ranks if a stop signal has reached any of them; all ranks call this."""
        number = self.signal
        if self.distributed:
            seen = torch.tensor(int(number))
            self._wait(dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.control, async_op=True))
            number = seen.item()
        if number:
            raise Stopped(number)

    # --- device ---

    def choose_for(self, cfg):
        """`choose` with the settings of a `TrainConfig`."""
        return self.choose(cfg.device, cfg.dtype, cfg.compile, cfg.deterministic, cfg.cache_dir, cfg.memory_budget)

    def choose(self, device="auto", dtype="auto", compile=False, deterministic=False, cache_dir=None,
               memory_budget=1.0):
        """Settle device, dtype, compiling and determinism; `self.notes` says what was chosen and why.

        `memory_budget`: the share of activations that compiled code keeps for the backward pass. Raises `UserError`
        for what this machine does not have. Returns the runtime itself.
        """
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in have if have[k]) if device == "auto" else device
        if not have[kind]:
            raise UserError(f"--device {kind}: this machine or build of torch has none; take --device auto")
        self.notes = []
        if kind == "cuda":
            self._choose_cuda(deterministic)
        else:
            self.device = torch.device(kind)
            threads = f" ({torch.get_num_threads()} threads)" if kind == "cpu" else ""
            self.notes.append(f"device {kind}{threads}")
        name, why = machine.pick_dtype(self.device, dtype)
        self.dtype = getattr(torch, name)
        self.notes.append(f"{name} ({why})")
        missing = machine.missing_for_compile(self.device) if compile else []
        self.compile = compile and not missing
        if self.compile:
            self._prepare_compiling(name, cache_dir, memory_budget)
        elif memory_budget < 1:
            raise UserError(f"--memory_budget {memory_budget}: only compiled code recomputes activations, and this run "
                            "is not compiled: leave it out")
        if kind == "cpu" or deterministic:
            # on the CPU always: inductor's embedding backward adds atomically otherwise, and it costs nothing.
            # torch switches on inductor's own mode with it, for which it imports inductor, 1.6 s
            if self.compile:
                torch.use_deterministic_algorithms(True)
            else:
                torch.set_deterministic_debug_mode("error")  # the same without inductor
            torch.utils.deterministic.fill_uninitialized_memory = False
        if kind == "cpu":
            machine.keep_freed_memory()
        self.notes.append("compiled" if self.compile else "not compiled")
        if missing:
            self.notes.append(f"WARNING: torch.compile, about twice as fast, needs {' and '.join(missing)}")
        return self

    def _prepare_compiling(self, dtype, cache_dir, memory_budget):
        """Tell inductor where to keep kernels, and what to keep for the backward pass.

        subtle: before it is imported, which torch.use_deterministic_algorithms does, since it then fixes its folder.
        """
        # subtle: torch 2.11 and 2.12 take a graph of bfloat16 out of the cache for a float16 run. Hence a folder per
        # dtype, and a tag for caches that users name themselves and for a second run in this process.
        if cache_dir:
            folder = Path(cache_dir).absolute() / "inductor" / f"torch{torch.__version__.split('+')[0]}-{dtype}"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        torch.compiler.config.cache_key_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "") + dtype
        functorch = importlib.import_module("torch._functorch.config")
        functorch.activation_memory_budget = memory_budget
        if "torch._dynamo" in sys.modules:
            torch.compiler.set_stance("default")  # an earlier run in this process may have used `stop_compiling`

    def why_not_compiled(self, error):
        """What to say of an exception if it is torch.compile's own failure; None if it is anything else."""
        if not self.compile:
            return None
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, torch.OutOfMemoryError):  # of a kernel that was tried out
            return None
        if not isinstance(error, TorchDynamoException | CppCompileError | InvalidCxxCompiler):
            return None
        text = " ".join(str(cause).split())
        text = text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"  # a compiler's command is long
        return f"{type(cause).__name__}: {text}"

    def stop_compiling(self, reason):
        """Run uncompiled what torch.compile has wrapped; all ranks call this, with the `reason` for the console."""
        torch.compiler.set_stance("force_eager")
        self.compile = False
        self.notes = ["not compiled: torch.compile failed" if note == "compiled" else note for note in self.notes]
        self.print(f"WARNING: torch.compile failed, so the run is not compiled, about half as fast ({reason})")

    def _choose_cuda(self, deterministic):
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        index = self.local_rank % torch.cuda.device_count()
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        name = torch.cuda.get_device_name(index)
        self.notes.append(f"device {self.device} ({name}, cuDNN {torch.backends.cudnn.version()})")

    def numerics(self):
        """What the digits of a loss depend on beside the code, the data and the device: a dict, kept in checkpoints."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "compiled": self.compile,
                "threads": torch.get_num_threads() if self.device.type == "cpu" else None}

    def autocast(self):
        """Context in which the model computes in `dtype`; plain fp32 needs none."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self):
        """Wait for all work that was queued on the device."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


class Heartbeat(threading.Thread):
    """Shows the other ranks that this process lives, and sees which of them do: every rank counts in a key of its own.

    `seen` has the counts of all ranks as they were read last; where they do not change, their ranks are silent.
    subtle: `multi_get` may never return, whatever its time limit, where the process that serves the store is frozen.
    So only this thread talks to the store, on a connection of its own, and `seen` then stands still for all ranks.
    """

    def __init__(self, store, rank, world_size):
        super().__init__(name="heartbeat", daemon=True)
        self.store = store.clone()
        self.store.set_timeout(timedelta(seconds=10))
        self.keys, self.key = [f"alive/{r}" for r in range(world_size)], f"alive/{rank}"
        self.pause = max(1.0, world_size / 64)  # seconds; 1,024 ranks read 64,000 counts a second
        self.seen = [None] * world_size
        self.closed = threading.Event()
        self.store.set(self.key, "0")

    def run(self):
        for beat in itertools.count(1):
            with contextlib.suppress(RuntimeError):  # the store is gone or busy: `seen` shows it
                self.store.set(self.key, str(beat))
                self.seen = self.store.multi_get(self.keys)
            if self.closed.wait(self.pause):
                return

    def close(self):
        self.closed.set()
        self.join(2)  # not longer: the store may never answer


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
