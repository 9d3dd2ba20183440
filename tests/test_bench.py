"""bench.py: the ladder on a very small model, its slow versions against the trainer's model, the memory formula."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_shards
from memory_formula import memory_bytes
from scripts import muon, peers
from torch.nn import functional as F

import bench
import train_gpt2 as t
from harness.cli import Parser, UserError, add_flags
from harness.runtime import Runtime

SMALL = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--seq_len", "16", "--total_batch_size", "64",
         "--device", "cpu"]


def cells(table):
    """The rows of a Markdown table, its heads first, without the rule."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_ladder_measures_in_fresh_processes_and_writes_what_it_says(tmp_path, capsys):
    """Catches the whole way from a rung's process to the table and the files, and the note for what a device lacks."""
    assert bench.main([*SMALL, "--repeats", "1", "--steps", "1", "--rungs", "tf32", "causal", "--profile",
                       "--out", str(tmp_path)]) == 0
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
    assert "ceiling" in err.splitlines()[0]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]  # of the last rung that was measured
    assert (tmp_path / "profile.txt").read_text() in out


def test_repeats_are_interleaved_and_the_table_has_their_medians(monkeypatch):
    """Catches all repeats of a rung falling into one slow minute, and a wrong gain or share."""
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
    _, second, *_, results = bench.climb(args, "data")
    assert second["fp32"]["tokens_per_sec"] == 10 and "note" in second["causal"]  # as a ladder that is ended early has
    assert "not measured yet" in bench.ladder_table(second, args)
    assert measured == ["ceiling", "fp32", "causal", "flash"] * 3
    table = cells(bench.ladder_table(results, args))
    assert table[1][:9] == ["fp32", "1", "20", "1,000.0", "10.0%", "5.0%", "-", "1.50", "-"]
    assert (table[2][2], table[2][8]) == ("40", "x2.00")  # of the two repeats that succeeded
    assert (table[3][2], table[3][8]) == ("60", "x1.50")
    assert table[4][2] == "-" and "one device" in table[4][9]


def test_tables_are_aligned():
    """Catches columns that a reader of the terminal cannot follow."""
    lines = bench.markdown(["model", "GB", "note"], [["gpt2", "1.5", "a"], ["gpt2-medium", "10.25", "b c"]], (0, 2))
    assert lines.splitlines() == [
        "| model       |    GB | note |",
        "| ----------- | ----: | ---- |",
        "| gpt2        |   1.5 | a |",
        "| gpt2-medium | 10.25 | b c |"]


@pytest.mark.parametrize("stored", [bench.future_mask(12, None), None])
def test_materialized_attention_is_the_same_function(monkeypatch, stored):
    """Catches a baseline that is slow because it computes something else."""
    model = t.GPT(bench.UnpaddedConfig(block_size=12, vocab_size=200, n_layer=2, n_head=2, n_embd=16))
    assert len(model.transformer.wte.weight) == 200
    idx = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = model(idx)[0]
    attention, (q, k) = F.scaled_dot_product_attention, (torch.randn(2, heads, 9, 8) for heads in (4, 2))
    grouped = attention(q, k, k, is_causal=True, enable_gqa=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", bench.MaterializedAttention(stored))
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, enable_gqa=True), grouped, atol=1e-5, rtol=1e-5)


def small_model(model_class, **shape):
    model = model_class(t.GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, **shape))
    assert model.config.padded_vocab_size == 50304
    return model


@pytest.mark.parametrize("model_class", [bench.Fp32Stream, bench.SlicedHead])
def test_slow_models_are_the_same_function(model_class):
    """Catches a rung that is slow, or fast, because it computes something else: loss, logits and gradients in fp32."""
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
    """Catches a rung that gains nothing because the slow version does what the trainer does."""
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
    """Catches a rung of loading that trains on other data, or stages a batch before it is asked for."""
    make_shards(tmp_path, train=(900,))
    loaders = t.DataLoaderLite(tmp_path, 2, 8), loader_class(tmp_path, 2, 8)
    for _ in range(40):  # beyond an epoch's end
        for ours, theirs in zip(*(loader.batches(3) for loader in loaders)):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert loaders[0].position == loaders[1].position and loaders[1]._staged is None
    for loader in loaders:
        loader.close()


