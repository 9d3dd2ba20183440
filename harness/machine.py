"""What this machine is and can do: dtype, peak speed, memory, and a setting of the allocator.

Facts about hardware and versions; nothing here knows about models or ranks.
"""

import contextlib
import os
import platform
from pathlib import Path

import numpy as np
import torch

from harness.cli import UserError

# Dense bf16 FLOP/s with fp32 accumulation (fp16 where there is no bf16) by the exact name of the device, without the
# "NVIDIA " that newer drivers put before it. From the vendors' data sheets (A2 to B200, Tesla, RTX 6000, Instinct) and
# NVIDIA's architecture white papers (GeForce, RTX A, TITAN RTX: "peak FP16 Tensor TFLOPS with FP32 accumulate").
# subtle: data sheets since Ampere print the figure with 2:4 sparsity first, or alone; these are half of it. A variant
# may share a name's beginning and be half as fast (L40 and L40S, A10 and A10G, laptop chips, MIG slices), so a device
# that is not in the list has no known peak.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12,
    "H200": 989.4e12, "H200 NVL": 835.5e12, "GH200 480GB": 989.4e12,
    "H100 80GB HBM3": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756e12,
    "A100-SXM4-40GB": 312e12, "A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12, "A100 80GB PCIe": 312e12,
    "A800-SXM4-80GB": 312e12, "A800 80GB PCIe": 312e12,
    "L40S": 362.05e12, "L40": 181.05e12, "L4": 121e12,
    "A40": 149.7e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12, "A2": 18e12,
    "RTX 6000 Ada Generation": 364.2e12, "RTX A6000": 154.8e12, "RTX A5000": 111.1e12, "RTX A4000": 76.7e12,
    "GeForce RTX 5090": 209.5e12, "GeForce RTX 5080": 112.6e12,
    "GeForce RTX 4090": 165.2e12, "GeForce RTX 4080": 97.5e12,
    "GeForce RTX 3090 Ti": 80e12, "GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2-16GB": 125e12, "Tesla V100-SXM2-32GB": 125e12, "Tesla V100S-PCIE-32GB": 130e12,
    "Tesla V100-PCIE-16GB": 112e12, "Tesla V100-PCIE-32GB": 112e12, "Tesla T4": 65e12, "TITAN RTX": 130.5e12,
    "AMD Instinct MI300X": 1307.4e12,
}


def peak_flops(device):
    """The vendor's dense bf16 FLOP/s of a `torch.device`, None where it is not known."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))


def peak_memory_gb(device):
    """(allocated, reserved): torch's peak in GB on a CUDA device so far; (None, None) on other devices."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9


def pick_dtype(device, wanted="auto"):
    """(name of a dtype, why): bfloat16 where the device is fast at it. `UserError` if it does not support `wanted`."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bfloat16" and not native:
            raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} does not support it; use float16")
        auto, why = ("bfloat16", "Ampere or later") if native else ("float16", "no bf16 before Ampere")
    elif device.type == "cpu":
        auto, why = _pick_cpu_dtype(torch.cpu.get_capabilities())
    else:
        auto, why = "float32", f"the safe choice on {device.type}"
    return (auto, why) if wanted == "auto" else (wanted, "as asked")


def _pick_cpu_dtype(capabilities):
    """subtle: AVX512-BF16 alone does not tell. AMD's is three times as fast as float32; Intel's has the rate of float32
    at best, and an update took 1.7 times as long in bfloat16 (docs/MEASURED.md). Intel is fast with AMX, which virtual
    machines may hide.
    """
    if capabilities.get("amx_bf16"):
        return "bfloat16", "this CPU has AMX"
    if capabilities.get("avx512_bf16") and "AMD" in capabilities.get("cpu_name", ""):
        return "bfloat16", "this CPU has AVX512-BF16"
    return "float32", "bf16 is slow on this CPU"


def fast_matmul_dtype(device):
    """bfloat16 where the device multiplies matrices faster in it than in float32, else float32."""
    return torch.bfloat16 if pick_dtype(device)[0] == "bfloat16" else torch.float32


def keep_freed_memory():
    """Make glibc keep freed memory: the page faults of large temporaries take a fifth of a small step on the CPU."""
    if platform.libc_ver()[0] != "glibc":
        return
    import ctypes

    # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt = ctypes.CDLL(None).mallopt
    # few arenas, since every new thread that reads data would otherwise fill one of its own
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 * 2**20), (arena_max, 2)):
        mallopt(option, value)


def private_cache():
    """The folder for what is executed when it is read again, compiled kernels: below the user's own cache folder.

    None where it cannot be made, or others can write to it. Never the working folder, which may hold anybody's files.
    """
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (named if named.is_absolute() else Path("~/.cache").expanduser()) / "train_gpt2"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    mine = not hasattr(os, "getuid") or status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if mine and folder.is_absolute() else None


@contextlib.contextmanager
def plain_fp32(model):
    """Context in which `model` computes without dropout, autocast and TF32; afterwards all is as it was."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)


@contextlib.contextmanager
def explain_out_of_memory(what):
    """Turn running out of memory for `what` into a `UserError`. On the CPU torch raises a plain RuntimeError for it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"not enough memory for {what}: use a smaller --model, --n_layer or --n_embd") from None


def versions():
    """Versions and platform: what the numbers of a run may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "system": platform.platform(), "processor": platform.processor() or platform.machine()}
