"""What only a CUDA device can show. `python -m pytest -m gpu`; skips itself without one."""

import signal
from functools import partial

import pytest
import torch
from helpers import free_port, log_rows, make_shards, metric_rows, run_trainer, strike, tiny_flags, write_questions
from memory_formula import memory_bytes
from test_resume import assert_equal

import train_gpt2
from harness.checkpoint import newest as newest_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def flags(tmp_path, log_dir, **changes):
    data = tmp_path / "data"
    if not data.exists():
        make_shards(data, train=(60000,), val=(9000,), high=200)
    return tiny_flags(data, tmp_path / log_dir, **{
        "n_layer": 2, "n_head": 2, "n_embd": 128, "seq_len": 64, "total_batch_size": 1024, "micro_batch_size": 8,
        "max_steps": 30, "max_lr": 3e-3, "val_every": 10, "device": "cuda", "dtype": "auto", **changes})


def trained(tmp_path, log_dir="log", before=None, env=None, **changes):
    done = run_trainer(flags(tmp_path, log_dir, **changes), before, env=env, timeout=600)
    assert before or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_dtype_trains_as_fp32_on_the_cpu_does(tmp_path, dtype, optimizer):
    """A scaler that is not unscaled before clipping, a fused optimizer beside it, a loss kept in half precision."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bf16 on this device")
    trained(tmp_path, "gpu", dtype=dtype, optimizer=optimizer)
    trained(tmp_path, "cpu", dtype="float32", device="cpu", optimizer=optimizer)
    ours, due = (metric_rows(tmp_path / d, "train") for d in ("gpu", "cpu"))
    assert not any(row["skipped"] for row in ours[1:]), "the scaler's first guess may be too high, no later one"
    start = 1 + max((row["step"] for row in ours if row["skipped"]), default=-1)
    for a, b in zip(ours[: 10 if start == 0 else 1], due):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05), a["step"]
    assert ours[-1]["loss"] == pytest.approx(due[-1]["loss"], abs=0.2) and ours[-1]["loss"] < 6.5
    assert ours[-1]["memory_allocated_gb"] > 0 and ours[-1]["memory_reserved_gb"] > 0


def test_compiled_with_benchmark_and_samples_on(tmp_path):
    """torch.compile that breaks HellaSwag or sampling, gives other losses, or leaves `_orig_mod.` in the keys."""
    on = {"hellaswag_every": 10, "hellaswag_path": write_questions(tmp_path / "questions.jsonl", 40),
          "sample_every": 10, "num_samples": 2, "sample_tokens": 5}
    trained(tmp_path, "compiled", compile=True, **on)
    trained(tmp_path, "eager", compile=False, **on)
    ours, due = log_rows(tmp_path / "compiled"), log_rows(tmp_path / "eager")
    assert [row[:2] for row in ours] == [row[:2] for row in due]
    assert [s for s, kind, _ in ours if kind == "hella"] == [10, 20, 30]
    for (step, kind, a), (_, _, b) in zip(ours, due):
        if kind != "hella":
            assert float(a) == pytest.approx(float(b), abs=0.05), (step, kind)
    assert all(len(row["texts"]) == 2 for row in metric_rows(tmp_path / "compiled", "sample"))
    checkpoint = newest_checkpoint(tmp_path / "compiled")[1]
    assert not any("_orig_mod" in name for name in checkpoint["model"])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_exact_resume_with_deterministic_kernels(tmp_path, dtype, compiled):
    """--deterministic that is not: atomics in a backward, an autotuned choice, a scaler or masks not restored."""
    changes = {"deterministic": True, "dropout": 0.1, "dtype": dtype, "compile": compiled, "checkpoint_every": 7,
               "max_steps": 20}
    trained(tmp_path, "straight", **changes)
    killed = trained(tmp_path, "killed", partial(strike, name="train_step", call=11), **changes)
    assert killed.returncode == -signal.SIGKILL
    done = run_trainer(["--resume", "--log_dir", tmp_path / "killed"], timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / "log.txt").read_text() == (tmp_path / "straight" / "log.txt").read_text()
    ours, due = (newest_checkpoint(tmp_path / d)[1] for d in ("killed", "straight"))
    for key in ("model", "optimizer", "scaler", "step", "position"):
        assert_equal(ours[key], due[key], key)


def _small_device(trainer, gigabytes):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def test_the_micro_batch_that_fits_is_found(tmp_path):
    """A search that ends out of memory in the first real step, or takes one row to be safe."""
    big = {"micro_batch_size": None, "seq_len": 512, "total_batch_size": 65536, "n_embd": 256, "max_steps": 2,
           "val_tokens": 4096}
    found = []
    for gigabytes in (3, 12):
        trained(tmp_path, "log", partial(_small_device, gigabytes=gigabytes), **big)
        found.append(newest_checkpoint(tmp_path / "log")[1]["micro_batch_size"])
        assert metric_rows(tmp_path / "log", "train")[-1]["memory_reserved_gb"] <= gigabytes
    small, large = found
    assert 1 <= small < large and 128 % small == 0 and 128 % large == 0
    done = trained(tmp_path, "log", partial(_small_device, gigabytes=3), **{**big, "micro_batch_size": 128})
    assert done.returncode == 2 and "--micro_batch_size 128" in done.stderr


def test_hellaswag_of_the_real_model_takes_its_time_and_no_more(tmp_path, shared_hellaswag):
    """An evaluation that runs question by question: 3,000 questions by the 124M model in its real training run.

    The time is in the row, to be read; the test holds only that it is there and that the count is whole.
    """
    trained(tmp_path, "log", n_layer=12, n_head=12, n_embd=768, seq_len=1024, total_batch_size=8192, max_steps=2,
            val_tokens=8192, hellaswag_every=2, hellaswag_path=shared_hellaswag, compile=True)
    (row,) = metric_rows(tmp_path / "log", "hella")
    print(f"HellaSwag: {row['questions']} questions in {row['seconds']:.2f} s")
    assert row["questions"] == 3000 and 0.15 < row["acc_norm"] < 0.35 and row["seconds"] > 0


def test_compiled_graphs_of_another_dtype_are_not_taken(tmp_path):
    """A kernel cache whose key leaves out autocast's dtype (torch before 2.13): float16 would run bfloat16's graph.

    The user names the folder of the cache, so that it is the same for both dtypes.
    """
    on = {"compile": True, "deterministic": True, "max_steps": 10}
    shared, apart = ({"TORCHINDUCTOR_CACHE_DIR": tmp_path / name} for name in ("shared", "apart"))
    trained(tmp_path, "bf16", env=shared, dtype="bfloat16", **on)
    trained(tmp_path, "fp16", env=shared, dtype="float16", **on)
    trained(tmp_path, "alone", env=apart, dtype="float16", **on)
    ours, due, other = ((tmp_path / name / "log.txt").read_text() for name in ("fp16", "alone", "bf16"))
    assert ours == due != other


@pytest.mark.parametrize("n_head, n_embd, budget", [
    (12, 768, 1.0), (12, 768, 0.3), pytest.param(20, 1280, 0.3, id="wide_as_large"),
    pytest.param(25, 1600, 0.3, id="wide_as_xl")])
def test_memory_is_what_the_formula_says(tmp_path, n_head, n_embd, budget):
    """A memory table that promises a micro-batch which does not fit, or leaves a third of the card empty."""
    B, shape = 16, {"n_layer": 12, "n_head": n_head, "n_embd": n_embd}
    trained(tmp_path, **shape, seq_len=1024, total_batch_size=B * 1024, micro_batch_size=B, max_steps=3, val_every=0,
            compile=True, dtype="bfloat16", memory_budget=budget)
    fixed, token = memory_bytes(train_gpt2.GPTConfig(**shape), budget)
    computed, measured = (fixed + B * 1024 * token) / 1e9, metric_rows(tmp_path / "log", "train")[-1]
    print(f"computed {computed:.2f} GB, allocated {measured['memory_allocated_gb']:.2f}, "
          f"reserved {measured['memory_reserved_gb']:.2f}")
    assert measured["memory_allocated_gb"] == pytest.approx(computed, rel=0.08)
    assert measured["memory_reserved_gb"] < 1.3 * computed


def as_a_world_of_one(trainer):
    """Make the trainer take every path of several ranks in a world of one, and say what it takes."""
    class Distributed(trainer.Runtime):
        def __init__(self, *args):
            super().__init__(*args, distributed=True)
            print(f"backends: {torch.distributed.get_backend_config()}; "
                  f"control: {torch.distributed.get_backend(self.control)}")

    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        calls = {"forward": 0, "no_sync": 0}

        def forward(self, *args):
            self.calls["forward"] += 1
            return super().forward(*args)

        def no_sync(self):
            self.calls["no_sync"] += 1
            return super().no_sync()

        def __del__(self):
            print(f"DDP: {self.calls}")

    trainer.Runtime = Distributed
    trainer.nn.parallel.DistributedDataParallel = Wrapper


@pytest.mark.parametrize("compiled", [True, False])
def test_ddp_with_a_world_of_one(tmp_path, compiled):
    """Lines that meet CUDA for the first time at a user's: NCCL, DDP around the compiled model, no_sync, the control
    group. They must give what a run without them gives, also after a kill and a resume."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    on = {"compile": compiled, "deterministic": True, "sample_every": 10, "num_samples": 1, "sample_tokens": 5,
          "checkpoint_every": 10}
    trained(tmp_path, "plain", **on)
    done = trained(tmp_path, "ddp", as_a_world_of_one, env=env, **on)
    assert "nccl" in done.stdout and "control: gloo" in done.stdout, done.stdout
    assert "DDP: {'forward': 60, 'no_sync': 30}" in done.stdout, done.stdout  # 30 steps of two micro-steps
    ours, due = log_rows(tmp_path / "ddp"), log_rows(tmp_path / "plain")
    assert [row[:2] for row in ours] == [row[:2] for row in due]
    for (step, kind, a), (_, _, b) in zip(ours, due):
        assert float(a) == pytest.approx(float(b), abs=0.01), (step, kind)
    names = [set(newest_checkpoint(tmp_path / name)[1]["model"]) for name in ("ddp", "plain")]
    assert names[0] == names[1]
    done = run_trainer(["--resume", tmp_path / "ddp" / "model_00010.pt", "--log_dir", tmp_path / "ddp"],
                       as_a_world_of_one, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    again = log_rows(tmp_path / "ddp")
    assert [row[:2] for row in again] == [row[:2] for row in due]
    for (step, kind, a), (_, _, b) in zip(again, ours):
        assert float(a) == pytest.approx(float(b), abs=0.01), (step, kind)
