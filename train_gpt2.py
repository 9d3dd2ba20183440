"""Train GPT-2 from scratch: the model, its optimizer, its data, its evaluation and the loop, in one file.

    python train_gpt2.py                                     one device; a small model where there is no data
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   one machine with eight GPUs
    srun python train_gpt2.py                                many machines, see docs/train.sbatch
    python train_gpt2.py --resume                            continue where the last run stopped
    python train_gpt2.py --help                              every knob

A run writes into --log_dir (log/): log.txt, metrics.jsonl, config.json, curves.png, model_*.pt (milestones),
rolling_*.pt (to resume from), best.pt (fine-tuning) and hf/ (the finished model for transformers).

First time here? Read Model, then Training. In order:
    Config                   every knob with its default, the presets
    Model                    GPT-2
    Optimizer and schedule   AdamW, Muon, the learning rate
    Data                     the order of the data, the loader
    State                    what a run changes, saves and resumes
    Evaluation               validation loss, HellaSwag, samples
    Training                 one update, the loop
    CLI                      flags made from the config
Everything that is not GPT-2 training (ranks, files, consoles, resume negotiation) is in harness/.
"""

if __name__ == "__main__":
    from harness.cli import quiet_imports

    quiet_imports()  # Ctrl-C in the seconds that the imports below take

import contextlib
import gc
import math
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import convert
import curves
import hellaswag
from harness import checkpoint, machine, rundir, tokenizer
from harness.cli import UserError, check_fields, exit_status, flag, locked, parse_flags
from harness.plan import divisors, find_micro_batch, make_plan
from harness.runlog import RunLog
from harness.runtime import DeviceCopies, Runtime, Stopped, rank_from_environment
from harness.sampling import pick_token
from harness.shards import Shards, derive_seed, find_shards, sequence_ids
from harness.tokenizer import VOCAB_SIZE

# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

MODELS = {  # name: layers, heads, width, AdamW's peak learning rate (Brown et al. 2020, table 2.1)
    "gpt2": (12, 12, 768, 6e-4),
    "gpt2-medium": (24, 16, 1024, 3e-4),
    "gpt2-large": (36, 20, 1280, 2.5e-4),
    "gpt2-xl": (48, 25, 1600, 2e-4),
}


