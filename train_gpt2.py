"""Train GPT-2 from scratch: config, model, data, checkpoints, evaluation and the loop, in one file.

    python train_gpt2.py                                     one device; a small model where there is no data
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   one machine with eight GPUs
    srun python train_gpt2.py                                many machines, see docs/train.sbatch
    python train_gpt2.py --resume                            go on where the last run stopped
    python train_gpt2.py --help                              every knob

A run writes into --log_dir (log/): log.txt, metrics.jsonl, config.json, curves.png, model_*.pt (milestones),
rolling_*.pt (to resume from), best.pt (fine-tuning) and hf/ (the finished model for transformers).

Sections, each using only what stands above it:
    Config      every knob with its default, the presets (flags.py makes the command line)
    Runtime     device, dtype, and with ranks.py the ranks: the only place that asks where it runs
    Model       GPT-2
    Optimizer   AdamW, Muon, the learning rate
    Data        the order of the data, the loader (shards.py reads the files)
    Checkpoint  one file that resumes exactly
    Evaluation  validation loss, HellaSwag, samples
    Logging     log.txt, metrics.jsonl, console, tracker, the log folder
    Training    one step, the loop
    CLI         flags made from the config
"""

import argparse
import contextlib
import gc
import io
import json
import math
import shlex
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import hellaswag  # convert, curves and fineweb are imported where they are used: not every run needs them
from harness import machine, rundir, text, tokenizer
from harness.checkpoint import FORMAT_VERSION
from harness.checkpoint import naming as blamed
from harness.checkpoint import read as read_checkpoint
from harness.cli import Parser, UserError, add_flags, check_fields, exit_status, flag, with_underscores
from harness.files import atomic_file
from harness.runtime import Runtime, place
from harness.shards import Shards, find_shards, kind_of_data
from harness.tokenizer import VOCAB_SIZE

# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------

MODELS = {  # name: layers, heads, width, peak learning rate (Brown et al. 2020, table 2.1, for these sizes)
    "gpt2": (12, 12, 768, 6e-4),
    "gpt2-medium": (24, 16, 1024, 3e-4),
    "gpt2-large": (36, 20, 1280, 2.5e-4),
    "gpt2-xl": (48, 25, 1600, 2e-4),
}


@dataclass(frozen=True)
class TrainConfig:
    """What was asked for. The defaults are the `gpt2` run: 124M parameters, 10B tokens of FineWeb-Edu.

    A run on a small text takes the numbers of `PRESETS["tiny"]` below in their place. What is `fixed` makes
    the model or the order of the data: a resume may not change it.
    """

    preset: str = flag("auto", "auto: gpt2 where its shards are, else tiny", "run",
                       choices=("auto", "gpt2", "tiny", "finetune"))
    resume: str | None = flag(None, "go on from the newest checkpoint of --log_dir, or from a FILE or DIR; "
                                    "auto: start afresh when there is none", const="newest")
    init_from: str = flag("scratch", "scratch, or weights: gpt2 ... gpt2-xl, a folder, a file", fixed=True)
    eval_only: bool = flag(False, "validation loss and HellaSwag of the model, then stop; writes nothing")
    log_dir: str = flag("log", "folder for all that the run writes")
    seed: int = flag(1337, "of weights, data order, dropout and samples", least=0, most=2**63 - 1, fixed=True)
    deterministic: bool = flag(False, "same bits every time on CUDA too, slower (the CPU always is)")

    data: str = flag("edu_fineweb10B", "folder of shards, shard, .txt, .jsonl, .parquet", "data", fixed=True)
    val_data: str | None = flag(None, "for validation (default: val shards, or a held-out tenth)", fixed=True)
    shuffle: bool = flag(True, "read sequences in a seeded random order, new each epoch", fixed=True)
    allow_incomplete: bool = flag(False, "train on a folder whose manifest says that shards are missing")
    cache_dir: str = flag(".cache", "tokenized text, the HellaSwag file and compiled kernels are kept here")

    model: str = flag("gpt2", "size", "model", choices=tuple(MODELS), fixed=True)
    n_layer: int | None = flag(None, "layers (default: by --model)", least=1, most=1000, fixed=True)
    n_head: int | None = flag(None, "heads a layer (default: by --model)", least=1, most=1000, fixed=True)
    n_embd: int | None = flag(None, "width (default: by --model)", least=1, most=65536, fixed=True)
    dropout: float = flag(0.0, "probability; 0 to pretrain, 0.1 to fine-tune", least=0, most=0.99, fixed=True)
    seq_len: int = flag(1024, "tokens a row, context of a new model", least=1, most=2**20, fixed=True)

    total_batch_size: int = flag(524288, "tokens a step, all ranks together", "batch and length",
                                 least=1, most=2**40, fixed=True)
    micro_batch_size: int = flag(0, "rows a forward pass; 0: the largest that fits", least=0, most=2**20)
    max_steps: int = flag(19073, "updates; 19,073 are 10B tokens", least=1, most=10**9)
    epochs: float | None = flag(None, "passes over the data, in place of --max_steps", least=1e-6, most=1e6)

    optimizer: str = flag("adamw", "muon: Muon for the layers' matrices, AdamW for the rest", "optimizer",
                          choices=("adamw", "muon"), fixed=True)
    max_lr: float | None = flag(None, "peak learning rate (default: by --model)", least=0, most=100)
    min_lr: float | None = flag(None, "final learning rate (default: a tenth of --max_lr)", least=0, most=100)
    warmup_steps: int = flag(715, "linear warmup, updates; 375M tokens as in GPT-3", least=0, most=10**9)
    schedule: str = flag("cosine", "wsd: constant, then linear to min_lr", choices=("cosine", "wsd"))
    decay_fraction: float = flag(0.2, "last share of the updates in which wsd decays", least=0, most=1)
    weight_decay: float = flag(0.1, "on matrices and embeddings only", least=0, most=100, fixed=True)
    beta1: float = flag(0.9, "Adam's decay of the mean", least=0, most=0.999999, fixed=True)
    beta2: float = flag(0.95, "Adam's decay of the square", least=0, most=0.999999, fixed=True)
    adam_eps: float = flag(1e-8, "Adam's epsilon", least=1e-20, most=1, fixed=True)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: none", least=0, most=1e9, fixed=True)

    val_every: int = flag(250, "updates between validations; 0: never", "evaluation", least=0, most=10**9)
    val_tokens: int = flag(10485760, "tokens of the validation split to read", least=1, most=2**40)
    hellaswag_every: int = flag(250, "updates between HellaSwag evaluations; 0: never", least=0, most=10**9)
    hellaswag_limit: int | None = flag(None, "only the first so many questions", least=1, most=10**9)
    hellaswag_path: str | None = flag(None, "the benchmark's JSONL file (default: fetched into --cache_dir)")
    sample_every: int = flag(250, "updates between text samples; 0: never", least=0, most=10**9)
    sample_prompt: str = flag("Hello, I'm a language model,", "what samples continue")
    num_samples: int = flag(4, "samples each time", least=1, most=1000)
    sample_tokens: int = flag(32, "tokens a sample", least=1, most=10**5)

    checkpoint_every: int = flag(5000, "updates between milestones, which are kept; 0: only the last",
                                 "checkpoints", least=0, most=10**9)
    save_minutes: float = flag(10.0, "between rolling checkpoints to resume from; 0: none", least=0, most=1e6)
    keep_checkpoints: int = flag(2, "rolling checkpoints that stay", least=1, most=10**6)
    max_skipped: int = flag(10, "stop after so many skipped updates in a row", least=1, most=10**9)

    dist_timeout: float = flag(600.0, "seconds that a rank waits for others", "machine", least=1, most=1e6)
    device: str = flag("auto", "CUDA, then MPS, then the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "bfloat16 where it is fast", choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = flag(True, "torch.compile, where a compiler is found")

    tracker: str = flag("none", "where metrics go besides --log_dir", "tracking", choices=("none", "wandb"))
    wandb_project: str = flag("gpt2", "Weights & Biases project")

    def __post_init__(self):
        check_fields(self)
        n_layer, n_head, n_embd, lr = MODELS[self.model]
        max_lr = lr if self.max_lr is None else self.max_lr
        by_model = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "max_lr": max_lr}
        for name, value in {**by_model, "min_lr": max_lr / 10}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen for everybody else
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}: lower it")


