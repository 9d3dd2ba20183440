"""A whole update of GPT-2 by the trainer beside the same by its peers, on one device, all compiled.

    python tests/scripts/peers.py                             124M, B 4, T 1024: some minutes on a CPU
    python tests/scripts/peers.py --micro_batch_size 64 --total_batch_size 524288       on a GPU

    ours                   train_gpt2.py's own `train_step`, as bench.py measures it
    tutorial               a plain GPT-2 and loop as build-nanogpt writes them, with 50,304 classes and torch.compile
    tutorial, loss alone   the same, but its model returns the loss alone, not the logits beside it: less memory
    nanoGPT                the tutorial as nanoGPT has it: exact GELU, the next batch fetched behind the forward pass
    transformers           GPT2LMHeadModel and its own loss, compiled, as its user runs it: 50,257 classes
    transformers padded    that with our advantages: 50,304 rows, the loss in the compiled graph, on a CPU the allocator

--env "NAME=VALUE ..." adds a contestant each, ours with these environment variables, to try settings of torch's; and
ours once more as the last one, to see what a minute's drift comes to.
All compute under bf16 autocast, or in fp32 where bf16 is slow. Every contestant does the same work (forward, backward,
clipping at 1, fused AdamW, gradient accumulation, reading its batches) in fresh processes that take turns; medians of
their updates are compared. The table is written to --out after each, so that a limit of time costs the last one.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import bench  # noqa: E402
from harness import machine  # noqa: E402
from harness.cli import UserError, exit_status  # noqa: E402

CONTESTANTS = ("ours", "tutorial", "tutorial, loss alone", "nanoGPT", "transformers", "transformers padded")
PADDED = 50304

# ---------------------------------------------------------------------------------------------------------------
# GPT-2 as the tutorials write it
# ---------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Layer(nn.Module):
    def __init__(self, heads, width, gelu):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(heads, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate=gelu), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Tutorial(nn.Module):
    """Logits and their loss, or the `loss_alone`, over 50,304 classes of which 47 never occur."""

    def __init__(self, layers, heads, width, context, loss_alone, gelu="tanh"):
        super().__init__()
        self.loss_alone = loss_alone
        self.tokens = nn.Embedding(PADDED, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(heads, width, gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PADDED, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self.init)

    def init(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return (None if self.loss_alone else logits), loss


# ---------------------------------------------------------------------------------------------------------------
# transformers' GPT-2
# ---------------------------------------------------------------------------------------------------------------


class Transformers(nn.Module):
    """GPT2LMHeadModel without dropout and cache. `padded`: 50,304 rows, and a loss without its shift and copies."""

    def __init__(self, layers, heads, width, context, padded):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        self.padded = padded
        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=PADDED if padded else 50257, n_layer=layers, n_head=heads, n_embd=width, n_positions=context,
            use_cache=False, attn_implementation="sdpa", **dropout))

    def forward(self, idx, targets):
        if self.padded:
            logits = self.model(input_ids=idx).logits
            return None, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return None, self.model(input_ids=idx, labels=idx).loss  # it shifts the labels itself


# ---------------------------------------------------------------------------------------------------------------
# In a fresh process: one peer
# ---------------------------------------------------------------------------------------------------------------


def measure_peer(spec):
    """Figures of some updates of a peer, in a plain loop."""
    name, T, B = spec["contestant"], spec["seq_len"], spec["large_rows"]
    device = torch.device(spec["kind"])
    if name == "transformers padded" and device.type == "cpu":
        machine.keep_freed_memory()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shape = (spec["n_layer"], spec["n_head"], spec["n_embd"], T)
    if name.startswith("transformers"):
        model = Transformers(*shape, padded=name == "transformers padded")
    elif name == "nanoGPT":
        model = Tutorial(*shape, loss_alone=False, gelu="none")
    else:
        model = Tutorial(*shape, loss_alone=name == "tutorial, loss alone")
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    compiled = torch.compile(model, dynamic=False)
    dtype = getattr(torch, machine.pick_dtype(device)[0])
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    tokens = np.load(Path(spec["data"]) / "bench_train_000001.npy")
    micro_steps, position = spec["rows"] // B, 0

    def next_batch():
        nonlocal position
        if position + B * T + 1 > len(tokens):
            position = 0
        batch = torch.from_numpy(tokens[position : position + B * T + 1].astype(np.int64))
        position += B * T
        if name == "nanoGPT" and device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        return batch[:-1].view(B, T).to(device), batch[1:].view(B, T).to(device)

    losses, times = [], [time.perf_counter()]
    batch = next_batch() if name == "nanoGPT" else None
    for _ in range(2 + spec["steps"]):
        total = 0.0
        for _ in range(micro_steps):
            if name != "nanoGPT":
                batch = next_batch()
            with autocast:
                _, loss = compiled(*batch)
            if name == "nanoGPT":
                batch = next_batch()  # while the device is busy with the forward pass
            loss = loss / micro_steps
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())  # waits for the device
        times.append(time.perf_counter())
    seconds = statistics.median(b - a for a, b in zip(times[2:], times[3:]))
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f"{name}: the loss is {losses[-1]}")
    return {"seconds": seconds, "tokens_per_sec": spec["rows"] * T / seconds, "losses": losses,
            "reserved_gb": machine.peak_memory_gb(device)[1], "micro_batch_size": B,
            "dtype": str(dtype).removeprefix("torch.")}


# ---------------------------------------------------------------------------------------------------------------
# All of them in turns
# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = bench.make_parser()
    parser.description = __doc__
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS),
                        help=", ".join(CONTESTANTS))
    parser.add_argument("--env", nargs="+", default=[], metavar="NAME=VALUE", help="ours with these variables set")
    parser.set_defaults(micro_batch_size=4, total_batch_size=4096, out=Path("log/peers"))
    return parser


def measure(name, args, data):
    """(figures, None) of a contestant in a fresh process, or (None, why not)."""
    spec = bench.make_spec("early_batch", args, data)
    if name.startswith("ours"):
        variables = dict(word.split("=", 1) for word in name.split()[1:] if "=" in word)
        with mock.patch.dict(os.environ, variables):
            return bench.run_fresh(spec)
    spec |= {"rung": name, "contestant": name, "kind": args.kind}
    return bench.run_fresh(spec, program=__file__)


def peers_table(results, names):
    """Median tokens/s, how many times the best peer's that is, and memory, as a Markdown table."""
    peers = [results[name]["tokens_per_sec"] for name in names
             if not name.startswith("ours") and "note" not in results[name]]
    rows = []
    for name in names:
        r = results[name]
        if "note" in r:
            rows.append([name, "-", "-", "-", "-", "-", r["note"]])
            continue
        ratio = f"{r['tokens_per_sec'] / max(peers):.3f}" if peers else "-"
        memory = f"{r['reserved_gb']:.1f}" if r["reserved_gb"] is not None else "-"
        repeats = ", ".join(f"{rate:,.0f}" for rate in r["repeats"])
        rows.append([name, f"{r['tokens_per_sec']:,.0f}", f"{1000 * r['seconds']:,.1f}", ratio, memory,
                     r["micro_batch_size"], f"{r['dtype']}; {repeats}"])
    return bench.markdown(["contestant", "tokens/s", "ms per step", "of the best peer", "reserved GB", "rows",
                           "each process"], rows, text=(0, 6))


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.work:
        spec = json.loads(args.work)
        try:
            figures = measure_peer(spec)
        except torch.OutOfMemoryError:
            raise UserError("out of memory") from None
        Path(spec["result"]).write_text(json.dumps(figures))
        return 0
    args.total_batch_size = max(args.total_batch_size, args.micro_batch_size * args.seq_len)
    args.rungs, args.devices = ["early_batch"], 1
    for variables in args.env:
        if not all("=" in word for word in variables.split()):
            raise UserError(f"--env {variables}: give NAME=VALUE")
        args.contestants.append(f"ours {variables}")
    if args.env:
        args.contestants.append("ours again")
    bench.settle(args)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if args.kind == "cuda" else args.kind
    print(f"{args.model} ({args.n_layer} layers, {args.n_embd} wide), {args.rows * args.seq_len:,} tokens per step, "
          f"{args.seq_len} a row, on {device}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as data:
        bench.write_tokens(data, args)
        for results in bench.measure_in_turns(args.contestants, args.repeats, lambda name: measure(name, args, data)):
            table = peers_table(results, args.contestants)
            (args.out / "peers.md").write_text(table + "\n")
            record = {"results": results, "device": device, "versions": machine.versions()}
            (args.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