def test_a_rung_stands_on_all_below_it():
    """Catches a ladder whose steps undo one another."""
    args = bench.make_parser().parse_args(SMALL)
    bench.settle(args)
    settings = [bench.make_spec(name, args, "data") for name in bench.RUNGS]
    for below, above, (_, changes) in zip(settings, settings[1:], list(bench.RUNGS.values())[1:]):
        assert {k for k in above if above[k] != below[k]} == {"rung", *changes}
    assert (args.small_rows, args.micro_batch_size, args.rows) == (1, 4, 4)


def rotary(self, idx, pos=None, mask=None, cache=None):
    """`GPT.hidden` of a model that has no positions added to its embeddings."""
    x = self.transformer.wte(idx)
    for block in self.transformer.h:
        x = block(x)
    return self.transformer.ln_f(x.float())


def test_every_rung_trains_a_model_without_wpe(monkeypatch):
    """Catches a slow version that copies the trainer's model and dies with its positions, as by rotary embeddings."""
    inner = t.GPT.__init__

    def without_wpe(self, *args):
        inner(self, *args)
        del self.transformer["wpe"]

    monkeypatch.setattr(t.GPT, "__init__", without_wpe)
    monkeypatch.setattr(t.GPT, "hidden", rotary)
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    args = bench.make_parser().parse_args(SMALL)
    bench.settle(args)
    cfg = t.TrainConfig.from_preset("gpt2", n_layer=1, n_head=2, n_embd=16, seq_len=16, optimizer="adamw")
    idx, attention = torch.zeros((1, 16), dtype=torch.int64), F.scaled_dot_product_attention
    for name in bench.RUNGS:
        F.scaled_dot_product_attention = attention
        state, _ = bench.make_state(bench.make_spec(name, args, "data"), cfg, Runtime())
        _, loss = state.model(idx, idx)
        loss.backward()
        state.optimizer["adamw"].step()
        assert state.model(idx, idx)[1] < loss and state.model.flops_per_token(16) > 0, name


def test_memory_formula_is_what_a_compiled_step_keeps():
    """Catches the memory table: the bytes that autograd holds between forward and backward, counted."""
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
    fixed, token = memory_bytes(config)
    # in the formula, but not there before the backward pass: fp32 weights, gradients and averages
    expected = fixed * 2 / 18 + B * config.block_size * token
    assert held == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("words, flags", [
    ("--repeats 0", ["--repeats", "0"]),
    ("n_embd 16 is not divisible by n_head 3", ["--n_head", "3"]),
    ("--seq_len 0", ["--seq_len", "0"]),
    ("--micro_batch_size -1", ["--micro_batch_size", "-1"]),
    ("--devices -1", ["--devices", "-1"]),
    ("test_bench.py is a file", ["--out", __file__]),
])
def test_mistakes_are_told_before_anything_is_measured(words, flags, tmp_path):
    """Catches a traceback, or an hour of measuring, where a flag is wrong."""
    with pytest.raises(UserError, match=words):
        bench.main([*SMALL, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in peers.CONTESTANTS if name != "ours"])
