"""The optimization ladder: what each known speed-up of GPT-2 training gives on this machine.

    python bench.py                                     124M, every rung
    python bench.py --model gpt2-medium --micro_batch_size 16
    python bench.py --rungs compile fused padded        only these; each stands on all the rungs below it
    python bench.py --profile                           and a trace of the last rung there is, for https://ui.perfetto.dev
    python bench.py --measure_memory                    CUDA: what micro-batches really take, beside the computed

Every measurement is a fresh process that makes whole updates (forward, backward, clipping, AdamW, loading) with the
trainer's own `train_step`; the repeats are interleaved, so that a slow minute of the machine falls on all rungs
alike, and the table has medians. Only the slow beginnings of the ladder are written here; the rest is train_gpt2.py's.
Writes bench.md, bench.json and bench.png (and trace.json) to --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import train_gpt2 as t
from harness import machine
from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file
from harness.plan import check_batch, find_micro_batch
from harness.runtime import Runtime, rank_from_environment
from harness.shards import Shards, find_shards
from harness.tokenizer import VOCAB_SIZE

RUNGS = {  # name: what it adds to all the rungs before it
    "fp32": ("plain fp32, scores of attention in memory, a stored mask", {
        "attention": "stored mask", "dtype": "float32", "tf32": False, "compile": False, "fused": False,
        "padded": False, "large_batch": False, "prefetch": False, "ddp": False}),
    "causal": ("causal mask made on the fly", {"attention": "made mask"}),
    "tf32": ("TF32 matrix products", {"tf32": True}),
    "bf16": ("autocast to bfloat16", {"dtype": "auto"}),
    "flash": ("scaled_dot_product_attention", {"attention": "flash"}),
    "compile": ("torch.compile of model and loss", {"compile": True}),
    "fused": ("fused AdamW", {"fused": True}),
    "padded": ("vocabulary padded to 50,304", {"padded": True}),
    "micro_batch": ("larger micro-batch", {"large_batch": True}),
    "prefetch": ("batches pinned and read ahead", {"prefetch": True}),
    "ddp": ("every device", {"ddp": True}),
}
CARDS_GB = (16, 24, 40, 80, 141)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
RESERVE = 0.92  # share of a card that torch can fill: the rest goes to CUDA's context and fragmentation

# ---------------------------------------------------------------------------------------------------------------
# The slow beginnings
# ---------------------------------------------------------------------------------------------------------------


class MaterializedAttention(t.CausalSelfAttention):
    """Attention as the formula is written: all scores (B, nh, T, T) in memory, under a mask stored or made anew."""

    def __init__(self, config, stored):
        super().__init__(config)
        self.register_buffer("future", future_mask(config.block_size, None) if stored else None, persistent=False)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        future = future_mask(T, x.device) if self.future is None else self.future[:T, :T]
        scores = (q @ k.transpose(2, 3)) * q.size(3) ** -0.5  # (B, nh, T, T)
        y = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def future_mask(T, device):
    """True where a query (row) may not look: at later keys (columns)."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


@dataclass(frozen=True)
class UnpaddedConfig(t.GPTConfig):
    @property
    def padded_vocab_size(self):
        return self.vocab_size


class PlainLoader:
    """Reads a batch when it is asked for, and waits for its copy to the device."""

    def __init__(self, shards, B, rt, ids):
        self.shards, self.B, self.rt, self.sequence_ids = shards, B, rt, ids
        self.position = 0

    def next_batch(self):
        first = self.position + self.rt.rank * self.B
        self.position += self.rt.world_size * self.B
        rows = torch.from_numpy(self.shards.read(self.sequence_ids(first, self.B)).astype(np.int64))
        return rows[:, :-1].to(self.rt.device), rows[:, 1:].to(self.rt.device)

    def close(self):
        pass


# ---------------------------------------------------------------------------------------------------------------
# In a fresh process: one measurement
# ---------------------------------------------------------------------------------------------------------------