@dataclass(frozen=True)
class TrainConfig:
    """What was asked for. The defaults are the `gpt2` run: 124M parameters, 10B tokens of FineWeb-Edu.

    A small text is trained on with the numbers of `PRESETS["tiny"]` below. What is `locked_on_resume`
    makes the model or the order of the data: a resume may not change it.
    """

    preset: str = flag("auto", "auto: gpt2 where its shards are, else tiny", "run",
                       choices=("auto", "gpt2", "tiny", "finetune"))
    resume: str | None = flag(None, "continue from the newest checkpoint of --log_dir, or from a FILE or DIR; "
                                    "auto: start afresh when there is none", const="newest")
    init_from: str = locked("scratch", "scratch, or weights: gpt2 ... gpt2-xl, a folder, a file")
    eval_only: bool = flag(False, "validation loss and HellaSwag of the model, then stop; writes nothing")
    log_dir: str = flag("log", "folder for everything that the run writes")
    seed: int = locked(1337, "of weights, data order, dropout and samples", minimum=0)
    deterministic: bool = flag(False, "same bits every time on CUDA too, slower (the CPU always is)")

    data: str = locked("edu_fineweb10B", "folder of shards, shard, .txt, .jsonl, .parquet", "data")
    val_data: str | None = locked(None, "for validation (default: val shards, or a held-out tenth)")
    shuffle: bool = locked(True, "read sequences in a seeded random order, new each epoch")
    allow_incomplete: bool = flag(False, "train on a folder whose manifest says that shards are missing")
    cache_dir: str = flag(".cache", "for tokenized text, HellaSwag's file and compiled kernels")

    model: str = locked("gpt2", "size", "model", choices=tuple(MODELS))
    n_layer: int | None = locked(None, "layers (default: by --model)", minimum=1)
    n_head: int | None = locked(None, "heads a layer (default: by --model)", minimum=1)
    n_embd: int | None = locked(None, "width (default: by --model)", minimum=1)
    dropout: float = locked(0.0, "probability; 0 to pretrain, 0.1 to fine-tune", minimum=0, maximum=0.99)
    seq_len: int = locked(1024, "tokens a row, context of a new model", minimum=1)

    total_batch_size: int = locked(524288, "tokens a step, all ranks together", "batch and length", minimum=1)
    micro_batch_size: int = flag(0, "rows a forward pass; 0: the largest that fits", minimum=0)
    max_steps: int = flag(19073, "updates; 19,073 are 10B tokens", minimum=1)
    epochs: float | None = flag(None, "passes over the data, in place of --max_steps", minimum=1e-6)

    optimizer: str = locked("adamw", "muon: Muon for the layers' matrices, AdamW for the rest", "optimizer",
                            choices=lambda: OPTIMIZERS)
    max_lr: float | None = flag(None, "peak learning rate (default: by --model)", minimum=0)
    min_lr: float | None = flag(None, "final learning rate (default: a tenth of --max_lr)", minimum=0)
    warmup_steps: int = flag(715, "linear warmup, updates; 375M tokens as in GPT-3", minimum=0)
    schedule: str = flag("cosine", "wsd: constant, then linear to min_lr", choices=lambda: SCHEDULES)
    decay_fraction: float = flag(0.2, "last share of the updates in which wsd decays", minimum=0, maximum=1)
    weight_decay: float = locked(0.1, "on matrices and embeddings only", minimum=0)
    beta1: float = locked(0.9, "Adam's decay of the mean", minimum=0, maximum=0.999999)
    beta2: float = locked(0.95, "Adam's decay of the square", minimum=0, maximum=0.999999)
    adam_eps: float = locked(1e-8, "Adam's epsilon", minimum=1e-20)
    grad_clip: float = locked(1.0, "largest gradient norm; 0: none", minimum=0)

    val_every: int = flag(250, "updates between validations; 0: never", "evaluation", minimum=0)
    val_tokens: int = flag(10485760, "tokens of the validation split to read", minimum=1)
    hellaswag_every: int = flag(250, "updates between HellaSwag evaluations; 0: never", minimum=0)
    hellaswag_limit: int | None = flag(None, "only the first so many questions", minimum=1)
    hellaswag_path: str | None = flag(None, "the benchmark's file (default: fetched into --cache_dir)")
    sample_every: int = flag(250, "updates between text samples; 0: never", minimum=0)
    sample_prompt: str = flag("Hello, I'm a language model,", "what samples continue")
    num_samples: int = flag(4, "samples each time", minimum=1)
    sample_tokens: int = flag(32, "tokens a sample", minimum=1)

    checkpoint_every: int = flag(5000, "updates between milestones, which are kept; 0: only the last",
                                 "checkpoints", minimum=0)
    save_minutes: float = flag(10.0, "between rolling checkpoints to resume from; 0: none", minimum=0)
    keep_checkpoints: int = flag(2, "rolling checkpoints that stay", minimum=1)
    max_skipped: int = flag(10, "stop after so many skipped updates in a row", minimum=1)

    dist_timeout: float = flag(600.0, "seconds that a rank waits for others", "machine", minimum=1)
    device: str = flag("auto", "CUDA, then MPS, then the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "bfloat16 where it is fast", choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = flag(True, "torch.compile, where a compiler is found")

    tracker: str = flag("none", "where metrics go besides --log_dir", "tracking", choices=("none", "wandb"))
    wandb_project: str = flag("gpt2", "project of the tracker")

    def __post_init__(self):
        check_fields(self)
        n_layer, n_head, n_embd, lr = MODELS[self.model]
        max_lr = lr if self.max_lr is None else self.max_lr
        defaults = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "max_lr": max_lr,
                    "min_lr": max_lr / 10}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen for everybody else
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}: lower it")

    @classmethod
    def from_preset(cls, name="auto", **overrides):
        """The config of a preset with `overrides` on top. `UserError` for unknown names and bad values."""
        if unknown := set(overrides) - {f.name for f in fields(cls)}:
            raise UserError(f"{min(unknown)} is no field of the config; see --help")
        if overrides.get("epochs") is not None and "max_steps" in overrides:
            raise UserError(f"--epochs {overrides['epochs']} and --max_steps {overrides['max_steps']} "
                            "both set the length: give one")
        values = dict(PRESETS.get(name, {}))
        if "model" in overrides:  # a size given by name replaces the preset's whole shape
            for field_name in ("n_layer", "n_head", "n_embd", "max_lr"):
                values.pop(field_name, None)
        return cls(**{**values, **overrides, "preset": name})


