"""Time sampling with cached keys and values beside the plain loop: `python tests/scripts/sample_speed.py`.

Both continue the same prompt with the same model of random weights and the same draws, in turns; in fp32 their tokens
must be equal. The plain loop is the usual one: for each token a forward pass over all tokens so far, with all logits.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sample import stream  # noqa: E402
from train_gpt2 import GPT, GPTConfig, pick_token  # noqa: E402


@torch.no_grad()
def plain_loop(model, idx, max_new_tokens, generator):
    for _ in range(max_new_tokens):
        logits, _ = model(idx)
        idx = torch.cat((idx, pick_token(logits[:, -1], generator=generator)), dim=1)
    return idx


def cached(model, idx, max_new_tokens, generator):
    return torch.cat((idx, *stream(model, idx, max_new_tokens, generator=generator)), dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n_layer", type=int, default=12, help="[12]; 12 layers of 12 heads, 768 wide, are the 124M")
    parser.add_argument("--new_tokens", type=int, default=256, help="[256]")
    parser.add_argument("--prompt_tokens", type=int, default=8, help="[8]")
    parser.add_argument("--repeats", type=int, default=2, help="[2]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="[float32]")
    args = parser.parse_args()

    model = GPT(GPTConfig(n_layer=args.n_layer)).to(args.device).eval()
    autocast = contextlib.nullcontext()
    if args.dtype != "float32":
        autocast = torch.autocast(args.device, dtype=getattr(torch, args.dtype))
    prompt = torch.arange(args.prompt_tokens, device=args.device)[None]
    seconds = {plain_loop: [], cached: []}
    results = []
    with autocast:  # one for all, as in sample.py: it casts each weight once
        for repeat in range(args.repeats + 1):  # the first, short, warms up
            for way, times in seconds.items():
                generator = torch.Generator(args.device).manual_seed(repeat)
                start = time.perf_counter()
                results.append(way(model, prompt, args.new_tokens if repeat else 4, generator).tolist())
                if repeat:
                    times.append(time.perf_counter() - start)
    same = all(a == b for a, b in zip(results[::2], results[1::2]))
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    for way, times in seconds.items():
        print(f"{way.__name__:10} {args.new_tokens / middle[way]:8.1f} tokens/s   seconds: "
              + " ".join(f"{t:.2f}" for t in times))
    print(f"{middle[plain_loop] / middle[cached]:.1f} times, tokens {'equal' if same else 'DIFFER'}")
    return 0 if same or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
