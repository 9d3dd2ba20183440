"""What this machine is and can: dtype, compiler, peak speed, memory, and a setting of the allocator.

Facts about hardware and versions; nothing here knows of models or ranks.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from harness.cli import UserError

PEAK_FLOPS = {  # vendors' dense bf16 (fp16 where there is no bf16) FLOP/s, by part of the device's name
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "L4": 121e12,
    "A10": 125e12, "A6000": 155e12, "3090": 71e12, "V100": 125e12, "T4": 65e12,
}


def peak_flops(device):
    """The vendor's bf16 FLOP/s of a `torch.device`, None where unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gb(device):
    """(allocated, reserved), the most GB that torch has held on a CUDA device so far; (None, None) on others."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9


def pick_dtype(device, wanted="auto"):
    """(name of a dtype, why): bfloat16 where the device is fast at it. `UserError` for what the device has not."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bfloat16" and not native:
            raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has none; take float16")
        auto, why = ("bfloat16", "Ampere or later") if native else ("float16", "no bf16 before Ampere")
    elif device.type == "cpu":
        probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
        fast = [name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)()]
        auto, why = ("bfloat16", f"this CPU has {fast[0]}") if fast else ("float32", "bf16 is slow on this CPU")
    else:
        auto, why = "float32", f"the safe choice on {device.type}"
    return (auto, why) if wanted == "auto" else (wanted, "as asked")


def fast_matmul_dtype(device):
    """bfloat16 where the device multiplies matrices fast in it, else float32."""
    return torch.bfloat16 if pick_dtype(device)[0] == "bfloat16" else torch.float32


def compile_lacks(device):
    """What torch.compile misses here, in words; looked up, since a trial compile costs seconds."""
    lacks = []
    if device.type == "mps":
        return ["a device other than mps"]
    names = ("cc", "gcc", "clang", "cl") if device.type == "cuda" else ("c++", "g++", "clang++", "cl")
    if not any(map(shutil.which, (os.environ.get("CXX", names[0]), *names))):
        lacks.append(f"a compiler ({names[1]})")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        lacks.append("Python's headers (python3-dev)")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            lacks.append("a GPU of capability 7.0 or later")
        if not find_spec("triton"):
            lacks.append("triton")
    return lacks


def keep_freed_memory():
    """Let glibc keep what is freed: page faults of large temporaries cost a fifth of a small CPU step."""
    if platform.libc_ver()[0] != "glibc":
        return
    import ctypes

    # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt = ctypes.CDLL(None).mallopt
    # few arenas: every new thread that reads data would fill another one
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 * 2**20), (arena_max, 2)):
        mallopt(option, value)


@contextlib.contextmanager
def memory_told(what):
    """Have memory that cannot be had for `what` end as a `UserError`; on the CPU torch has no exception for that."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"there is no memory for {what}: take a smaller --model, --n_layer or --n_embd") from None


def git_commit():
    """The commit of this checkout, None outside of one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        checkout = Path(__file__).parent.parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    return None


def versions():
    """What the numbers of a run may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "system": platform.platform(), "processor": platform.processor() or platform.machine()}
