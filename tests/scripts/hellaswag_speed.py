"""HellaSwag as hellaswag.py packs it against one question per forward pass: questions/s, and are the answers the same?

    python tests/scripts/hellaswag_speed.py hellaswag_val.jsonl [--model gpt2] [--questions 150] [--dtype bfloat16]

Both score the same questions, taken from the whole file, in one process and in turns. `one_by_one` is how training
scripts usually do it: JSON parsed and tokenized each time, four rows that each repeat the context, padded to the
longest, logits at every position. `--model` is what `hellaswag.py --model` takes; without it, GPT-2 124M with random
weights, which are as fast, but find all endings about equally likely: give trained ones to judge the agreement.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hellaswag
from harness import tokenizer
from harness.cli import exit_status
from train_gpt2 import GPT, GPTConfig, Runtime

VARIANTS = ("acc", "acc_norm")  # those that the loop computes


@torch.no_grad()
def one_by_one(model, lines, rt, autocast):
    """{question's endings: prediction by variant}, one question per forward pass."""
    encode = tokenizer.gpt2().encode_ordinary
    found = {}
    for line in lines:
        row = json.loads(line)
        context = encode(row["ctx"])
        endings = [encode(" " + ending) for ending in row["endings"]]
        width = len(context) + max(len(ending) for ending in endings)
        tokens, inside = torch.zeros(2, 4, width, dtype=torch.long)
        for e, ending in enumerate(endings):
            tokens[e, : len(context) + len(ending)] = torch.tensor(context + ending)
            inside[e, len(context) : len(context) + len(ending)] = 1
        tokens, inside = tokens.to(rt.device), inside[:, 1:].to(rt.device)
        with autocast():
            logits = model(tokens)[0]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * inside).sum(dim=1)
        key = tuple(map(tuple, endings))
        found[key] = {"acc": sums.argmin().item(), "acc_norm": (sums / inside.sum(dim=1)).argmin().item()}
    return found


@torch.no_grad()
def packed(model, benchmark, rt, autocast):
    """The same from hellaswag.py's batches; `hellaswag.evaluate` counts where this keeps every prediction."""
    found = {}
    with autocast():
        head = model.centered_head()
        for batch in benchmark.batches:
            scores = hellaswag.ending_scores(model, batch, rt.device, benchmark.sizes.logits, head)
            guesses = hellaswag.predictions(scores, batch)
            for r in range(len(batch.label)):
                key = tuple(tuple(batch.target[batch.ending == 4 * r + e].tolist()) for e in range(4))
                found[key] = {variant: guesses[variant][r].item() for variant in VARIANTS}
    return found


def timed(work, *args, rt):
    rt.synchronize()
    started = time.perf_counter()
    result = work(*args)
    rt.synchronize()
    return result, time.perf_counter() - started


def agreement(found, wanted):
    return ", ".join(
        f"{variant} {sum(found[key][variant] == wanted[key][variant] for key in wanted)} of {len(wanted)}"
        for variant in VARIANTS
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl")
    parser.add_argument("--model")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)

    rt = Runtime.start(args.device, args.dtype)
    print(", ".join(rt.notes))
    model = GPT.from_checkpoint(args.model) if args.model else GPT(GPTConfig())
    model = model.to(rt.device).eval()
    lines = [line for line in Path(args.jsonl).read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = lines[:: max(1, len(lines) // args.questions)][: args.questions]
    with tempfile.TemporaryDirectory() as folder:
        subset = Path(folder) / "subset.jsonl"
        subset.write_text("\n".join(lines), encoding="utf-8")
        load = {"block_size": model.config.block_size, "device": rt.device}
        benchmark, seconds = timed(lambda: hellaswag.load(subset, **load), rt=rt)
    print(f"{benchmark}; read, tokenized and packed in {seconds:.2f} s, once a run")
    shapes = sorted({tuple(batch.tokens.shape) for batch in benchmark.batches}, key=lambda shape: shape[1])
    tokens = sum(batch.tokens.numel() for batch in benchmark.batches) / benchmark.questions
    print(f"rows x width of the batches: {', '.join(f'{r} x {w}' for r, w in shapes)}; {tokens:.1f} tokens a question")

    warm = lines[: max(2, len(lines) // 20)]
    one_by_one(model, warm, rt, rt.autocast)
    packed(model, benchmark, rt, rt.autocast)
    loop_seconds, packed_seconds = [], []
    for _ in range(2):
        loop, seconds = timed(one_by_one, model, lines, rt, rt.autocast, rt=rt)
        loop_seconds.append(seconds)
        batches, seconds = timed(packed, model, benchmark, rt, rt.autocast, rt=rt)
        packed_seconds.append(seconds)
    slow, fast = (len(lines) / min(seconds) for seconds in (loop_seconds, packed_seconds))
    print(f"one question per forward pass {slow:.1f} questions/s, packed {fast:.1f}: {fast / slow:.2f} times as fast")
    exact_loop, exact = one_by_one(model, lines, rt, nullcontext), packed(model, benchmark, rt, nullcontext)
    print(f"float32, packed against one by one, the same prediction: {agreement(exact, exact_loop)}")
    if rt.dtype != torch.float32:
        name = str(rt.dtype).removeprefix("torch.")
        print(f"{name} against float32, packed: {agreement(batches, exact)}; one by one: {agreement(loop, exact)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
