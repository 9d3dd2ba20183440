"""Where a run computes: device, dtype, determinism, compile cache."""

import atexit
import contextlib
import importlib
import math
import os
import shutil
import sys
import tempfile
from collections import deque
from pathlib import Path

import torch

from harness import machine
from harness.cli import UserError, count
from harness.threads import cores, cpu_quota


class Device:
    """The device and dtype in which this process computes, as `choose` settled them."""

    local_rank = 0  # which of several GPUs
    device, dtype, compile = torch.device("cpu"), torch.float32, False  # until `choose`
    notes = ()  # what was chosen and why, for the console
    before = None  # torch's settings of determinism until `choose`, for `restore`

    def choose(self, device="auto", dtype="auto", compile=False, deterministic=False, memory_budget=1.0):
        """Settle device, dtype, compiling and determinism; `self.notes` says what was chosen and why.

        `memory_budget`: the share of activations that compiled code keeps for the backward pass. Raises `UserError`
        for what this machine does not have. Returns the runtime itself.
        """
        have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k in have if have[k]) if device == "auto" else device
        if not have[kind]:
            raise UserError(f"--device {kind}: this machine or build of torch has none; use --device auto")
        self.notes = []
        if kind == "cuda":
            self._choose_cuda(deterministic, self.local_rank)
        else:
            self.device = torch.device(kind)
            if (quota := cpu_quota()) < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(math.ceil(quota))  # more would wait for each other's turns
            threads = f" ({count(torch.get_num_threads(), 'thread')})" if kind == "cpu" else ""
            self.notes.append(f"device {kind}{threads}")
        name, why = machine.pick_dtype(self.device, dtype)
        self.dtype = getattr(torch, name)
        self.notes.append(f"{name} ({why})")
        self.compile, self.memory_budget = compile and kind != "mps", memory_budget
        if self.compile:
            self._prepare_compiling(name, memory_budget)
        self.before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
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
        return self

    def restore(self):
        """Give torch back its settings of determinism: the process may have other work."""
        if self.before:
            mode, torch.utils.deterministic.fill_uninitialized_memory = self.before
            if "torch._inductor" in sys.modules:  # its own mode too
                torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
            else:
                torch.set_deterministic_debug_mode(mode)

    def _prepare_compiling(self, dtype, memory_budget):
        """Tell inductor where to keep kernels, and what to keep for the backward pass.

        subtle: before it is imported, which torch.use_deterministic_algorithms does, since it then fixes its folder.
        """
        # subtle: torch 2.11 and 2.12 take a graph of bfloat16 out of the cache for a float16 run. Hence a folder per
        # dtype, and a tag for caches that users name themselves and for a second run in this process.
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            folder = machine.private_cache()
            if folder is None:
                folder = tempfile.mkdtemp(prefix="train_gpt2_")
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                self.notes.append("WARNING: compiled kernels are not kept: ~/.cache/train_gpt2 cannot be written, or "
                                  "others can write to it (TORCHINDUCTOR_CACHE_DIR names another folder)")
            kernels = Path(folder, "inductor", f"torch{torch.__version__.split('+')[0]}-{dtype}")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)
        if cpu_quota() < math.inf:
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores()))
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

    def _choose_cuda(self, deterministic, local_rank):
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        index = local_rank % torch.cuda.device_count()
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

    def keep_random_state(self):
        """Context after which the random numbers of this process go on as if nothing had been drawn within."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

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
            if self.device.type == "mps" and tensor.dtype == torch.uint16:  # which it does not have
                tensor = tensor.int()
            return tensor.to(self.device)
        buffer, copied = self.buffers[0]
        self.buffers.rotate(1)
        copied.synchronize()
        buffer.copy_(tensor)
        on_device = buffer.to(self.device, non_blocking=True)
        copied.record()
        return on_device
