"""bench.py: the ladder on a very small model, its slow beginnings against the trainer's model, its memory formula."""

import json

import pytest
import torch

import bench
import train_gpt2 as t
from common import UserError

SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--seq_len", "16", "--total_batch_size", "64",
         "--device", "cpu"]


def test_ladder_measures_in_fresh_processes_and_writes_what_it_says(tmp_path, capsys):
    """Guards the table's arithmetic (gain, shares), the note for a rung that a device lacks, and the files."""
    assert bench.main([*SMALL, "--repeats", "2", "--steps", "1", "--rungs", "bf16", "tf32", "causal", "--profile",
                       "--out", str(tmp_path), "--cache_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(results) == ["ceiling", "causal", "tf32", "bf16"]  # in the ladder's order, whatever was typed
    assert "tokens_per_sec" not in results["tf32"] and "| tf32 | - " in printed and "no TF32" in printed
    causal = results["causal"]
    assert causal["dtype"] == "float32" and not causal["compiled"] and len(causal["repeats"]) == 2
    assert causal["tokens_per_sec"] == pytest.approx(sum(causal["repeats"]) / 2)
    if "note" not in results["bf16"]:
        gain = results["bf16"]["tokens_per_sec"] / causal["tokens_per_sec"]
        assert f"| x{gain:.2f} |" in printed
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert printed.startswith((tmp_path / "bench.md").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


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
    rt = t.Runtime.start("cpu", "bfloat16", compile=True)
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
])
def test_mistakes_are_told_before_anything_is_measured(words, flags, tmp_path):
    """Guards a traceback, or an hour of measuring, where a flag is wrong."""
    with pytest.raises(UserError, match=words):
        bench.main([*SMALL, *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