PRESETS = {  # differences from the defaults above
    "tiny": {
        "data": "input.txt", "n_layer": 4, "n_head": 4, "n_embd": 256, "seq_len": 256,
        "total_batch_size": 2048, "max_steps": 180, "max_lr": 1.5e-3, "warmup_steps": 20,
        "val_every": 60, "val_tokens": 65536, "hellaswag_every": 0, "sample_every": 60,
        "sample_prompt": "Crake:\n", "num_samples": 1, "sample_tokens": 64, "checkpoint_every": 0,
    },
    "finetune": {
        "init_from": "gpt2", "dropout": 0.1, "total_batch_size": 16 * 1024, "max_steps": 5000, "max_lr": 1e-5,
        "warmup_steps": 100, "hellaswag_every": 0, "checkpoint_every": 1000,
    },
}


def preset_config(cls, name="auto", **overrides):
    """The config of a preset with `overrides` on top. `UserError` for unknown names and bad values."""
    if unknown := set(overrides) - {f.name for f in fields(cls)}:
        raise UserError(f"{min(unknown)} is no field of the config; see --help")
    if overrides.get("epochs") is not None and "max_steps" in overrides:
        raise UserError(f"--epochs {overrides['epochs']} and --max_steps {overrides['max_steps']} both set "
                        "the length: give one")
    changes = dict(PRESETS.get(name, {}))
    if "model" in overrides:  # a size asked for by name is meant whole
        changes = {k: v for k, v in changes.items() if k not in ("n_layer", "n_head", "n_embd", "max_lr")}
    return cls(**{**changes, **overrides, "preset": name})


TrainConfig.preset = classmethod(preset_config)  # from outside: the field of that name is each instance's own


def check_batch(cfg, world_size):
    """`UserError`, naming values that do, where the batch does not divide into ranks and micro-batches."""
    def nearest(unit):
        low = cfg.total_batch_size // unit * unit
        return f"{low:,} or {low + unit:,}" if low else f"{unit:,}"

    unit = cfg.seq_len * world_size
    if cfg.total_batch_size % unit:
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is no multiple of --seq_len {cfg.seq_len}"
                        f" x {world_size} ranks: take {nearest(unit)}")
    rows = cfg.total_batch_size // unit
    if cfg.micro_batch_size and rows % cfg.micro_batch_size:
        fit = sorted(divisors(rows), key=lambda d: abs(d - cfg.micro_batch_size))[:2]
        raise UserError(f"--micro_batch_size {cfg.micro_batch_size} does not divide the {rows} rows that a "
                        f"rank reads a step: take {' or '.join(map(str, sorted(fit)))}, or a "
                        f"--total_batch_size of {nearest(unit * cfg.micro_batch_size)}")


def divisors(n):
    """All divisors of `n`, in rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------
# GPT-2 as released (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, biases, a tied head.
# Shapes: B rows, T tokens a row, C = n_embd, nh heads of hs = C / nh, V = vocab_size.


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model. A shape that cannot be raises `UserError`."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}: it must be at least 0 and less than 1")
        if self.n_embd % self.n_head:
            fit = max(h for h in range(1, self.n_head + 1) if self.n_embd % h == 0)
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: take {fit}")

    @property
    def padded_vocab_size(self):
        """Rows of `wte`: the vocabulary rounded up to a multiple of 128, which matrix units like (50,304)."""
        return -(-self.vocab_size // 128) * 128


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache(k, v)  # (B, nh, T, hs) in, (B, nh, all so far, hs) out
        # without a mask a row sees itself and what is left of it; one new token over a cache sees everything
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) == k.size(2),
            dropout_p=self.dropout if self.training else 0.0,
        )  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `GPT(config)` is randomly initialised from `seed`, on the CPU and in fp32."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # the head too, transposed
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw every parameter anew: N(0, 0.02), biases 0, gains 1; the same on every device for one seed.

        Projections into the residual stream, of which there are two a layer, are scaled by 1/sqrt(2 n_layer),
        so that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta:  # a skeleton that waits for loaded tensors
                continue
            if name.endswith("bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            else:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                p.normal_(0.0, 0.02 * scale, generator=generator)
        if not self.transformer.wte.weight.is_meta:
            self.transformer.wte.weight[self.config.vocab_size :] = 0.0  # padding: in no softmax, untrained

    def num_parameters(self):
        """How many numbers the model has, without the padding of the vocabulary."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self, T):
        """FLOPs of a token's forward and backward pass in rows of `T`: 6 a weight that multiplies, and
        attention's two products (Chowdhery et al. 2022, appendix B)."""
        c, looked_up = self.config, self.transformer.wpe.weight.numel()
        return 6 * (self.num_parameters() - looked_up) + 12 * c.n_layer * c.n_embd * T

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Final hidden states (B, T, C), normed, of token ids `idx` (B, T) int64.

        `pos` (T,) or (B, T): positions, 0..T-1 unless given. `mask`, broadcastable to (B, nh, T, all keys)
        bool, True where a query may look; causal unless given. `cache`: one callable a layer, which takes a
        layer's new keys and values (B, nh, T, hs) and returns all there are.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, cache[layer] if cache is not None else None)
        return self.transformer.ln_f(x)

    def logits(self, hidden):
        """Scores (..., V) of the next token from hidden states (..., C): the tied head without padding."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """`(logits, None)` with logits (B, T, V), or with `targets` (B, T) `(None, loss)`.

        The loss is the mean cross-entropy in nats over the targets that are not -100, a scalar in fp32. The
        two never come together, so that compiled head and loss are one graph and the logits are not kept.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens a row exceed the context of {self.config.block_size}: crop them")
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue `idx` (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens) int64.

        Temperature 0 is greedy. `generator` (on the device of `idx`) makes the draw repeatable and leaves the
        global one alone. Beyond the context the model sees the last `block_size` tokens. `sample.py` does the
        same with a cache, faster.
        """
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx[:, -self.config.block_size :])
            token = pick_token(self.logits(hidden[:, -1]), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
        return idx

    @classmethod
    def from_tensors(cls, config, tensors):
        """A model of `config` (`GPTConfig` or its dict) around `tensors`, its state dict, not copied.

        `UserError`, which names the tensor, where they do not fit.
        """
        import convert

        with torch.device("meta"):
            model = cls(config if isinstance(config, GPTConfig) else GPTConfig(**config))
        convert.check_shapes(tensors, model.state_dict())
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return model.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """OpenAI's weights by name (`gpt2`, ... `gpt2-xl`), a Hugging Face folder, or a checkpoint."""
        import convert

        config, tensors = convert.load(name_or_folder)
        with blamed(name_or_folder):
            return cls.from_tensors({**config, "dropout": dropout}, tensors)

    from_checkpoint = from_pretrained  # a file, or a log folder's newest: `convert.load` tells them apart

    def save_pretrained(self, folder):
        """Write a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` open."""
        import convert

        convert.save(asdict(self.config), self.state_dict(), folder)


