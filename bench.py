"""The optimization ladder: what each known speed-up of GPT-2 training gives on this machine.

    python bench.py                                     124M, every rung
    python bench.py --model gpt2-medium --micro_batch_size 16
    python bench.py --rungs compile fused padded        only these; each stands on all the rungs below it
    python bench.py --profile                           and a profile of the last rung, for https://ui.perfetto.dev

Every measurement is a fresh process that makes whole updates (forward, backward, clipping, AdamW, loading) with the
trainer's own `train_step`, timed as the trainer times them, from one update's wait for the device to the next. The
repeats are interleaved, so that a slow minute of the machine falls on all rungs alike, and the table has medians. Only
the slow versions are written here; the rest is train_gpt2.py's. Writes bench.md and bench.json (with --profile
trace.json and profile.txt) to --out, after every measurement.
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("bench.py"))  # python -P leaves it out
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
from harness.fit import divisors
from harness.plan import check_batch
from harness.profile import Profile
from harness.ranks import rank_from_environment
from harness.runtime import Runtime
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

# --- The slow versions ---


class MaterializedAttention:
    """In place of F.scaled_dot_product_attention: all scores (B, nh, T, T) in memory, as the formula is written.

    The mask is `stored` (T, T), True where a query (row) may not look at a later key (column), or made at every call.
    """

    def __init__(self, stored=None):
        self.stored = stored

    def __call__(self, q, k, v, attn_mask=None, is_causal=True, dropout_p=0.0, enable_gqa=False):
        assert attn_mask is None and not dropout_p, "for training without dropout"
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) if enable_gqa else t for t in (k, v))
        T = q.size(2)
        future = future_mask(T, q.device) if self.stored is None else self.stored[:T, :T]
        scores = (q @ k.transpose(2, 3)) * q.size(3) ** -0.5
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


def future_mask(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


@dataclass(frozen=True)
class UnpaddedConfig(t.GPTConfig):
    @property
    def padded_vocab_size(self):
        return self.vocab_size


class Fp32Stream(t.GPT):
    """GPT-2 whose residual stream is in fp32 under autocast too: each block adds to what the first one gets."""

    def __init__(self, *args):
        super().__init__(*args)
        self.transformer.h[0].register_forward_pre_hook(lambda block, args: (args[0].float(), *args[1:]))


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

    def batches(self, count):
        for _ in range(count):
            yield self.next_batch()


class PlainLoader(LateLoader):
    """Reads a batch when it is asked for, and waits for its copy to the device."""

    def __init__(self, *args, device="cpu", **options):
        super().__init__(*args, device=device, **options)
        self.device = device

    def next_batch(self):
        ids = self.sequence_ids(self.position + self.rank * self.B, self.B)
        self.position += self.world_size * self.B
        rows = torch.from_numpy(self.shards.read(ids).astype(np.int64))
        return rows[:, :-1].to(self.device), rows[:, 1:].to(self.device)


LOADERS = {"plain": PlainLoader, "late": LateLoader, "trainer's": t.DataLoaderLite}


# --- In a fresh process: one measurement ---


def make_state(spec, cfg, rt):
    """(state, compiled model) of the spec's rung, without a loader."""
    config_class = t.GPTConfig if spec["padded"] else UnpaddedConfig
    model_class = SlicedHead
    if spec["head"]:
        model_class = t.GPT if spec["stream"] else Fp32Stream
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd")}
    model = model_class(config_class(block_size=cfg.seq_len, **shape))
    if spec["attention"] != "flash":
        stored = future_mask(cfg.seq_len, rt.device) if spec["attention"] == "stored mask" else None
        F.scaled_dot_product_attention = MaterializedAttention(stored)
    model.to(rt.device).train()
    optimizers = t.OPTIMIZERS[cfg.optimizer].make(model, cfg)
    if not spec["fused"]:
        groups = [{k: group[k] for k in ("params", "weight_decay")} for group in optimizers["adamw"].param_groups]
        optimizers["adamw"] = torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    compiled = torch.compile(model, dynamic=False) if rt.compile else model
    return t.TrainState(model, optimizers, scaler), compiled