PRESETS = {  # differences from the defaults above, which are the preset gpt2
    "tiny": {
        "data": "input.txt", "n_layer": 4, "n_head": 4, "n_embd": 256, "seq_len": 256,
        "total_batch_size": 2048, "max_steps": 180, "max_lr": 1.5e-3, "warmup_steps": 20,
        "val_every": 60, "val_tokens": 65536, "hellaswag_every": 0, "sample_every": 60,
        "sample_prompt": "Crake:\n", "num_samples": 1, "sample_tokens": 64, "checkpoint_every": 0,
    },
    "finetune": {
        "init_from": "gpt2", "dropout": 0.1, "total_batch_size": 16 * 1024, "max_steps": 5000,
        "max_lr": 1e-5, "warmup_steps": 100, "hellaswag_every": 0, "checkpoint_every": 1000,
    },
}


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------
# GPT-2 as released (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, biases, a
# tied head. Shapes: B rows, T tokens a row, C = n_embd, nh heads of hs = C / nh, V = vocab_size.


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model. An impossible shape raises `UserError`."""

    block_size: int = flag(1024, "longest context, tokens", minimum=1)
    vocab_size: int = flag(VOCAB_SIZE, "token ids", minimum=1)
    n_layer: int = flag(12, "blocks", minimum=1)
    n_head: int = flag(12, "attention heads a block", minimum=1)
    n_embd: int = flag(768, "width of the residual stream", minimum=1)
    dropout: float = flag(0.0, "probability", minimum=0, maximum=0.99)

    def __post_init__(self):
        check_fields(self)
        if self.n_embd % self.n_head:
            fit = max(h for h in range(1, self.n_head + 1) if self.n_embd % h == 0)
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: take {fit}")

    @property
    def padded_vocab_size(self):
        """Rows of `wte`: the vocabulary rounded up to a multiple of 128 (50,304), which matrix units need."""
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
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache(k, v)  # (B, nh, T, hs) in, (B, nh, all so far, hs) out
        # without a mask a token sees itself and what is left of it; one new token over a cache sees everything
        causal = mask is None and q.size(2) == k.size(2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


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
        """Draw every parameter: N(0, 0.02), biases 0, gains 1; the same on every device for one seed.

        Projections into the residual stream, of which there are two a layer, are scaled by
        1/sqrt(2 n_layer): its variance then does not grow with depth (Radford et al. 2019, 2.3).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta:  # waits for loaded tensors
                continue
            if name.endswith("bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            else:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                p.normal_(0.0, 0.02 * scale, generator=generator)
        if not self.transformer.wte.weight.is_meta:
            self.transformer.wte.weight[self.config.vocab_size :] = 0.0  # padding: untrained

    def num_parameters(self):
        """How many numbers the model has, without the padding of the vocabulary."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self, T):
        """FLOPs of a token's forward and backward pass in rows of `T`: 6 for each weight that multiplies,
        and attention's two products (Chowdhery et al. 2022, appendix B)."""
        multiplying = self.num_parameters() - self.transformer.wpe.weight.numel()
        return 6 * multiplying + 12 * self.config.n_layer * self.config.n_embd * T

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Final hidden states (B, T, C), after the last norm, of token ids `idx` (B, T) int64.

        `pos` (T,) or (B, T): positions, 0..T-1 by default. `mask`, broadcastable to (B, nh, T, all
        keys) bool, True where a query may look; causal by default. `cache`: one callable a layer,
        which takes a layer's new keys and values (B, nh, T, hs) and returns all of them so far.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[layer])
        return self.transformer.ln_f(x)

    def logits(self, hidden):
        """Scores (..., V) of the next token from hidden states (..., C)."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """`(logits, None)` with logits (B, T, V), or with `targets` (B, T) `(None, loss)`.

        The loss is the mean cross-entropy in nats over the targets that are not -100, a scalar in
        fp32. The two never come together, so that head and loss compile into one graph and the
        logits need not be kept.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens a row exceed the context of {self.config.block_size}: crop them")
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return None, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue `idx` (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens) int64.

        Temperature 0 is greedy. `generator` (on the device of `idx`) makes the draw repeatable and
        leaves the global one alone. Beyond the context the model sees the last `block_size` tokens.
        `sample.py` does the same with a cache, faster.
        """
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx[:, -self.config.block_size :])
            token = pick_token(self.logits(hidden[:, -1]), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
        return idx

    @classmethod
    def from_state_dict(cls, config, tensors):
        """A model of `config` (`GPTConfig` or its dict) around `tensors`, its state dict, not copied.

        Raises `UserError`, which names the tensor, where they do not fit.
        """
        with torch.device("meta"):
            model = cls(config if isinstance(config, GPTConfig) else GPTConfig(**config))
        convert.check_shapes(tensors, model.state_dict())
        model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return model.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """OpenAI's weights by name (`gpt2`, ... `gpt2-xl`), a Hugging Face folder, or a checkpoint."""
        config, tensors = convert.load(name_or_folder)
        with checkpoint.blamed(name_or_folder):
            return cls.from_state_dict({**config, "dropout": dropout}, tensors)

    from_checkpoint = from_pretrained  # a file, or a log folder's newest: `convert.load` tells them apart

    def save_pretrained(self, folder):
        """Write a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` open."""
        convert.save(asdict(self.config), self.state_dict(), folder)


# --------------------------------------------------------------------------------------------------
# Optimizer and schedule
# --------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of the update step -> step + 1: linear warmup to `max_lr`, then the schedule,
    which falls from `max_lr` to `min_lr` and reaches it at `max_steps`."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    return cfg.min_lr + SCHEDULES[cfg.schedule](step, cfg) * (cfg.max_lr - cfg.min_lr)


def cosine(step, cfg):
    """Half a cosine from 1 at the end of warmup to 0 at `max_steps` (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * decay_progress(step, cfg.warmup_steps, cfg.max_steps)))


def wsd(step, cfg):
    """1, then linearly to 0 over the last `decay_fraction` of the run (Hu et al. 2024)."""
    start = max(cfg.warmup_steps, round(cfg.max_steps * (1 - cfg.decay_fraction)))
    return 1 - decay_progress(step, start, cfg.max_steps)


def decay_progress(step, start, end):
    return min(1.0, max(0, step - start) / max(1, end - start))


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def make_adamw(model, cfg, device, apart=()):
    """{"adamw": ...} over all parameters but those named in `apart`.

    Weight decay acts on matrices and embeddings; gains and biases, of one dimension, have none.
    """
    parameters = [p for name, p in model.named_parameters() if name not in apart]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.beta1, cfg.beta2)
    return {"adamw": torch.optim.AdamW(groups, lr=cfg.max_lr, betas=betas, eps=cfg.adam_eps, fused=True)}


def make_muon(model, cfg, device):
    """Muon for the matrices of the layers, AdamW for embeddings, gains and biases; one learning rate for both."""
    matrices = {name: p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    groups = [
        {"params": [p for name, p in matrices.items() if ".c_attn." not in name], "stacked": 1},
        {"params": [p for name, p in matrices.items() if ".c_attn." in name], "stacked": 3},  # q, k, v
    ]
    return {**make_adamw(model, cfg, device, apart=matrices),
            "muon": Muon(groups, cfg.max_lr, cfg.weight_decay, machine.fast_matmul_dtype(device))}


OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each update of a matrix is its momentum, made orthogonal.

    A parameter of a group with `stacked` n is n matrices on top of one another, each for itself. An
    update's size is matched to AdamW's (Liu et al. 2025, section 2.2), so that one rate serves both.
    `dtype`: of the orthogonalization.
    """

    def __init__(self, groups, lr, weight_decay, dtype, momentum=0.95):
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group)

    def update(self, p, group):
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        average = self.state[p]["momentum_buffer"]
        average.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
        p.mul_(1 - group["lr"] * group["weight_decay"])
        n = group["stacked"]
        for weight, change in zip(p.chunk(n), update.chunk(n)):
            size = 0.2 * math.sqrt(max(weight.shape))
            weight.add_(self.orthogonalize(change), alpha=-group["lr"] * size)

    def orthogonalize(self, matrix):
        """Nearly U V^T of the matrix U S V^T: five Newton-Schulz steps, whose coefficients are Jordan's."""
        x = matrix.to(self.dtype)
        if x.size(0) > x.size(1):
            x = x.T
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            a = x @ x.T
            b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.addmm(x, b, x, beta=3.4445)
        return x.T if matrix.size(0) > matrix.size(1) else x


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class DataLoaderLite:
    """This rank's micro-batches, from a global position on.

    `position` counts the sequences that were handed out to all ranks together since step 0. A call
    takes W B of them, of which rank r gets [position + r B, position + (r + 1) B): so a step reads
    the same set of sequences for every number of ranks and micro-batch size, and one integer
    resumes. `ahead` micro-batches are read in the background, and the next one is already on its
    way to the device. `seconds` counts the time that callers have waited.
    """

    READ_ROWS = 16  # rows that one task reads
    THREADS = 16  # tasks at a time, so that slow storage overlaps

    def __init__(self, data, B, T, *, split="train", rank=0, world_size=1, seed=1337, shuffle=True,
                 position=0, ahead=1, device="cpu"):
        self.shards = data if isinstance(data, Shards) else Shards(find_shards(data, split), T)
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.shuffle, self.position = seed, shuffle, position
        self.device = torch.device(device)
        self.seconds = 0.0
        self._next = position  # the position up to which reads were started
        self._reads = deque()
        self._ahead = max(1, ahead)
        self._pool = ThreadPoolExecutor(self.THREADS, thread_name_prefix="loader")
        self._to_device = DeviceCopies((B, T + 1), torch.int16, self.device)
        self._staged = None

    def sequence_ids(self, position, count):
        """Sequences, as `Shards` numbers them, that positions [position, position + count) read."""
        seed = self.seed if self.shuffle else None
        return sequence_ids(len(self.shards), position, count, seed)

    def _start_reading(self):
        ids = self.sequence_ids(self._next + self.rank * self.B, self.B)
        self._next += self.world_size * self.B
        parts = [ids[i : i + self.READ_ROWS] for i in range(0, self.B, self.READ_ROWS)]
        self._reads.append([self._pool.submit(self.shards.read, part) for part in parts])

    def _stage(self):
        """The next micro-batch, which travels as it is stored, in 16 bits, and becomes int64 on the device."""
        while len(self._reads) <= self._ahead:
            self._start_reading()
        sequences = np.concatenate([part.result() for part in self._reads.popleft()])  # (B, T + 1)
        ids = self._to_device(torch.from_numpy(sequences.view(np.int16))).to(torch.int64) & 0xFFFF
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def next_batch(self):
        """Inputs and targets, (B, T) int64 each, on the loader's device; targets are one token further."""
        started = time.perf_counter()
        batch = self._staged or self._stage()
        self._staged = self._stage()
        self.position += self.world_size * self.B
        self.seconds += time.perf_counter() - started
        return batch

    def take_seconds(self):
        """Seconds that callers have waited for data since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self):
        self._pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# State
# --------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """What a run changes as it goes. `raw_model` is never compiled or wrapped."""

    raw_model: GPT
    optimizers: dict
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite | None = None
    step: int = 0  # completed updates
    micro_batch_size: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None  # of the model as it is now, if it was measured
    best_val_loss: float | None = None
    tracker_id: str | None = None
    saved_as: str | None = None  # the checkpoint file that holds the state as it is now
    saved_at: float = 0.0  # when the last checkpoint was written, by rank 0's clock


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
# Evaluations return numbers and change nothing: no training RNG, no loader, no mode.


@dataclass(frozen=True)
class EvalData:
    """What the model is judged by; None where it is not."""

    val_shards: Shards | None
    val_sequences: int  # of them, from the start
    benchmark: hellaswag.Benchmark | None


def open_eval_data(plan, cfg, rt):
    """Open the validation split and prepare HellaSwag, as planned; says on the console what they are."""
    shards, sequences, benchmark = None, 0, None
    if plan.val_files:
        shards = Shards(plan.val_files, cfg.seq_len)
        sequences = min(len(shards), max(1, cfg.val_tokens // cfg.seq_len))
        whole = ", the whole split" if sequences == len(shards) else ""
        rt.print(f"validation on {sequences * cfg.seq_len:,} tokens{whole}")
    if plan.benchmark:
        benchmark = hellaswag.load(plan.benchmark, block_size=cfg.seq_len, device=rt.device,
                                   limit=cfg.hellaswag_limit)
        rt.print(str(benchmark))
    return EvalData(shards, sequences, benchmark)


@torch.no_grad()
def validate(run):
    """Mean loss in nats a token over the first `val_sequences` of the validation split.

    The same tokens for every number of ranks and batch size. Rows beyond the last sequence are
    masked, not dropped, so that the compiled model keeps its one shape.
    """
    rt, model, data, B = run.rt, run.state.raw_model, run.eval_data, run.state.micro_batch_size
    loader = DataLoaderLite(data.val_shards, B, run.cfg.seq_len, rank=rt.rank, shuffle=False,
                            world_size=rt.world_size, ahead=4, device=rt.device)
    total = 0.0
    model.eval()
    try:
        for start in range(0, data.val_sequences, rt.world_size * B):
            rt.raise_if_stopped()
            x, y = loader.next_batch()
            counted = max(0, min(B, data.val_sequences - start - rt.rank * B))
            y[counted:] = -100
            if counted:
                with rt.autocast():
                    _, loss = run.compiled(x, y)
                # as a number: small tensors that are kept would fragment the memory freed by large ones
                total += loss.item() * counted
        return rt.sum([total])[0] / data.val_sequences
    finally:
        loader.close()
        model.train()


def score_hellaswag(run):
    """HellaSwag counts over all ranks, see `hellaswag.evaluate`."""
    rt = run.rt
    counts = hellaswag.evaluate(run.state.raw_model, run.eval_data.benchmark, device=rt.device,
                                autocast=rt.autocast, rank=rt.rank, world_size=rt.world_size,
                                check_stop=rt.raise_if_stopped)
    return dict(zip(counts, rt.sum(list(counts.values()))))


def write_samples(run):
    """`num_samples` texts that continue the prompt, drawn together on rank 0."""
    cfg, rt, model = run.cfg, run.rt, run.state.raw_model
    encoding = tokenizer.gpt2()
    prompt = encoding.encode(cfg.sample_prompt, allowed_special="all") or [tokenizer.END_OF_TEXT]
    idx = torch.tensor([prompt] * cfg.num_samples, device=rt.device)
    generator = torch.Generator(rt.device).manual_seed(derive_seed(cfg.seed, run.state.step))
    model.eval()
    with rt.autocast():
        idx = model.generate(idx, cfg.sample_tokens, top_k=50, generator=generator)
    model.train()
    return [encoding.decode(row) for row in idx.tolist()]


def evaluate(run):
    """Run what is due after `state.step` updates; at step 0 validation only. Returns whether anything was."""
    cfg, rt, state, log, data = run.cfg, run.rt, run.state, run.log, run.eval_data
    step = state.step

    def due(kind, every):
        at_this_step = every and (step % every == 0 or step >= cfg.max_steps)
        return at_this_step and (step > 0 or kind == "val") and not log.has(step, kind)

    kinds = [kind for kind, every in (("val", cfg.val_every if data.val_shards else 0),
                                      ("hella", cfg.hellaswag_every if data.benchmark else 0),
                                      ("sample", cfg.sample_every)) if due(kind, every)]
    if "val" in kinds:
        seconds, loss = timed(validate, run)
        state.val_loss = loss
        if loss < (math.inf if state.best_val_loss is None else state.best_val_loss):  # never for nan
            state.best_val_loss = loss
            if cfg.init_from != "scratch" and step:
                # before the row: after a kill in between it is validated again
                rt.on_rank0(log.checkpoint, "best.pt", state)
        log.val(step, loss, data.val_sequences * cfg.seq_len, seconds)
    if "hella" in kinds:
        seconds, counts = timed(score_hellaswag, run)
        log.hella(step, counts, seconds)
    if "sample" in kinds:
        seconds, texts = timed(rt.on_rank0, write_samples, run)
        log.samples(step, texts, seconds)
    log.curves(step)
    return bool(kinds)


def evaluate_only(run):
    """Validation loss and HellaSwag of the model as it is, printed; returned as `train` returns them."""
    state, log, data = run.state, run.log, run.eval_data
    if data.val_shards:
        state.micro_batch_size = find_micro_batch(state.raw_model, run.compiled, run.cfg, run.rt)
        seconds, loss = timed(validate, run)
        log.val(state.step, loss, data.val_sequences * run.cfg.seq_len, seconds)
    if data.benchmark:
        seconds, counts = timed(score_hellaswag, run)
        log.hella(state.step, counts, seconds)
    return log.history


def timed(function, *args):
    """(seconds, result) of `function(*args)`, whose result is on the CPU."""
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What travels through a run together."""

    cfg: TrainConfig
    rt: Runtime
    state: TrainState
    log: RunLog
    compiled: nn.Module  # `state.raw_model` compiled: validation, at one shape
    model: nn.Module  # what is trained: `compiled`, in DDP's wrapper where there are ranks
    eval_data: EvalData


