"""Facts about hardware: peaks by exact names, a compiler that is not there, memory that runs out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TRAINER, make_shards, tiny_flags

from harness import code, machine
from harness.cli import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "teraflops"), [
    ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4),
    ("NVIDIA A100-SXM4-80GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
    ("NVIDIA L4", 121), ("NVIDIA L40", 181.05), ("NVIDIA L40S", 362.05), ("NVIDIA B200", 2250), ("Tesla T4", 65),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA RTX A1000", None), ("NVIDIA T400", None), ("NVIDIA T400 4GB", None), ("NVIDIA RTX A4000 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None), ("NVIDIA A100X", None),
])
def test_peaks_belong_to_exact_names(monkeypatch, name, teraflops):
    """Catches an mfu by another card's peak: "A10" is a part of A10G and A100, "L4" of L40, "T4" of T400."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_flops(CUDA) == (teraflops and pytest.approx(1e12 * teraflops))
    assert machine.peak_flops(CPU) is None


@pytest.mark.parametrize(("capabilities", "dtype"), [
    ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon Platinum 8488C"}, "bfloat16"),
    ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC 9R45"}, "bfloat16"),
    ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, "float32"),
    ({"avx512_bf16": False, "cpu_name": "AMD EPYC 7R13"}, "float32"), ({"architecture": "aarch64"}, "float32"),
    ({}, "float32"),
])
def test_a_cpu_computes_in_the_dtype_that_is_fast_on_it(monkeypatch, capabilities, dtype):
    """Catches bfloat16 by a flag that says it exists: on Intel without AMX an update took 1.7 times as long in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.pick_dtype(CPU)[0] == dtype
    assert machine.fast_matmul_dtype(CPU) == getattr(torch, dtype)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the default compiler is another one")
def test_a_machine_without_a_compiler_trains_uncompiled(tmp_path):
    """Catches a traceback of torch.compile in place of a slower run, and a user who is not told which compiler."""
    CXX = "/opt/old/g++"
    flags = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", compile=True, max_steps=2, n_layer=1)
    env = {**os.environ, "CXX": CXX, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, TRAINER, *map(str, flags)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("WARNING: torch.compile failed")]
    assert repr(CXX) in warning
    assert json.loads((tmp_path / "log" / "config.json").read_text())["compiled"] is False


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
def test_only_a_folder_of_ones_own_holds_kernels(tmp_path, monkeypatch):
    """Catches kernels in a folder that others can write to, in one relative to where one stands, and a lost home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.private_cache() == tmp_path / "train_gpt2"
    assert (tmp_path / "train_gpt2").stat().st_mode & 0o777 == 0o700
    (tmp_path / "train_gpt2").chmod(0o777)
    assert machine.private_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # the specification: "All paths must be absolute"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert machine.private_cache() == tmp_path / "home" / ".cache" / "train_gpt2"
    monkeypatch.setenv("HOME", "/dev/null")
    assert machine.private_cache() is None


def test_the_commit_is_that_of_the_code_or_none(tmp_path, monkeypatch):
    """Catches the commit of another repository, in which the code lies, and a clean one of changed code."""
    def git(*words):
        done = subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True)
        return done.stdout.strip()

    def git_commit(checkout):
        monkeypatch.setattr(code, "ROOT", checkout)
        return code.git_commit()

    git("init", "-q")
    (tmp_path / "code.py").write_text("0.02\n")
    (tmp_path / "copy").mkdir()
    git("add", ".")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit and git_commit(tmp_path / "copy") is None
    (tmp_path / "notes.txt").write_text("not part of it\n")
    assert git_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("0.01\n")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_memory_that_runs_out_is_one_line():
    """Catches a traceback for a model that does not fit, and any other error being taken for one."""
    with pytest.raises(UserError, match="not enough memory for the model: use a smaller --model"), \
            machine.explain_out_of_memory("the model"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), machine.explain_out_of_memory("the model"):
        torch.zeros(2) @ torch.zeros(3, 3)
