"""Train GPT-2 from scratch: model, optimizer, data, evaluation and the loop, in one file.

    python train_gpt2.py                                     one device (tiny model if no data)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   one machine with eight GPUs
    srun python train_gpt2.py                                several machines: docs/train.sbatch
    python train_gpt2.py --resume                            continue where the last run stopped
    python train_gpt2.py --help                              every option

A run writes into --log_dir (log/): log.txt, metrics.jsonl, config.json, curves.png, model_*.pt
(milestones), rolling_*.pt (to resume from), best.pt (fine-tuning), hf/ (for transformers).

First time here? Read Model, then Training. Sections: Config · Model · Optimizer and schedule ·
Data · State · Evaluation · Training · CLI. Everything else (ranks, files, console, resuming) is
in harness/.
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("train_gpt2.py"))  # python -P omits it
    from harness.cli import quiet_imports
    quiet_imports()  # no traceback if Ctrl-C is pressed during the slow imports below

import functools
import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import InitVar, asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

import convert
import curves
import hellaswag
from harness import checkpoint, commands, machine, rundir, runlog, tokenizer
from harness.cli import UserError, check_fields, exit_status, flag, locked, parse_args
from harness.device import DeviceCopies
from harness.fingerprints import BackgroundHashes, start_hashing
from harness.fit import divisors, fits, steps_in
from harness.plan import check_shape, describe_length, follow, make_plan, resolve, settle
from harness.profile import Profile
from harness.ranks import AgreedError, rank_from_environment
from harness.readahead import ReadAhead
from harness.runtime import Runtime
from harness.samples import write_samples
from harness.shards import Shards, derive_seed, find_shards, sequence_ids
from harness.signals import Stopped
from harness.threads import ThreadPool, cores

# === Config =======================================================================================

MODELS = {  # layers, heads, width, GPT-3's peak rate at this size (Brown et al. 2020, table 2.1)
    "gpt2": (12, 12, 768, 6e-4),
    "gpt2-medium": (24, 16, 1024, 3e-4),
    "gpt2-large": (36, 20, 1280, 2.5e-4),
    "gpt2-xl": (48, 25, 1600, 2e-4),
}


@dataclass(frozen=True, init=False)
class TrainConfig:
    """What was asked for, and the values that follow from it. The defaults below are the `gpt2`
    run. A resume may not change `locked` fields: they define model, data and optimizer."""

    asked: InitVar[dict] = None  # no flag: {field: value} of what was given, set by __init__

    preset: str = flag("auto", "auto: gpt2 if its shards are there, else tiny", group="run",
                       choices=("auto", "gpt2", "tiny", "finetune"))
    resume: str | None = flag(None, "continue from the newest checkpoint of --log_dir, or FILE or "
                                    "DIR; auto: start fresh if there is none", const="newest")
    config: str | None = flag(None, "repeat a run from its config.json; flags override it")
    init_from: str = locked("scratch", "scratch, gpt2 ... gpt2-xl, a folder or a checkpoint file")
    eval_only: bool = flag(False, "print loss, bits per byte and HellaSwag; write nothing")
    log_dir: str = flag("log", "folder for everything that the run writes")
    seed: int = locked(1337, "for weights, data order, dropout, samples", minimum=0)
    deterministic: bool = flag(False, "bitwise reproducible on CUDA too, but slower")

    data: str = locked("edu_fineweb10B", "folder of shards, shard, .txt, .jsonl, .csv, .parquet",
                       group="data")
    val_data: str | None = locked(None, "for validation (default: val shards, or a held-out tenth)")
    tokenizer: str = locked("gpt2", "gpt2; N: learn N tokens from the text; bytes; tokenizer.json")
    text_column: str | None = locked(None, "text column of --data (default: detected)")
    loss_on: str = locked("completion", "for prompt/completion pairs; all: prompts too",
                          choices=("completion", "all"))
    shuffle: bool = locked(True, "read sequences in a seeded random order, new each epoch")
    allow_incomplete: bool = flag(False, "train on a folder with some shards missing")
    cache_dir: str = flag(".cache", "for tokenized text and HellaSwag's file; compiled kernels are "
                          "in ~/.cache, or where TORCHINDUCTOR_CACHE_DIR says")

    model: str = locked("gpt2", "size of the model", group="model", choices=tuple(MODELS))
    n_layer: int | None = locked(None, "layers (default: by --model)", minimum=1)
    n_head: int | None = locked(None, "heads per layer (default: by --model)", minimum=1)
    n_embd: int | None = locked(None, "width (default: by --model)", minimum=1)
    dropout: float = locked(0.0, "0 to pretrain, 0.1 to fine-tune", minimum=0, maximum=0.99)
    seq_len: int = locked(1024, "tokens per row, context of a new model", minimum=1)

    total_batch_size: int = locked(524288, "tokens per step, all ranks together",
                                   group="batch and length", minimum=1)
    micro_batch_size: int = flag(0, "rows per forward pass; 0: the largest that fits", minimum=0)
    max_steps: int = flag(19073, "updates; 19,073 are 10B tokens", minimum=1)
    epochs: float | None = flag(None, "passes over the data, in place of --max_steps", minimum=1e-6)
    max_tokens: float | None = flag(None, "length in tokens: 1e9", minimum=1)
    minutes: float | None = flag(None, "length in time; updates are timed before step 0",
                                 minimum=1e-6)

    optimizer: str = locked("adamw", "muon: for the layers' matrices, AdamW for the rest",
                            group="optimizer", choices=lambda: OPTIMIZERS)
    # Six defaults depend on the optimizer, see OPTIMIZERS.
    max_lr: float | None = flag(None, "peak learning rate: 6e-4, larger models less; muon 4.5e-3",
                                minimum=0)
    min_lr: float | None = flag(None, "final rate: a tenth of --max_lr; muon 0", minimum=0)
    warmup_steps: int | None = flag(None, "715, or a tenth of a shorter run; muon 0", minimum=0)
    schedule: str | None = flag(None, "cosine, or wsd: constant, then linear; muon wsd",
                                choices=lambda: SCHEDULES)
    decay_fraction: float | None = flag(None, "share of the run in which wsd decays: 0.2; muon 0.8",
                                        minimum=0, maximum=1)
    weight_decay: float | None = locked(None, "on matrices, embeddings: 0.1; muon 0.28", minimum=0)
    beta1: float = locked(0.9, "AdamW: first-moment decay", minimum=0, maximum=0.999999)
    beta2: float = locked(0.95, "AdamW: second-moment decay", minimum=0, maximum=0.999999)
    adam_eps: float = locked(1e-8, "AdamW: epsilon", minimum=1e-20)
    grad_clip: float = locked(1.0, "maximum gradient norm; 0: no clipping", minimum=0)

    val_every: int = flag(250, "updates between validations; 0: never", group="evaluation",
                          minimum=0)
    val_tokens: int = flag(10485760, "validation tokens to read", minimum=1)
    hellaswag_every: int = flag(250, "updates between HellaSwag evaluations; 0: never", minimum=0)
    hellaswag_limit: int | None = flag(None, "score only the first N questions", minimum=1)
    hellaswag_path: str | None = flag(None, "HellaSwag's file (default: fetched into --cache_dir)")
    sample_every: int = flag(250, "updates between text samples; 0: never", minimum=0)
    sample_prompt: str | None = flag(None, "text to continue (default: the val split's start)")
    num_samples: int = flag(4, "samples each time", minimum=1)
    sample_tokens: int = flag(32, "tokens per sample", minimum=1)

    checkpoint_every: int = flag(5000, "updates between milestones, all kept; 0: only the last",
                                 group="checkpoints", minimum=0)
    save_minutes: float = flag(10.0, "between rolling checkpoints; 0: none", minimum=0)
    keep_checkpoints: int = flag(2, "rolling checkpoints to keep", minimum=1)
    max_skipped: int = flag(10, "stop after this many skipped updates in a row", minimum=1)

    dist_timeout: float = flag(600.0, "seconds a rank waits for the others", group="machine",
                               minimum=1)
    device: str = flag("auto", "CUDA, MPS, else the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "bfloat16 where it is fast",
                      choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = flag(True, "torch.compile, where a compiler is found")
    memory_budget: float = flag(1.0, "below 1: recompute some activations", minimum=0, maximum=1)
    profile: int = flag(0, "updates to profile, from the third on; 0: none", minimum=0)

    tracker: str = flag("none", "where metrics go besides --log_dir", group="tracking",
                        choices=("none", "wandb", "trackio"))
    wandb_project: str = flag("gpt2", "tracker project name")

    def __init__(self, **given):
        """A value that is not given is the preset's, else the default. `UserError` for bad ones."""
        vars(self).update(resolve(type(self), given))  # the class is frozen

    @classmethod
    def from_preset(cls, name="auto", **overrides):
        """A preset's config, `overrides` on top. `UserError` for unknown names and bad values."""
        return cls(**{**overrides, "preset": name})

    @classmethod
    def values_for(cls, asked):
        """All fields' values, {name: value}: as `asked` for, else the preset's, else the default.
        What follows from another value (a rate from the model, say) follows from the one that won.
        """
        default = "gpt2" if "model" in asked else None  # a named size has GPT-2's vocabulary
        name, vocabulary = asked.get("preset"), asked.get("tokenizer", default)
        preset = PRESETS.get(name, {}) | PRESET_VARIANTS.get((name, vocabulary), {})
        optimizer = asked.get("optimizer", preset.get("optimizer", cls.optimizer))
        kept = set(preset)
        if "model" in asked and "n_layer" in preset:  # a preset's rate is tuned for its shape
            kept -= {"n_layer", "n_head", "n_embd", "max_lr", "tokenizer"}
        if "optimizer" in preset and optimizer != preset["optimizer"]:  # ... and its optimizer
            kept -= {"max_lr", "min_lr", "schedule", "decay_fraction", "weight_decay"}
        recipe = OPTIMIZERS[optimizer]
        # min_lr follows max_lr: its share of it is kept
        share = preset["min_lr"] / preset["max_lr"] if "min_lr" in kept else recipe.min_lr_share

        values = {f.name: f.default for f in fields(cls)}
        values |= {name: preset[name] if name != "min_lr" else None for name in kept} | asked
        defaults = dict(zip(("n_layer", "n_head", "n_embd", "max_lr"), MODELS[values["model"]]))
        defaults |= {name: value for name, value in recipe._asdict().items() if value is not None}
        defaults["warmup_steps"] = min(recipe.warmup_steps, values["max_steps"] // 10)
        values |= {name: defaults.get(name) for name, value in values.items() if value is None}
        if values["min_lr"] is None:
            values["min_lr"] = share * values["max_lr"]
        if values["min_lr"] > values["max_lr"]:
            whose = "" if "max_lr" in asked else f" of preset {values['preset']}"
            raise UserError(f"--min_lr {values['min_lr']:g} is above --max_lr "
                            f"{values['max_lr']:g}{whose}: lower it")
        return values


PRESETS = {  # differences from the defaults above, which are the preset gpt2
    "gpt2": {"sample_prompt": "Hello, I'm a language model,"},
    "tiny": {
        "data": "input.txt", "tokenizer": "4096", "n_layer": 4, "n_head": 3, "n_embd": 192,
        "seq_len": 64, "total_batch_size": 1024, "max_steps": 300, "optimizer": "muon",
        "max_lr": 8e-3, "min_lr": 0.0, "warmup_steps": 10, "schedule": "cosine",
        "weight_decay": 0.1, "val_every": 75, "val_tokens": 65536, "hellaswag_every": 0,
        "sample_every": 75, "num_samples": 1, "sample_tokens": 64, "checkpoint_every": 0,
        "save_minutes": 0.5,
    },
    "finetune": {
        "init_from": "gpt2", "dropout": 0.1, "total_batch_size": 16 * 1024, "max_steps": 5000,
        "max_lr": 1e-5, "warmup_steps": 100, "hellaswag_every": 0, "checkpoint_every": 1000,
    },
}

PRESET_VARIANTS = {  # (preset, tokenizer): what that vocabulary changes in the preset
    ("tiny", "gpt2"): {
        "n_head": 4, "n_embd": 256, "seq_len": 256, "total_batch_size": 2048, "max_steps": 75,
        "min_lr": 8e-4, "warmup_steps": 5, "val_every": 25, "sample_every": 25,
    },
}


# === Model ========================================================================================
# GPT-2 as released (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, biases, a
# tied head, OpenAI's parameter names. Shapes: B rows (sequences) of T tokens, C = n_embd, nh heads
# of size hs = C / nh, V = vocab_size.


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2, by default 124M's. An impossible one raises `UserError`."""

    block_size: int = flag(1024, "longest context, tokens", minimum=1)
    vocab_size: int = flag(tokenizer.VOCAB_SIZE, "token ids", minimum=1)
    n_layer: int = flag(12, "blocks", minimum=1)
    n_head: int = flag(12, "attention heads per block", minimum=1)
    n_embd: int = flag(768, "width of the residual stream", minimum=1)
    dropout: float = flag(0.0, "probability", minimum=0, maximum=0.99)

    def __post_init__(self):
        check_fields(self)
        if self.n_embd % self.n_head:
            fit = max(h for h in range(1, self.n_head + 1) if self.n_embd % h == 0)
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                            f"take {fit}")

    @property
    def padded_vocab_size(self):
        """Rows of `wte`: the vocabulary rounded up to a multiple of 128, for tensor cores."""
        return -(-self.vocab_size // 128) * 128


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.split_sizes = [config.n_embd] * 3  # rows of c_attn: q, k, v in one product
        self.c_attn = nn.Linear(config.n_embd, sum(self.split_sizes))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(self.split_sizes, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache(k, v)  # (B, nh, T, hs) in, (B, nh, all so far, hs) out
        # Causal unless the caller masks. One token over a cache may attend to every key; several
        # need a mask, or they would see one another's future.
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
        self.tokenizer = None  # a `tokenizer.Tokenizer`, None for GPT-2's; not in the state dict
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # and, tied, the head
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.reset_pad_bias()
        self.init_weights(seed)

    def reset_pad_bias(self):
        """`pad_bias`: 0, and -inf for the padding's logits. fp32; not in the state dict."""
        bias = torch.zeros(self.config.padded_vocab_size)
        bias[self.config.vocab_size :] = -math.inf
        self.register_buffer("pad_bias", bias, persistent=False)

    def init_weights(self, seed):
        """Initialise every parameter: weights N(0, 0.02^2), biases 0, gains 1, fixed by `seed`.

        The two projections per layer into the residual stream are scaled by 1/sqrt(2 n_layer), so
        that its variance does not grow with depth (Radford et al. 2019, 2.3). Raises `UserError`
        for a parameter that no rule covers.
        """
        parameters = [(name, p) for name, p in self.named_parameters() if not p.is_meta]
        seeds = [derive_seed(seed, i) for i in range(len(parameters))]
        with ThreadPool(cores()) as pool:  # one after another, 124M normals take a second
            list(pool.map(self._init_parameter, parameters, seeds))

    @torch.no_grad()
    def _init_parameter(self, named, seed):
        name, p = named
        if name.endswith("bias"):
            p.zero_()
        elif ".ln_" in name:
            p.fill_(1.0)
        elif p.dim() != 2 or not name.endswith(".weight"):  # a gain under another name, say
            raise UserError(f"no rule initialises {name}, of shape {tuple(p.shape)}: add one to "
                            "GPT._init_parameter")
        else:
            scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
            p.normal_(0.0, 0.02 * scale, generator=torch.Generator().manual_seed(seed))
        if name.endswith("wte.weight"):
            p[self.config.vocab_size :] = 0.0  # padding ids have probability 0: the rows stay 0

    def num_parameters(self):
        """Parameter count, without the rows that pad the vocabulary."""
        padding = self.transformer.wte.weight[self.config.vocab_size :]
        return sum(p.numel() for p in self.parameters()) - padding.numel()

    def flops_per_token(self, T):
        """FLOPs per token, forward and backward, at length `T`: 6 per weight in a matrix product,
        and 12 C T per layer for attention's two, causal or not (Chowdhery et al. 2022, B)."""
        looked_up = sum(p.numel() for name, p in self.named_parameters() if ".wpe." in name)
        multiplied = self.num_parameters() - looked_up  # and biases and norms, which are few
        return 6 * multiplied + 12 * self.config.n_layer * self.config.n_embd * T

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Final hidden states (B, T, C), after the last norm, of token ids `idx` (B, T) int64.

        `pos` (T,) or (B, T): positions, 0..T-1 by default. `mask`, broadcastable to (B, nh, T, all
        keys) bool, True where a query may attend; causal by default. `cache`: a callable per layer,
        which takes a layer's new keys and values (B, nh, T, hs) and returns all of them so far.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        if torch.is_autocast_enabled(x.device.type):  # a 16-bit residual stream: half the traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[layer])
        return self.transformer.ln_f(x.to(self.transformer.ln_f.weight.dtype))  # fp32 from here

    def logits(self, hidden, head=None):
        """Logits (..., V) of hidden states (..., C): plain, or by `head`, see `centered_head`."""
        head = self.transformer.wte.weight if head is None else head
        return F.linear(hidden.to(head.dtype), head)[..., : self.config.vocab_size]

    def centered_head(self):
        """`wte` minus its mean row (padded V, C), used wherever a softmax follows.

        A softmax ignores a constant added to all logits; rounding does not. OpenAI's weights put
        logits near -100, where bf16 has steps of 0.5. `detach` leaves the gradient exact, because
        the gradients of a softmax loss sum to 0 over the vocabulary. subtle: autocast caches only
        its casts of parameters, so cast here: once, however many tokens use the result.
        """
        wte = self.transformer.wte.weight
        head = wte - wte[: self.config.vocab_size].mean(dim=0).detach()
        autocast = torch.is_autocast_enabled(wte.device.type)
        return head.to(torch.get_autocast_dtype(wte.device.type)) if autocast else head

    def forward(self, idx, targets=None):
        """`(logits, None)` with logits (B, T, V), or with `targets` (B, T) `(None, loss)`.

        The loss is the mean cross-entropy in nats over the targets that are not -100, a scalar in
        fp32. Only one of the two is computed, so no caller keeps the (B, T, V) logits of training.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens exceed the context of {self.config.block_size}: crop them")
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden), None
        # subtle: logits[:, :50257] would take 9 of 142 ms on an H100, since rows of 50,257 are
        # misaligned. Adding -inf fuses for free; as F.linear's bias it costs a CPU an extra pass.
        logits = F.linear(hidden, self.centered_head()).float() + self.pad_bias
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None):
        """Continue `idx` (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens) int64.

        Temperature 0 is greedy. `generator`, on the device of `idx`, replaces the global RNG. Past
        the context only the last `block_size` tokens are seen. Call `eval()` first: dropout is not
        switched off. `sample.py` does the same with a key-value cache, faster.
        """
        head = self.centered_head()
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx[:, -self.config.block_size :])
            logits = self.logits(hidden[:, -1], head)
            token = pick_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
        return idx

    @classmethod
    def from_state_dict(cls, config, tensors, tokenizer=None):
        """A model of `config` (`GPTConfig` or its dict) that takes over `tensors`, as fp32;
        `UserError` naming the tensor if one does not fit."""
        config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        with torch.device("meta"):
            model = cls(config)
        convert.check_shapes(tensors, model.state_dict())
        model.reset_pad_bias()  # it was on the meta device too
        if any(b.is_meta for name, b in model.named_buffers() if name not in tensors):
            model = cls(config)  # slower, but buffers that are not saved must be made for real
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        model.tokenizer = tokenizer
        return model.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """OpenAI's weights by name (`gpt2` ... `gpt2-xl`), a Hugging Face folder, a checkpoint."""
        found = convert.read_source(name_or_folder)
        config = {**found.config, "dropout": dropout}
        with checkpoint.naming(name_or_folder):
            model = cls.from_state_dict(config, found.tensors, found.tokenizer)
        if found.checkpoint:
            checkpoint.check_probe(model, found.checkpoint, found.path)
        return model

    from_checkpoint = from_pretrained  # a file, or a log folder's newest: `convert.read_source`

    def save_pretrained(self, folder, weights=None, card=None, step=None):
        """Write a folder that transformers opens; `UserError` if this model is no longer GPT-2."""
        convert.export(self, folder, weights, card, step)


def pick_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token id per row, (B, 1) int64, from next-token `logits` (B, V).

    Temperature 0 is greedy. `top_k` keeps the k most likely tokens, `top_p` the fewest whose
    probabilities reach p (nucleus sampling, Holtzman et al. 2020). `FloatingPointError` for nan.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the model computes logits that are not finite")
    if temperature < 1e-6:  # as good as 0, and 1 / temperature might not be finite
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature
    if top_k is not None:
        values, kept = logits.topk(min(top_k, logits.size(-1)))  # exactly k, even with ties
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, values)
    if top_p is not None:
        values, order = logits.sort(dim=-1, descending=True)
        probs = values.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # the tokens before this one already reach p
        beyond[:, 0] = False
        logits = logits.scatter(-1, order, values.masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


# === Optimizer and schedule =======================================================================


def lr_at(step, cfg):
    """Learning rate for the update from `step` to `step + 1`: linear warmup to `max_lr`, then the
    schedule, from `max_lr` down to `min_lr` at `max_steps`."""
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
    """How far `step` is from `start` (0) to `end` (1), clamped."""
    return min(1.0, max(0, step - start) / max(1, end - start))


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def decay_groups(model, cfg, exclude=()):
    """Groups of parameters not in `exclude`: only matrices and embeddings are decayed."""
    parameters = [p for name, p in model.named_parameters() if name not in exclude]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(model, cfg, exclude=()):
    groups, betas = decay_groups(model, cfg, exclude), (cfg.beta1, cfg.beta2)
    return {"adamw": torch.optim.AdamW(groups, cfg.max_lr, betas, cfg.adam_eps, fused=True)}


def make_muon(model, cfg):
    """Muon for the blocks' matrices, AdamW for everything else. Both share one rate and decay."""
    matrices = {name: p for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    stacked = [p for name, p in matrices.items() if ".c_attn." in name]
    groups = [{"sizes": None, "params": [p for n, p in matrices.items() if ".c_attn." not in n]}]
    if stacked:  # c_attn is q, k and v: each is made orthogonal on its own
        groups += [{"sizes": model.transformer.h[0].attn.split_sizes, "params": stacked}]
    dtype = machine.fast_matmul_dtype(next(model.parameters()).device)
    return {**make_adamw(model, cfg, exclude=matrices),
            "muon": Muon(groups, cfg.max_lr, cfg.weight_decay, dtype)}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each update of a matrix is its momentum, made orthogonal, scaled
    to match AdamW's (Liu et al. 2025, section 2.2), so that one rate serves both. A parameter of a
    group with `sizes` is several matrices stacked, with those numbers of rows."""

    def __init__(self, groups, lr, weight_decay, dtype, momentum=0.95):
        self.dtype = dtype  # of the matrix products
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if group["sizes"] and sum(group["sizes"]) != p.size(0):
                    raise UserError(f"Muon: a matrix of {p.size(0)} rows does not consist of "
                                    f"{group['sizes']} rows: correct split_sizes")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            of_shape = {}  # {shape: [(matrix, its change)]}: equal shapes are multiplied together
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov look-ahead
                p.mul_(1 - lr * group["weight_decay"])
                sizes = group["sizes"] or [p.size(0)]
                for weight, change in zip(p.split(sizes), update.split(sizes)):
                    of_shape.setdefault(weight.shape, []).append((weight, change))
            for shape, pairs in of_shape.items():
                changes = orthogonalize(torch.stack([change for _, change in pairs]), self.dtype)
                for (weight, _), change in zip(pairs, changes):
                    weight.add_(change, alpha=-lr * 0.2 * math.sqrt(max(shape)))


def orthogonalize(matrices, dtype):
    """Nearly U V^T of each U S V^T, (n, rows, columns): five of Jordan's Newton-Schulz steps."""
    x = matrices.to(dtype)
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if is_tall else x


class Recipe(NamedTuple):
    """An optimizer, and its defaults for flags not given. An entry lists only what differs."""

    make: Callable  # make(model, cfg) -> {name: torch optimizer}
    max_lr: float | None = None  # None: the model's, see MODELS
    min_lr_share: float = 0.1  # of max_lr
    warmup_steps: int = 715  # at most: a tenth of a shorter run
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.1


OPTIMIZERS = {
    "adamw": Recipe(make_adamw),
    "muon": Recipe(make_muon, max_lr=4.5e-3, min_lr_share=0.0, warmup_steps=0, schedule="wsd",
                   decay_fraction=0.8, weight_decay=0.28),
}


# === Data =========================================================================================


class DataLoaderLite:
    """This rank's micro-batches, starting at a global `position`.

    `position` counts the sequences handed out since step 0, over all ranks. With W ranks, each call
    takes the next W * B: rank r gets [position + r * B, position + (r + 1) * B). A step therefore
    reads the same sequences for any number of ranks and any micro-batch size, and a resume needs
    only this integer. Reads run `ahead` micro-batches in advance; the last step waited `seconds`
    for them. Of the last batch's targets `counted` are not -100: all, unless prompts are masked.
    """

    def __init__(self, data, B, T, *, split="train", rank=0, world_size=1, seed=1337, shuffle=True,
                 position=0, ahead=1, device="cpu"):
        self.shards = data if isinstance(data, Shards) else Shards(find_shards(data, split), T)
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.shuffle, self.position = seed, shuffle, position
        self.seconds, self.counted, self._staged = 0.0, B * T, None
        self._read_position = position  # the position up to which reads were started
        self._reads = ReadAhead(self.shards, self._next_ids, max(1, ahead))
        self._to_device = DeviceCopies((B, T + 1), torch.uint16, torch.device(device))
        self._mask_to_device = DeviceCopies((B, T), torch.bool, torch.device(device))

    def sequence_ids(self, position, count):
        """Sequences, as `Shards` numbers them, that positions [position, position + count) read."""
        seed = self.seed if self.shuffle else None
        return sequence_ids(len(self.shards), position, count, seed)

    def _next_ids(self):
        """The sequences of this rank's next micro-batch to be read."""
        position = self._read_position + self.rank * self.B
        self._read_position += self.world_size * self.B
        return self.sequence_ids(position, self.B)

    def batches(self, count):
        """The next `count` micro-batches, as `next_batch` returns them.

        By the time the caller asks for the next one, it has queued its work on the current one; the
        transfer overlaps it, including that of the next step's first.
        """
        for _ in range(count):
            yield self.next_batch()
            self._stage()
        self.seconds, self._reads.seconds = self._reads.seconds, 0.0  # what `error` waited, too

    def next_batch(self):
        """Inputs and targets, (B, T) int64 each, on the device; targets are one token further, or
        -100 where they do not count. Raises `UserError` for data that cannot be read.
        """
        self._stage()
        if self._staged is None:
            raise self.error(1)
        (x, y, self.counted), self._staged = self._staged, None
        self.position += self.world_size * self.B
        return x, y

    def error(self, count):
        """The `UserError` of reading the next `count` micro-batches, None if all of them are here.
        Asked before an update, so that no rank has begun it when another one cannot."""
        return self._reads.error(count - (self._staged is not None))

    def _stage(self):
        """Send the next micro-batch on its way to the device, unless it already is."""
        if self._staged is not None or (batch := self._reads.next()) is None:
            return
        tokens, counts = batch
        ids = self._to_device(torch.from_numpy(tokens)).to(torch.int64)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].clone()  # callers may write into y
        if not counts.all():
            y.masked_fill_(self._mask_to_device(torch.from_numpy(~counts)), -100)
        self._staged = x, y, int(counts.sum())

    def close(self):
        self._reads.close()


# === State ========================================================================================


@dataclass
class TrainState:
    """What a run resumes from: the fields are the keys of a checkpoint, which saves, checks and
    restores what is listed here. Objects with a `state_dict` are saved through it, also in dicts.

    A default is what an older checkpoint without the key means. If it must be computed (an average
    of the weights begins as the model), set it in `build`: a restore leaves it alone then.
    """

    model: GPT  # never compiled or wrapped
    optimizer: dict  # {name: optimizer}
    scaler: torch.amp.GradScaler
    step: int = 0  # completed updates
    val_loss: float | None = None  # of the model as it is now, if it was measured
    best_val_loss: float | None = None
    best_id: str | None = None  # of best.pt, see `checkpoint.contents_id`
    skipped_in_a_row: int = 0
    tracker_id: str | None = None


@dataclass
class Run:
    """Everything that evaluation and training share."""

    cfg: TrainConfig
    rt: Runtime
    state: TrainState
    loader: DataLoaderLite
    log: runlog.RunLog
    compiled: nn.Module  # `state.model`, compiled: for validation, always at one shape
    model: nn.Module  # what trains: `compiled`, wrapped in DDP if there are several ranks
    val_shards: Shards | None  # None: not validated
    benchmark: hellaswag.Benchmark | None
    hashes: BackgroundHashes | None = None  # of the data; on rank 0
    saved_as: tuple | None = None  # (path, step) of the checkpoint that was read or written last
    saved_at: float = 0.0  # when it was written, by rank 0's clock
    tried_at: int | None = None  # step of the last attempt to write one

    @property
    def micro_batch_size(self):
        return self.loader.B

    @property
    def micro_steps(self):
        """Micro-batches that a rank trains on in one update."""
        rows = self.cfg.total_batch_size // self.cfg.seq_len
        return rows // (self.rt.world_size * self.micro_batch_size)

    def error(self):
        """What would make this rank fail in the next update, a `UserError` or None. All ranks
        agree on it first, so that none begins an update that another one cannot make."""
        known = self.log.error or (self.hashes and self.hashes.error())
        is_last = self.state.step >= self.cfg.max_steps
        return known or (None if is_last else self.loader.error(self.micro_steps))

    @functools.cached_property
    def not_gpt2(self):
        """Why transformers could not open an export of this model, None if it can."""
        return convert.why_not_gpt2(self.state.model, tokens=8)


# === Evaluation ===================================================================================
# None of these touches the training RNG or loader; afterwards the model is in training mode again.


def open_eval_data(plan, cfg, rt):
    """(validation shards, HellaSwag) as planned, None for what is not. Says what they are."""
    shards, benchmark, own = None, None, plan.tokenizer
    if plan.val_files:
        # with its partial last sequence: the same text for all vocabularies (but never GPT-2's)
        shards = Shards(plan.val_files, cfg.seq_len, own.size, with_tail=own.json is not None,
                        masked=cfg.loss_on == "completion", most=cfg.val_tokens // cfg.seq_len)
        rt.print(runlog.describe_validation(shards, cfg))
    if plan.benchmark:
        benchmark = hellaswag.load(plan.benchmark, block_size=cfg.seq_len, device=rt.device,
                                   limit=cfg.hellaswag_limit, own=own)
        rt.print(str(benchmark))
    return shards, benchmark


@torch.no_grad()
def validate(run, shards):
    """{"loss": nats per token, "bits_per_byte": ..., "tokens": ...} over all of `shards`.

    Bits per byte compares tokenizers: total nats / ln 2 / bytes of the targets' text, in which
    <|endoftext|> counts 0 bytes. Ranks and batch size change neither, but for rounding. Positions
    past the end are masked, not dropped, so that the compiled model sees one shape. `bytes` and
    `text_sha256` say on which text: results on other text are not comparable. Where only
    completions count, all of these are about them, and `counted` is the number of their tokens.
    """
    rt, cfg, model, B = run.rt, run.cfg, run.state.model, run.micro_batch_size
    loader = DataLoaderLite(shards, B, cfg.seq_len, rank=rt.rank, shuffle=False,
                            world_size=rt.world_size, ahead=4, device=rt.device)
    lengths = torch.tensor(tokenizer.of(model).byte_lengths, device=rt.device)  # (V,)
    nats, tokens, text_bytes = 0.0, 0, 0
    model.eval()
    try:
        for start in range(0, len(shards), rt.world_size * B):
            rt.raise_if_stopped(loader.error(1))
            x, y = loader.next_batch()
            y[max(0, len(shards) - start - rt.rank * B) :] = -100
            counted = y >= 0
            count = counted.sum().item()
            text_bytes += lengths[y[counted]].sum().item()
            tokens += count
            if count:
                with rt.autocast():
                    _, loss = run.compiled(x, y)
                # .item() at once: a tensor kept per batch would fragment memory on a CPU
                nats += loss.item() * count
        nats, tokens, text_bytes = rt.sum([nats, tokens, text_bytes])
        sha256 = shards.text_sha256(tokenizer.of(model)) if rt.rank == 0 else None
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
                "tokens": int(tokens), "bytes": int(text_bytes), "text_sha256": sha256,
                **({"counted": int(tokens)} if shards.masked else {})}
    finally:
        loader.close()
        model.train()


def is_due(run, kind, every):
    """Whether it is time for an evaluation that was not already done before a resume."""
    step = run.state.step
    at_this_step = every and (step % every == 0 or step >= run.cfg.max_steps)
    return at_this_step and not run.log.has(step, kind)


def evaluate(run):
    """Evaluate what is due at this step and log it; at step 0, only the validation loss."""
    cfg, step = run.cfg, run.state.step
    if run.val_shards and is_due(run, "val", cfg.val_every):
        log_validation(run)
    if step and run.benchmark and is_due(run, "hella", cfg.hellaswag_every):
        log_hellaswag(run)
    if step and is_due(run, "sample", cfg.sample_every):
        started = time.perf_counter()
        texts = run.rt.on_rank0(write_samples, run)
        run.log.write(step, "sample", texts=texts, seconds=time.perf_counter() - started)
    runlog.draw_curves(run)  # no-op unless due


def log_validation(run):
    state, started = run.state, time.perf_counter()
    figures = validate(run, run.val_shards)
    seconds = time.perf_counter() - started
    state.val_loss = figures["loss"]
    best = math.inf if state.best_val_loss is None else state.best_val_loss
    if state.val_loss < best:  # never for nan
        state.best_val_loss = state.val_loss
        if run.cfg.init_from != "scratch" and state.step and not run.cfg.eval_only:
            checkpoint.save(run, "best.pt")  # before the log: a kill in between redoes both
    run.log.write(state.step, "val", **figures, seconds=seconds)


def log_hellaswag(run):
    """Score HellaSwag over all ranks, see `hellaswag.evaluate`, and log the shares."""
    rt, started = run.rt, time.perf_counter()
    counts = hellaswag.evaluate(run.state.model, run.benchmark, device=rt.device,
                                autocast=rt.autocast, rank=rt.rank, world_size=rt.world_size,
                                check_stop=rt.raise_if_stopped)
    counts = dict(zip(counts, rt.sum(list(counts.values()))))
    shares = {name: counts[name] / counts["questions"] for name in hellaswag.VARIANTS}
    run.log.write(run.state.step, "hella", **shares, questions=counts["questions"],
                  questions_sha256=run.benchmark.sha256, seconds=time.perf_counter() - started)


# === Training =====================================================================================


@machine.explain_out_of_memory("the model, its gradients and its optimizer")
def build(plan, rt):
    """Build (cfg, state) on the device: from scratch, from weights or from a checkpoint. Weights
    set cfg's `n_layer`, `n_head` and `n_embd`; `UserError` if they do not fit."""
    cfg, saved = plan.cfg, plan.take_checkpoint()
    names = [f.name for f in fields(GPTConfig) if hasattr(cfg, f.name)]
    if saved:
        with checkpoint.naming(plan.checkpoint_path):
            config = {**saved["config"], "dropout": cfg.dropout}
            model = GPT.from_state_dict(config, saved["model"], plan.tokenizer)
    elif cfg.init_from == "scratch":
        shape = {name: getattr(cfg, name) for name in names}
        model = GPT(GPTConfig(cfg.seq_len, plan.tokenizer.size, **shape), cfg.seed)
        model.tokenizer = plan.tokenizer
    else:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout)
        convert.check_trainable(asdict(model.config), cfg.init_from, cfg.seq_len, model.tokenizer)
        check_shape(cfg, asdict(model.config), cfg.init_from)
        cfg = settle(cfg, **{name: getattr(model.config, name) for name in names})
    model.to(rt.device).train()
    optimizers = OPTIMIZERS[cfg.optimizer].make(model, cfg)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    state = TrainState(model, optimizers, scaler)
    if saved:
        with checkpoint.naming(plan.checkpoint_path):
            checkpoint.restore(state, saved)
        if rt.rank == 0:
            checkpoint.check_probe(model, saved, plan.checkpoint_path)
    return cfg, state


def find_micro_batch(model, compiled, cfg, rt):
    """Rows per forward pass: as given, or the most that fit one real step. Compiles on the way."""
    # more than 65,536 tokens gain nothing on CUDA, and a CPU's caches hold at most 4,096
    largest = (65536 if rt.device.type == "cuda" else 4096) // cfg.seq_len
    rows_per_rank = cfg.total_batch_size // cfg.seq_len // rt.world_size
    sizes = [b for b in divisors(rows_per_rank) if b <= largest] or [1]
    B = cfg.micro_batch_size or sizes[-1]
    while not fits(model, compiled, B, cfg, rt):  # on all ranks alike
        smaller = [b for b in sizes if b <= B // 2]
        if cfg.micro_batch_size or not smaller:
            rt.fail(f"out of memory at --micro_batch_size {B}, a forward and backward pass of {B} "
                    f"x {cfg.seq_len} tokens: lower it, or --seq_len, or the model's size")
        B = smaller[-1]
    return B


def train_step(run):
    """One update over `total_batch_size` tokens. Returns the values of its row in the log.

    The loss is in nats per token that counts; the norm is before clipping. If either is not finite,
    all ranks skip the update. It still counts as a step, and its data is not read again.
    """
    cfg, rt, state = run.cfg, run.rt, run.state
    lr = lr_at(state.step, cfg)
    for optimizer in state.optimizer.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
    micro_steps = run.micro_steps
    total, counted = torch.zeros((), device=rt.device), 0
    for micro_step, (x, y) in enumerate(run.loader.batches(micro_steps)):
        counted += run.loader.counted
        if not run.loader.counted:
            y[0, 0] = 0  # subtle: the mean over no targets is nan; the weight below is 0
        if cfg.dropout:  # seeded for every micro-batch, so that a resume draws the same masks
            index = micro_step * rt.world_size + rt.rank
            torch.manual_seed(derive_seed(cfg.seed, state.step, index))
        # All-reduce the gradients once per update, in the last micro-step. subtle: DDP decides that
        # in the forward pass, so the forward pass must be inside the context too.
        with rt.sync_gradients(run.model, enabled=micro_step == micro_steps - 1):
            with rt.autocast():
                _, loss = run.model(x, y)
            # Gradients accumulate over micro-steps. Each loss is a mean over its micro-batch. Times
            # the share that counts, over micro_steps, they sum to the step's nats over its tokens.
            loss = loss * (run.loader.counted / y.numel()) / micro_steps
            state.scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in state.optimizer.values():
        state.scaler.unscale_(optimizer)
    if run.loader.shards.masked:  # from the mean over all tokens to that over those that count
        counted = int(rt.sum([counted])[0])
        weight = cfg.total_batch_size / max(1, counted)
        total *= weight
        for p in state.model.parameters():
            p.grad *= weight
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)

    # Wait for the device. `total` is this rank's share: average it over ranks. DDP has averaged the
    # gradients, so the norms should agree; averaging them too gives all ranks the same number, so
    # that either all of them take the update or none does.
    loss, norm = rt.mean(torch.stack((total, norm)).tolist())
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    row = {"loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}  # add a metric here
    if not skipped:
        for optimizer in state.optimizer.values():
            state.scaler.step(optimizer)
    state.scaler.update()
    state.model.zero_grad()

    state.step += 1
    state.val_loss = None  # it belonged to the previous weights
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    return row


def train(cfg):
    """Train as `cfg` says, from step 0 or from a checkpoint, until `max_steps`.

    Returns a dict: "model", and (steps, values) under "train", "val", "hella", "bits_per_byte".
    Raises `UserError` for a user's mistake, and `SystemExit(128 + N)` after signal N, once saved.
    """
    began = time.perf_counter()
    with Runtime(*rank_from_environment(), cfg.dist_timeout) as rt, ExitStack() as cleanup:
        # 1. Plan: resume point, preset, data, batch. Skip this on a first reading. (on_rank0: rank
        # 0 does it for all; on_all: every rank does it; an error on any of them ends all.)
        if "log_dir" not in cfg.asked:
            cfg = settle(cfg, log_dir=rt.on_rank0(rundir.log_dir_of, cfg.resume, cfg.log_dir))
        if not cfg.eval_only:
            rt.on_rank0(cleanup.enter_context, rundir.lock(cfg.log_dir))
        plan = rt.on_rank0(make_plan, cfg, rt.world_size, hellaswag.fetch, TrainState,
                          convert.tokenizer_of)
        cfg = plan.cfg
        rt.on_all(rt.choose_for, cfg)
        cleanup.enter_context(rt.keep_random_state())
        rt.on_all(plan.check, rt)

        # 2. Model, data, micro-batch. state.model is plain, `compiled` validates, `model` trains.
        cfg, state = rt.on_all(build, plan, rt)
        resumed_at = state.step if plan.checkpoint_path else None
        compiled = torch.compile(state.model, dynamic=False) if rt.compile else state.model
        rt.print(plan.announcement(rt))
        shards = rt.on_all(Shards, plan.train_files, cfg.seq_len, plan.tokenizer.size, False,
                           cfg.loss_on == "completion")
        cleanup.callback(shards.close)
        val_shards, benchmark = rt.on_all(open_eval_data, plan, cfg, rt)
        if val_shards:
            cleanup.callback(val_shards.close)
        start_seconds, compile_began = time.perf_counter() - began, time.perf_counter()
        B = find_micro_batch(state.model, compiled, cfg, rt)
        compile_seconds = time.perf_counter() - compile_began  # finding the micro-batch compiles
        model = rt.data_parallel(compiled)  # one graph: gradients are reduced after all of backward

        # 3. The data and the log. An old run's files are moved aside first.
        sequences = cfg.total_batch_size // cfg.seq_len  # a step
        loader = DataLoaderLite(
            shards, B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size, seed=cfg.seed,
            shuffle=cfg.shuffle, position=state.step * sequences, device=rt.device,
            ahead=sequences // (rt.world_size * B))  # a step's micro-batches
        cleanup.callback(loader.close)
        log = cleanup.enter_context(runlog.RunLog(cfg, rt, curves))
        run = Run(cfg, rt, state, loader, log, compiled, model, val_shards, benchmark)
        if cfg.eval_only:  # nothing is written
            log_validation(run)
            if benchmark:
                log_hellaswag(run)
            return log.history | {"model": state.model}
        if not cfg.max_steps:  # --minutes: not known yet
            steps, note = steps_in(cfg.minutes, run, validate)
            run.cfg = log.cfg = cfg = follow(cfg, max_steps=steps)
            rt.print("\n".join([note, *describe_length(cfg, plan.train_files)]))
        run.hashes = start_hashing(run, plan.saved_data, cleanup)
        cleanup.enter_context(rt.catch_signals())
        runlog.open_log(run, plan, {"start": start_seconds, "compile": compile_seconds})

        # 4. The loop: evaluations that are due, the checkpoint that is due, one update.
        gc.collect()
        gc.freeze()  # long-lived objects: do not scan them again and again
        cleanup.callback(gc.unfreeze)  # a notebook keeps running afterwards
        runlog.start_bar(run)
        profile = Profile(cfg.profile, cfg.log_dir, rt)
        cleanup.callback(profile.close)
        run.saved_at, step_began = rt.clock(), time.perf_counter()
        try:
            while True:  # left in the middle, so that the last step is evaluated and saved too
                rt.raise_if_stopped(run.error())
                paused = time.perf_counter()
                evaluate(run)
                checkpoint.save_if_due(run)
                if state.step >= cfg.max_steps:
                    break
                profile.step(state.step - log.first_step)
                step_began += time.perf_counter() - paused  # evaluating and saving do not count
                stats = train_step(run)
                now = time.perf_counter()
                runlog.log_update(run, stats, now - step_began)
                step_began = now
        except AgreedError:
            checkpoint.rescue(run)
            raise
        except Stopped as stop:
            checkpoint.save(run, checkpoint.rolling_name(state.step), required=True)
            log.close_bar()
            rt.print(f"stopped by {stop} at step {state.step}, saved; resume with: "
                     f"{commands.resume(cfg.log_dir)}")
            raise SystemExit(128 + stop.signal) from None
        except torch.OutOfMemoryError:
            raise UserError(commands.after_out_of_memory(cfg.log_dir, B)) from None

        # 5. hf/, the last curves, the summary.
        rt.on_rank0(runlog.export, run, convert.holds)
        runlog.draw_curves(run, last=True)
        runlog.last_words(run, resumed_at, time.perf_counter() - began)
        return log.history | {"model": state.model}


# === CLI ==========================================================================================


def main(argv=None):
    """The command: parse `argv`, train, return the exit status."""
    train(parse_args(TrainConfig, PRESETS, argv, rank_from_environment()[0], (
        "Train GPT-2. Without flags: the 124M model on edu_fineweb10B/ if it is there, else a "
        "small one on input.txt. In brackets: the default, and those of other presets.")))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