def make_state(spec, cfg, rt):
    """(state, compiled model) of the spec's rung, without a loader."""
    config_class = t.GPTConfig if spec["padded"] else UnpaddedConfig
    model = t.GPT(config_class(block_size=cfg.seq_len, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd))
    if spec["attention"] != "flash":
        for block in model.transformer.h:
            block.attn = MaterializedAttention(model.config, stored=spec["attention"] == "stored mask")
        model.init_weights(0)
    model.to(rt.device).train()
    optimizers = t.OPTIMIZERS[cfg.optimizer][0](model, cfg)
    if not spec["fused"]:
        groups = [{k: group[k] for k in ("params", "weight_decay")} for group in optimizers["adamw"].param_groups]
        optimizers["adamw"] = torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    compiled = torch.compile(model, dynamic=False) if rt.compile else model
    return t.TrainState(model, optimizers, scaler), compiled


def measure_rung(spec):
    """Figures of some updates on a rung; with several ranks all call it and every rank returns them."""
    began = time.perf_counter()
    rt = Runtime(*rank_from_environment())
    rt.choose(spec["device"], spec["dtype"], spec["compile"], cache_dir=spec["cache_dir"])
    if not spec["tf32"]:
        torch.set_float32_matmul_precision("highest")
    shape = {name: spec[name] for name in ("model", "n_layer", "n_head", "n_embd", "seq_len")}
    cfg = t.TrainConfig.from_preset(
        "gpt2", **shape, total_batch_size=spec["rows"] * spec["seq_len"] * rt.world_size, val_every=0, max_lr=1e-4,
        micro_batch_size=spec["large_rows" if spec["large_batch"] else "small_rows"])
    check_batch(cfg, rt.world_size)
    state, compiled = make_state(spec, cfg, rt)
    B = state.micro_batch_size = find_micro_batch(state.raw_model, compiled, cfg, rt)
    shards = Shards(find_shards(spec["data"], "train"), cfg.seq_len)
    state.loader = t.DataLoaderLite(shards, B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size, device=rt.device,
                                    ahead=spec["rows"] // B)
    if not spec["prefetch"]:
        state.loader.close()
        state.loader = PlainLoader(shards, B, rt, state.loader.sequence_ids)
    model = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True) if rt.distributed else compiled
    run = t.Run(cfg, rt, state, None, compiled, model, None)
    for _ in range(2):  # the first update allocates AdamW's state, and finds the kernels' plans
        t.train_step(run)
    ready = time.perf_counter() - began
    seconds = []
    for _ in range(spec["steps"]):
        rt.synchronize()
        started = time.perf_counter()
        t.train_step(run)
        rt.synchronize()
        seconds.append(time.perf_counter() - started)
    allocated, reserved = machine.peak_memory_gb(rt.device)
    if spec["trace"] and rt.rank == 0:
        with torch.profiler.profile() as profiler:  # of all the kinds of device there are
            t.train_step(run)
        profiler.export_chrome_trace(spec["trace"])
    elif spec["trace"]:
        t.train_step(run)
    state.loader.close()
    step, flops = statistics.median(seconds), cfg.total_batch_size * state.raw_model.flops_per_token(cfg.seq_len)
    figures = {"seconds": step, "tokens_per_sec": cfg.total_batch_size / step, "devices": rt.world_size,
               "flops_per_sec": flops / step / rt.world_size,
               "allocated_gb": allocated, "reserved_gb": reserved, "micro_batch_size": B, "ready_seconds": ready,
               "dtype": str(rt.dtype).removeprefix("torch."), "compiled": rt.compile}
    rt.barrier()
    rt.__exit__(None, None, None)
    return figures


