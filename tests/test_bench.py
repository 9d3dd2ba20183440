"""bench.py: the ladder on a very small model, its slow versions against the trainer's model, its memory formula."""

import argparse
import json
import re
import time

import pytest
import torch
from helpers import make_shards

import bench
import train_gpt2 as t
from harness.cli import UserError
from harness.runtime import Runtime

SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--seq_len", "16", "--total_batch_size", "64",
         "--device", "cpu"]


def cells(table):
    """The rows of a Markdown table, its heads first, without the rule."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_ladder_measures_in_fresh_processes_and_writes_what_it_says(tmp_path, capsys):
    """Guards the whole way from a rung's process to the table and the files, and the note for what a device lacks."""
    assert bench.main([*SMALL, "--repeats", "1", "--steps", "1", "--rungs", "tf32", "causal", "--profile",
                       "--out", str(tmp_path), "--cache_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(results) == ["ceiling", "causal", "tf32"]  # in the ladder's order, whatever was typed
    assert results["tf32"] == {"note": "this device has no TF32"}
    causal = results["causal"]
    assert causal["dtype"] == "float32" and not causal["compiled"] and causal["micro_batch_size"] == 1
    assert causal["tokens_per_sec"] == pytest.approx(64 / causal["seconds"])
    table = cells(bench.ladder_table(results, argparse.Namespace(rungs=["causal", "tf32"])))
    assert table[1][:3] == ["causal", "1", f"{causal['tokens_per_sec']:,.0f}"] and table[2][:3] == ["tf32", "-", "-"]
    out, err = printed
    assert out.startswith((tmp_path / "bench.md").read_text())
    first, *others = err.splitlines()
    assert re.fullmatch(r"2 rungs, 1 fresh processes each: about \d+ s", first) and "ceiling" in others[0]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]  # of the last rung that was measured
    assert (tmp_path / "profile.txt").read_text() in out


def test_repeats_are_interleaved_and_the_table_has_their_medians(monkeypatch):
    """Guards against all repeats of a rung falling into one slow minute, and against a wrong gain or share."""
    args = bench.make_parser().parse_args([*SMALL, "--rungs", "fp32", "causal", "flash", "ddp"])
    bench.settle(args)
    rates, measured = {"fp32": [10.0, 90.0, 20.0], "causal": [30.0, 50.0, 1.0], "flash": [60.0, 60.0, 61.0]}, []

    def run_fresh(spec, devices, timeout):
        measured.append(spec["rung"])
        if spec["rung"] == "ceiling":
            return {"flops_per_sec": 2e9, "vendor_flops_per_sec": 4e9}, None
        if spec["rung"] == "causal" and measured.count("causal") == 3:
            return None, "out of memory"
        rate = rates[spec["rung"]][measured.count(spec["rung"]) - 1]
        return {"tokens_per_sec": rate, "seconds": 1.0, "flops_per_sec": 1e7 * rate, "devices": 1, "dtype": "float32",
                "micro_batch_size": 1, "allocated_gb": None, "reserved_gb": 1.5}, None

    monkeypatch.setattr(bench, "run_fresh", run_fresh)
    results = bench.climb(args, "data", bench.Clock(None))
    assert measured == ["ceiling", "fp32", "causal", "flash"] * 3
    table = cells(bench.ladder_table(results, args))
    assert table[1][:9] == ["fp32", "1", "20", "1,000.0", "10.0%", "5.0%", "-", "1.50", "-"]
    assert (table[2][2], table[2][8]) == ("40", "x2.00")  # of the two repeats that succeeded
    assert (table[3][2], table[3][8]) == ("60", "x1.50")
    assert table[4][2] == "-" and "one device" in table[4][9]


def test_a_limit_of_time_keeps_what_was_measured(monkeypatch):
    """Guards a limit that loses the table, and a rung that looks measured though its time had run out."""
    args = bench.make_parser().parse_args([*SMALL, "--rungs", "fp32", "causal", "--seconds", "100"])
    bench.settle(args)
    clock, left = bench.Clock(100), []

    def run_fresh(spec, devices, timeout):
        left.append(timeout)
        clock.began -= 40  # every process takes 40 s; the third has 20 left
        if len(left) == 3:
            return None, bench.NO_TIME
        if spec["rung"] == "ceiling":
            return {"flops_per_sec": 2e9, "vendor_flops_per_sec": None}, None
        return {"tokens_per_sec": 10.0, "seconds": 1.0, "flops_per_sec": 1e7, "devices": 1, "dtype": "float32",
                "micro_batch_size": 1, "allocated_gb": None, "reserved_gb": None}, None

    monkeypatch.setattr(bench, "run_fresh", run_fresh)
    results = bench.climb(args, "data", clock)
    assert left == pytest.approx([100, 60, 20], abs=1)
    assert results["fp32"]["repeats"] == [10.0] and results["causal"] == {"note": bench.NO_TIME}
    assert cells(bench.ladder_table(results, args))[2][-1].endswith(bench.NO_TIME)


def test_a_process_beyond_the_limit_is_ended(tmp_path):
    """Guards a limit that waits for the process it has given up, or leaves it running."""
    program = tmp_path / "slow.py"
    program.write_text("import time\ntime.sleep(600)\n")
    started = time.monotonic()
    spec = {"rung": "slow", "ddp": False, "result": str(tmp_path / "result.json")}
    assert bench.run_fresh(spec, timeout=0.5, program=program) == (None, bench.NO_TIME)
    assert time.monotonic() - started < 60


def test_tables_are_aligned():
    """Guards columns that a reader of the terminal cannot follow."""
    lines = bench.markdown(["model", "GB", "note"], [["gpt2", "1.5", "a"], ["gpt2-medium", "10.25", "b c"]], (0, 2))
    assert lines.splitlines() == [
        "| model       |    GB | note |",
        "| ----------- | ----: | ---- |",
        "| gpt2        |   1.5 | a |",
        "| gpt2-medium | 10.25 | b c |"]
    args = argparse.Namespace(seq_len=1024, model="gpt2")
    lines = bench.memory_table(args, {8: 6.6}).splitlines()
    assert len({tuple(i for i, c in enumerate(line) if c == "|")[:-1] for line in lines}) == 1


@pytest.mark.parametrize("seconds, words", [(41.6, "42 s"), (100, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")])
def test_durations_in_words(seconds, words):
    assert bench.in_words(seconds) == words


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


def small_model(model_class, **shape):
    model = model_class(t.GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, **shape))
    assert model.config.padded_vocab_size == 50304
    return model


@pytest.mark.parametrize("model_class", [bench.Fp32Stream, bench.SlicedHead])
def test_slow_models_are_the_same_function(model_class):
    """Guards a rung that is slow, or fast, because it computes something else: loss, logits and gradients in fp32."""
    ours, slow = small_model(t.GPT), small_model(model_class)
    idx, targets = torch.randint(0, 50257, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    targets[0, 3] = -100
    torch.testing.assert_close(slow(idx)[0], ours(idx)[0], atol=1e-5, rtol=1e-5)
    losses = [model(idx, targets)[1] for model in (ours, slow)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), slow.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_slow_models_are_slow():
    """Guards a rung that gains nothing because the slow version does what the trainer does."""
    idx, streams = torch.zeros((1, 16), dtype=torch.int64), []
    for model_class in (bench.SlicedHead, bench.Fp32Stream):
        model = small_model(model_class)
        for block in model.transformer.h:
            block.register_forward_hook(lambda block, args, out: streams.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(idx, idx)
    assert streams == [torch.float32] * 4
    model = small_model(bench.SlicedHead)
    with torch.profiler.profile(record_shapes=True) as profiler:
        model(idx, idx)
    averages = profiler.key_averages(group_by_input_shape=True)
    sliced = [row.input_shapes[0] for row in averages if row.key == "aten::slice"]
    assert [1, 16, 50304] in sliced


@pytest.mark.parametrize("loader_class", [bench.LateLoader, bench.PlainLoader])
def test_slow_loaders_read_the_same_batches(tmp_path, loader_class):
    """Guards a rung of loading that trains on other data, or stages a batch before it is asked for."""
    make_shards(tmp_path, train=(900,))
    ours = t.DataLoaderLite(tmp_path, 2, 8)
    if loader_class is bench.PlainLoader:
        slow = bench.PlainLoader(ours.shards, 2, Runtime(), ours.sequence_ids)
    else:
        slow = bench.LateLoader(tmp_path, 2, 8)
    for _ in range(120):  # beyond an epoch's end
        for mine, theirs in zip(ours.next_batch(), slow.next_batch()):
            assert torch.equal(mine, theirs)
    assert slow.position == ours.position and getattr(slow, "_staged", None) is None
    for loader in (ours, slow):
        loader.close()


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
    ("--seconds 0", ["--seconds", "0"]),
    ("test_bench.py is a file", ["--out", __file__]),
])
def test_mistakes_are_told_before_anything_is_measured(words, flags, tmp_path):
    """Guards a traceback, or an hour of measuring, where a flag is wrong."""
    with pytest.raises(UserError, match=words):
        bench.main([*SMALL, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
