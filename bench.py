"""The optimization ladder: what each known speed-up of GPT-2 training gives on this machine.

    python bench.py                                     124M, every rung
    python bench.py --model gpt2-medium --micro_batch_size 16
    python bench.py --rungs compile fused padded        only these; each stands on all the rungs below it
    python bench.py --seconds 600                       stop after ten minutes, with a table of what was measured
    python bench.py --profile                           and a profile of the last rung, for https://ui.perfetto.dev
    python bench.py --measure_memory                    CUDA: measured memory beside the computed

Every measurement is a fresh process that makes whole updates (forward, backward, clipping, AdamW, loading) with the
trainer's own `train_step`, timed as the trainer times them, from one update's wait for the device to the next. The
repeats are interleaved, so that a slow minute of the machine falls on all rungs alike, and the table has medians. Only
the slow versions are written here; the rest is train_gpt2.py's. Writes bench.md, bench.json and bench.png (with
--profile trace.json and profile.txt) to --out.
"""

if __name__ == "__main__":
    from harness.cli import quiet_imports
    quiet_imports()

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
from torch.nn import functional as F

import train_gpt2 as t
from harness import machine
from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file
from harness.plan import check_batch, divisors, find_micro_batch
from harness.profile import Profile
from harness.ranks import rank_from_environment
from harness.runtime import Runtime
from harness.shards import Shards, find_shards
from harness.tokenizer import VOCAB_SIZE

RUNGS = {  # name: what it adds to all the rungs before it
    "fp32": ("plain fp32, scores of attention in memory, a stored mask", {
        "attention": "stored mask", "dtype": "float32", "tf32": False, "compile": False, "fused": False,
        "padded": False, "large_batch": False, "head": False, "stream": False, "loader": "plain", "ddp": False}),
    "causal": ("causal mask made on the fly", {"attention": "made mask"}),
    "tf32": ("TF32 matrix products", {"tf32": True}),
    "bf16": ("autocast to bfloat16", {"dtype": "auto"}),
    "flash": ("scaled_dot_product_attention", {"attention": "flash"}),
    "compile": ("torch.compile of model and loss", {"compile": True}),
    "fused": ("fused AdamW", {"fused": True}),
    "padded": ("vocabulary padded to 50,304", {"padded": True}),
    "micro_batch": ("larger micro-batch", {"large_batch": True}),
    "head": ("padded classes masked by -inf, not sliced off", {"head": True}),
    "stream": ("residual stream in autocast's dtype", {"stream": True}),
    "prefetch": ("batches read ahead and pinned", {"loader": "late"}),
    "early_batch": ("the next batch sent before the update's wait", {"loader": "trainer's"}),
    "ddp": ("every device", {"ddp": True}),
}
BUDGETS = {"gpt2-large": 0.3, "gpt2-xl": 0.3}  # rows of the memory table with --memory_budget: models for small cards
CARDS_GB = (16, 24, 40, 80, 141)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
RESERVE = 0.92  # share of a card that torch can fill: the rest goes to CUDA's context and fragmentation

# ---------------------------------------------------------------------------------------------------------------
# The slow versions: each writes out whole methods of the trainer's, whatever these do today
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


class Fp32Stream(t.GPT):
    """GPT-2 whose residual stream stays in fp32 under autocast."""

    def hidden(self, idx, pos=None, mask=None, cache=None):
        assert mask is None and cache is None, "for training only"
        pos = torch.arange(idx.size(1), device=idx.device) if pos is None else pos
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)


class SlicedHead(Fp32Stream):
    """That, and the logits of the vocabulary's padding are cut off, in the training graph too."""

    def forward(self, idx, targets=None):
        logits = F.linear(self.hidden(idx), self.transformer.wte.weight)[..., : self.config.vocab_size]
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return None, loss


class LateLoader(t.DataLoaderLite):
    """The trainer's loader, but a batch is sent to the device when it is asked for, after the update's wait."""

    def stage(self):
        pass

    def next_batch(self):
        super().stage()
        return super().next_batch()


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

    def stage(self):
        pass

    def close(self):
        pass