@machine.explain_out_of_memory("the model, its gradients and its optimizer")
def build(plan, rt):
    """(cfg, state): the model, new, loaded or resumed, and its optimizers; cfg takes a loaded model's shape."""
    cfg, saved = plan.cfg, plan.take_checkpoint()
    if saved:
        with checkpoint.blamed(plan.checkpoint_path):
            config = {**saved["config"], "dropout": cfg.dropout}
            model = GPT.from_state_dict(config, saved["model"])
    elif cfg.init_from == "scratch":
        shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "dropout")}
        model = GPT(GPTConfig(block_size=cfg.seq_len, **shape), cfg.seed)
    else:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout)
        if cfg.seq_len > model.config.block_size:
            raise UserError(f"--seq_len {cfg.seq_len} is beyond the context of {cfg.init_from}, "
                            f"{model.config.block_size}: lower it")
        shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd")}
        cfg = replace(cfg, **shape)
    model.to(rt.device).train()
    optimizers = OPTIMIZERS[cfg.optimizer](model, cfg, rt.device)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    state = TrainState(model, optimizers, scaler)
    if saved:
        with checkpoint.blamed(plan.checkpoint_path):
            checkpoint.restore(state, saved)
        state.saved_as = plan.checkpoint_path.name
    return cfg, state


