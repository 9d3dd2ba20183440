"""The learning rate by worked examples, who is updated by what, and whole training against a plain reference."""

import math

import numpy as np
import pytest
import torch
from helpers import make_shards, metric_rows, tiny_flags
from test_model import as_transformers
from torch import nn
from torch.nn import functional as F

import train_gpt2
from harness.cli import UserError
from train_gpt2 import GPT, OPTIMIZERS, GPTConfig, Muon, TrainConfig, lr_at

pytestmark = pytest.mark.quick

# --- the schedule ----------------------------------------------------------------------------------------------------


COSINE = {0: 0.1, 4: 0.5, 9: 1.0,  # warmup: a tenth more each step, the peak at its last
          10: 1.0, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 85: 0.1 + 0.45 * (1 - math.sqrt(0.5)),
          110: 0.1, 111: 0.1, 5000: 0.1}
WSD = {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 99: 0.145, 100: 0.1, 500: 0.1}


@pytest.mark.parametrize(("flags", "due"), [
    ({"max_steps": 110}, COSINE), ({"max_steps": 100, "schedule": "wsd", "decay_fraction": 0.2}, WSD)])
def test_worked_examples(flags, due):
    """Warmup that starts at 0 or ends a step late, a decay that starts early, bends, misses its minimum or rises."""
    cfg = TrainConfig(max_lr=1.0, min_lr=0.1, warmup_steps=10, **flags)
    assert {step: lr_at(step, cfg) for step in due} == pytest.approx(due, rel=1e-12)


def test_schedules_at_their_edges():
    """Division by zero without a warmup or a decay; a warmup longer than the run; the two overlapping."""
    assert lr_at(0, TrainConfig(max_lr=1.0, warmup_steps=0)) == 1.0
    long = TrainConfig(max_lr=1.0, warmup_steps=1000, max_steps=100)
    assert [lr_at(s, long) for s in (0, 99, 999)] == [0.001, 0.1, 1.0]
    even = TrainConfig(max_lr=1.0, warmup_steps=100, max_steps=100)
    assert lr_at(100, even) == pytest.approx(0.1) or lr_at(100, even) == 1.0
    flat = TrainConfig(max_lr=1.0, warmup_steps=0, max_steps=100, schedule="wsd", decay_fraction=0.0)
    assert lr_at(99, flat) == 1.0
    whole = TrainConfig(max_lr=1.0, min_lr=0.0, warmup_steps=50, max_steps=100, schedule="wsd", decay_fraction=1.0)
    assert [lr_at(s, whole) for s in (49, 50, 75)] == [1.0, 1.0, 0.5]


