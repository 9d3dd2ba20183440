"""Placeholder head while the trainer is being written: the Model section is final, the rest follows."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from common import UserError

VOCAB_SIZE = 50257

# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
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
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: n_head {fit} would be")

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

        Projections into the residual stream, of which there are two a layer, are scaled by 1/sqrt(2 n_layer), so
        that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
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
            self.transformer.wte.weight[self.config.vocab_size :] = 0.0  # padding: in no softmax, never trained

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Final hidden states (B, T, C), normed, of token ids `idx` (B, T) int64.

        `pos` (T,) or (B, T): positions, 0..T-1 unless given. `mask`, broadcastable to (B, nh, T, all keys) bool,
        True where a query may look; causal unless given. `cache`: one callable a layer, which takes a layer's new
        keys and values (B, nh, T, hs) and returns all there are.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, cache[layer] if cache is not None else None)
        return self.transformer.ln_f(x)

    def logits(self, hidden):
        """Scores (..., V) of the next token from hidden states (..., C): the tied head without the padded rows."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """`(logits, None)` with logits (B, T, V), or with `targets` (B, T) `(None, loss)`.

        The loss is the mean cross-entropy in nats over the targets that are not -100, a scalar in fp32. The two
        never come together, so that under `torch.compile` head and loss are one graph and the logits are not kept.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens a row are more than the model's context of {self.config.block_size}: crop them")
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue `idx` (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens) int64.

        Temperature 0 is greedy. `generator` (on the device of `idx`) makes the draw repeatable and leaves the
        global one alone. Beyond the context the model sees the last `block_size` tokens. `sample.py` does the same
        with a cache, faster.
        """
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx[:, -self.config.block_size :])
            token = pick_token(self.logits(hidden[:, -1]), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
        return idx

    @classmethod
    def from_tensors(cls, config, tensors):
        """A model of `config` (`GPTConfig` or its dict) around `tensors`, its state dict, which are not copied."""
        config = config if isinstance(config, GPTConfig) else GPTConfig(**config)
        with torch.device("meta"):
            model = cls(config)
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        for name, shape in wanted.items():
            if name not in tensors:
                raise UserError(f"tensor {name} of shape {shape} is missing: these are not the weights of this model")
            if tuple(tensors[name].shape) != shape:
                raise UserError(f"tensor {name} has shape {tuple(tensors[name].shape)}: this model needs {shape}")
        if unknown := sorted(set(tensors) - set(wanted)):
            raise UserError(f"tensor {unknown[0]} belongs to no part of this model: is it another architecture?")
        model.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
        return model.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """OpenAI's weights by name (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`), or a Hugging Face folder."""
        import convert

        config, tensors = convert.load(name_or_folder)
        return cls.from_tensors({**config, "dropout": dropout}, tensors)

    from_checkpoint = from_pretrained  # a checkpoint file, or a log folder's newest: `convert.load` tells them apart

    def save_pretrained(self, folder):
        """Write a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` open."""
        import convert

        convert.save(asdict(self.config), self.state_dict(), folder)


def pick_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token id a row, (B, 1) int64, from next-token `logits` (B, V); temperature 0 takes the largest.

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