# ---------------------------------------------------------------------------------------------------------------
# In a fresh process: one measurement
# ---------------------------------------------------------------------------------------------------------------


def make_state(spec, cfg, rt):
    """(state, compiled model) of the spec's rung, without a loader."""
    config_class = t.GPTConfig if spec["padded"] else UnpaddedConfig
    model_class = SlicedHead
    if spec["head"]:
        model_class = t.GPT if spec["stream"] else Fp32Stream
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd")}
    model = model_class(config_class(block_size=cfg.seq_len, **shape))
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
    return t.TrainState(model, optimizers, scaler, not_gpt2=None), compiled


def measure_rung(spec, rt):
    """Figures of some updates on a rung; with several ranks all call it and every rank returns them."""
    began = time.perf_counter()
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
    loader_class = LateLoader if spec["loader"] == "late" else t.DataLoaderLite
    state.loader = loader_class(shards, B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size, device=rt.device,
                                ahead=spec["rows"] // B)
    if spec["loader"] == "plain":
        state.loader.close()
        state.loader = PlainLoader(shards, B, rt, state.loader.sequence_ids)
    model = rt.data_parallel(compiled)
    run = t.Run(cfg=cfg, rt=rt, state=state, log=None, compiled=compiled, model=model, eval_data=None)
    for _ in range(2):  # the first update allocates AdamW's state, and finds the kernels' plans
        t.train_step(run)
    started = time.perf_counter()  # after an update's wait for the device, as all that follow end
    ready, seconds = started - began, []
    for _ in range(spec["steps"]):
        t.train_step(run)
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    rt.synchronize()
    allocated, reserved = machine.peak_memory_gb(rt.device)
    if spec["trace"]:
        profile = Profile(1, spec["trace"], rt, first=1)
        profile.step(0)
        t.train_step(run)
        profile.step(1)
    state.loader.close()
    step, flops = statistics.median(seconds), cfg.total_batch_size * state.raw_model.flops_per_token(cfg.seq_len)
    return {"seconds": step, "tokens_per_sec": cfg.total_batch_size / step, "devices": rt.world_size,
               "flops_per_sec": flops / step / rt.world_size,
               "allocated_gb": allocated, "reserved_gb": reserved, "micro_batch_size": B, "ready_seconds": ready,
               "dtype": str(rt.dtype).removeprefix("torch."), "compiled": rt.compile}


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
        if spec["rung"] == "ceiling":
            figures = measure_ceiling(spec)
        else:
            with Runtime(*rank_from_environment()) as rt:
                figures = measure_rung(spec, rt)
                rt.barrier()
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


def run_fresh(spec, devices=1, timeout=None, program=__file__):
    """(figures, None) of a measurement in a fresh process, or (None, why not) where memory or time does not suffice.

    The process is `program --work SPEC`, which writes its figures to the file that the spec names as its `result`.
    """
    result = Path(spec["result"])
    result.unlink(missing_ok=True)
    launch = [sys.executable]
    if spec["ddp"] and devices > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    command = [*launch, str(program), "--work", json.dumps(spec)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: torchrun passes it on to its ranks
            return None, NO_TIME
    if process.returncode == 0:
        return json.loads(result.read_text()), None
    errors = [line for line in stderr.splitlines() if ": error: " in line]
    if not errors:
        raise RuntimeError(f"{spec['rung']} failed:\n{stderr[-4000:]}")
    return None, errors[0].split(": error: ", 1)[1]


NO_TIME = "no time was left (--seconds)"


class Clock:
    """How much of --seconds is left; without a limit there is always time."""

    def __init__(self, seconds):
        self.began, self.seconds = time.monotonic(), seconds

    def spent(self):
        return time.monotonic() - self.began

    def left(self):
        """Seconds, None where there is no limit."""
        return None if self.seconds is None else max(0.0, self.seconds - self.spent())

    def over(self):
        return self.left() == 0.0


def why_not(name, args):
    """Why a rung would change nothing here, None where it would."""
    device = torch.device(args.kind)
    if name == "tf32" and (args.kind != "cuda" or torch.cuda.get_device_capability() < (8, 0)):
        return "this device has no TF32"
    if name in ("bf16", "stream") and machine.pick_dtype(device)[0] == "float32":
        return "bf16 is slow on this device: fp32 stays"
    if name == "compile" and (missing := machine.missing_for_compile(device)):
        return f"torch.compile needs {' and '.join(missing)}"
    if name == "micro_batch" and args.micro_batch_size and args.micro_batch_size <= args.small_rows:
        return "the micro-batch is as large as it was"
    if name == "ddp" and args.devices == 1:
        return "one device"
    return None


def measure_in_turns(names, repeats, clock, measure):
    """({name: its figures, one dict a repeat}, {name: why it has none}) of `measure(name) -> (figures, why not)`.

    After the first round a line says how long the others will take.
    """
    samples, notes = {name: [] for name in names}, {}
    for repeat in range(repeats):
        for name in names:
            if name in notes:
                continue
            figures, note = (None, NO_TIME) if clock.over() else measure(name)
            if note is None:
                samples[name].append(figures)
                rate = figures.get("tokens_per_sec")
                report(f"{name}, repeat {repeat + 1} of {repeats}: " + (
                    f"{rate:,.0f} tokens/s" if rate else f"{figures['flops_per_sec'] / 1e12:.2f} TFLOP/s"))
            elif note != NO_TIME or not samples[name]:
                notes[name] = note
                report(f"{name}: {note}")
        if repeat == 0 and repeats > 1 and not clock.over():
            left = (repeats - 1) * clock.spent()
            report(f"about {in_words(left if clock.left() is None else min(left, clock.left()))} to come")
    return samples, {name: note for name, note in notes.items() if not samples[name]}


def climb(args, data, clock):
    """{rung: its figures, medians of the interleaved repeats, or {"note": why it has none}}, and the ceiling."""
    def measure(name):
        note = None if name == "ceiling" else why_not(name, args)
        if note:
            return None, note
        return run_fresh(make_spec(name, args, data), args.devices, clock.left())

    samples, notes = measure_in_turns(["ceiling", *args.rungs], args.repeats, clock, measure)
    return {name: median_figures(samples[name]) if samples[name] else {"note": notes[name]} for name in samples}


def estimate(args):
    """Roughly how many seconds the ladder takes: short products of matrices say what this machine can do.

    A compiled update reaches about half of their speed and one that is not compiled a fifth; a process starts in some
    ten seconds, and compiles for thirty where the kernels are not in the cache.
    """
    rt = Runtime.start(args.device)
    n = 8192 if rt.device.type == "cuda" else 1024
    rates = {}
    for dtype in {torch.float32, rt.dtype}:
        a = torch.ones(n, n, dtype=dtype, device=rt.device)
        seconds = []
        for _ in range(4):
            rt.synchronize()
            started = time.perf_counter()
            a @ a
            rt.synchronize()
            seconds.append(time.perf_counter() - started)
        rates[dtype] = 2 * n**3 / min(seconds)
    with torch.device("meta"):
        model = t.GPT(t.GPTConfig(args.seq_len, n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd))
    flops = args.rows * args.seq_len * model.flops_per_token(args.seq_len)
    total = 0.0
    for name in args.rungs:
        if why_not(name, args):
            continue
        spec = make_spec(name, args, "")
        rate = rates[torch.float32 if spec["dtype"] == "float32" else rt.dtype]
        update = flops / rate / (0.5 if spec["compile"] else 0.2)
        total += args.repeats * (10 + (3 + args.steps) * update) + (30 if spec["compile"] else 0)
    return total + args.repeats * 15  # and the ceilings


def in_words(seconds):
    """A duration as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def median_figures(samples):
    """One dict from several of the same keys: medians of the numbers, the last of everything else."""
    numbers = {k for k, v in samples[-1].items() if isinstance(v, float)}
    return {k: statistics.median(s[k] for s in samples) if k in numbers else v for k, v in samples[-1].items()} | {
        "repeats": [s["tokens_per_sec"] if "tokens_per_sec" in s else s["flops_per_sec"] for s in samples]}


def report(line):
    print(line, file=sys.stderr, flush=True)


def ladder_table(results, args):
    """The rungs as rows of a Markdown table that is aligned in a terminal too."""
    ceiling = results["ceiling"]
    peak = ceiling.get("vendor_flops_per_sec")
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
                     f"{r['flops_per_sec'] / ceiling['flops_per_sec']:.1%}" if "flops_per_sec" in ceiling else "-",
                     f"{r['flops_per_sec'] / peak:.1%}" if peak else "-",
                     *(f"{r[k]:.2f}" if r[k] is not None else "-" for k in ("allocated_gb", "reserved_gb")), gain,
                     f"{what}; {r['dtype']}, {r['micro_batch_size']} rows, {spread}"])
    return markdown(["rung", "devices", "tokens/s", "ms a step", "of ceiling", "of peak", "allocated GB", "reserved GB",
                     "gain", "note"], rows, text=(0, 9))


def markdown(heads, rows, text=(0,)):
    """A Markdown table with aligned columns: those whose numbers are in `text` to the left, the others to the right."""
    table = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(heads))]
    rule = ["-" * width if i in text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[cell.ljust(widths[i]) if i in text else cell.rjust(widths[i]) for i, cell in enumerate(row)]
             for row in table]
    return "\n".join("| " + " | ".join(row).rstrip() + " |" for row in (lines[0], rule, *lines[1:]))


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


def memory_bytes(config, budget=1.0):
    """(fixed bytes, bytes a token of a micro-batch) that a compiled bf16 step of the shipped trainer takes on a GPU.

    A parameter: its weight, gradient and AdamW's two averages in fp32, and autocast's bf16 copy (18 bytes). A token
    and layer keep for the backward pass, in bytes a channel: the residual stream at both norms (4), both norms' outputs
    (4), q, k, v (6), attention's output (2), the MLP before GELU (8) and after it (8); GELU and norms may be computed
    again instead. A token also keeps its row of logits in bf16, over which the row's gradient is written.

    With a `budget` below 1 (--memory_budget) that share of the layers' bytes is kept, and the row's gradient gets
    memory of its own. Held against an H100 in docs/MEASURED.md.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in t.GPT(config).parameters())
    logits = 2 * config.padded_vocab_size * (1 if budget == 1 else 2)
    return 18 * parameters, 32 * budget * config.n_layer * config.n_embd + logits


def memory_table(args, measured):
    """Computed GB by model and micro-batch, the largest micro-batch by card, and measured GB where there are any."""
    rows = []
    for name, budget in [*((name, 1.0) for name in t.MODELS), *BUDGETS.items()]:
        n_layer, n_head, n_embd = t.MODELS[name][:3]
        config = t.GPTConfig(args.seq_len, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        fixed, token = memory_bytes(config, budget)
        row = token * args.seq_len
        found = measured if name == args.model and budget == 1 else {}
        cells = [f"{(fixed + B * row) / 1e9:.1f}" + (f" ({found[B]:.1f})" if B in found else "") for B in MICRO_BATCHES]
        fit = [int((RESERVE * card * 1e9 - fixed) // row) for card in CARDS_GB]
        label = name if budget == 1 else f"{name} --memory_budget {budget:g}"
        rows.append([label, *cells, *(B if B > 0 else "-" for B in fit)])
    heads = [f"{B} x {args.seq_len}" for B in MICRO_BATCHES] + [f"most in {gb} GB" for gb in CARDS_GB]
    return markdown(["model", *heads], rows)


def measure_memory(args, data):
    """{micro-batch: GB that torch reserved} for the chosen model on a CUDA device, while they fit."""
    found = {}
    for B in MICRO_BATCHES:
        figures, note = run_fresh(make_spec("early_batch", args, data, large_rows=B, rows=B, steps=1))
        report(f"memory at {B} rows: " + (note or f"{figures['reserved_gb']:.1f} GB"))
        if note:
            break
        found[B] = figures["reserved_gb"]
    return found


# ---------------------------------------------------------------------------------------------------------------
# CLI
# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
    add("--seconds", type=float, help="measure no longer than this, and print what there is [no limit]")
    add("--profile", action="store_true", help="profile an update of the last rung: trace.json, profile.txt")
    add("--measure_memory", action="store_true", help="CUDA: fill in the memory table for the model")
    add("--out", type=Path, default=Path("log/bench"), help="folder for what it writes [log/bench]")
    add("--cache_dir", default=".cache", help="compiled kernels [.cache]")
    add("--work", help=argparse.SUPPRESS)  # a spec: this is one of the fresh processes
    return parser


def settle(args):
    """Fill in what depends on the model and the machine; `UserError` for what cannot be."""
    args.kind = Runtime.start(args.device).device.type
    for name, value in zip(("n_layer", "n_head", "n_embd"), t.MODELS[args.model]):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name, least in (("repeats", 1), ("steps", 1), ("seq_len", 1), ("micro_batch_size", 0), ("devices", 1),
                        ("seconds", 1), ("total_batch_size", args.seq_len)):
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
        args.micro_batch_size = max(b for b in divisors(args.rows) if b * args.seq_len <= max(4096, args.seq_len))
    args.small_rows = max(b for b in divisors(args.rows) if b <= max(1, min(4, (args.micro_batch_size or 16) // 4)))
    args.rungs = [name for name in RUNGS if name in args.rungs]
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    if args.measure_memory and args.kind != "cuda":
        raise UserError(f"--measure_memory: device {args.kind} does not count its memory; it needs CUDA")


def title(ceiling, args):
    """One line: the model, the step and the device."""
    return (f"{args.model} ({args.n_layer} layers, {args.n_embd} wide), {args.rows * args.seq_len:,} tokens a step and "
            f"device, {args.seq_len} a row, on {ceiling.get('device', args.kind)}")


def describe_ceiling(ceiling, args):
    """The lines above the ladder: what matrix products reach, and how the rungs were measured."""
    how = f"Medians of {args.repeats} fresh processes a rung, {args.steps} updates each; torch {torch.__version__}."
    if "note" in ceiling:
        return f"Ceiling of matrix products: {ceiling['note']}. {how}"
    peak = ceiling["vendor_flops_per_sec"]
    return (f"Ceiling of matrix products: {ceiling['flops_per_sec'] / 1e12:.2f} TFLOP/s measured ({ceiling['dtype']}, "
            f"{ceiling['shape']}); the vendor's figure: {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown'}. {how}")


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.work:
        work(json.loads(args.work))
        return 0
    settle(args)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = estimate(args)
    if args.seconds is not None:
        seconds = min(seconds, args.seconds)
    report(f"{len(args.rungs)} rungs, {args.repeats} fresh processes each: about {in_words(seconds)}")
    clock = Clock(args.seconds)
    with tempfile.TemporaryDirectory() as data:
        write_tokens(data, args)
        results = climb(args, data, clock)
        measured_rungs = [name for name in args.rungs if "note" not in results[name]]
        table = None
        if args.profile and measured_rungs:
            run_fresh(make_spec(measured_rungs[-1], args, data, trace=str(args.out)), args.devices)
            table = (args.out / "profile.txt").read_text()
        measured = measure_memory(args, data) if args.measure_memory else {}
    where = title(results["ceiling"], args)
    memory = f"Memory of a step in GB, computed{' (measured)' if measured else ''}, {args.seq_len} tokens a row:"
    blocks = [where, describe_ceiling(results["ceiling"], args), ladder_table(results, args), memory,
              memory_table(args, measured)]
    if table:
        blocks.append(f"The rung {measured_rungs[-1]}:\n\n```\n{table}```")
    text = "\n\n".join(blocks) + "\n"
    record = {"arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "work"},
              "results": results, "measured_memory_gb": measured}
    for name, content in (("bench.md", text), ("bench.json", json.dumps(record, indent=1) + "\n")):
        with atomic_file(args.out / name, "w", encoding="utf-8") as file:
            file.write(content)
    draw(results, args, where, args.out / "bench.png")
    print(f"{text}\nwrote {args.out}/: bench.md, bench.json, bench.png{', trace.json, profile.txt' if table else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
