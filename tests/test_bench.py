"""bench.py: the ladder on a very small model, its slow beginnings against the trainer's model, its memory formula."""

import json

import pytest
import torch

import bench
import train_gpt2 as t
from harness.cli import UserError
from harness.runtime import Runtime

SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--seq_len", "16", "--total_batch_size", "64",
         "--device", "cpu"]


def test_ladder_measures_in_fresh_processes_and_writes_what_it_says(tmp_path, capsys):
    """Guards the whole way from a rung's process to the table and the files, and the note for what a device lacks."""
    assert bench.main([*SMALL, "--repeats", "1", "--steps", "1", "--rungs", "tf32", "causal", "--profile",
                       "--out", str(tmp_path), "--cache_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(results) == ["ceiling", "causal", "tf32"]  # in the ladder's order, whatever was typed
    assert results["tf32"] == {"note": "this device has no TF32"} and "| tf32 | - " in printed
    causal = results["causal"]
    assert causal["dtype"] == "float32" and not causal["compiled"] and causal["micro_batch_size"] == 1
    assert causal["tokens_per_sec"] == pytest.approx(64 / causal["seconds"])
    assert f"| {causal['tokens_per_sec']:,.0f} |" in printed
    assert printed.startswith((tmp_path / "bench.md").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]  # of the last rung that there is


def test_repeats_are_interleaved_and_the_table_has_their_medians(monkeypatch):
    """Guards against all repeats of a rung falling into one slow minute, and against a wrong gain or share."""
    args = bench.make_parser().parse_args([*SMALL, "--rungs", "fp32", "causal", "flash", "ddp"])
    bench.settle(args)
    rates, measured = {"fp32": [10.0, 90.0, 20.0], "causal": [30.0, 50.0, 1.0], "flash": [60.0, 60.0, 61.0]}, []

    def run_fresh(spec, devices):
        measured.append(spec["rung"])
        if spec["rung"] == "ceiling":
            return {"flops_per_sec": 2e9, "vendor_flops_per_sec": 4e9}, None
        if spec["rung"] == "causal" and measured.count("causal") == 3:
            return None, "out of memory"
        rate = rates[spec["rung"]][measured.count(spec["rung"]) - 1]
        return {"tokens_per_sec": rate, "seconds": 1.0, "flops_per_sec": 1e7 * rate, "devices": 1, "dtype": "float32",
                "micro_batch_size": 1, "allocated_gb": None, "reserved_gb": 1.5}, None

    monkeypatch.setattr(bench, "run_fresh", run_fresh)
    results = bench.climb(args, "data")
    assert measured == ["ceiling", "fp32", "causal", "flash"] * 3
    lines = bench.ladder_table(results, args).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table[2][:9] == ["fp32", "1", "20", "1,000.0", "10.0%", "5.0%", "-", "1.50", "-"]
    assert (table[3][2], table[3][8]) == ("40", "x2.00")  # of the two repeats that were had
    assert (table[4][2], table[4][8]) == ("60", "x1.50")
    assert table[5][2] == "-" and "one device" in table[5][9]


@pytest.mark.parametrize("stored", [True, False])
def test_materialized_attention_is_the_same_function(stored):
    """Guards a baseline that is slow because it computes something else."""
    model = t.GPT(bench.UnpaddedConfig(block_size=12, vocab_size=200, n_layer=2, n_head=2, n_embd=16))
    idx = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    expected, state = model(idx)[0], model.state_dict()
    assert len(state["transformer.wte.weight"]) == 200
    for block in model.transformer.h:
        block.attn = bench.MaterializedAttention(model.config, stored)
    model.load_state_dict(state)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_rung_stands_on_all_below_it():
    """Guards a ladder whose steps undo one another."""
    args = bench.make_parser().parse_args(SMALL)
    bench.settle(args)
    settings = [bench.make_spec(name, args, "data") for name in bench.RUNGS]
    for below, above, (_, changes) in zip(settings, settings[1:], list(bench.RUNGS.values())[1:]):
        assert {k for k in above if above[k] != below[k]} == {"rung", *changes}
    assert (args.small_rows, args.micro_batch_size, args.rows) == (1, 4, 4)


def test_memory_formula_is_what_a_compiled_step_keeps():
    """Guards the memory table: the bytes that autograd holds between forward and backward, counted."""
    rt = Runtime.start("cpu", "bfloat16", compile=True)
    if not rt.compile:
        pytest.skip("no compiler here")
    B, config = 2, t.GPTConfig(block_size=256, n_layer=2, n_head=4, n_embd=128)
    model, kept = t.GPT(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    idx = torch.zeros((B, config.block_size), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), rt.autocast():
        torch.compile(model, dynamic=False)(idx, idx)
    held = sum(size for storage, size in kept.items() if storage not in weights)
    fixed, token = bench.memory_bytes(config)
    # in the formula, but not there before the backward pass: fp32 weights, gradients, averages; gradients of logits
    expected = fixed * 2 / 18 + B * config.block_size * (token - 2 * config.padded_vocab_size)
    assert held == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("words, flags", [
    ("--repeats 0", ["--repeats", "0"]),
    ("needs CUDA", ["--measure_memory"]),
    ("n_embd 16 is not divisible by n_head 3", ["--n_head", "3"]),
    ("--seq_len 0", ["--seq_len", "0"]),
    ("--micro_batch_size -1", ["--micro_batch_size", "-1"]),
    ("--devices -1", ["--devices", "-1"]),
    ("test_bench.py is a file", ["--out", __file__]),
])
def test_mistakes_are_told_before_anything_is_measured(words, flags, tmp_path):
    """Guards a traceback, or an hour of measuring, where a flag is wrong."""
    with pytest.raises(UserError, match=words):
        bench.main([*SMALL, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
