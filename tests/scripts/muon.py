"""AdamW against Muon on real text: rates tuned until the best lies between others, equal trials, several seeds.

    python tests/scripts/muon.py DOCUMENTS --out FOLDER --minutes 60            a small model on a CPU
    python tests/scripts/muon.py ../shared/documents --out FOLDER --gpu         124M, 150 updates of 65,536 tokens

DOCUMENTS is a folder of parquet files with a column `text`. Each arm first tries its rates with one seed; while the
best of them is the lowest or the highest, one beyond it is tried, and then every arm gets as many trials as the one
with most. The best rate runs with the other seeds. Last, Muon runs shorter schedules, to find the tokens at which it
reaches AdamW's best loss. Every run is a line of results.jsonl, and a command that is repeated continues after the last
one; --minutes ends the measuring before a run that would take longer, and prints the tables of what there is.

On the CPU the vocabulary has 4,096 tokens (the first merges of GPT-2's own), so that the share of weights in the
layers' matrices, which Muon trains, is near that of 124M; it says nothing about 124M. With --gpu the whole is GPT-2
124M, and 150 updates are about two epochs of 5 million tokens of documents.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt2 as t  # noqa: E402
from harness import tokenizer  # noqa: E402
from harness.cli import UserError, exit_status  # noqa: E402
from harness.runtime import Runtime  # noqa: E402
from harness.shards import Shards, find_shards  # noqa: E402

SMALL_VOCAB = 4096
ARMS = {  # what makes them; everything else of an optimizer is the trainer's default for it
    "adamw": {"optimizer": "adamw"},
    "adamw linear": {"optimizer": "adamw", "schedule": "wsd", "decay_fraction": 0.8, "min_lr": 0.0},
    "muon": {"optimizer": "muon"},
    "muon cosine": {"optimizer": "muon", "schedule": "cosine"},
}
CPU = {"steps": 400, "lrs": {"adamw": [1e-3, 2.5e-3, 6e-3], "muon": [2.5e-3, 6e-3, 1.5e-2]}, "val_rows": 512,
       "shape": {"n_layer": 4, "n_head": 3, "n_embd": 192, "seq_len": 256, "total_batch_size": 2048}}
GPU = {"steps": 150, "lrs": {"adamw": [6e-4, 1.2e-3, 2e-3], "muon": [2.5e-3, 4.5e-3, 8e-3]}, "val_rows": 128,
       "shape": {"n_layer": 12, "n_head": 12, "n_embd": 768, "seq_len": 1024, "total_batch_size": 65536}}


class OutOfTime(Exception):
    """The next run would end after --minutes."""


def make_shards(documents, folder, vocab):
    """Tokenize the documents' text, with GPT-2's vocabulary or a small one; every 20th document is for validation."""
    import pyarrow.parquet

    if (folder / "docs_val_000000.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    encoding, end = tokenizer.gpt2(), tokenizer.END_OF_TEXT
    if vocab < tokenizer.VOCAB_SIZE:
        end = vocab - 1
        ranks = {encoding.decode_single_token_bytes(i): i for i in range(end)}
        encoding = tiktoken.Encoding("small", pat_str=tokenizer.r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": end})
    texts = [text.as_py() for file in sorted(documents.glob("*.parquet"))
             for text in pyarrow.parquet.read_table(file, columns=["text"])["text"]]
    if not texts:
        raise UserError(f"{documents} has no documents: give a folder of parquet files with a column `text`")
    for name, part in (("train_000001", [x for i, x in enumerate(texts) if i % 20]), ("val_000000", texts[::20])):
        ids = [i for ids in encoding.encode_ordinary_batch(part) for i in (end, *ids)]
        np.save(folder / f"docs_{name}.npy", np.array(ids, np.uint16))  # validation last: it says that all are there
        print(f"{name}: {len(part):,} documents, {len(ids):,} tokens", flush=True)


def train(arm, lr, seed, share, args):
    """Train one model on `share` of the steps; its validation loss in nats a token, and figures of the run."""
    steps = round(share * args.steps)
    overrides = {**args.settings["shape"], **ARMS[arm]}
    if overrides["optimizer"] == "adamw":
        overrides["warmup_steps"] = steps // 20  # the default is that of a long run
    overrides["val_tokens"] = args.settings["val_rows"] * overrides["seq_len"]
    cfg = t.TrainConfig.from_preset("gpt2", data=str(args.shards), max_steps=steps, max_lr=lr, seed=seed, **overrides)
    rt = Runtime.start(args.device, compile=True)
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd")}
    model = t.GPT(t.GPTConfig(block_size=cfg.seq_len, vocab_size=args.vocab, **shape), seed).to(rt.device).train()
    compiled = torch.compile(model, dynamic=False) if rt.compile else model
    make_optimizers = t.OPTIMIZERS[cfg.optimizer].make
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    state = t.TrainState(model, make_optimizers(model, cfg), scaler)
    B = t.find_micro_batch(model, compiled, cfg, rt)
    micro_steps = cfg.total_batch_size // (B * cfg.seq_len)
    loader = t.DataLoaderLite(args.shards, B, cfg.seq_len, seed=seed, ahead=micro_steps, device=rt.device)
    run = t.Run(cfg, rt, state, loader, None, compiled, compiled, None, None)  # no log, no evaluation
    started, losses = time.perf_counter(), []
    while state.step < steps:
        losses.append(t.train_step(run)["loss"])
    seconds = time.perf_counter() - started
    loader.close()
    val = t.validate(run, Shards(find_shards(args.shards, "val"), cfg.seq_len))
    return {"val_loss": val["loss"], "train_loss": statistics.mean(losses[-20:]), "steps": steps, "seconds": seconds,
            "val_tokens": val["tokens"], "device": rt.notes[0]}


class Results:
    """The runs of results.jsonl, and those still to be made: `loss` makes them, until the time is over."""

    def __init__(self, args, make=train):
        self.args, self.make, self.began, self.longest = args, make, time.monotonic(), 0.0
        self.file = args.out / "results.jsonl"
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def loss(self, arm, lr, seed, share=1.0):
        """Validation loss of a run, made now unless the file has it; infinite where it is not a number."""
        asked = {"arm": arm, "lr": lr, "seed": seed, "share": share, "full_steps": self.args.steps,
                 "vocab": self.args.vocab}
        row = next((row for row in self.rows if asked.items() <= row.items()), None)
        if row is None:
            started = time.monotonic()
            if self.args.minutes and started - self.began + self.longest > 60 * self.args.minutes:
                raise OutOfTime
            torch.compiler.reset()
            row = {**asked, **self.make(arm, lr, seed, share, self.args)}
            self.longest = max(self.longest, time.monotonic() - started)
            self.rows.append(row)
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf


def next_rate(tried):
    """(rate to try next, whether the best of `tried` {rate: loss} is at an edge of them).

    Beyond the edge by the last step's factor; else halfway, in the logarithm, to the better of the best's neighbours.
    """
    rates = sorted(tried)
    best = rates.index(min(rates, key=tried.get))
    if best == 0:
        return rates[0] ** 2 / rates[1], True
    if best == len(rates) - 1:
        return rates[-1] ** 2 / rates[-2], True
    neighbour = min(rates[best - 1], rates[best + 1], key=tried.get)
    return math.sqrt(rates[best] * neighbour), False


def tune(arms, results, tried, args):
    """Fill `tried`, {arm: {rate: loss}}: as many trials for each arm, and the best of each between two others."""
    seed = args.seeds[0]
    for arm in arms:
        tried[arm] = {}
        for lr in args.settings["lrs"][ARMS[arm]["optimizer"]]:
            tried[arm][lr] = results.loss(arm, lr, seed)
        while next_rate(tried[arm])[1] and len(tried[arm]) < args.trials:
            lr = float(f"{next_rate(tried[arm])[0]:.2g}")
            tried[arm][lr] = results.loss(arm, lr, seed)
    most = max(map(len, tried.values()))
    for arm in arms:
        while len(tried[arm]) < most:
            lr = float(f"{next_rate(tried[arm])[0]:.3g}")
            tried[arm][lr] = results.loss(arm, lr, seed)


def print_tables(arms, tried, seeds, shorter, args):
    """Every trial; each arm's best over the seeds; Muon's shorter runs beside AdamW's best."""
    batch = args.settings["shape"]["total_batch_size"]
    print(f"\n{args.steps} updates of {batch:,} tokens, vocabulary {args.vocab:,}, validation loss; the trials with "
          f"seed {args.seeds[0]}:")
    for arm in arms:
        row = tried.get(arm, {})
        if not row:
            continue
        best = min(row, key=row.get)
        edge = "  (the best is at an edge: give more --trials)" if len(row) > 1 and next_rate(row)[1] else ""
        trials = [f"{lr:g} {loss:.4f}" + ("*" if lr == best else "") for lr, loss in sorted(row.items())]
        print(f"{arm}: {', '.join(trials)}{edge}")
    for arm, losses in seeds.items():
        spread = f", sd {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{arm} at its best rate, {len(losses)} seeds: {statistics.mean(losses):.4f}{spread}")
    for share, mean in sorted(shorter.items()):
        print(f"muon with {share:.0%} of the tokens and a schedule as long: {mean:.4f}")
    if "adamw" in seeds and len(shorter) > 1:
        goal = statistics.mean(seeds["adamw"])
        shares = sorted(shorter)
        if shorter[shares[-1]] <= goal <= shorter[shares[0]]:
            reached = np.interp(goal, [shorter[share] for share in reversed(shares)], shares[::-1])
            print(f"muon reaches adamw's {goal:.4f} with {reached:.0%} of the tokens")
        else:
            print(f"adamw's {goal:.4f} lies outside of what muon's runs reached: give other --shares")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("documents", type=Path, help="folder of parquet files with a text column")
    add("--out", type=Path, required=True, help="folder for shards, kernels and results.jsonl")
    add("--gpu", action="store_true", help="GPT-2 124M with its own vocabulary, 150 updates of 65,536 tokens")
    add("--device", default="auto")
    add("--minutes", type=float, help="measure no longer than this [no limit]")
    add("--steps", type=int, help="updates of a whole run [400; 150 with --gpu]")
    add("--arms", nargs="+", choices=list(ARMS), default=["adamw", "muon"])
    add("--trials", type=int, default=6, help="most rates an arm tries [6]")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one tunes [1 2 3]")
    add("--shares", type=float, nargs="+", default=[0.5, 0.7, 0.85], help="of the steps: Muon's shorter runs")
    args = parser.parse_args(argv)
    args.settings, args.vocab = (GPU, tokenizer.VOCAB_SIZE) if args.gpu else (CPU, SMALL_VOCAB)
    args.steps = args.steps or args.settings["steps"]
    args.out.mkdir(parents=True, exist_ok=True)
    args.shards = args.out / f"shards_{args.vocab}"
    make_shards(args.documents, args.shards, args.vocab)
    results, tried, seeds, shorter = Results(args), {}, {}, {}
    try:
        tune(args.arms, results, tried, args)
        best = {arm: min(tried[arm], key=tried[arm].get) for arm in args.arms}
        for arm in args.arms:
            seeds[arm] = [results.loss(arm, best[arm], seed) for seed in args.seeds]
        if {"adamw", "muon"} <= set(args.arms):
            shorter[1.0] = statistics.mean(seeds["muon"])
            for share in args.shares:
                shorter[share] = statistics.mean(results.loss("muon", best["muon"], seed, share) for seed in args.seeds)
    except OutOfTime:
        print(f"\n--minutes {args.minutes:g} are over; the same command continues")
    print_tables(args.arms, tried, seeds, shorter, args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