def measure_rung(spec, rt):
    """Figures of some updates on a rung; with several ranks all call it and every rank returns them."""
    began = time.perf_counter()
    rt.choose(spec["device"], spec["dtype"], spec["compile"])
    if not spec["tf32"]:
        torch.set_float32_matmul_precision("highest")
    shape = {name: spec[name] for name in ("model", "n_layer", "n_head", "n_embd", "seq_len")}
    cfg = t.TrainConfig.from_preset(
        "gpt2", **shape, total_batch_size=spec["rows"] * spec["seq_len"] * rt.world_size, val_every=0, max_lr=1e-4,
        micro_batch_size=spec["large_rows" if spec["large_batch"] else "small_rows"])
    check_batch(cfg, rt.world_size)
    state, compiled = make_state(spec, cfg, rt)
    B = t.find_micro_batch(state.model, compiled, cfg, rt)
    if spec["compile"] and not rt.compile:
        raise UserError(rt.notes[-1])
    loader = LOADERS[spec["loader"]](spec["data"], B, cfg.seq_len, rank=rt.rank, world_size=rt.world_size,
                                     device=rt.device, ahead=spec["rows"] // B)
    run = t.Run(cfg, rt, state, loader, None, compiled, rt.data_parallel(compiled), None, None)  # no log, no evaluation
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
        profile = Profile(1, spec["trace"], rt, skip=0)
        profile.step(0)
        t.train_step(run)
        profile.step(1)
    loader.close()
    step, flops = statistics.median(seconds), cfg.total_batch_size * state.model.flops_per_token(cfg.seq_len)
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


# --- The ladder ---


def make_spec(name, args, data, **changes):
    """All that a fresh process needs to know to measure rung `name`."""
    same = ("model", "n_layer", "n_head", "n_embd", "seq_len", "device", "steps", "rows", "small_rows")
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


def run_fresh(spec, devices=1, program=__file__):
    """(figures, None) of a measurement in a fresh process, or (None, why not) where it ends with a `UserError`.

    The process is `program --work SPEC`, which writes its figures to the file that the spec names as its `result`.
    """
    result = Path(spec["result"])
    result.unlink(missing_ok=True)
    launch = [sys.executable]
    if spec["ddp"] and devices > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    command = [*launch, str(program), "--work", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return json.loads(result.read_text()), None
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    if not errors:
        raise RuntimeError(f"{spec['rung']} failed:\n{done.stderr[-4000:]}")
    return None, errors[0].split(": error: ", 1)[1]


def why_not(name, args):
    """Why a rung would change nothing here, None where it would."""
    device = torch.device(args.kind)
    if name == "tf32" and (args.kind != "cuda" or torch.cuda.get_device_capability() < (8, 0)):
        return "this device has no TF32"
    if name in ("bf16", "stream") and machine.pick_dtype(device)[0] == "float32":
        return "bf16 is slow on this device: fp32 stays"
    if name == "micro_batch" and args.micro_batch_size and args.micro_batch_size <= args.small_rows:
        return "the micro-batch is as large as it was"
    if name == "ddp" and args.devices == 1:
        return "one device"
    return None


def measure_in_turns(names, repeats, measure):
    """Yields {name: medians of its figures or {"note": why it has none}} after each measurement.

    `measure(name)` returns (figures, None) or (None, why not).
    """
    samples, notes = {name: [] for name in names}, {}
    for repeat in range(repeats):
        for name in [name for name in names if name not in notes]:
            figures, note = measure(name)
            if note is None:
                samples[name].append(figures)
                rate = figures.get("tokens_per_sec")
                report(f"{name}, repeat {repeat + 1} of {repeats}: " + (
                    f"{rate:,.0f} tokens/s" if rate else f"{figures['flops_per_sec'] / 1e12:.2f} TFLOP/s"))
            else:
                notes[name] = note
                report(f"{name}: {note}")
            unknown = {name: {"note": notes.get(name, "not measured yet")} for name in names}
            yield unknown | {name: median_figures(samples[name]) for name in names if samples[name]}


def climb(args, data):
    """Yields {rung: its figures or a note}, and those of the ceiling, after each measurement; repeats take turns."""
    def measure(name):
        note = None if name == "ceiling" else why_not(name, args)
        if note:
            return None, note
        return run_fresh(make_spec(name, args, data), args.devices)

    return measure_in_turns(["ceiling", *args.rungs], args.repeats, measure)


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
    return markdown(["rung", "devices", "tokens/s", "ms per step", "of ceiling", "of peak", "allocated GB",
                     "reserved GB", "gain", "note"], rows, text=(0, 9))


def markdown(heads, rows, text=(0,)):
    """A Markdown table with aligned columns: those whose numbers are in `text` to the left, the others to the right."""
    table = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(heads))]
    rule = ["-" * width if i in text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [[cell.ljust(widths[i]) if i in text else cell.rjust(widths[i]) for i, cell in enumerate(row)]
             for row in table]
    return "\n".join("| " + " | ".join(row).rstrip() + " |" for row in (lines[0], rule, *lines[1:]))


# --- CLI ---


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", choices=list(t.MODELS), default="gpt2")
    add("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS), metavar="RUNG", help=", ".join(RUNGS))
    add("--micro_batch_size", type=int, default=0, help="rows of the larger micro-batch [the largest that fits]")
    add("--seq_len", type=int, default=1024)
    add("--total_batch_size", type=int, help="tokens per step and device [131,072 on CUDA, else 4,096]")
    for name in ("n_layer", "n_head", "n_embd"):
        add(f"--{name}", type=int, help="override the model's")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--devices", type=int, help="ranks of the last rung [all GPUs, or one]")
    add("--repeats", type=int, default=3, help="fresh processes per rung [3]")
    add("--steps", type=int, default=5, help="timed updates per process [5]")
    add("--profile", action="store_true", help="profile an update of the last rung: trace.json, profile.txt")
    add("--out", type=Path, default=Path("log/bench"), help="folder for what it writes [log/bench]")
    add("--work", help=argparse.SUPPRESS)  # a spec: this is one of the fresh processes
    return parser


def settle(args):
    """Fill in what depends on the model and the machine; `UserError` for what cannot be."""
    args.kind = Runtime.start(args.device).device.type
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
        args.micro_batch_size = max(b for b in divisors(args.rows) if b * args.seq_len <= max(4096, args.seq_len))
    args.small_rows = max(b for b in divisors(args.rows) if b <= max(1, min(4, (args.micro_batch_size or 16) // 4)))
    args.rungs = [name for name in RUNGS if name in args.rungs]
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")


def as_text(results, args):
    """bench.md: the model and the device, what matrix products reach, how the rungs were measured, the ladder."""
    ceiling = results["ceiling"]
    if "note" in ceiling:
        reached = ceiling["note"]
    else:
        peak = ceiling["vendor_flops_per_sec"]
        vendor = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown"
        reached = (f"{ceiling['flops_per_sec'] / 1e12:.2f} TFLOP/s measured ({ceiling['dtype']}, {ceiling['shape']}); "
                   f"the vendor's figure: {vendor}")
    return (f"{args.model} ({args.n_layer} layers, {args.n_embd} wide), {args.rows * args.seq_len:,} tokens per step "
            f"and device, {args.seq_len} per row, on {ceiling.get('device', args.kind)}\n\n"
            f"Ceiling of matrix products: {reached}. Medians of {args.repeats} fresh processes per rung, "
            f"{args.steps} updates each; torch {torch.__version__}.\n\n{ladder_table(results, args)}\n")


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.work:
        work(json.loads(args.work))
        return 0
    settle(args)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "work"}
    files = "bench.md, bench.json"
    with tempfile.TemporaryDirectory() as data:
        write_tokens(data, args)
        for results in climb(args, data):
            text = as_text(results, args)
            write(args.out / "bench.md", text)
            write(args.out / "bench.json", json.dumps({"arguments": arguments, "results": results}, indent=1) + "\n")
        measured = [name for name in args.rungs if "note" not in results[name]]
        if args.profile and measured:
            run_fresh(make_spec(measured[-1], args, data, trace=str(args.out)), args.devices)
            text += f"\nThe rung {measured[-1]}:\n\n```\n{(args.out / 'profile.txt').read_text()}```\n"
            write(args.out / "bench.md", text)
            files += ", trace.json, profile.txt"
    print(f"{text}\nwrote {args.out}/: {files}")
    return 0


def write(path, text):
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(exit_status(main))
