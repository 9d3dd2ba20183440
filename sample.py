"""Generate text with GPT-2, printed as it is drawn.

    python sample.py --model gpt2 --prompt "Once upon a time"

The model is a name, a Hugging Face folder, a checkpoint file or a log folder. Without `--prompt` the command asks for
prompts until end of file (Ctrl-D) and answers each by itself. The tokens are those of `GPT.generate`, but the keys and
values of earlier tokens are kept, so that a new token costs the work of one token.
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("sample.py"))  # python -P leaves it out
    from harness.cli import quiet_imports
    quiet_imports()

import codecs
import contextlib
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import convert
from harness import checkpoint, tokenizer
from harness.cli import UserError, check_fields, exit_status, flag, parse_flags, say
from harness.runtime import Runtime
from train_gpt2 import GPT, pick_token


class LayerCache:
    """One layer's keys and values: called with those of new tokens (B, nh, T, hs), it returns those of all tokens."""

    def __init__(self, capacity):
        self.capacity = capacity  # tokens
        self.length = 0  # tokens so far

    def __call__(self, k, v):
        if self.length == 0:  # allocated once, in the dtype and on the device that attention works in
            shape = (*k.shape[:2], self.capacity, k.size(3))
            self.keys = k.new_empty(shape)
            self.values = v.new_empty(shape)
        start = self.length
        self.length += k.size(2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@torch.no_grad()  # subtle: not inference_mode, in which autocast casts every weight again at each token
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Yield, one (B, 1) tensor at a time, the tokens by which `GPT.generate` continues `idx` (B, T).

    Beyond the context the window slides, which moves every token to another position and so changes every key and
    value: there each token costs a pass over `block_size` tokens, as in `generate`.
    """
    context = model.config.block_size
    head = model.centered_head()
    cache = [LayerCache(min(context, idx.size(1) + max_new_tokens)) for _ in range(model.config.n_layer)]
    cached = 0
    for _ in range(max_new_tokens):
        if idx.size(1) <= context:
            pos = torch.arange(cached, idx.size(1), device=idx.device)
            hidden = model.hidden(idx[:, cached:], pos=pos, cache=cache)
            cached = idx.size(1)
        else:
            cache = None  # frees its memory
            hidden = model.hidden(idx[:, -context:])
        logits = model.logits(hidden[:, -1], head)
        token = pick_token(logits, temperature, top_k, top_p, generator)
        idx = torch.cat((idx, token), dim=1)
        yield token


class Text:
    """The characters of one sample, made from its token ids, those of a `Tokenizer`, one by one."""

    def __init__(self, own):
        self.own = own
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split between tokens
        self.waiting = ""
        self.done = False

    def feed(self, id):
        """Take in the next token id; the end of the text finishes it, and what comes after that is ignored."""
        if not self.done:
            self.done = id == self.own.end_of_text
            piece = b"" if self.done else self.own.table[id]
            self.waiting += self.decoder.decode(piece, final=self.done)

    def take(self):
        """The characters that were added since the last `take`."""
        taken, self.waiting = self.waiting, ""
        return taken


def write_samples(model, prompt, num_samples, write, echo="", **options):
    """Continue the token ids `prompt` `num_samples` times, each to the end of its text, and `write` them in order.

    All samples are drawn together, which costs little more than one. The first is written token by token; the next
    one starts with the tokens that it has by then. `echo` is written before each. `options` are those of `stream`.
    """
    device, own = model.transformer.wte.weight.device, tokenizer.of(model)
    tokens = stream(model, torch.tensor([prompt] * num_samples, device=device), **options)
    texts = [Text(own) for _ in range(num_samples)]
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
                other.feed(own.end_of_text if step is None else step[row].item())
        write("\n")


def read_prompt(prompt):
    """The text of `--prompt`: itself, or standard input for `-`, a file for `@FILE`, less its mark and last newline."""
    try:
        if prompt == "-":
            return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
        if prompt.startswith("@"):
            return Path(prompt[1:]).read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise UserError(f"--prompt {prompt}: the file cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt {prompt}: the file is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    return prompt


def encode_prompt(text, own, context):
    """The token ids to continue: the last `context` ones of `text`; without text <|endoftext|>, which starts one."""
    ids = own.encode(text, special=True).tolist() or [own.end_of_text]
    if len(ids) > context:
        say(f"the prompt has {len(ids)} tokens: the last {context}, the model's context, are used", sys.stderr)
    return ids[-context:]


def converse(answer):
    """Ask for prompts and `answer` each of them, until end of file; Ctrl-C ends an answer early."""
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


@dataclass(frozen=True)
class Options:
    """The flags."""

    model: str = flag("log", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder, a checkpoint file or "
                             "a log folder")
    prompt: str | None = flag(None, "text to continue; - reads it from standard input, @FILE from a file")
    num_samples: int = flag(1, "texts, all from the same prompt", minimum=1, maximum=1000)
    max_new_tokens: int = flag(256, "most tokens to generate per text", minimum=1, maximum=10**6)
    temperature: float = flag(1.0, "0: always the most likely token", minimum=0, maximum=1000)
    top_k: int = flag(50, "draw from the k most likely tokens; 0: from all", minimum=0, maximum=10**6)
    top_p: float = flag(1.0, "draw from the fewest most likely tokens whose probabilities add up to p; 1: from all",
                        minimum=1e-9, maximum=1)
    seed: int = flag(1337, "sampling seed", minimum=0)
    device: str = flag("auto", "CUDA, MPS, else the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "bfloat16 where it is fast", choices=("auto", "bfloat16", "float16", "float32"))

    def __post_init__(self):
        check_fields(self)
        if 0 < self.temperature < 1e-3:  # logits / temperature may overflow
            raise UserError(f"--temperature {self.temperature}: it must be 0 (greedy) or at least 0.001")


def main(argv=None):
    """The command; returns its exit status."""
    about = "Generate text with GPT-2; asks for prompts if none is given."
    args = Options(**parse_flags(Options, {}, argv, description=about))
    for standard in (sys.stdin, sys.stdout):  # a terminal or a pipe may know fewer characters than GPT-2
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(errors="replace")
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    rt = Runtime.start(args.device, args.dtype)
    if args.model == "log" and not any((*Path("log").glob("*.pt"), *Path("log").glob("*.safetensors"))):
        raise UserError("there is no model in log/ yet: run `python train_gpt2.py` first, or name a model, for example "
                        "--model gpt2")
    source = convert.read_source(args.model)
    own = tokenizer.fitting(source.tokenizer, source.config["vocab_size"], source.path)
    with checkpoint.naming(source.path):
        model = GPT.from_state_dict(source.config, source.tensors, own).to(rt.device).eval()
    say(", ".join((str(source.path), *rt.notes)), sys.stderr)
    options = {
        "num_samples": args.num_samples,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k or None,
        "top_p": args.top_p if args.top_p < 1 else None,
        "generator": torch.Generator(rt.device).manual_seed(args.seed),
    }

    def answer(text, echo=""):
        show = partial(print, end="", flush=True)
        write_samples(model, encode_prompt(text, own, model.config.block_size), write=show, echo=echo, **options)

    try:
        with rt.autocast():  # one for all texts: it casts each weight once
            if prompt is None:
                converse(answer)
            else:
                answer(prompt, echo=prompt)
    except FloatingPointError as error:
        raise UserError(f"{source.path}: {error}: the run has diverged, take an older checkpoint") from error
    except KeyboardInterrupt:
        say("")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