def measure_ceiling(spec):
    """The most FLOP/s that matrix products reach here, of square ones and the model's own, in the autocast dtype."""
    rt = Runtime.start(spec["device"])
    rows, C = min(4096, spec["rows"] * spec["seq_len"]), spec["n_embd"]
    big = 8192 if rt.device.type == "cuda" else 2048
    best = (0.0, None)
    for m, k, n in ((big, big, big), (big // 2,) * 3, (rows, C, 4 * C), (rows, 4 * C, C), (rows, C, 50304)):
        a = torch.randn(m, k, device=rt.device, dtype=rt.dtype)
        b = torch.randn(n, k, device=rt.device, dtype=rt.dtype)
        times = []
        for _ in range(12):
            rt.synchronize()
            started = time.perf_counter()
            a @ b.T
            rt.synchronize()
            times.append(time.perf_counter() - started)
        best = max(best, (2 * m * k * n / statistics.median(times[2:]), f"{m} x {k} x {n}"))
    cuda = rt.device.type == "cuda"
    return {"flops_per_sec": best[0], "shape": best[1], "dtype": str(rt.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            "vendor_flops_per_sec": machine.peak_flops(rt.device), "versions": machine.versions()}


def work(spec):
    """What a fresh process does: the measurement that `spec` describes, its figures to the file it names."""
    try:
        figures = measure_ceiling(spec) if spec["rung"] == "ceiling" else measure_rung(spec)
    except torch.OutOfMemoryError:
        raise UserError("out of memory") from None
    if int(os.environ.get("RANK", "0")) == 0:
        Path(spec["result"]).write_text(json.dumps(figures))


# ---------------------------------------------------------------------------------------------------------------
# The ladder
# ---------------------------------------------------------------------------------------------------------------


def make_spec(name, args, data, **changes):
    """All that a fresh process needs to know to measure rung `name`."""
    same = ("model", "n_layer", "n_head", "n_embd", "seq_len", "device", "steps", "rows", "small_rows", "cache_dir")
    spec = {"rung": name, "trace": None, "data": data, "result": str(Path(data, "result.json")),
            "large_rows": args.micro_batch_size, **{k: getattr(args, k) for k in same}}
    for rung, (_, settings) in RUNGS.items():
        spec |= settings
        if rung == name:
            break
    return spec | changes


def write_tokens(folder, args):
    """A shard of ids as frequent as words are (Zipf): the embedding's gradients depend on how often ids repeat."""
    tokens = VOCAB_SIZE ** np.random.default_rng(0).random(4 * args.rows * args.seq_len + 1) - 1
    np.save(Path(folder, "bench_train_000001.npy"), tokens.astype(np.uint16))


def run_fresh(spec, devices=1):
    """(figures, None) of a measurement in a fresh process, or (None, why not) where it is out of memory or the like."""
    result = Path(spec["result"])
    result.unlink(missing_ok=True)
    launch = [sys.executable]
    if spec["ddp"] and devices > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    done = subprocess.run([*launch, __file__, "--work", json.dumps(spec)], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(result.read_text()), None
    told = [line for line in done.stderr.splitlines() if ": error: " in line]
    if not told:
        raise RuntimeError(f"rung {spec['rung']} failed:\n{done.stderr[-4000:]}")
    return None, told[0].split(": error: ", 1)[1]


def no_sense(name, args):
    """Why a rung would change nothing here, None where it would."""
    if name == "tf32" and (args.kind != "cuda" or torch.cuda.get_device_capability() < (8, 0)):
        return "this device has no TF32"
    if name == "bf16" and machine.pick_dtype(torch.device(args.kind))[0] == "float32":
        return "bf16 is slow on this device: fp32 stays"
    if name == "compile" and (lacks := machine.missing_for_compile(torch.device(args.kind))):
        return f"torch.compile wants {' and '.join(lacks)}"
    if name == "micro_batch" and args.micro_batch_size and args.micro_batch_size <= args.small_rows:
        return "the micro-batch is as large as it was"
    if name == "ddp" and args.devices == 1:
        return "one device"
    return None


def climb(args, data):
    """{rung: its figures, medians of the interleaved repeats, or {"note": why it has none}}, and the ceiling."""
    samples, notes = {name: [] for name in ("ceiling", *args.rungs)}, {}
    for repeat in range(args.repeats):
        for name in samples:
            note = notes.get(name) or (None if name == "ceiling" else no_sense(name, args))
            if note is None:
                figures, note = run_fresh(make_spec(name, args, data), args.devices)
            notes[name] = note
            if note:
                tell(f"{name}: {note}")
                continue
            samples[name].append(figures)
            rate = figures.get("tokens_per_sec")
            tell(f"{name}, repeat {repeat + 1} of {args.repeats}: " + (f"{rate:,.0f} tokens/s" if rate else
                 f"{figures['flops_per_sec'] / 1e12:.2f} TFLOP/s"))
    return {name: median_figures(samples[name]) if samples[name] else {"note": notes[name]} for name in samples}


def median_figures(samples):
    """One dict from several of the same keys: medians of the numbers, the last of everything else."""
    numbers = {k for k, v in samples[-1].items() if isinstance(v, float)}
    return {k: statistics.median(s[k] for s in samples) if k in numbers else v for k, v in samples[-1].items()} | {
        "repeats": [s.get("tokens_per_sec", s["flops_per_sec"]) for s in samples]}


def tell(line):
    print(line, file=sys.stderr, flush=True)


def ladder_table(results, args):
    """The rungs as rows of a Markdown table."""
    ceiling = results["ceiling"]
    peak = ceiling["vendor_flops_per_sec"]
    rows, before = [], None
    for name in args.rungs:
        r, what = results[name], RUNGS[name][0]
        if "note" in r:
            rows.append([name, *["-"] * 8, f"{what}: {r['note']}"])
            continue
        gain = f"x{r['tokens_per_sec'] / before:.2f}" if before else "-"
        before = r["tokens_per_sec"]
        spread = f"{min(r['repeats']):,.0f}-{max(r['repeats']):,.0f}"
        rows.append([name, r["devices"], f"{before:,.0f}", f"{1000 * r['seconds']:,.1f}",
                     f"{r['flops_per_sec'] / ceiling['flops_per_sec']:.1%}",
                     f"{r['flops_per_sec'] / peak:.1%}" if peak else "-",
                     *(f"{r[k]:.2f}" if r[k] is not None else "-" for k in ("allocated_gb", "reserved_gb")), gain,
                     f"{what}; {r['dtype']}, {r['micro_batch_size']} rows, {spread}"])
    return markdown(["rung", "devices", "tokens/s", "ms a step", "share of ceiling", "share of vendor's peak",
                     "allocated GB", "reserved GB", "gain", "note"], rows)


def markdown(heads, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows))


def draw(results, args, title, path):
    """A bar a rung, tokens/s."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in args.rungs if "note" not in results[name]]
    rates = [results[name]["tokens_per_sec"] for name in names]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh([f"{name}: {RUNGS[name][0]}" for name in names], rates, color="#4472a8")
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="tokens/s, all devices", title=title)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


def memory_bytes(config):
    """(fixed bytes, bytes a token of a micro-batch) that a compiled bf16 step of the shipped trainer takes on a GPU.

    A parameter: its weight, gradient and AdamW's two averages in fp32, and autocast's bf16 copy (18 bytes). A token
    and layer keep for the backward pass, in bytes a channel: the residual stream at both norms in fp32 (8), both
    norms' outputs (4), q, k, v (6), attention's output (2), the MLP before GELU (8) and after it (8); GELU and
    norms may be computed again instead. A token also keeps its row of logits and that row's gradient in bf16.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in t.GPT(config).parameters())
    return 18 * parameters, 36 * config.n_layer * config.n_embd + 4 * config.padded_vocab_size


def memory_table(args, measured):
    """Computed GB by model and micro-batch, the largest micro-batch by card, and measured GB where there are any."""
    rows = []
    for name, (n_layer, n_head, n_embd, _) in t.MODELS.items():
        fixed, token = memory_bytes(t.GPTConfig(args.seq_len, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        row = token * args.seq_len
        found = measured if name == args.model else {}
        cells = [f"{(fixed + B * row) / 1e9:.1f}" + (f" ({found[B]:.1f})" if B in found else "") for B in MICRO_BATCHES]
        fit = [int((RESERVE * card * 1e9 - fixed) // row) for card in CARDS_GB]
        rows.append([name, *cells, *(B if B > 0 else "-" for B in fit)])
    heads = [f"{B} x {args.seq_len}" for B in MICRO_BATCHES] + [f"most in {gb} GB" for gb in CARDS_GB]
    return markdown(["model", *heads], rows)


def measure_memory(args, data):
    """{micro-batch: GB that torch reserved} for the chosen model on a CUDA device, while they fit."""
    found = {}
    for B in MICRO_BATCHES:
        figures, note = run_fresh(make_spec("prefetch", args, data, large_rows=B, rows=B, steps=1))
        tell(f"memory at {B} rows: " + (note or f"{figures['reserved_gb']:.1f} GB"))
        if note:
            break
        found[B] = figures["reserved_gb"]
    return found


# ---------------------------------------------------------------------------------------------------------------
# CLI
# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=list(t.MODELS), default="gpt2")
    add("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS), metavar="RUNG", help=", ".join(RUNGS))
    add("--micro_batch_size", type=int, default=0, help="rows of the larger micro-batch [the largest that fits]")
    add("--seq_len", type=int, default=1024)
    add("--total_batch_size", type=int, help="tokens a step and device [131,072 on CUDA, else 4,096]")
    for name in ("n_layer", "n_head", "n_embd"):
        add(f"--{name}", type=int, help="in place of the model's")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--devices", type=int, help="ranks of the last rung [all GPUs, or one]")
    add("--repeats", type=int, default=3, help="fresh processes a rung [3]")
    add("--steps", type=int, default=5, help="timed updates a process [5]")
    add("--profile", action="store_true", help="write a trace of the last rung to trace.json")
    add("--measure_memory", action="store_true", help="CUDA: fill in the memory table for the model")
    add("--out", type=Path, default=Path("log/bench"), help="folder for what it writes [log/bench]")
    add("--cache_dir", default=".cache", help="compiled kernels [.cache]")
    add("--work", help=argparse.SUPPRESS)  # a spec: this is one of the fresh processes
    return parser


def settle(args):
    """Fill in what depends on the model and the machine; `UserError` for what cannot be."""
    args.kind = t.Runtime().choose(args.device).device.type
    for name, value in zip(("n_layer", "n_head", "n_embd"), t.MODELS[args.model]):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name, least in (("repeats", 1), ("steps", 1), ("seq_len", 1), ("micro_batch_size", 0), ("devices", 1),
                        ("total_batch_size", args.seq_len)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: it must be at least {least}")
    t.GPTConfig(block_size=args.seq_len, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    args.devices = args.devices or (torch.cuda.device_count() if args.kind == "cuda" else 1)
    if args.kind == "cuda" and args.devices > torch.cuda.device_count():
        raise UserError(f"--devices {args.devices}: this machine has {torch.cuda.device_count()}")
    tokens = args.total_batch_size or (131072 if args.kind == "cuda" else 4096)
    args.rows = max(1, tokens // args.seq_len, args.micro_batch_size)
    if args.micro_batch_size:
        args.rows -= args.rows % args.micro_batch_size
    elif args.kind != "cuda":
        args.micro_batch_size = max(b for b in t.divisors(args.rows) if b * args.seq_len <= max(4096, args.seq_len))
    args.small_rows = max(b for b in t.divisors(args.rows) if b <= max(1, min(4, (args.micro_batch_size or 16) // 4)))
    args.rungs = [name for name in RUNGS if name in args.rungs]
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    if args.measure_memory and args.kind != "cuda":
        raise UserError(f"--measure_memory: device {args.kind} does not count its memory; it needs CUDA")


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.work:
        work(json.loads(args.work))
        return 0
    settle(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        write_tokens(data, args)
        results = climb(args, data)
        there = [name for name in args.rungs if "note" not in results[name]]
        if args.profile and there:
            run_fresh(make_spec(there[-1], args, data, trace=str(args.out / "trace.json")), args.devices)
        measured = measure_memory(args, data) if args.measure_memory else {}
    ceiling = results["ceiling"]
    peak = ceiling["vendor_flops_per_sec"]
    title = (f"{args.model} ({args.n_layer} layers, {args.n_embd} wide), {args.rows * args.seq_len:,} tokens a step "
             f"and device, {args.seq_len} a row, on {ceiling['device']}")
    text = "\n\n".join([
        title,
        f"Ceiling of matrix products: {ceiling['flops_per_sec'] / 1e12:.2f} TFLOP/s measured ({ceiling['dtype']}, "
        f"{ceiling['shape']}); the vendor's figure: {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown'}. torch "
        f"{ceiling['versions']['torch']}. Medians of {args.repeats} fresh processes a rung, {args.steps} updates each.",
        ladder_table(results, args),
        f"Memory of a step in GB, computed{' (measured)' if measured else ''}, {args.seq_len} tokens a row:",
        memory_table(args, measured)]) + "\n"
    record = {"arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "work"},
              "results": results, "measured_memory_gb": measured}
    for name, content in (("bench.md", text), ("bench.json", json.dumps(record, indent=1) + "\n")):
        with atomic_file(args.out / name, "w", encoding="utf-8") as file:
            file.write(content)
    draw(results, args, title, args.out / "bench.png")
    print(f"{text}\nwritten to {args.out}: bench.md, bench.json, bench.png" + ", trace.json" * args.profile)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
