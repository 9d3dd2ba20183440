"""What only a CUDA device can show. `python -m pytest -m gpu`; skips itself without one."""

import json
import signal
from functools import partial

import pytest
import torch
from helpers import log_rows, make_shards, metric_rows, run_trainer, strike, tiny_flags
from test_resume import assert_equal

from harness.checkpoint import newest as newest_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def flags(tmp_path, log_dir, **changes):
    data = tmp_path / "data"
    if not data.exists():
        make_shards(data, train=(60000,), val=(9000,), high=200)
    return tiny_flags(data, tmp_path / log_dir, **{
        "n_layer": 2, "n_head": 2, "n_embd": 128, "seq_len": 64, "total_batch_size": 1024, "micro_batch_size": 8,
        "max_steps": 30, "max_lr": 3e-3, "val_every": 10, "device": "cuda", "dtype": "auto", **changes})


def trained(tmp_path, log_dir="log", before=None, **changes):
    done = run_trainer(flags(tmp_path, log_dir, **changes), before, timeout=600)
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
    rows = [{"ctx": "A dog is", "endings": [" red.", " up.", " in a tree.", " it."], "label": i % 4,
             "activity_label": "Dogs", "ctx_a": "A dog is", "ctx_b": "", "ind": i} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    on = {"hellaswag_every": 10, "hellaswag_path": tmp_path / "questions.jsonl", "sample_every": 10, "num_samples": 2,
          "sample_tokens": 5}
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
    assert row["rows"] == 3000 and 0.15 < row["acc_norm"] < 0.35 and row["seconds"] > 0
