"""What a training step takes on a GPU, computed: docs/faq.md's table; GPU tests measure against it."""

import torch

from train_gpt2 import GPT, MODELS, GPTConfig

BUDGETS = {"gpt2-large": 0.3, "gpt2-xl": 0.3}  # rows of the table with --memory_budget: models for small cards
CARDS_GB = (16, 24, 40, 80, 141)
RESERVE = 0.92  # share of a card that torch can fill: the rest goes to CUDA's context and fragmentation


def memory_bytes(config, budget=1.0):
    """(fixed bytes, bytes a token of a micro-batch) that a compiled bf16 step takes.

    A parameter: its weight, gradient and AdamW's two averages in fp32, and autocast's bf16 copy (18 bytes). A token
    and layer keep for the backward pass, in bytes a channel: the residual stream at both norms (4), both norms' outputs
    (4), q, k, v (6), attention's output (2), the MLP before GELU (8) and after it (8); GELU and norms may be computed
    again instead. A token also keeps its row of logits in bf16, over which the row's gradient is written.

    With a `budget` below 1 (--memory_budget) that share of the layers' bytes is kept, and the row's gradient gets
    memory of its own. Measured on an H100 in docs/MEASURED.md.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    logits = 2 * config.padded_vocab_size * (1 if budget == 1 else 2)
    return 18 * parameters, 32 * budget * config.n_layer * config.n_embd + logits


def rows_that_fit(seq_len=1024):
    """{model, with its --memory_budget if it has one: [rows of `seq_len` tokens that fit, by card]}; "-" for none."""
    table = {}
    for name, budget in [*((name, 1.0) for name in MODELS), *BUDGETS.items()]:
        n_layer, n_head, n_embd = MODELS[name][:3]
        fixed, token = memory_bytes(GPTConfig(seq_len, n_layer=n_layer, n_head=n_head, n_embd=n_embd), budget)
        fit = [int((RESERVE * card * 1e9 - fixed) // (token * seq_len)) for card in CARDS_GB]
        label = name if budget == 1 else f"{name} --memory_budget {budget:g}"
        table[label] = [str(B) if B > 0 else "-" for B in fit]
    return table
