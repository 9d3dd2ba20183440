"""AdamW against Muon, and cosine against wsd, on real text: equal tokens, equal tuning, several seeds.

    python tests/scripts/muon.py FOLDER_OF_PARQUET --out FOLDER     half an hour on a core; goes on where it stopped

A small GPT-2 with a vocabulary of 4,096 (the first merges of GPT-2's own BPE, so that the share of weights in the
hidden matrices, which is what Muon trains, is near that of 124M). Each arm tries the same learning rates with one seed;
its best one runs with the other seeds. Then Muon runs shorter schedules, to find the tokens at which it reaches AdamW's
loss. One JSON line a run goes to results.jsonl; the tables are printed at the end. It says nothing about 124M.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import tokenizer  # noqa: E402

import train_gpt2 as t  # noqa: E402
from harness.files import exit_status  # noqa: E402

VOCAB = 4096
ARMS = {"adamw cosine": ("adamw", "cosine"), "adamw wsd": ("adamw", "wsd"), "muon cosine": ("muon", "cosine"),
        "muon wsd": ("muon", "wsd")}


def make_shards(documents, folder):
    """Tokenize the documents' text with the small vocabulary; every 20th document is for validation."""
    import pyarrow.parquet

    if (folder / "docs_val_000000.npy").exists():
        return
    gpt2 = tokenizer.gpt2()
    ranks = {gpt2.decode_single_token_bytes(i): i for i in range(VOCAB - 1)}
    small = tiktoken.Encoding("small", pat_str=tokenizer.r50k_pat_str, mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": VOCAB - 1})
    texts = [text.as_py() for file in sorted(documents.glob("*.parquet"))
             for text in pyarrow.parquet.read_table(file, columns=["text"])["text"]]
    for name, part in (("train_000001", [x for i, x in enumerate(texts) if i % 20]), ("val_000000", texts[::20])):
        ids = [i for ids in small.encode_ordinary_batch(part) for i in (VOCAB - 1, *ids)]
        np.save(folder / f"docs_{name}.npy", np.array(ids, np.uint16))
        print(f"{name}: {len(part):,} documents, {len(ids):,} tokens", flush=True)


def run(arm, lr, seed, share, args):
    """Train one model on `share` of the steps; its final validation loss, in nats a token of the small vocabulary."""
    optimizer, schedule = ARMS[arm]
    steps = round(share * args.steps)
    cfg = t.TrainConfig.from_preset(
        "tiny", data=str(args.out), n_layer=4, n_head=3, n_embd=192, seq_len=256, total_batch_size=2048,
        micro_batch_size=8, max_steps=steps, warmup_steps=args.steps // 20, optimizer=optimizer, schedule=schedule,
        max_lr=lr, seed=seed)
    rt = t.Runtime.start("cpu", compile=True, cache_dir=str(args.out))
    model = t.GPT(t.GPTConfig(block_size=cfg.seq_len, vocab_size=VOCAB, n_layer=cfg.n_layer, n_head=cfg.n_head,
                              n_embd=cfg.n_embd), seed).train()
    view = torch.compile(model, dynamic=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = t.TrainState(model, t.make_optimizers(model, cfg, rt.device), scaler, micro_batch_size=8)
    state.loader = t.DataLoaderLite(args.out, 8, cfg.seq_len, seed=seed)
    started, losses = time.perf_counter(), []
    while state.step < steps:
        losses.append(t.train_step(state, view, cfg, rt)[0]["loss"])
    seconds = time.perf_counter() - started
    state.loader.close()
    val = t.Shards(t.find_shards(args.out, "val"), cfg.seq_len)
    rows = min(len(val), 512) // 8 * 8
    loss = t.validate(view, model, val, rows, 8, rt)
    return {"val_loss": loss, "train_loss": statistics.mean(losses[-20:]), "steps": steps, "seconds": seconds,
            "val_tokens": rows * cfg.seq_len}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["adamw cosine", "muon cosine", "adamw wsd"])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2.5e-3, 6e-3], help="tried for every arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the first one tunes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.8], help="of the steps: Muon's short runs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    make_shards(args.documents, args.out)
    results = args.out / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def loss(arm, lr, seed, share=1.0):
        """Validation loss of a run, made now unless results.jsonl has it."""
        asked = {"arm": arm, "lr": lr, "seed": seed, "share": share, "full_steps": args.steps}
        for row in known:
            if asked.items() <= row.items():
                return row["val_loss"]
        torch.compiler.reset()
        known.append({**asked, **run(arm, lr, seed, share, args)})
        with results.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
        print(json.dumps(known[-1]), flush=True)
        return known[-1]["val_loss"]

    best, table = {}, []
    for arm in args.arms:
        tuned = {lr: loss(arm, lr, args.seeds[0]) for lr in args.lrs}
        best[arm] = min(tuned, key=tuned.get)
        losses = [loss(arm, best[arm], seed) for seed in args.seeds]
        table.append([arm, f"{best[arm]:g}", *(f"{tuned[lr]:.4f}" for lr in args.lrs),
                      f"{statistics.mean(losses):.4f}", f"{statistics.stdev(losses):.4f}"])
    heads = ["arm", "best lr", *(f"lr {lr:g}, seed {args.seeds[0]}" for lr in args.lrs), "mean of seeds", "sd"]
    for row in (heads, ["---"] * len(heads), *table):
        print("| " + " | ".join(row) + " |")
    if {"adamw cosine", "muon cosine"} <= set(args.arms):
        lr = {arm: best[arm] for arm in best}
        goal = statistics.mean(loss("adamw cosine", lr["adamw cosine"], seed) for seed in args.seeds)
        shares = sorted({*args.shares, 1.0})
        means = [statistics.mean(loss("muon cosine", lr["muon cosine"], seed, share) for seed in args.seeds)
                 for share in shares]
        for share, mean in zip(shares, means):
            print(f"muon, {share:.0%} of the tokens, schedule as long: {mean:.4f} (adamw at 100%: {goal:.4f})")
        if means[-1] <= goal <= means[0]:
            print(f"muon reaches adamw's loss with {np.interp(goal, means[::-1], shares[::-1]):.0%} of the tokens")
        else:
            print("adamw's loss lies outside of what muon's runs reached: give other --shares")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
