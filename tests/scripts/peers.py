"""A whole update of 124M by the trainer against transformers' GPT-2, both compiled under bf16 autocast, on one device.

    python tests/scripts/peers.py                          B 4, T 1024, some minutes on a CPU
    python tests/scripts/peers.py --micro_batch_size 32    on a GPU

The peer is GPT2LMHeadModel (scaled_dot_product_attention, no dropout) with its own loss in one compiled graph, clipping
and fused AdamW: the same work, as a careful user of transformers writes it. Contestants take turns in fresh processes;
medians of their updates are compared. `peer, memory kept` has the trainer's setting of the allocator too.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import bench  # noqa: E402
from harness.files import exit_status  # noqa: E402


def peer_step(args, data, keep_memory):
    """A function that makes one update of transformers' GPT-2, under the shape of `args`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if keep_memory:
        machine.keep_freed_memory()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.kind)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, n_positions=args.seq_len,
                        use_cache=False, attn_implementation="sdpa", **no_dropout)
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    view = torch.compile(model, dynamic=False)
    tokens = np.load(Path(data) / "bench_train_000001.npy")
    tokens = torch.from_numpy(tokens[: args.rows * args.seq_len].astype(np.int64))
    rows = tokens.view(args.rows, args.seq_len).to(device)
    dtype = getattr(torch, machine.pick_dtype(device)[0])

    def step():
        for part in rows.split(args.micro_batch_size):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = view(input_ids=part, labels=part).loss * (len(part) / args.rows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step


def measure_peer(args, data, keep_memory):
    step = peer_step(args, data, keep_memory)
    seconds = []
    for _ in range(2 + args.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[2:], "tokens_per_sec": args.rows * args.seq_len / statistics.median(seconds[2:])}


def fresh_peer(args, data, keep_memory):
    """`measure_peer` in a process of its own."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peer, (args, data, keep_memory))


def main(argv=None):
    parser = bench.make_parser()
    parser.description = __doc__
    parser.set_defaults(rungs=["prefetch"], micro_batch_size=4, total_batch_size=4096)
    args = parser.parse_args(argv)
    args.total_batch_size = max(args.total_batch_size, args.micro_batch_size * args.seq_len)
    bench.settle(args)
    rates = {"ours": [], "peer": [], "peer, memory kept": []}
    if args.kind != "cpu":
        del rates["peer, memory kept"]
    with tempfile.TemporaryDirectory() as data:
        bench.write_tokens(data, args)
        for repeat in range(args.repeats):
            for name, samples in rates.items():
                if name == "ours":
                    figures, note = bench.run_fresh(bench.make_spec("prefetch", args, data))
                    if note:
                        raise RuntimeError(note)
                else:
                    figures = fresh_peer(args, data, keep_memory=name == "peer, memory kept")
                samples.append(figures["tokens_per_sec"])
                bench.tell(f"{name}, repeat {repeat + 1} of {args.repeats}: {samples[-1]:,.0f} tokens/s")
    medians = {name: statistics.median(samples) for name, samples in rates.items()}
    for name, rate in medians.items():
        print(f"{name}: {rate:,.0f} tokens/s ({', '.join(f'{x:,.0f}' for x in rates[name])}), "
              f"ours is {medians['ours'] / rate:.2f} times it")
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"tokens_per_sec": rates, "versions": machine.versions()}
    (args.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