def train_step(run):
    """One update over `total_batch_size` tokens; returns the figures of its row.

    An update whose loss or gradient is not finite is skipped, on all ranks alike; it counts as a
    step and its data as read.
    """
    cfg, rt, state = run.cfg, run.rt, run.state
    first_position, lr = state.loader.position, lr_at(state.step, cfg)
    micro_steps = cfg.total_batch_size // (cfg.seq_len * rt.world_size * state.micro_batch_size)
    total = torch.zeros((), device=rt.device)
    for micro_step in range(micro_steps):
        x, y = state.loader.next_batch()
        if cfg.dropout:
            torch.manual_seed(derive_seed(cfg.seed, state.step, micro_step * rt.world_size + rt.rank))
        # Gradients are exchanged once an update, in the last micro-step. subtle: DDP decides that in
        # the forward pass, so the forward pass too must be inside the context.
        with rt.sync_gradients(run.model, enabled=micro_step == micro_steps - 1):
            with rt.autocast():
                _, loss = run.model(x, y)
            # Gradients add up over micro-steps, each of which is a mean over its own tokens: a share
            # of 1 / micro_steps makes their sum the mean over the step's tokens.
            loss = loss / micro_steps
            state.scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in state.optimizers.values():
        state.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.raw_model.parameters(), cfg.grad_clip or math.inf)

    # The update's only wait for the device. The loss is the mean over ranks. DDP has averaged the
    # gradients already, so the norm is every rank's own figure for the same thing; the mean makes
    # it the same number, by which all ranks take the update or none does.
    loss, norm = rt.mean(torch.stack((total, norm)).tolist())
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skipped:
            state.scaler.step(optimizer)
    state.scaler.update()
    state.raw_model.zero_grad(set_to_none=True)

    state.step, state.val_loss, state.saved_as = state.step + 1, None, None
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    stats = {"loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}
    if skipped:
        stats["skipped_in_a_row"] = state.skipped_in_a_row
        count = state.loader.position - first_position
        stats["sequence_ids"] = state.loader.sequence_ids(first_position, count).tolist()
    return stats


def save(run, name, required=False):
    """Write the state as the checkpoint `name`, unless it was just read from it. Rank 0 writes, all wait.

    A full disk is a warning, unless the checkpoint is `required`.
    """
    rt, state = run.rt, run.state
    if state.saved_as != name:
        rt.on_rank0(run.log.checkpoint, name, state, required)
    state.saved_as, state.saved_at = name, rt.clock()


def save_if_due(run):
    """Write the milestone or rolling checkpoint that is due at this step. Returns whether one was."""
    cfg, state = run.cfg, run.state
    last = state.step >= cfg.max_steps
    if state.step == 0:
        return False
    milestone = cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0
    rolling = cfg.save_minutes and run.rt.clock() - state.saved_at > 60 * cfg.save_minutes
    if last or milestone:
        save(run, f"model_{state.step:05d}.pt", required=last)
    elif rolling:
        save(run, f"rolling_{state.step:05d}.pt")
    return last or milestone or rolling


def train(cfg, overrides=None):
    """Run `cfg` from its start, or from where it is to resume, to its end.

    Returns {"train": (steps, losses), "val": (steps, losses), "hella": (steps, acc_norm)}.
    `overrides`: {field: value} set on purpose, which a resume puts over the checkpoint's; by default
    what differs from the preset. Raises `UserError` for the user's mistakes, and
    `SystemExit(128 + N)` after signal N, when everything is saved.
    """
    began = time.perf_counter()
    if overrides is None:
        preset = TrainConfig.from_preset(cfg.preset)
        overrides = {name: value for name, value in asdict(cfg).items() if value != getattr(preset, name)}
    with (Runtime(*rank_from_environment(), cfg.dist_timeout) as rt,
          contextlib.ExitStack() as cleanup):
        # 1. Plan: resume point, preset, data, batch. Nothing is written yet. Skip this on a first reading.
        if "log_dir" not in overrides:
            cfg = replace(cfg, log_dir=rt.on_rank0(rundir.log_dir_of, cfg.resume, cfg.log_dir))
        if not cfg.eval_only:
            rt.on_rank0(cleanup.enter_context, rundir.lock(cfg.log_dir))
        bundled = Path(__file__).with_name(PRESETS["tiny"]["data"])
        plan = rt.on_rank0(make_plan, cfg, overrides, rt.world_size, bundled, hellaswag.fetch)
        cfg = plan.cfg
        rt.on_all(rt.choose, cfg.device, cfg.dtype, cfg.compile, cfg.deterministic, cfg.cache_dir)
        rt.on_all(plan.check_data, rt.rank)

        # 2. The model, and what it is judged by.
        cfg, state = rt.on_all(build, plan, rt)
        raw_model = state.raw_model
        compiled = torch.compile(raw_model, dynamic=False) if rt.compile else raw_model
        rt.print("\n".join([*plan.notes, ", ".join(rt.notes)]))
        eval_data = rt.on_all(open_eval_data, plan, cfg, rt)
        log = cleanup.enter_context(RunLog(
            cfg, rt, raw_model.num_parameters(), raw_model.flops_per_token(cfg.seq_len), curves.plot))
        run = Run(cfg, rt, state, log, compiled, compiled, eval_data)
        if cfg.eval_only:
            return evaluate_only(run)

        # 3. The log, the micro-batch, the data.
        train_shards = rt.on_all(Shards, plan.train_files, cfg.seq_len)
        rt.on_rank0(log.watch_data, train_shards, eval_data.val_shards, plan.saved_data)
        rt.on_rank0(log.start_tracker, state.tracker_id)  # it may fail, and the folder is still as it was
        state.tracker_id = log.tracker.id
        resumed_at = state.step if plan.checkpoint_path else None
        log.open(state.step, *rt.on_rank0(rundir.archive_old_run, cfg.log_dir, resumed_at))
        cleanup.enter_context(rt.catch_signals())
        log.row(state.step, "start", seconds=time.perf_counter() - began)
        started = time.perf_counter()
        if rt.compile:
            rt.print("compiling: a minute or so, a few seconds where the kernels are cached")
        B = state.micro_batch_size = find_micro_batch(raw_model, compiled, cfg, rt)
        log.row(state.step, "compile", seconds=time.perf_counter() - started)
        if rt.distributed:  # around the compiled model, whose graphs stay whole
            run.model = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
        sequences = cfg.total_batch_size // cfg.seq_len  # a step
        micro_steps = sequences // (rt.world_size * B)
        rt.print(f"{log.parameters:,} parameters; a step is {rt.world_size} ranks x {micro_steps} micro-steps x "
                 f"{B} rows x {cfg.seq_len} tokens")
        state.loader = DataLoaderLite(
            train_shards, B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size,
            seed=cfg.seed, shuffle=cfg.shuffle, position=state.step * sequences, ahead=micro_steps,
            device=rt.device)
        cleanup.callback(state.loader.close)

        # 4. The loop: evaluations that are due, the checkpoint that is due, one update.
        log.start_bar(state.step)
        state.saved_at, clock = rt.clock(), time.monotonic()
        first_step = state.step
        try:
            while True:
                evaluated = evaluate(run)
                saved = save_if_due(run)
                if state.step >= cfg.max_steps:
                    break
                if evaluated or saved:
                    rt.synchronize()
                    clock = time.monotonic()
                stats = train_step(run)
                now = time.monotonic()
                log.train(state.step - 1, stats, now - clock, state.loader.take_seconds())
                clock = now
                if state.step == first_step + 1:
                    gc.collect()
                    gc.freeze()  # what lives now lives on; walking through it would cost half a second at times
                rt.raise_if_stopped()
        except Stopped as stop:
            save(run, f"rolling_{state.step:05d}.pt", required=True)
            rt.print(f"stopped by {stop} at step {state.step}, saved; "
                     f"resume with: python train_gpt2.py {rundir.resume_command(cfg.log_dir)}")
            raise SystemExit(128 + stop.signal) from None
        except torch.OutOfMemoryError:
            half = max(d for d in divisors(B) if d <= max(1, B // 2))
            raise UserError(f"out of memory at --micro_batch_size {B}: resume with python train_gpt2.py "
                            f"{rundir.resume_command(cfg.log_dir)} --micro_batch_size {half}") from None

        # 5. The finished model for transformers, the last curves, last words.
        rt.on_rank0(log.export, state.step, raw_model.save_pretrained, resumed_at)
        log.done(state.step, state.best_val_loss, resumed_at, time.perf_counter() - began)
        return log.history


# --------------------------------------------------------------------------------------------------
# CLI
# --------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command: parse `argv`, train, return the exit status."""
    rank = rank_from_environment()[0]
    try:
        overrides = parse_flags(TrainConfig, PRESETS, argv, rank, description=(
            "Train GPT-2. Without flags: the 124M model on edu_fineweb10B/ if it is there, else a small one "
            "on input.txt. In brackets: the default, and those of other presets."))
        flags = {name: value for name, value in overrides.items() if name != "preset"}
        cfg = TrainConfig.from_preset(overrides.get("preset", "auto"), **flags)
    except UserError:
        if rank == 0:  # every rank would say the same
            raise
        return 2
    train(cfg, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
