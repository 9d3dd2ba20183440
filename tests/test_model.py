"""GPT-2 against transformers' own, its initialisation, and sampling against a second implementation of it."""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from harness.cli import UserError
from sample import LayerCache
from train_gpt2 import GPT, GPTConfig, pick_token

pytestmark = pytest.mark.quick

SHAPE = GPTConfig(block_size=24, vocab_size=301, n_layer=3, n_head=4, n_embd=32)  # 301 is padded to 384 rows


@pytest.fixture
def model():
    """A small model whose every parameter is random, so that a bias or gain left out shows."""
    model = GPT(SHAPE, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.fixture
def idx():
    return torch.randint(SHAPE.vocab_size, (3, 24), generator=torch.Generator().manual_seed(7))


def as_transformers(model, dropout=0.0):
    """transformers' GPT2LMHeadModel with the same weights (its layers keep their matrices transposed)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    other = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0))
    tensors = model.state_dict()
    with torch.no_grad():
        for name, p in other.named_parameters():
            ours = tensors[name][: c.vocab_size] if name == "transformer.wte.weight" else tensors[name]
            matrix = ".h." in name and p.dim() == 2
            p.copy_(ours.T if matrix else ours)
    return other.eval()


# --- against transformers --------------------------------------------------------------------------------------------


def test_logits_and_loss_equal_transformers(model, idx):
    """A wrong GELU, epsilon, scale, mask, norm, position or head: anything that makes it another model."""
    other = as_transformers(model)
    targets = torch.randint(SHAPE.vocab_size, idx.shape, generator=torch.Generator().manual_seed(8))
    targets[0, :5] = -100
    with torch.no_grad():
        theirs = other(idx).logits
        logits, no_loss = model(idx)
        no_logits, loss = model(idx, targets)
    assert no_loss is None and no_logits is None
    assert logits.shape == (3, 24, SHAPE.vocab_size)
    torch.testing.assert_close(logits, theirs, atol=2e-5, rtol=1e-4)
    expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers(model, idx):
    """A forward that is right and a backward that is not: a head that is not tied, a detached branch."""
    other = as_transformers(model)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    logits = other(idx[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for name, p in other.named_parameters():
        ours = dict(model.named_parameters())[name].grad
        ours = ours[: SHAPE.vocab_size] if name == "transformer.wte.weight" else ours
        ours = ours.T if ".h." in name and p.dim() == 2 else ours
        torch.testing.assert_close(ours, p.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert not model.transformer.wte.weight.grad[SHAPE.vocab_size :].any(), "padding must not be trained"


def test_default_shape_is_the_released_model():
    """A parameter too many or too few: GPT-2 has 124,439,808."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    padding = 47 * 768
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + padding
    assert model.transformer.wte.weight.shape == (50304, 768)
    assert not any("lm_head" in name or "mask" in name for name in model.state_dict())
    assert asdict(GPTConfig()) == {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768,
                                   "dropout": 0.0}


# --- initialisation --------------------------------------------------------------------------------------------------


def test_initialisation_is_gpt2s():
    """A layer left at torch's default, or residual projections that are not scaled down with depth."""
    model = GPT(GPTConfig(block_size=256, n_layer=8, n_head=4, n_embd=128), seed=1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            p = p[:50257]
            due = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(due, rel=0.05), name
            assert abs(p.mean().item()) < 5 * due / math.sqrt(p.numel()), name
    assert not model.transformer.wte.weight[50257:].any()


# --- dropout, context, shapes ----------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only_and_at_each_of_its_places(idx):
    """Dropout missing at one of GPT-2's four places, or left on in evaluation."""
    config = GPTConfig(**{**asdict(SHAPE), "dropout": 0.3})
    places = []
    for name, module in GPT(config).named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.3
            places.append(name.split(".")[-2] if ".h." in name else name)
    assert sorted(set(places)) == ["attn", "mlp", "transformer.drop"] and len(places) == 1 + 2 * config.n_layer
    model = GPT(config, seed=1)
    with torch.no_grad():
        assert not torch.equal(model(idx)[0], model(idx)[0])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert not torch.equal(model(idx)[0], model(idx)[0]), "attention's own dropout"
        model.eval()
        assert torch.equal(model(idx)[0], model(idx)[0])


def test_impossible_shapes_and_long_rows_are_refused(model):
    """A shape that fails deep inside torch, or positions beyond the table."""
    for wrong in ({"n_head": 5, "n_embd": 32}, {"n_layer": 0}, {"vocab_size": 2.5}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GPTConfig(**wrong)
    with pytest.raises(UserError, match="25 tokens.*24"):
        model(torch.zeros((1, 25), dtype=torch.int64))


def test_weights_that_do_not_fit_are_refused(model):
    """Weights of another shape or architecture, loaded in part or in silence."""
    tensors = model.state_dict()
    missing = {k: v for k, v in tensors.items() if k != "transformer.ln_f.bias"}
    with pytest.raises(UserError, match=r"ln_f\.bias.*missing"):
        GPT.from_state_dict(SHAPE, missing)
    with pytest.raises(UserError, match="lm_head"):
        GPT.from_state_dict(SHAPE, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    with pytest.raises(UserError, match="shape"):
        GPT.from_state_dict(SHAPE, {**tensors, "transformer.wpe.weight": torch.zeros(25, 32)})


def test_buffers_that_are_not_saved_are_made_again():
    """Catches tables of angles, as of rotary embeddings, that are left without data when a checkpoint is loaded."""
    class WithTable(GPT):
        def __init__(self, config, seed=0):
            super().__init__(config, seed)
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    saved = WithTable(SHAPE, seed=3)
    loaded = WithTable.from_state_dict(SHAPE, saved.state_dict())
    assert torch.equal(loaded.angles, saved.angles) and torch.equal(loaded.pad_bias, saved.pad_bias)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


# --- hidden: positions, mask, cache ----------------------------------------------------------------------------------


def test_hidden_takes_positions_and_a_mask(model, idx):
    """Packed questions that see one another: each packed piece must equal the piece alone."""
    a, b = idx[:1, :10], idx[1:2, :14]
    packed = torch.cat((a, b), dim=1)
    pos = torch.cat((torch.arange(10), torch.arange(14)))
    piece = torch.tensor([0] * 10 + [1] * 14)
    mask = (piece[:, None] == piece[None, :]) & torch.ones(24, 24, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden = model.hidden(packed, pos, mask)
        torch.testing.assert_close(hidden[:, :10], model.hidden(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[:, 10:], model.hidden(b), atol=1e-5, rtol=1e-5)
        by_row = model.hidden(packed.expand(2, -1), pos.expand(2, -1), mask.expand(2, 1, 24, 24))
        torch.testing.assert_close(by_row[1], hidden[0], atol=1e-5, rtol=1e-5)


def test_hidden_with_a_cache_equals_the_whole_row(model, idx):
    """Keys and values kept for the wrong layer or position, or a chunk that does not see what came before."""
    cache = [LayerCache(24) for _ in range(SHAPE.n_layer)]
    with torch.no_grad():
        whole = model.hidden(idx)
        parts = [model.hidden(idx[:, :9], cache=cache)]
        parts += [model.hidden(idx[:, i : i + 1], torch.tensor([i]), cache=cache) for i in range(9, 12)]
        mask = torch.ones(24, 24, dtype=torch.bool).tril()[12:]
        parts.append(model.hidden(idx[:, 12:], torch.arange(12, 24), mask, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


# --- the padded vocabulary -------------------------------------------------------------------------------------------


def test_padding_is_no_part_of_the_softmax_and_never_sampled(idx):
    """Ids 50257..50303 that take probability from the loss, or come out of the sampler: padding made very likely."""
    model = GPT(SHAPE, seed=1).eval()
    with torch.no_grad():
        before = model(idx, idx)[1]
        model.transformer.ln_f.bias.fill_(1.0)
        with_bias = model(idx, idx)[1]
        model.transformer.wte.weight[SHAPE.vocab_size :] = 100.0  # a logit of thousands
        assert torch.equal(model(idx, idx)[1], with_bias) and not torch.equal(before, with_bias)
        for how in ({"temperature": 0}, {"temperature": 2.0}, {"top_k": 400}, {"top_p": 0.999}):
            out = model.generate(idx[:, :4], 20, generator=torch.Generator().manual_seed(1), **how)
            assert out.max() < SHAPE.vocab_size


# --- sampling --------------------------------------------------------------------------------------------------------


def allowed(probs, top_k=None, top_p=None):
    """The ids that may be drawn, by the definitions and one token at a time: a set."""
    ranked = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k is not None:
        ranked = ranked[:top_k]
        total = sum(probs[i] for i in ranked)
        probs = [p / total for p in probs]
    if top_p is not None:
        kept, reached = [], 0.0
        for i in ranked:
            if kept and reached >= top_p:
                break
            kept.append(i)
            reached += probs[i]
        ranked = kept
    return set(ranked)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (5, None), (400, None), (None, 0.0), (None, 0.3),
                                              (None, 0.9), (None, 1.0), (7, 0.6)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_have_the_right_distribution(temperature, top_k, top_p):
    """Top-k and top-p off by one, applied before the temperature, or not renormalised."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 2
    probs = (logits / temperature).softmax(-1).tolist()
    ids = allowed(probs, top_k, top_p)
    n = 20000
    drawn = pick_token(logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(6))
    assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
    share = torch.bincount(drawn.flatten(), minlength=12) / n
    total = sum(probs[i] for i in ids)
    for i in range(12):
        due = probs[i] / total if i in ids else 0.0
        assert abs(share[i].item() - due) <= 5 * math.sqrt(due * (1 - due) / n), (i, share[i].item(), due)


def test_generate_equals_a_plain_loop(model, idx):
    """Prompt rows mixed up, the wrong position's logits, a prompt beyond the context cropped at the wrong end."""
    for T in (1, 20, 24):
        expected = idx[:, :T]
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for _ in range(8):
                logits = model(expected[:, max(0, expected.size(1) - 24) :])[0][:, -1]
                kth = logits.sort(descending=True).values[:, 9:10]
                probs = torch.where(logits >= kth, logits / 0.8, torch.tensor(-torch.inf)).softmax(-1)
                expected = torch.cat((expected, torch.multinomial(probs, 1, generator=generator)), dim=1)
        out = model.generate(idx[:, :T], 8, temperature=0.8, top_k=10, generator=torch.Generator().manual_seed(9))
        assert torch.equal(out, expected)


def test_ties_and_values_that_are_not_finite():
    """Catches `top_k` that keeps all tokens that tie with the k-th, and greedy draws of another token or among nan."""
    drawn = pick_token(torch.zeros(2000, 7), top_k=3, generator=torch.Generator().manual_seed(1))
    assert len(drawn.unique()) == 3
    assert pick_token(torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]]), temperature=0).tolist() == [[1], [0]]
    for bad in (math.nan, math.inf, -math.inf):
        for options in ({"temperature": 0}, {}, {"top_k": 2}):
            with pytest.raises(FloatingPointError, match="not finite"):
                pick_token(torch.tensor([[0.0, bad, 1.0]]), **options)


def test_sampling_leaves_the_global_generator_alone(model, idx):
    """Samples that change the training that follows them, or cannot be repeated."""
    state = torch.random.get_rng_state()
    first, second = (model.generate(idx, 5, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, second) and torch.equal(torch.random.get_rng_state(), state)
    assert model.generate(idx, 0).equal(idx)


# --- the head --------------------------------------------------------------------------------------------------------


def head_model(dtype=torch.float32):
    return GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64), seed=1).to(dtype)


def sliced_loss(model, idx, targets):
    """The loss as it is usually written: all logits, the padding cut off."""
    logits = F.linear(model.hidden(idx), model.transformer.wte.weight)[..., : model.config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "autocast", "tolerance"), [
    (torch.float32, None, 1e-5), (torch.float32, torch.bfloat16, 0.02), (torch.float32, torch.float16, 3e-3),
    (torch.bfloat16, None, 0.02),
])
def test_the_head_equals_the_sliced_one(dtype, autocast, tolerance):
    """Padding that takes part in the softmax, a shift that changes the gradient, a bias that raises in some dtype."""
    model = head_model(dtype)
    idx, targets = torch.randint(0, 50257, (2, 2, 32), generator=torch.Generator().manual_seed(0))
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context:
        ours, gradients = loss_and_gradients(model, model(idx, targets)[1])
        due, due_gradients = loss_and_gradients(model, sliced_loss(model, idx, targets))
    assert ours == pytest.approx(due, abs=tolerance / 10)
    for name, gradient in gradients.items():
        assert (gradient - due_gradients[name]).norm() <= tolerance * due_gradients[name].norm() + 1e-8, name
    assert not gradients["transformer.wte.weight"][model.config.vocab_size :].any(), "the padding is not trained"


def test_the_compiled_graph_neither_slices_nor_pads_logits():
    """9 ms of 142 a micro-batch on an H100: rows of 50,257 are not aligned, and their gradient is padded again."""
    model, graphs = head_model(), []

    def keep(graph_module, example_inputs):
        graphs.append(graph_module)
        return make_boxed_func(graph_module.forward)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), dynamic=False)
    idx = torch.zeros((2, 32), dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(idx, idx)[1].backward()
    assert len(graphs) == 2, "one graph forward, one backward: nothing breaks it"
    rows = [(str(node.target), tuple(node.meta["val"].shape)) for graph in graphs for node in graph.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].numel() >= 64 * 50257]
    assert any(shape == (64, 50304) for _, shape in rows), "the logits are there"
    for target, shape in rows:
        is_weight = shape in ((50304, 64), (50257, 64)) and "sub" not in target
        assert "50257" not in str(shape) or is_weight, (target, shape)
        assert not ("slice" in target or "pad" in target) or is_weight, (target, shape)


def test_logits_far_from_zero():
    """OpenAI's weights put logits near -100, where bf16 moves in steps of 0.5: loss and samples must not notice."""
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64), seed=3)
    with torch.no_grad():
        # a constant in the last norm's bias, and the same one in every row of the head, moves all logits alike
        model.transformer.wte.weight[: model.config.vocab_size] += 0.5
        model.transformer.ln_f.bias -= 100 / (0.5 * 64)
        model.transformer.ln_f.weight *= 3
    idx, targets = torch.randint(0, 50257, (2, 4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(idx)[0].mean() == pytest.approx(-100, abs=5), "public logits stay as they are"
        due = model(idx, targets)[1].item()
        due_tokens = model.logits(model.hidden(idx)).argmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(idx, targets)[1].item() == pytest.approx(due, abs=2e-3)
            hidden = model.hidden(idx)
            centered = model.logits(hidden, model.centered_head()).float()
            raw = model.logits(hidden).float()
    right, right_raw = ((logits.argmax(-1) == due_tokens).float().mean() for logits in (centered, raw))
    assert right > 0.85, "random weights have near ties"
    assert right_raw < 0.6, "the comparison must cover what goes wrong"
    kth = centered.topk(50).values[..., -1:]
    assert (centered >= kth).sum(-1).float().mean() < 52, "top_k=50 keeps 50"


def test_activations_as_large_as_openais_fit_fp16():
    """A residual stream of 3,000, as GPT-2's own, that overflows in fp16, or a norm that rounds it away."""
    model = head_model()
    with torch.no_grad():
        model.transformer.wpe.weight[:, 7] = 3000.0
    idx = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(0))
    due = model(idx, idx)[1].item()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            hidden = model.hidden(idx)
            assert hidden.dtype == torch.float32, "what the head gets is fp32 on every device"
            assert model(idx, idx)[1].item() == pytest.approx(due, abs=0.05)


def test_a_seed_gives_the_same_weights_on_any_number_of_threads(monkeypatch):
    """Catches weights that depend on which thread drew first, on no seed, or are drawn twice from the same numbers."""
    first = head_model().state_dict()
    assert not any(p.equal(q) for p, q in zip(GPT(SHAPE, seed=1).parameters(), GPT(SHAPE, seed=2).parameters())
                   if p.dim() == 2)
    monkeypatch.setattr("train_gpt2.ThreadPool", lambda *args: ThreadPoolExecutor(1))
    for name, tensor in head_model().state_dict().items():
        assert torch.equal(tensor, first[name]), name
    drawn = [t for name, t in first.items() if name.endswith("mlp.c_fc.weight")]
    assert not torch.equal(*drawn)