def test_gpt2s_own_schedule():
    """The published run: 6e-4 after 715 steps, 6e-5 at 19,073."""
    cfg = TrainConfig()
    assert lr_at(714, cfg) == pytest.approx(6e-4) and lr_at(19073, cfg) == pytest.approx(6e-5)
    assert lr_at(0, cfg) == pytest.approx(6e-4 / 715)
    rates = [lr_at(s, cfg) for s in range(714, 19074)]
    assert rates == sorted(rates, reverse=True)
    assert [TrainConfig(max_steps=n).warmup_steps for n in (7150, 7149, 1000, 5)] == [715, 714, 100, 0]
    assert TrainConfig(max_steps=1000, warmup_steps=715).warmup_steps == 715, "given is given"


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return GPT(GPTConfig(block_size=16, vocab_size=301, n_layer=2, n_head=2, n_embd=32), seed=1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_exactly(model, optimizer):
    """A parameter that is never trained, updated twice, or decayed where it must not be."""
    cfg = TrainConfig(optimizer=optimizer, weight_decay=0.3)
    optimizers = OPTIMIZERS[optimizer].make(model, cfg)
    names = {p: n for n, p in model.named_parameters()}
    groups = [group for o in optimizers.values() for group in o.param_groups]
    decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(decay) == sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    for name, value in decay.items():
        assert value == (0.3 if model.get_parameter(name).dim() >= 2 else 0.0), name
    assert all((g["betas"], g["eps"]) == ((0.9, 0.95), 1e-8) for g in optimizers["adamw"].param_groups)
    if optimizer == "muon":
        sizes = {names[p]: group["sizes"] for group in optimizers["muon"].param_groups for p in group["params"]}
        matrices = {"attn.c_attn": [32, 32, 32], "attn.c_proj": None, "mlp.c_fc": None, "mlp.c_proj": None}
        assert sizes == {f"transformer.h.{i}.{m}.weight": n for i in (0, 1) for m, n in matrices.items()}


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_muon_equals_torchs_to_the_bit(shape):
    """A momentum, a Nesterov step, a scale or an order of operations that is not torch.optim.Muon's."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([{"params": [ours], "sizes": None}], 0.02, 0.1, torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
        assert torch.equal(ours, theirs), seed
    assert torch.equal(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_matrices_of_one_shape_are_updated_together_as_alone():
    """Catches an update that goes to another matrix, or mixes two, where equal shapes are multiplied in one batch."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((32, 16), (16, 16), (32, 16), (16, 16))]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in "ab")
    muon = Muon([{"params": ours, "sizes": None}], 0.02, 0.1, torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q, start in zip(ours, theirs, starts):  # torch's multiplies in bfloat16
        assert (p - q).norm() < 0.02 * (q - start).norm()


@pytest.mark.parametrize("sizes", [[32, 32, 32], [64, 16, 16]])
def test_muon_takes_q_k_and_v_as_matrices_of_their_sizes(sizes):
    """Catches Muon on the stacked matrix, which mixes q, k and v, and equal parts where they differ in size."""
    start = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    stacked, whole = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.split(sizes)]
    muons = [Muon([{"params": [stacked], "sizes": sizes}], 0.02, 0.1, torch.float32),
             Muon([{"params": [whole], "sizes": None}], 0.02, 0.1, torch.float32),
             Muon([{"params": parts, "sizes": None}], 0.02, 0.1, torch.float32)]
    for seed in range(4):
        stacked.grad = torch.randn(96, 32, generator=torch.Generator().manual_seed(seed))
        whole.grad = stacked.grad.clone()
        for part, grad in zip(parts, stacked.grad.split(sizes)):
            part.grad = grad.clone()
        for muon in muons:
            muon.step()
    assert torch.equal(stacked, torch.cat(parts))
    assert (stacked - whole).norm() > 0.1 * (stacked - start).norm()


def test_muon_refuses_a_matrix_that_its_sizes_do_not_fill(model):
    """Catches a c_attn that was made smaller while nobody has changed split_sizes."""
    for block in model.transformer.h:
        block.attn.c_attn = nn.Linear(32, 64)
    with pytest.raises(UserError, match=r"64 rows does not consist of \[32, 32, 32\] rows"):
        OPTIMIZERS["muon"][0](model, TrainConfig(optimizer="muon"))


def test_muons_update_by_hand():
    """Newton-Schulz coefficients, momentum or size that are not the paper's (Jordan et al. 2024), in fp32."""
    w = start = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(start.clone())
    muon, velocity = Muon([{"params": [p], "sizes": None}], 0.02, 0.1, torch.float32), torch.zeros_like(start)
    for seed in range(3):
        g = p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
        velocity = 0.95 * velocity + 0.05 * g
        x = 0.05 * g + 0.95 * velocity
        x = (x / x.norm()).T
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(24) * x.T
        muon.step()
    torch.testing.assert_close(p.detach(), w)


# --- whole training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batch_size", "schedule", "grad_clip"), [(2, "cosine", 1.0), (8, "wsd", 0.5)])
def test_twenty_steps_equal_a_plain_reference(tmp_path, micro_batch_size, schedule, grad_clip):
    """Accumulation that weighs wrongly, clipping before the mean, a step's rate off by one, decay on the wrong group.

    The reference is transformers' model with torch's AdamW on the whole batch at once, written without our helpers.
    """
    data = make_shards(tmp_path / "data", train=(1100, 700), high=300)
    flags = tiny_flags(data, tmp_path / "log", max_steps=20, micro_batch_size=micro_batch_size, shuffle=False,
                       schedule=schedule, grad_clip=grad_clip, max_lr=3e-3, weight_decay=0.2, val_every=0)
    assert train_gpt2.main(flags) == 0
    rows = metric_rows(tmp_path / "log", "train")

    start = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32), seed=TrainConfig().seed)
    model = as_transformers(start).train()
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias") and ".ln_" not in n]
    others = [p for n, p in model.named_parameters() if n.endswith("bias") or ".ln_" in n]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
                              betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    sequences = []  # of 16 tokens and the one after, shard by shard
    for file in sorted(data.glob("*train*")):
        tokens = np.load(file).astype(np.int64)
        sequences += [tokens[i * 16 : i * 16 + 17] for i in range((len(tokens) - 1) // 16)]
    assert len(sequences) == 68 + 43 and 20 * 8 > len(sequences), "over the end of an epoch"
    for step in range(20):
        batch = torch.from_numpy(np.stack([sequences[(8 * step + i) % len(sequences)] for i in range(8)]))
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        share = (step - 3) / 17
        left = (1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else min(1.0, (20 - step) / 4)
        lr = 3e-3 * (step + 1) / 3 if step < 3 else 3e-4 + (3e-3 - 3e-4) * left
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        row = rows[step]
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4), step
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step
        assert row["lr"] == pytest.approx(lr, rel=1e-9), step
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "the comparison must cover real movement"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_gradient_is_kept_between_steps(tmp_path, optimizer, monkeypatch):
    """Gradients that live through the next forward pass and double its memory."""
    kept = []
    inner = train_gpt2.train_step

    def look(run):
        result = inner(run)
        kept.append(any(p.grad is not None for p in run.state.model.parameters()))
        return result

    monkeypatch.setattr(train_gpt2, "train_step", look)
    flags = tiny_flags(make_shards(tmp_path / "data"), tmp_path / "log", max_steps=2, optimizer=optimizer, val_every=0)
    assert train_gpt2.main(flags) == 0
    assert kept == [False, False]