def pick_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token id a row, (B, 1) int64, from next-token `logits` (B, V); temperature 0: the largest.

    `top_k` keeps the k likeliest tokens; `top_p` the fewest likeliest whose probabilities reach p (nucleus
    sampling, Holtzman et al. 2020), at least one.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        values, order = logits.sort(dim=-1, descending=True)
        probs = values.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what lies before this token already reaches p
        beyond[:, 0] = False
        logits = logits.scatter(-1, order, values.masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


# ------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ------------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of the update step -> step + 1.

    Linear warmup to `max_lr`; then `cosine` (Loshchilov & Hutter 2017) reaches `min_lr` at `max_steps`, and
    `wsd` (Hu et al. 2024) stays at `max_lr` until the last `decay_fraction` of the run, and falls linearly.
    """
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    start = cfg.warmup_steps
    if cfg.schedule == "wsd":
        start = max(start, round(cfg.max_steps * (1 - cfg.decay_fraction)))
    done = min(1.0, max(0, step - start) / max(1, cfg.max_steps - start))  # share of the decay
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + left * (cfg.max_lr - cfg.min_lr)


# what each optimizer keeps of a parameter
OPTIMIZER_SLOTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def make_optimizers(model, cfg, device):
    """{"adamw": ...}, with --optimizer muon {"adamw": ..., "muon": ...}: each parameter in one group exactly.

    Weight decay acts on matrices and embeddings; gains and biases, of one dimension, have none.
    """
    named = dict(model.named_parameters())
    matrices = {n for n, p in named.items() if cfg.optimizer == "muon" and p.dim() == 2 and ".h." in n}
    decay = {n for n, p in named.items() if p.dim() >= 2} - matrices
    rest = set(named) - matrices - decay
    assert len(matrices) + len(decay) + len(rest) == len(named)
    groups = [
        {"params": [named[n] for n in named if n in decay], "weight_decay": cfg.weight_decay},
        {"params": [named[n] for n in named if n in rest], "weight_decay": 0.0},
    ]
    optimizers = {"adamw": torch.optim.AdamW(
        groups, lr=cfg.max_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
        fused=device.type in ("cuda", "cpu", "mps"))}
    if matrices:
        optimizers["muon"] = make_muon([named[n] for n in named if n in matrices], cfg)
    return optimizers


def make_muon(matrices, cfg):
    """Muon (Jordan et al. 2024) at AdamW's learning rate; `c_attn` holds q, k and v, three matrices to it.

    Each part is a leaf that views its matrix's storage; `alias_gradients` gives it its part of the gradient.
    `match_rms_adamw` scales updates to AdamW's size (Liu et al. 2025), so that one learning rate serves both.
    """
    parts = []
    for matrix in matrices:
        n = 3 if matrix.size(0) == 3 * matrix.size(1) else 1
        for i, rows in enumerate(matrix.detach().chunk(n)):
            part = nn.Parameter(rows)
            part.source = (matrix, i, n)
            parts.append(part)
    return torch.optim.Muon(parts, lr=cfg.max_lr, weight_decay=cfg.weight_decay,
                            adjust_lr_fn="match_rms_adamw")


def alias_gradients(optimizers):
    """Point the gradients of Muon's parts into those of the matrices that they view."""
    for part in optimizers["muon"].param_groups[0]["params"] if "muon" in optimizers else ():
        matrix, i, n = part.source
        part.grad = matrix.grad.chunk(n)[i]


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------

def mix(*numbers):
    """A 63-bit seed from whole numbers: nearby ones give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def order(seed, epoch, index, n):
    """Where position `index` (an array) of an epoch over `n` sequences reads: a seeded bijection on 0..n-1.

    A Feistel network on the smallest even number of bits that holds n, with cycle walking: values that fall
    outside go through again (Black & Rogaway 2002). It needs no memory, whatever n is.
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low = np.uint64(2 ** int(half) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)

    def permute(x):
        left, right = x >> half, x & low
        for key in keys:
            h = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((h >> np.uint64(32)) & low)
        return left << half | right

    x = permute(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)


class DataLoaderLite:
    """This rank's micro-batches, from a global position on.

    `position` counts the sequences that all ranks together have taken since step 0. A call takes W B of them,
    of which rank r gets [position + r B, position + (r + 1) B): so a step reads the same set of sequences for
    every number of ranks and micro-batch size, and one integer resumes. `ahead` micro-batches are read ahead.
    """

    READ_ROWS, THREADS = 16, 16  # rows that a task reads; tasks at a time, so that slow storage overlaps

    def __init__(self, data, B, T, *, split="train", rank=0, world_size=1, seed=1337, shuffle=True,
                 position=0, ahead=1, device="cpu"):
        self.shards = data if isinstance(data, Shards) else Shards(find_shards(data, split), T)
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.shuffle, self.position = seed, shuffle, position
        self.device = torch.device(device)
        self._next = position  # the position up to which reads are issued
        self._ahead, self._queue = max(1, ahead), deque()
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="loader")

    def sequence_ids(self, position, count):
        """Sequences, as `Shards` numbers them, that positions [position, position + count) read."""
        positions, n = np.arange(position, position + count), len(self.shards)
        if not self.shuffle:
            return positions % n
        ids = np.empty(count, np.int64)
        for epoch in range(position // n, (position + count - 1) // n + 1):
            inside = positions // n == epoch
            ids[inside] = order(self.seed, epoch, positions[inside] % n, n)
        return ids

    def _issue(self):
        ids = self.sequence_ids(self._next + self.rank * self.B, self.B)
        self._next += self.world_size * self.B
        parts = [ids[i : i + self.READ_ROWS] for i in range(0, self.B, self.READ_ROWS)]
        self._queue.append([self._pool.submit(self.shards.read, part) for part in parts])

    def next_batch(self):
        """Inputs and targets, (B, T) int64 each, on the loader's device; targets are one token further."""
        while len(self._queue) <= self._ahead:  # the next one and `ahead` more
            self._issue()
        rows = np.concatenate([part.result() for part in self._queue.popleft()])
        self.position += self.world_size * self.B
        batch = torch.from_numpy(rows.astype(np.int64))
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        else:
            batch = batch.to(self.device)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def close(self):
        self._pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------
# Checkpoint
# ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """What a run changes as it goes. `raw_model` is never compiled or wrapped."""

    raw_model: GPT
    optimizers: dict
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite | None = None
    step: int = 0  # completed updates
    position: int = 0  # sequences read when the loader is opened; from then on it is the loader's
    micro_batch_size: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None  # of the model as it is now, if it was measured
    best_val_loss: float | None = None
    tracker_id: str | None = None
    data: dict = field(default_factory=dict)  # fingerprints of the splits
    saved_at: float = 0.0  # time.monotonic() of the last checkpoint
    unsaved_seconds: float = 0.0  # since then, the same on all ranks, as they decide by it


def save_checkpoint(path, state, cfg, world_size):
    """Write all that an exact resume needs to `path`, whole or not at all, as tensors and plain types."""

    checkpoint = {
        "format_version": FORMAT_VERSION,
        "model": state.raw_model.state_dict(),
        "config": asdict(state.raw_model.config),
        "step": state.step,
        "val_loss": state.val_loss,
        "best_val_loss": state.best_val_loss,
        "optimizer": {name: optimizer.state_dict() for name, optimizer in state.optimizers.items()},
        "scaler": state.scaler.state_dict(),
        "train_config": asdict(cfg),
        "position": state.loader.position,
        "micro_batch_size": state.micro_batch_size,
        "world_size": world_size,
        "skipped_in_a_row": state.skipped_in_a_row,
        "tracker_id": state.tracker_id,
        "data": state.data,
    }
    with atomic_file(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            raise error.__context__ or error from None  # the full disk's OSError, which torch's close() hides


def load_state(checkpoint, state):
    """Put a checkpoint, read by `read_checkpoint`, into a state whose model it fits.

    Of the optimizers it gives the tensors; settings are the config's. Fused kernels do not check shapes.
    """
    for name, optimizer in state.optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"][name]["state"]})
        for p in (p for group in optimizer.param_groups for p in group["params"] if optimizer.state):
            shapes = {slot: tuple(tensor.shape) for slot, tensor in optimizer.state[p].items()}
            if shapes != {slot: () if slot == "step" else tuple(p.shape) for slot in OPTIMIZER_SLOTS[name]}:
                raise ValueError(f"{name} has {shapes} for a parameter of shape {tuple(p.shape)}")
    if checkpoint["scaler"]:  # none was saved where the dtype was another
        state.scaler.load_state_dict(checkpoint["scaler"])
    for name in ("step", "position", "val_loss", "best_val_loss", "skipped_in_a_row", "tracker_id"):
        setattr(state, name, checkpoint[name])


def resume_config(cfg, given, checkpoint, path, world_size):
    """The checkpoint's config with the flags `given` beside --resume, which may not change data or model."""

    other_run = Path(cfg.log_dir, "log.txt")
    if other_run.exists() and other_run.parent.resolve() != path.parent.resolve():
        raise UserError(f"--log_dir {cfg.log_dir} holds another run than {path}: give a new folder or none")
    saved = checkpoint["train_config"]
    saved = {f.name: saved.get(f.name, f.default) for f in fields(TrainConfig)}  # older ones may lack some
    with blamed(path):
        TrainConfig(**saved)  # whatever is wrong with these is not the flags'
    for f in fields(TrainConfig):
        if f.name in given and f.metadata["fixed"] and given[f.name] != saved[f.name] and \
                f.name not in ("data", "val_data"):  # these may have moved: their contents are compared
            raise UserError(f"--{f.name} {given[f.name]} contradicts {path}, which has {saved[f.name]}: "
                            "leave it out, or start a new run")
    if "max_lr" in given and "min_lr" not in given:
        saved["min_lr"] = None  # a tenth of the new one
    if "max_steps" in given:
        saved["epochs"] = None
    now = {name: getattr(cfg, name) for name in ("log_dir", "resume", "eval_only")}
    cfg = TrainConfig(**{**saved, **given, **now, "preset": saved["preset"]})
    if given.get("max_steps", checkpoint["step"]) < checkpoint["step"] and not cfg.eval_only:
        raise UserError(f"--max_steps {cfg.max_steps}: {path} has {checkpoint['step']} updates already: give "
                        "more, or --resume an older checkpoint")
    if "micro_batch_size" in given:
        return cfg
    B, rows = cfg.micro_batch_size, cfg.total_batch_size // cfg.seq_len // world_size
    if world_size == checkpoint["world_size"]:  # found or given: the same bits need the same
        return replace(cfg, micro_batch_size=checkpoint["micro_batch_size"])
    return replace(cfg, micro_batch_size=B and math.gcd(B, rows))  # one that divides


# ------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(view, model, shards, rows, B, rt):
    """Mean loss in nats a token over the first `rows` sequences of `shards`; None when a signal asks to stop.

    The same tokens for every number of ranks and batch size: rows beyond the last are masked, not dropped, so
    that a compiled view keeps its one shape.
    """
    model.eval()
    loader = DataLoaderLite(shards, B, shards.T, rank=rt.rank, world_size=rt.world_size, shuffle=False,
                            ahead=4, device=rt.device)
    total = 0.0
    try:
        for start in range(0, rows, rt.world_size * B):
            if rt.stopping():
                return None
            x, y = loader.next_batch()
            inside = max(0, min(B, rows - start - rt.rank * B))
            y[inside:] = -100
            if inside:
                with rt.autocast():
                    # as a number: a small tensor that is kept splits the memory that a large one freed
                    total += view(x, y)[1].item() * inside
        return rt.sum([total])[0] / rows
    finally:
        loader.close()
        model.train()


def score_hellaswag(model, benchmark, rt):
    """HellaSwag counts over all ranks (see `hellaswag.evaluate`); None when a signal asks to stop."""
    counts = hellaswag.evaluate(model, benchmark, device=rt.device, autocast=rt.autocast, rank=rt.rank,
                                world_size=rt.world_size, stop=rt.stopping)
    return counts and dict(zip(counts, rt.sum(list(counts.values()))))


def write_samples(model, cfg, step, rt):
    """`num_samples` texts that continue the prompt, each with its own generator; None when asked to stop."""
    encoding = tokenizer.gpt2()
    prompt = encoding.encode(cfg.sample_prompt, allowed_special="all") or [tokenizer.END_OF_TEXT]
    model.eval()
    texts = {}
    for first in range(0, cfg.num_samples, rt.world_size):
        if rt.stopping():
            model.train()
            return None
        i = first + rt.rank
        if i < cfg.num_samples:
            generator = torch.Generator(rt.device).manual_seed(mix(cfg.seed, step, i))
            with rt.autocast():
                ids = model.generate(torch.tensor([prompt], device=rt.device), cfg.sample_tokens, top_k=50,
                                     generator=generator)
            texts[i] = encoding.decode(ids[0].tolist())
    model.train()
    texts = {i: text for part in rt.gather(texts) for i, text in part.items()}
    return [texts[i] for i in sorted(texts)]


# ------------------------------------------------------------------------------------------------------------
# Logging
# ------------------------------------------------------------------------------------------------------------

class RunLog:
    """log.txt, metrics.jsonl, the console and the tracker of rank 0; on other ranks the verbs do nothing."""

    def __init__(self, cfg, rt, state):
        self.cfg, self.rt, self.active = cfg, rt, False
        self.history = {"train": ([], []), "val": ([], []), "hella": ([], [])}
        self.tracker, self.bar, self.shown, self.drawn = rundir.NoTracker(), None, {}, time.monotonic()
        self.tracker_id, self.first_step = state.tracker_id, state.step
        self.parameters = state.raw_model.num_parameters()
        self.flops_per_token = state.raw_model.flops_per_token(cfg.seq_len)

    def track(self):
        """Start the tracker, on rank 0; `UserError` where it cannot."""
        if self.cfg.tracker == "wandb":
            self.tracker = rundir.WandbTracker(
                self.cfg.wandb_project, self.cfg.log_dir, asdict(self.cfg), self.tracker_id)

    def open(self, rows):
        """Open both logs, of which log.txt has `rows` already. Before, only the console is written."""
        for step, kind, value in rows:
            self._remember(step, kind, value)
        self.active = self.rt.rank == 0
        if not self.active:
            return
        folder = Path(self.cfg.log_dir)
        self.text, self.metrics = rundir.Lines(folder / "log.txt"), rundir.Lines(folder / "metrics.jsonl")
        record = {"config": asdict(self.cfg), "parameters": self.parameters, "world_size": self.rt.world_size,
                  "device": self.rt.notes, "git_commit": machine.git_commit(), "versions": machine.versions()}
        with rundir.full_disk("config.json is not written"), atomic_file(folder / "config.json", "w") as file:
            json.dump(record, file, indent=1)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.cfg.max_steps, initial=self.first_step, unit="step", smoothing=0,
                            dynamic_ncols=True)

    def _remember(self, step, kind, value):
        if kind in self.history:
            self.history[kind][0].append(step)
            self.history[kind][1].append(value)

    def row(self, step, kind, value=None, text=None, **values):
        """One row: to metrics.jsonl, and where `text` is given `step kind text` to log.txt."""
        self._remember(step, kind, value)
        if self.active:
            for name, number in values.items():
                if isinstance(number, float) and not math.isfinite(number):
                    values[name] = None  # JSON has no nan
            self.metrics.add(json.dumps({"step": step, "kind": kind, **values}))
            if text is not None:
                self.text.add(f"{step} {kind} {text}")

    def show(self, **values):
        """Update the progress bar's figures."""
        if self.bar is not None:
            self.shown |= values
            self.bar.set_postfix(self.shown, refresh=False)

    def train(self, step, stats):
        """The row of update step -> step + 1, from what `train_step` returns."""
        loss, lr, norm, seconds = (stats[k] for k in ("loss", "lr", "grad_norm", "seconds"))
        rate, peak = self.cfg.total_batch_size / seconds, machine.peak_flops(self.rt.device)
        mfu = rate * self.flops_per_token / (peak * self.rt.world_size) if peak else None
        allocated, reserved = machine.peak_memory_gb(self.rt.device)
        self.row(step, "train", loss, f"{loss:.6f}", **stats, tokens_per_sec=rate, mfu=mfu,
                 memory_allocated_gb=allocated, memory_reserved_gb=reserved)
        self.tracker.log(step, **{"train/loss": loss, "train/lr": lr, "train/grad_norm": norm,
                                  "train/tokens_per_sec": rate})
        if self.bar is not None:
            share = f"{mfu:.0%}" if mfu else "-"
            self.show(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{rate:,.0f}", mfu=share)
            self.bar.update()
        else:
            self.rt.print(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                          f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.0f}")
        if stats["skipped"]:
            self.rt.print(f"step {step:5d} | WARNING: loss or gradient is not finite: update skipped")

    def val(self, step, loss, tokens, seconds):
        self.row(step, "val", loss, f"{loss:.4f}", loss=loss, tokens=tokens, seconds=seconds)
        self.tracker.log(step, **{"val/loss": loss})
        self.show(val=f"{loss:.4f}")
        self.rt.print(f"step {step:5d} | validation loss: {loss:.4f}")

    def hella(self, step, counts, seconds):
        shares = {k: counts[k] / counts["rows"] for k in ("acc", "acc_norm", "acc_norm_char")}
        score = shares["acc_norm"]
        self.row(step, "hella", score, f"{score:.4f}", **shares, rows=counts["rows"], seconds=seconds)
        self.tracker.log(step, **{"val/hellaswag": score})
        self.rt.print(f"step {step:5d} | hellaswag accuracy: {score:.4f} ({seconds:.1f}s)")

    def sync(self):
        """Have both logs on the disk; OSError where it is full."""
        self.metrics.sync()
        self.text.sync()

    def samples(self, step, texts, seconds):
        self.row(step, "sample", texts=texts, seconds=seconds)
        self.tracker.log(step, samples=texts)
        for i, sample in enumerate(texts):
            self.rt.print(f"step {step:5d} | sample {i}: {sample}")

    def curves(self, step, last=False):
        """Redraw curves.png after the evaluations of `step`, at most every 30 s, and at the `last` one."""
        evaluated = self.history["val"][0][-1:] == [step] or self.history["hella"][0][-1:] == [step]
        if self.active and (last or (step and evaluated and time.monotonic() - self.drawn > 30)):
            try:
                import curves

                curves.plot([self.cfg.log_dir], Path(self.cfg.log_dir) / "curves.png")
            except Exception as error:  # whatever it is: no picture is worth a run
                self.rt.print(f"WARNING: curves.png is not drawn ({type(error).__name__}: {error})")
            gc.collect()  # a figure is a knot of references that would lie about, 10 MB each
            self.drawn = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        self.tracker.finish()
        if self.active:
            self.text.file.close()
            self.metrics.file.close()


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out before the run starts; every rank gets the same."""

    cfg: TrainConfig
    checkpoint: Path | None  # to resume from
    train_parts: list  # see `find_shards`
    val_parts: list | None
    data: dict  # fingerprints of both
    benchmark: Path | None  # HellaSwag's file
    notes: list  # lines for the console


def make_plan(cfg, given, world_size):
    """Find the resume point, the preset and the data, and check that they fit; writes only the cache."""
    path, checkpoint = rundir.find_checkpoint(cfg.resume, cfg.log_dir) if cfg.resume else (None, None)
    if checkpoint:
        cfg, notes = resume_config(cfg, given, checkpoint, path, world_size), [f"going on from {path}"]
    else:
        cfg, notes = resolve_preset(cfg, given, world_size)
    bundled = PRESETS["tiny"]["data"]
    if cfg.data == bundled and "data" not in given and not Path(bundled).exists():  # called from elsewhere
        cfg = replace(cfg, data=str(Path(__file__).with_name(bundled)))
    train_parts, val_parts = text.find_splits(cfg.data, cfg.val_data, cfg.cache_dir, cfg.allow_incomplete,
                                                 val=cfg.val_every > 0 or cfg.eval_only)
    marks = fingerprints(train_parts, val_parts, cfg.seq_len)
    tokens = len(Shards(train_parts, cfg.seq_len)) * cfg.seq_len
    for split in marks if checkpoint else ():
        before = checkpoint["data"].get(split)
        name = "val_data" if split == "val" and cfg.val_data else "data"
        if before != marks[split] and (split == "train" or (before and marks[split])):
            raise UserError(f"--{name} {getattr(cfg, name)} does not hold what {path} has for {split}, "
                            f"{checkpoint['train_config'][name]}: give that, or start a new run")
    if cfg.epochs is not None:
        cfg = replace(cfg, max_steps=max(1, round(cfg.epochs * tokens / cfg.total_batch_size)))
    check_batch(cfg, world_size)
    if not cfg.eval_only:
        notes += describe_length(cfg, len(train_parts), tokens)
    benchmark = None
    if cfg.hellaswag_every or (cfg.eval_only and "hellaswag_every" not in given):
        try:
            benchmark = Path(cfg.hellaswag_path) if cfg.hellaswag_path else hellaswag.fetch(cfg.cache_dir)
        except UserError as error:
            notes.append(f"WARNING: no HellaSwag in this run: {error}")
    return Plan(cfg, path, train_parts, val_parts, marks, benchmark, notes)


def describe_length(cfg, shards, tokens):
    """Lines that say how long the run is, and warn of a length that can hardly be meant."""
    epochs = cfg.max_steps * cfg.total_batch_size / tokens
    notes = [f"{shards} train shards, {tokens:,} tokens; {cfg.max_steps:,} steps of "
             f"{cfg.total_batch_size:,} = {epochs:.2f} epochs"]
    if epochs > 50:
        notes.append(f"WARNING: all of it is read {epochs:,.0f} times and learnt by heart: --epochs sets the "
                     "length by the data, --preset tiny takes a model for small texts")
    if cfg.warmup_steps >= cfg.max_steps:
        notes.append(f"WARNING: --warmup_steps {cfg.warmup_steps} of --max_steps {cfg.max_steps}: the rate "
                     f"only rises, to {lr_at(cfg.max_steps - 1, cfg):.2g} of --max_lr {cfg.max_lr:.2g}")
    return notes


def fingerprints(train_parts, val_parts, T):
    """{"train": ..., "val": ... or None}: what `Shards.fingerprint` makes of each split."""
    splits = {"train": train_parts, "val": val_parts}
    return {name: parts and Shards(parts, T).fingerprint() for name, parts in splits.items()}


def resolve_preset(cfg, given, world_size):
    """(config of the preset that `auto` means for the data at hand, lines that say so)."""
    if cfg.preset != "auto":
        return cfg, [f"preset {cfg.preset}" + f", weights of {cfg.init_from}" * (cfg.init_from != "scratch")]
    overrides, folder = {name: value for name, value in given.items() if name != "preset"}, Path(cfg.data)
    if "data" in given:
        name = "gpt2" if kind_of_data(folder) == "shards" else "tiny"
        return TrainConfig.preset(name, **overrides), [f"preset {name}, by --data {folder}"]
    manifest = text.read_manifest(folder) if folder.is_dir() else None
    enough = manifest is None or manifest["complete"] or cfg.allow_incomplete
    if enough and folder.is_dir() and any(folder.glob("*_train_*")):
        return TrainConfig.preset("gpt2", **overrides), [f"preset gpt2: {folder}/ is there"]
    there = text.shards_there(manifest) if manifest else "it is not there"
    notes = [f"preset tiny on input.txt, for want of {folder}/ ({there})",
             "the real run: python fineweb.py --pretokenized && python train_gpt2.py"]
    if world_size > 1:
        notes = ["=" * 110, f"WARNING: {world_size} ranks will train a TOY: " + notes[0], notes[1], "=" * 110]
    return TrainConfig.preset("tiny", **overrides), notes


def check_data(plan, cfg, rt):
    """Raise `UserError` where this rank's machine does not have the data that rank 0 planned with."""
    try:
        same = fingerprints(plan.train_parts, plan.val_parts, cfg.seq_len) == plan.data
    except OSError:
        same = False
    if not same:
        raise UserError(f"--data {cfg.data}: rank {rt.rank} does not find rank 0's files there: every "
                        "machine needs the same, on a disk that all share or copied to the same path")


@machine.memory_told("the model, its gradients and its optimizer")
def build(plan, rt):
    """(cfg, state): the model, new, loaded or resumed, and its optimizers; cfg takes a loaded one's shape."""

    cfg, checkpoint = plan.cfg, read_checkpoint(plan.checkpoint) if plan.checkpoint else None
    if checkpoint:
        with blamed(plan.checkpoint):
            model = GPT.from_tensors({**checkpoint["config"], "dropout": cfg.dropout}, checkpoint["model"])
    elif cfg.init_from == "scratch":
        shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "dropout")}
        model = GPT(GPTConfig(block_size=cfg.seq_len, **shape), cfg.seed)
    else:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout)
        if cfg.seq_len > model.config.block_size:
            raise UserError(f"--seq_len {cfg.seq_len} is beyond the context of {cfg.init_from}, "
                            f"{model.config.block_size}: lower it")
        cfg = replace(cfg, **{name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd")})
    model.to(rt.device).train()
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    state = TrainState(model, make_optimizers(model, cfg, rt.device), scaler, data=plan.data)
    if checkpoint:
        with blamed(plan.checkpoint):
            load_state(checkpoint, state)
    return cfg, state


def fit_micro_batch(model, view, cfg, rt):
    """Rows a forward pass: as asked for, or the largest that fits one real step. Compiles the view too.

    On CUDA sizes are tried from 65,536 tokens down by halves (nothing is gained beyond), all ranks alike; the
    CPU and MPS take 4,096 tokens, as their caches hold no more.
    """
    most = (65536 if rt.device.type == "cuda" else 4096) // cfg.seq_len
    sizes = [b for b in divisors(cfg.total_batch_size // cfg.seq_len // rt.world_size) if b <= most] or [1]
    B = cfg.micro_batch_size or sizes[-1]
    while rt.sum([float(not fits(model, view, B, cfg, rt))])[0]:
        smaller = [b for b in sizes if b <= B // 2]
        if cfg.micro_batch_size or not smaller:
            rt.refuse(f"out of memory at --micro_batch_size {B}, a forward and backward pass of {B} x "
                      f"{cfg.seq_len} tokens: lower it, or --seq_len, or the model's size")
        B = smaller[-1]
    return B


def fits(model, view, B, cfg, rt):
    """Whether `B` rows can be trained and validated, which compiles the view; leaves the model as it was."""
    if rt.device.type != "cuda" and not rt.compile:
        return True  # nothing to find out or to compile
    try:
        x, y = (torch.zeros((B, cfg.seq_len), dtype=torch.int64, device=rt.device) for _ in "xy")
        spare = torch.empty(2 * sum(p.numel() for p in model.parameters()), device=rt.device)  # Adam's to be
        for _ in range(2 if rt.device.type == "cuda" else 1):  # the second pass has the first one's gradients
            with rt.autocast():
                _, loss = view(x, y)
            loss.backward()
        del spare
        if cfg.val_every or cfg.eval_only:
            model.eval()
            with torch.no_grad(), rt.autocast():
                view(x, y)
        return True
    except torch.OutOfMemoryError:
        if rt.compile:
            torch._dynamo.reset()  # it compiles 8 shapes at most: those that do not fit are not to count
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
        if rt.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def open_tests(plan, cfg, rt):
    """(val shards, rows of them to read, benchmark): what the model is judged by, None where it is not."""
    shards, rows, benchmark = None, 0, None
    if plan.val_parts:
        shards = Shards(plan.val_parts, cfg.seq_len)
        rows = min(len(shards), max(1, cfg.val_tokens // cfg.seq_len))
        rt.print(f"validation on {rows * cfg.seq_len:,} tokens" + ", all there are" * (rows == len(shards)))
    if plan.benchmark:
        benchmark = hellaswag.load(plan.benchmark, block_size=cfg.seq_len, device=rt.device,
                                   limit=cfg.hellaswag_limit)
        rt.print(str(benchmark))
    return shards, rows, benchmark


def train_step(state, view, cfg, rt):
    """One update over `total_batch_size` tokens. Returns its row's figures and the signal to stop on, or 0.

    The loss is the mean over the step's tokens on all ranks. An update whose loss or gradient is not finite
    is skipped, on all ranks alike; it counts as a step and its data as read.
    """
    started, waited, total = time.perf_counter(), 0.0, torch.zeros((), device=rt.device)
    lr, first = lr_at(state.step, cfg), state.loader.position
    micro_steps = cfg.total_batch_size // (cfg.seq_len * rt.world_size * state.micro_batch_size)
    for m in range(micro_steps):
        before = time.perf_counter()
        x, y = state.loader.next_batch()
        waited += time.perf_counter() - before
        if cfg.dropout:
            torch.manual_seed(mix(cfg.seed, state.step, m * rt.world_size + rt.rank))
        # gradients meet in the last micro-step only; DDP decides that in the forward pass
        alone = rt.world_size > 1 and m < micro_steps - 1
        with view.no_sync() if alone else contextlib.nullcontext():
            with rt.autocast():
                _, loss = view(x, y)
            loss = loss / micro_steps
            state.scaler.scale(loss).backward()
        total += loss.detach()
    alias_gradients(state.optimizers)
    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.raw_model.parameters(), cfg.grad_clip or math.inf)
    unsaved = time.monotonic() - state.saved_at
    loss, norm, state.unsaved_seconds, *seen = rt.mean(
        [float(total), float(norm), unsaved, *rt.signals_seen()])
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            state.scaler.step(optimizer)
        optimizer.zero_grad()  # Muon's parts hold on to the model's gradients too
    state.scaler.update()
    state.raw_model.zero_grad()
    rt.synchronize()
    state.step, state.val_loss = state.step + 1, None
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    stats = {"loss": loss, "lr": lr, "grad_norm": norm, "seconds": time.perf_counter() - started,
             "data_seconds": waited, "skipped": skipped}
    if skipped:
        stats["sequence_ids"] = state.loader.sequence_ids(first, state.loader.position - first).tolist()
    return stats, rt.stopping(seen)


def evaluate(state, view, tests, cfg, rt, log, done=()):
    """Make the evaluations that are due at this step and not in `done`; returns the signal to stop on, or 0.

    Step 0 is only validated. The view is validated at its one shape; everything else uses the raw model.
    """
    model, step, (shards, rows, benchmark) = state.raw_model, state.step, tests
    last = step >= cfg.max_steps

    def due(kind, every):
        at_this_step = last or (step % every == 0 and (step or kind == "val")) if every else False
        return at_this_step and kind not in done

    def timed(work, *args):
        started = time.perf_counter()
        result = work(*args)
        rt.synchronize()
        return result, time.perf_counter() - started

    if shards and due("val", cfg.val_every):
        loss, seconds = timed(validate, view, model, shards, rows, state.micro_batch_size, rt)
        if loss is None:
            return rt.stopping()
        state.val_loss = loss
        if loss < (math.inf if state.best_val_loss is None else state.best_val_loss):  # never for nan
            state.best_val_loss = loss
            if cfg.init_from != "scratch" and step:
                # before the row: after a kill in between it is validated again
                save("best.pt", state, cfg, rt, log)
        log.val(step, loss, rows * cfg.seq_len, seconds)
    if benchmark and due("hella", cfg.hellaswag_every):
        counts, seconds = timed(score_hellaswag, model, benchmark, rt)
        if counts is None:
            return rt.stopping()
        log.hella(step, counts, seconds)
    if due("sample", cfg.sample_every):
        texts, seconds = timed(write_samples, model, cfg, step, rt)
        if texts is None:
            return rt.stopping()
        log.samples(step, texts, seconds)
    return 0


def save(name, state, cfg, rt, log, must=False):
    """Rank 0 writes a checkpoint, all wait for it. A full disk is a warning, unless it `must` be written."""
    def write():
        started, path = time.perf_counter(), Path(cfg.log_dir, name)
        mend = rundir.resume_command(cfg.log_dir) if must else None
        with rundir.full_disk(f"{path} is not written; those before it stay", mend):
            log.sync()
            save_checkpoint(path, state, cfg, rt.world_size)
            log.row(state.step, "checkpoint", file=name, seconds=time.perf_counter() - started)
            rundir.prune_checkpoints(cfg.log_dir, cfg.keep_checkpoints)

    rt.first(write)


def save_due(state, cfg, rt, log, stop=0, done=()):
    """Write the milestone or rolling checkpoint that is due at this step, or for a signal to `stop` on."""
    name, last = f"rolling_{state.step:05d}.pt", state.step >= cfg.max_steps
    if not stop:
        if last or (cfg.checkpoint_every and state.step and state.step % cfg.checkpoint_every == 0):
            name = f"model_{state.step:05d}.pt"
        elif not cfg.save_minutes or state.unsaved_seconds <= 60 * cfg.save_minutes:
            return
    if name not in done:
        save(name, state, cfg, rt, log, must=bool(stop) or last)
    state.saved_at, state.unsaved_seconds = time.monotonic(), 0.0


def run_loop(state, view, tests, cfg, rt, log, done):
    """Train to `max_steps`; returns 0, or the signal that stopped it. `done`: what the logs have already."""
    trained = view
    if rt.world_size > 1:
        trained = nn.parallel.DistributedDataParallel(view, gradient_as_bucket_view=True)
    stop, frozen = 0, False
    while True:
        stop = stop or evaluate(state, view, tests, cfg, rt, log, done)
        save_due(state, cfg, rt, log, stop, done)
        if stop or state.step >= cfg.max_steps:
            return stop
        log.curves(state.step)
        stats, stop = train_step(state, trained, cfg, rt)
        log.train(state.step - 1, stats)
        if state.skipped_in_a_row >= cfg.max_skipped:
            rt.refuse(f"step {state.step - 1}: {state.skipped_in_a_row} updates in a row (--max_skipped) had "
                      f"no finite loss or gradient; sequences begin with {stats['sequence_ids'][:8]}, all "
                      f"are in {cfg.log_dir}/metrics.jsonl: look at them or lower --max_lr {cfg.max_lr:g}")
        if not frozen:
            gc.collect()
            gc.freeze()  # what lives now lives on: walking it again and again costs pauses of half a second
        done, frozen = (), True


def prepare_loop(state, view, plan, cfg, rt, log):
    """Find the micro-batch, compile, and open the loader at the run's position; then the loop can start."""
    started = time.perf_counter()
    if rt.compile:
        rt.print("compiling: a minute or so, a few seconds where the kernels are cached")
    B = state.micro_batch_size = fit_micro_batch(state.raw_model, view, cfg, rt)
    log.row(state.step, "compile", seconds=time.perf_counter() - started)
    micro_steps = cfg.total_batch_size // (cfg.seq_len * rt.world_size * B)
    rt.print(f"{log.parameters:,} parameters; a step is {rt.world_size} ranks x {micro_steps} micro-steps x "
             f"{B} rows x {cfg.seq_len} tokens")
    state.loader = DataLoaderLite(
        Shards(plan.train_parts, cfg.seq_len), B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size,
        seed=cfg.seed, shuffle=cfg.shuffle, position=state.position, ahead=micro_steps, device=rt.device)
    state.tracker_id, state.saved_at = log.tracker.id, time.monotonic()


def finish(state, cfg, rt, log, start, began):
    """Export the finished model, draw the last curves, say where everything is. `start`: the resumed step."""
    folder, started, trained = Path(cfg.log_dir), time.perf_counter(), state.step != start

    def export():
        if trained or not (folder / "hf" / "model.safetensors").exists():
            mend = rundir.resume_command(cfg.log_dir)
            with rundir.full_disk(f"{folder}/hf is not written; all else is saved", mend):
                state.raw_model.save_pretrained(folder / "hf")
        log.curves(state.step, last=True)
        log.row(state.step, "export", seconds=time.perf_counter() - started)

    rt.first(export)
    best = "" if state.best_val_loss is None else f", best validation loss {state.best_val_loss:.4f}"
    since = "" if start is None else " since the resume" if trained else ", nothing left to train"
    rt.print(f"done: {state.step:,} steps, {state.step * cfg.total_batch_size:,} tokens{best}; "
             f"{time.perf_counter() - began:.0f} s{since}\n"
             f"look:   {folder}/curves.png, {folder}/log.txt\n"
             f"sample: python sample.py --model {shlex.quote(cfg.log_dir)}\n"
             f"share:  {folder}/hf is a Hugging Face folder")


def evaluate_only(state, view, tests, cfg, rt):
    """Validation loss and HellaSwag of the model as it is, printed and returned as `train` does."""
    log, (shards, rows, benchmark) = RunLog(cfg, rt, state), tests
    started = time.perf_counter()
    if shards:
        B = fit_micro_batch(state.raw_model, view, cfg, rt)
        loss = validate(view, state.raw_model, shards, rows, B, rt)
        log.val(state.step, loss, rows * cfg.seq_len, time.perf_counter() - started)
    started = time.perf_counter()
    if benchmark:
        log.hella(state.step, score_hellaswag(state.raw_model, benchmark, rt), time.perf_counter() - started)
    return log.history


def train(cfg, given=None):
    """Run `cfg` from its start, or from where it is to resume, to its end.

    Returns {"train": (steps, losses), "val": (steps, losses), "hella": (steps, acc_norm)}. `given`: {field:
    value} set on purpose, which a resume puts over the checkpoint's; by default what differs from the preset.
    Raises `UserError` for the user's mistakes, and `SystemExit(128 + N)` after signal N, when all is saved.
    """
    began = time.perf_counter()
    if given is None:
        preset = TrainConfig.preset(cfg.preset)
        given = {f.name: v for f in fields(cfg) if (v := getattr(cfg, f.name)) != getattr(preset, f.name)}
    with Runtime(*place(), cfg.dist_timeout) as rt, contextlib.ExitStack() as held:
        if "log_dir" not in given:
            cfg = replace(cfg, log_dir=rt.first(lambda: rundir.home_of(cfg.resume, cfg.log_dir)))
        if not cfg.eval_only:
            rt.first(lambda: held.enter_context(rundir.claim_folder(cfg.log_dir)))
        plan = rt.first(lambda: make_plan(cfg, given, rt.world_size))
        cfg = plan.cfg
        rt.together(lambda: rt.choose(cfg.device, cfg.dtype, cfg.compile, cfg.deterministic, cfg.cache_dir))
        rt.together(lambda: check_data(plan, cfg, rt))
        cfg, state = rt.together(lambda: build(plan, rt))
        view = torch.compile(state.raw_model, dynamic=False) if rt.compile else state.raw_model
        rt.print("\n".join([*plan.notes, ", ".join(rt.notes)]))
        tests = rt.together(lambda: open_tests(plan, cfg, rt))
        if cfg.eval_only:
            return evaluate_only(state, view, tests, cfg, rt)
        log = held.enter_context(RunLog(cfg, rt, state))
        rt.first(log.track)  # it may fail, and the folder is still as it was
        start = state.step if plan.checkpoint else None
        note, rows, done = rt.first(lambda: rundir.clear_folder(cfg.log_dir, start))
        if note:
            rt.print(note)
        held.enter_context(rt.signals())
        log.open(rows)
        log.row(state.step, "start", seconds=time.perf_counter() - began)
        prepare_loop(state, view, plan, cfg, rt, log)
        held.callback(state.loader.close)
        again = rundir.resume_command(cfg.log_dir)
        try:
            stop = run_loop(state, view, tests, cfg, rt, log, done)
        except torch.OutOfMemoryError:
            B = state.micro_batch_size
            half = max(d for d in divisors(B) if d <= max(1, B // 2))
            raise UserError(f"out of memory at --micro_batch_size {B}: go on with {again} "
                            f"--micro_batch_size {half}") from None
        if stop:
            rt.print(f"stopped by signal {stop} at step {state.step}, saved; "
                     f"go on with: python train_gpt2.py {again}")
            raise SystemExit(128 + stop)
        finish(state, cfg, rt, log, start, began)
        return log.history


# ------------------------------------------------------------------------------------------------------------
# CLI
# ------------------------------------------------------------------------------------------------------------


def make_parser():
    """An argparse parser with a flag for every field of `TrainConfig`."""
    parser = Parser(
        usage="%(prog)s [--flag VALUE ...]",
        description="Train GPT-2. Without flags: the 124M model on edu_fineweb10B/ if it is there, else a "
                    "small one on input.txt. In brackets: the default, and those of other presets.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    return add_flags(parser, TrainConfig, PRESETS)


def main(argv=None):
    """The command: parse `argv`, train, return the exit status."""
    rank = place()[0]
    try:
        argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):  # --help
            given = vars(make_parser().parse_args(argv))
        flags = {name: value for name, value in given.items() if name != "preset"}
        cfg = TrainConfig.preset(given.get("preset", "auto"), **flags)
    except UserError:
        if rank == 0:  # every rank would say the same
            raise
        return 2
    train(cfg, given)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