def test_peers_train_as_they_should(tmp_path, monkeypatch, name):
    """Catches a peer that is fast because it leaves work out: what it learns in four updates, and its micro-steps."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(bench.machine, "keep_freed_memory", lambda: None)  # this process has other tests to run
    args = peers.make_parser().parse_args([*SMALL, "--micro_batch_size", "2", "--steps", "4"])
    bench.settle(args)
    bench.write_tokens(tmp_path, args)
    spec = bench.make_spec("early_batch", args, str(tmp_path)) | {"contestant": name, "kind": "cpu"}
    figures = peers.measure_peer(spec)
    assert figures["losses"][0] == pytest.approx(math.log(50304), abs=0.1)
    assert figures["losses"][-1] < figures["losses"][0]  # the shard is so short that it is read again
    whole = peers.measure_peer(spec | {"large_rows": 4})
    assert whole["losses"] == pytest.approx(figures["losses"], abs=0.02)


def test_the_tutorials_model_is_gpt2():
    """Catches a comparison with another architecture: as many parameters as GPT-2 with 50,304 rows, its function."""
    ours, theirs = small_model(t.GPT), peers.Tutorial(2, 2, 32, 16, loss_alone=False)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    names = {"tokens": "wte", "positions": "wpe", "layers": "h", "norm_1": "ln_1", "norm_2": "ln_2", "norm": "ln_f",
             "attention": "attn", "qkv": "c_attn", "out": "c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
    weights = ours.state_dict()
    copied = {}
    for name in theirs.state_dict():
        if name == "head.weight":
            source = "wte.weight"
        else:
            source = re.sub(r"mlp\.[02]|[a-z]\w*", lambda part: names.get(part[0], part[0]), name)
        copied[name] = weights[f"transformer.{source}"]
    theirs.load_state_dict(copied)
    idx, targets = torch.randint(0, 50257, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    logits = F.pad(ours(idx)[0], (0, 47))  # the tutorial's softmax has the padding too, whose weights are 0
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    returned, loss = theirs(idx, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(returned[..., :50257], ours(idx)[0], atol=1e-5, rtol=0)
    theirs.loss_alone = True
    assert theirs(idx, targets)[0] is None


def test_the_peers_table_compares_with_the_best_of_them():
    """Catches a ratio to a weak peer, or to ourselves."""
    def figures(rate):
        return {"tokens_per_sec": rate, "seconds": 1.0, "reserved_gb": None, "repeats": [rate], "micro_batch_size": 4,
                "dtype": "bfloat16"}

    results = {"ours": figures(110.0), "tutorial": figures(100.0), "transformers": figures(50.0),
               "transformers padded": {"note": "out of memory"}, "ours A=1": figures(120.0)}
    table = cells(peers.peers_table(results, list(results)))
    assert [row[3] for row in table[1:]] == ["1.100", "1.000", "0.500", "-", "1.200"] and "out of memory" in table[4]


def test_a_setting_of_torchs_is_tried_beside_the_peers(tmp_path, monkeypatch, capsys):
    """Catches a lever that is measured without being pulled, or that stays pulled for the next contestant."""
    seen = {}

    def run_fresh(spec, program=None):
        seen[len(seen)] = os.environ.get("TORCHINDUCTOR_USE_FAST_MATH"), os.environ.get("A")
        return {"tokens_per_sec": 1.0 + len(seen), "seconds": 1.0, "reserved_gb": None, "micro_batch_size": 2,
                "dtype": "float32"}, None

    monkeypatch.delenv("TORCHINDUCTOR_USE_FAST_MATH", raising=False)
    monkeypatch.setattr(bench, "run_fresh", run_fresh)
    peers.main([*SMALL, "--micro_batch_size", "2", "--repeats", "1", "--out", str(tmp_path), "--contestants", "ours",
                "--env", "TORCHINDUCTOR_USE_FAST_MATH=1", "TORCHINDUCTOR_USE_FAST_MATH=0 A=b"])
    assert list(seen.values()) == [(None, None), ("1", None), ("0", "b"), (None, None)]
    assert "| ours TORCHINDUCTOR_USE_FAST_MATH=1 " in capsys.readouterr().out
    with pytest.raises(UserError, match="NAME=VALUE"):
        peers.main([*SMALL, "--env", "A"])


GPU_SH = Path(__file__).parent / "scripts" / "gpu.sh"
STUB = '''#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
printf '%s\\0' "$@" >>"$CALLS"; printf '\\n' >>"$CALLS"
case "$*" in *"-k wide"*) exit 1;; esac
[ "$1" = - ] && cat >/dev/null
exit 0
'''


@pytest.mark.skipif(not shutil.which("timeout") or not shutil.which("bash"), reason="gpu.sh is for Linux")
def test_the_gpu_scripts_commands_are_right(tmp_path):
    """Catches a run on a rented GPU that is lost to a flag that is gone: every command that gpu.sh starts, parsed.

    A program in python's place notes its arguments, and fails in one part: the rest goes on, the status counts it.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "shared" / "documents").mkdir(parents=True)
    (tmp_path / "shared" / "hellaswag").mkdir()
    (tmp_path / "shared" / "hellaswag" / "hellaswag_val.jsonl").touch()
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
           "FIGURES": str(tmp_path / "figures"), "SHARED": str(tmp_path / "shared")}

    def run(*arguments):
        return subprocess.run(["bash", GPU_SH, *arguments], env=env, capture_output=True, text=True, timeout=120,
                              cwd=GPU_SH.parents[2])

    done = run()
    summary = (tmp_path / "figures" / "summary.txt").read_text()
    assert done.returncode == 1 and summary.count("status 0") == 5 and "memory: status 1" in summary, done.stdout
    listed = [line.split() for line in run("--list").stdout.splitlines()]
    assert [name for _, name, _ in listed] == ["switches", "memory", "ddp", "peers", "curve", "tests"]
    assert all(sum(int(limit) for when, _, limit in listed if when == call) <= 420 for call in ("first", "second"))
    calls = [line.rstrip("\0").split("\0") for line in (tmp_path / "calls").read_text().splitlines()]
    parse = {
        "tests/scripts/peers.py": lambda argv: bench.settle(peers.make_parser().parse_args([*argv, "--device", "cpu"])),
        "train_gpt2.py": lambda argv: t.TrainConfig.from_preset(**train_overrides(argv)),
        "curves.py": lambda argv: None,
        "fineweb.py": lambda argv: None,
    }
    seen = [argv[0] for argv in calls]
    assert set(seen) == {*parse, "-", "-m", "--version"} and seen.count("train_gpt2.py") == 3
    for argv in calls:
        if argv[0] in parse:
            parse[argv[0]](argv[1:])
        elif "--optimizer" in argv:  # what is handed to the trainer by a script
            parse["train_gpt2.py"](argv[1:])
    gpu_tests = (Path(__file__).parent / "test_gpu.py").read_text()
    assert sum(argv[1:2] == ["pytest"] for argv in calls) == 3
    assert "wide_as_xl" in gpu_tests and "def test_ddp_with_a_world_of_one(" in gpu_tests  # which -k chooses
    assert run("peers", "speed").returncode == 2  # no such part


