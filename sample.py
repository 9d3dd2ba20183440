"""Text from a GPT-2, streamed as it comes: `python sample.py --model gpt2 --prompt "Once upon a time"`.

The model is a name, a Hugging Face folder, a checkpoint file or a log folder. Without `--prompt` it asks for prompts,
each answered afresh, until end of file (Ctrl-D). The tokens are those of `GPT.generate`; the keys and values of what
has been read are kept, so that a new token costs one token's work.
"""

import codecs
import contextlib
import io
import sys
from pathlib import Path

import torch

from harness import tokenizer
from harness.cli import Parser, UserError, exit_status
from harness.runtime import Runtime
from train_gpt2 import GPT, pick_token


class LayerCache:
    """One layer's keys and values: called with new ones (B, nh, T, hs), it returns all there are so far."""

    def __init__(self, room):
        self.room, self.length = room, 0  # tokens

    def __call__(self, k, v):
        if self.length == 0:  # allocated once, in the dtype and on the device that attention works in
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.room, x.size(3)) for x in (k, v))
        start, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Yield, one (B, 1) tensor at a time, the tokens by which `GPT.generate` continues `idx` (B, T).

    Beyond the context the window slides, which moves every token to another position and so changes every key and
    value: there each token costs a pass over `block_size` tokens, as in `generate`.
    """
    context = model.config.block_size
    cache = [LayerCache(min(context, idx.size(1) + max_new_tokens)) for _ in range(model.config.n_layer)]
    cached = 0
    for _ in range(max_new_tokens):
        if idx.size(1) <= context:
            pos = torch.arange(cached, idx.size(1), device=idx.device)
            hidden = model.hidden(idx[:, cached:], pos=pos, cache=cache)
            cached = idx.size(1)
        else:
            cache = None  # of no more use
            hidden = model.hidden(idx[:, -context:])
        token = pick_token(model.logits(hidden[:, -1]), temperature, top_k, top_p, generator)
        idx = torch.cat((idx, token), dim=1)
        yield token


class Text:
    """The characters of one sample, from its token ids as they come."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split between tokens
        self.waiting = ""
        self.done = False

    def feed(self, id):
        """Take in the next token id; the end of the text finishes it, and what comes after that is ignored."""
        if not self.done:
            self.done = id == tokenizer.END_OF_TEXT
            piece = b"" if self.done else tokenizer.gpt2().decode_single_token_bytes(id)
            self.waiting += self.decoder.decode(piece, final=self.done)

    def take(self):
        """What has come since the last `take`."""
        taken, self.waiting = self.waiting, ""
        return taken


def write_samples(model, prompt, num_samples, write, echo="", **options):
    """Continue the token ids `prompt` `num_samples` times, each to the end of its text, and `write` them in order.

    All are drawn together, which costs little more than one. The first is written as it comes; the next starts with
    what it has by then. `echo` is written before each. `options` are those of `stream`.
    """
    device = model.transformer.wte.weight.device
    tokens = stream(model, torch.tensor([prompt] * num_samples, device=device), **options)
    texts = [Text() for _ in range(num_samples)]
    for number, text in enumerate(texts, 1):
        if num_samples > 1:
            write(f"--- {number} of {num_samples} ---\n")
        write(echo)
        while True:
            write(text.take())
            if text.done:
                break
            step = next(tokens, None)
            for row, other in enumerate(texts):
                other.feed(tokenizer.END_OF_TEXT if step is None else step[row].item())
        write("\n")


def read_prompt(prompt):
    """The text that `--prompt` means: itself, with `-` standard input, with `@FILE` a file; a last newline goes."""
    try:
        if prompt == "-":
            return sys.stdin.read().removesuffix("\n")
        if prompt.startswith("@"):
            return Path(prompt[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"--prompt {prompt}: the file cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt {prompt}: not UTF-8 at byte {error.start}, save it as UTF-8") from error
    return prompt


def encode_prompt(text, context):
    """The token ids to continue: those of `text`, cropped from the left to `context`, or the start of a text."""
    ids = tokenizer.gpt2().encode(text, allowed_special="all") or [tokenizer.END_OF_TEXT]
    if len(ids) > context:
        print(f"the prompt has {len(ids)} tokens: the last {context} are used, the model's context", file=sys.stderr)
    return ids[-context:]


def converse(answer):
    """Ask for prompts and `answer` each by itself, until end of file; Ctrl-C cuts an answer short."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing; Windows has its own)
    ask = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            prompt = input(ask)
        except EOFError:
            return print()
        try:
            answer(prompt)
        except KeyboardInterrupt:
            print()


def parse_args(argv):
    parser = Parser(description="Write text with a GPT-2; asks for prompts when none is given.")
    parser.add_argument("--model", default="log", metavar="NAME|DIR|FILE",
                        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder, a checkpoint file or a "
                             "log folder [log]")
    parser.add_argument("--prompt", metavar="TEXT|-|@FILE", help="text to continue; - reads it from standard input")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, each from the prompt [1]")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="a sample, if its text goes on [256]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token [1.0]")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all [50]")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from those that reach p; 1: from all [1.0]")
    parser.add_argument("--seed", type=int, default=1337, help="of the draws [1337]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    limits = {
        "num_samples": (1, 1000), "max_new_tokens": (1, 10**6), "temperature": (0, 1000), "top_k": (0, 10**6),
        "top_p": (1e-9, 1), "seed": (0, 2**63 - 1),
    }
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:  # false for nan
            raise UserError(f"--{name} {getattr(args, name)}: it must be between {least} and {most}")
    return args


def main(argv=None):
    """The command; returns its exit status."""
    args = parse_args(argv)
    for standard in (sys.stdin, sys.stdout):  # a terminal or a pipe may know fewer characters than GPT-2
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(errors="replace")
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    rt = Runtime.start(args.device, args.dtype)
    model = GPT.from_pretrained(args.model).to(rt.device, rt.dtype).eval()
    config = model.config
    if config.vocab_size != tokenizer.VOCAB_SIZE:
        raise UserError(f"{args.model} has a vocabulary of {config.vocab_size}: GPT-2's has {tokenizer.VOCAB_SIZE}")
    print(", ".join((args.model, *rt.notes)), file=sys.stderr)
    options = {
        "num_samples": args.num_samples,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k or None,
        "top_p": args.top_p if args.top_p < 1 else None,
        "generator": torch.Generator(rt.device).manual_seed(args.seed),
    }

    def write(text):
        print(text, end="", flush=True)

    def answer(text, echo=""):
        write_samples(model, encode_prompt(text, config.block_size), write=write, echo=echo, **options)

    try:
        if prompt is None:
            converse(answer)
        else:
            answer(prompt, echo=prompt)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