@pytest.mark.skipif(not shutil.which("bash"), reason="gpu.sh is for Linux")
def test_the_gpu_script_makes_shards_of_real_documents(tmp_path, shared_documents):
    """Catches minutes on a rented GPU that end because the documents do not fill a shard."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FIGURES": str(tmp_path),
           "SHARED": str(shared_documents.parent)}
    done = subprocess.run(["bash", GPU_SH, "--part", "shards"], env=env, capture_output=True, text=True, timeout=120,
                          cwd=GPU_SH.parents[2])
    assert done.returncode == 0 and "is complete" in done.stdout, done.stderr


def train_overrides(argv):
    """What `train_gpt2.py ARGV` sets, with the preset as `name`."""
    parser = Parser()
    add_flags(parser, t.TrainConfig, t.PRESETS)
    given = {word.removeprefix("--") for word in argv if word.startswith("--")}
    values = {name: value for name, value in vars(parser.parse_args(argv)).items() if name in given}
    return {"name": values.pop("preset", "auto"), **values}


def test_rates_are_tuned_until_the_best_is_no_edge(tmp_path, capsys):
    """Catches a comparison of optimizers of which one was tuned less, or whose best rate was the last that was tried.

    Loss is a parabola in the logarithm of the rate; AdamW's best, 1e-2, lies outside of its first three rates.
    """
    best, runs = {"adamw": 1e-2, "muon": 6e-3}, []

    def make(arm, lr, seed, share, args):
        runs.append((arm, seed, share))
        return {"val_loss": 4 + math.log(lr / best[arm]) ** 2 - 0.5 * (arm == "muon") * (2 * share - 1) + seed / 100}

    args = argparse.Namespace(out=tmp_path, steps=400, vocab=4096, minutes=None, settings=muon.CPU, seeds=[1, 2, 3],
                              trials=6)
    results, tried = muon.Results(args, make), {}
    muon.tune(["adamw", "muon"], results, tried, args)
    assert set(tried["adamw"]) == {1e-3, 2.5e-3, 6e-3, 1.4e-2, 3.3e-2}
    for arm, losses in tried.items():
        assert len(losses) == len(tried["adamw"]) and not muon.next_rate(losses)[1], arm
        assert abs(math.log(min(losses, key=losses.get) / best[arm])) < 0.5
    made = len(runs)
    muon.tune(["adamw", "muon"], muon.Results(args, make), {}, args)  # the file has them
    assert len(runs) == made
    args.minutes = 1e-9
    with pytest.raises(muon.OutOfTime):
        muon.Results(args, make).loss("adamw", 1.0, 1)
    seeds = {"adamw": [4.0, 4.1], "muon": [3.5, 3.6]}
    muon.print_tables(["adamw", "muon"], tried, seeds, {0.5: 4.25, 0.75: 3.95, 1.0: 3.55}, args)
    assert "muon reaches adamw's 4.0500 with 67% of the tokens" in capsys.readouterr().out
