"""HellaSwag (Zellers et al. 2019): which of four endings does a model find the likeliest?

    python hellaswag.py --model gpt2            # or a Hugging Face folder, a checkpoint, a log folder

The trainer calls the same `fetch`, `load` and `evaluate`. Three numbers come from one pass, since other tools
differ in how an ending's log-probability is made comparable with that of a longer one:

    acc            not at all: the sum over its tokens
    acc_norm       the mean over its tokens: GPT-3's choice, this field's habit and the number in `log.txt`
    acc_norm_char  the sum divided by its characters: lm-evaluation-harness's `acc_norm`

A question is one row of tokens, its context and then its four endings, under a mask which lets every ending see
the context and itself, each at the positions that it would have alone. So the context is computed once.
"""

import http.client
import json
import re
import sys
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256 as sha256_of
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from harness import tokenizer
from harness.cli import Parser, UserError, exit_status
from harness.files import atomic_file, sha256

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 rows
VARIANTS = ("acc", "acc_norm", "acc_norm_char")

# Published results (acc, acc_norm, acc_norm_char). GPT-2: completion style as here, and lm-evaluation-harness,
# which has a context of its own (`--lm_eval_context`). GPT-3: Brown et al. 2020, appendix H, zero-shot.
PUBLISHED = {
    "GPT-2 124M": (0.2859, 0.2955, None),
    "GPT-2 124M, lm_eval": (0.2892, None, 0.3114),
    "GPT-2 350M": (None, 0.3752, None),
    "GPT-2 774M": (None, 0.4320, None),
    "GPT-2 1558M": (0.3842, 0.4893, None),
    "GPT-2 1558M, lm_eval": (0.4004, None, 0.5089),
    "GPT-3 125M": (None, 0.337, None),
    "GPT-3 350M": (None, 0.436, None),
    "GPT-3 760M": (None, 0.510, None),
    "GPT-3 1.3B": (None, 0.547, None),
}


@dataclass(frozen=True)
class Sizes:
    """How much goes to the device at once. Every new shape costs a GPU a kernel plan, every padded token time."""

    tokens: int  # of a batch, padding included
    multiple: int  # widths are rounded up to it
    head_rows: int  # positions whose logits, `vocab_size` floats each, are in memory at the same time


CPU_SIZES = Sizes(tokens=1024, multiple=8, head_rows=256)
GPU_SIZES = Sizes(tokens=16384, multiple=32, head_rows=2048)


@dataclass(frozen=True)
class Question:
    context: list  # token ids
    endings: list  # four lists of token ids
    chars: list  # characters of each ending, the space before it not counted
    label: int  # which ending is the true one
    cropped: bool  # whether the context lost tokens on the left


@dataclass(frozen=True)
class Batch:
    """R questions, one a row, in rows of W tokens, with P places that predict and N predicted tokens; on the CPU.

    tokens, positions: (R, W). until: (R, W), token j is seen by the tokens j..until[j]-1 of its row.
    predicting: (P,) indices into the R*W tokens, rising. source: (N,) indices into `predicting`, rising.
    target: (N,) the predicted id. ending: (N,) which of the R*4 endings it belongs to.
    lengths, chars: (R, 4) tokens and characters of an ending. label: (R,). All int64.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    until: torch.Tensor
    predicting: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    ending: torch.Tensor
    lengths: torch.Tensor
    chars: torch.Tensor
    label: torch.Tensor


@dataclass(frozen=True)
class Benchmark:
    """All questions, tokenized and batched once. `str()` says what it is in a line."""

    batches: list
    rows: int
    cropped: int  # questions whose context was too long for the model
    block_size: int
    head_rows: int

    def __str__(self):
        shapes = {tuple(batch.tokens.shape) for batch in self.batches}
        what = f"{self.rows:,} questions in {len(self.batches)} batches of {len(shapes)} shapes"
        return f"{what}, {self.cropped} contexts cropped on the left to fit {self.block_size} tokens"


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def fetch(cache_dir):
    """Path of the official validation set in `cache_dir`, downloaded unless it is there whole.

    Raises `UserError` when it can neither be found nor downloaded, or is not the published file.
    """
    path = Path(cache_dir) / "hellaswag_val.jsonl"
    if path.is_file() and sha256(path) == SHA256:
        return path
    mend = f"download {URL} elsewhere and save it as {path}, or name your copy with --hellaswag_path"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"HellaSwag is not at {path} and could not be downloaded ({error}): {mend}") from error
    if sha256_of(data).hexdigest() != SHA256:
        raise UserError(f"what {URL} sent is not HellaSwag's validation set ({len(data):,} bytes, torn?): {mend}")
    with atomic_file(path) as file:
        file.write(data)
    return path


def load(path, *, block_size, device, limit=None, lm_eval_context=False):
    """Read, check, tokenize and batch the JSONL at `path` for a model of context `block_size`: a `Benchmark`.

    The batches depend on the kind of `device`, never on how many ranks share them. `limit`: only the first so many
    rows. `lm_eval_context`: the text as lm-evaluation-harness makes it, activity first and WikiHow's marks removed.
    Raises `UserError`, naming the line, for a row that is no HellaSwag question.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of HellaSwag questions is {limit}: it must be at least 1")
    questions = list(islice(_questions(path, block_size, lm_eval_context), limit))
    if not questions:
        raise UserError(f"{path} has no rows: it should be HellaSwag's JSONL, one question a line")
    sizes = GPU_SIZES if torch.device(device).type == "cuda" else CPU_SIZES
    return Benchmark(
        batches=_batches(questions, sizes),
        rows=len(questions),
        cropped=sum(question.cropped for question in questions),
        block_size=block_size,
        head_rows=sizes.head_rows,
    )


def _questions(path, block_size, lm_eval_context):
    """The rows of the JSONL at `path`, checked and tokenized, one by one."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _question(line, f"{path}, line {number}", block_size, lm_eval_context)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it should be HellaSwag's JSONL") from error


def _question(line, where, block_size, lm_eval_context):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, brackets without end
        raise UserError(f"{where} is not JSON ({error}): is the file torn? Fetch it again from {URL}") from error
    texts = ("activity_label", "ctx_a", "ctx_b") if lm_eval_context else ("ctx",)
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: a row needs {', '.join(texts)}, endings and label")
    for name in (*texts, "endings", "label"):
        if name not in row:
            raise UserError(f"{where} has no {name!r}: a row needs {', '.join(texts)}, endings and label")
    for name in texts:
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name!r} is {row[name]!r}, it must be a text")
    endings, label = row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{where}: 'endings' must be a list of 4 texts, it is {str(endings)[:80]!r}")
    if str(label) not in ("0", "1", "2", "3"):  # a number in the official file, a text in Hugging Face's copy
        raise UserError(f"{where}: 'label' is {label!r}, it must be 0, 1, 2 or 3 (the test set has no labels)")

    space = " "  # before an ending
    if lm_eval_context:
        context = _without_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [_without_marks(ending) for ending in endings]
        space = context[len(context.rstrip()) :] + space  # GPT-2's tokens begin with a space, they never end with one
        context = context.rstrip()
    else:
        context = row["ctx"]
    for index, ending in enumerate(endings):
        if not ending.strip():
            raise UserError(f"{where}: ending {index} is empty")

    encode = tokenizer.gpt2().encode_ordinary
    context, tokens = encode(context), [encode(space + ending) for ending in endings]
    longest = max(len(ending) for ending in tokens)
    room = block_size - (longest - 1)  # the last token is predicted, but predicts nothing
    if not context:
        raise UserError(f"{where}: the context is empty, nothing predicts the first token of an ending")
    if room < 1:
        raise UserError(f"{where}: an ending of {longest} tokens is longer than the model's context of {block_size}")
    return Question(
        context=context[-room:],
        endings=tokens,
        chars=[len(ending) for ending in endings],
        label=int(label),
        cropped=len(context) > room,
    )


def _without_marks(text):
    """lm-evaluation-harness's clean-up of WikiHow's "[title]", "[header]" and the like, to the letter."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ---------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------


def _packed_length(question):
    return len(question.context) + sum(len(ending) - 1 for ending in question.endings)


def _batches(questions, sizes):
    """Every question once, longest first, so that rows of a batch are alike and memory is asked for at the start."""
    questions = sorted(questions, key=_packed_length, reverse=True)
    batches = []
    while questions:
        width = -(-_packed_length(questions[0]) // sizes.multiple) * sizes.multiple
        rows = max(1, sizes.tokens // width)
        batches.append(_pack(questions[:rows], width))
        questions = questions[rows:]
    return batches


def _pack(questions, width):
    """The `Batch` of `questions` in rows of `width` tokens. Padding sees itself and is seen by nothing else."""
    tokens, positions = np.zeros((2, len(questions), width), dtype=np.int64)
    until = np.arange(1, width + 1).repeat(len(questions)).reshape(width, -1).T.copy()
    predicting, target, ending_of = [], [], []
    for r, question in enumerate(questions):
        n = len(question.context)
        tokens[r, :n] = question.context
        positions[r, :n] = np.arange(n)
        start = n
        for e, ending in enumerate(question.endings):
            stop = start + len(ending) - 1
            tokens[r, start:stop] = ending[:-1]
            positions[r, start:stop] = np.arange(n, n + len(ending) - 1)
            until[r, start:stop] = stop
            predicting += [r * width + i for i in (n - 1, *range(start, stop))]
            target += ending
            ending_of += [4 * r + e] * len(ending)
            start = stop
        until[r, :n] = start
    # the last token of a context predicts the first of four endings: it goes through the head once
    predicting, source = np.unique(predicting, return_inverse=True)
    order = np.argsort(source, kind="stable")
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        until=torch.from_numpy(until),
        predicting=torch.from_numpy(predicting),
        source=torch.from_numpy(source[order]),
        target=torch.tensor(target)[order],
        ending=torch.tensor(ending_of)[order],
        lengths=torch.tensor([[len(ending) for ending in question.endings] for question in questions]),
        chars=torch.tensor([question.chars for question in questions]),
        label=torch.tensor([question.label for question in questions]),
    )


# ---------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------


def ending_scores(model, batch, device, head_rows):
    """Log-probabilities of the four endings of a batch's questions in nats, summed over tokens: (R, 4) fp64, CPU."""
    on_device = (batch.tokens, batch.positions, batch.until, batch.predicting, batch.source, batch.target)
    tokens, positions, until, predicting, source, target = (t.to(device) for t in on_device)
    column = torch.arange(tokens.size(1), device=device)
    row = column[:, None]
    mask = (column <= row) & (row < until[:, None, None, :])  # (R, 1, W, W)
    hidden = model.hidden(tokens, positions, mask).flatten(0, 1)[predicting]  # (P, C)
    starts = range(0, len(hidden), head_rows)
    edges = torch.searchsorted(batch.source, torch.tensor([*starts, len(hidden)])).tolist()
    logprobs = []
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        logits = _logits(model, hidden[start : start + head_rows])
        logprobs.append(logits.log_softmax(dim=-1)[source[first:last] - start, target[first:last]])
    sums = torch.zeros(batch.label.numel() * 4, dtype=torch.float64)
    return sums.index_add_(0, batch.ending, torch.cat(logprobs).cpu().double()).view(-1, 4)


def _logits(model, hidden):
    """Logits (rows, V) in fp32 that autocast has not rounded too coarsely.

    A softmax is blind to where the logits lie, rounding is not: OpenAI's weights put them near -100, where bf16
    steps by 0.5 and some predictions change. There, seen by the first row, the head is computed in fp32.
    """
    logits = model.logits(hidden)
    if logits.dtype != torch.float32 and logits[0].float().mean().abs() > 32:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = model.logits(hidden.float())
    return logits.float()


def predictions(scores, batch):
    """{variant: (R,) the ending it holds for true} from `ending_scores`."""
    return {
        "acc": scores.argmax(dim=1),
        "acc_norm": (scores / batch.lengths).argmax(dim=1),
        "acc_norm_char": (scores / batch.chars).argmax(dim=1),
    }


@torch.no_grad()
def evaluate(model, benchmark, device, autocast=nullcontext, rank=0, world_size=1, check_stop=None, progress=None):
    """This rank's counts of right answers, {"rows": n, "acc": k, "acc_norm": k, "acc_norm_char": k}.

    Batch i belongs to rank i mod world_size: summed over the ranks, rows is the benchmark's and every question
    counts once. `model`: the raw GPT, whose mode is left as it was; no RNG is touched. `autocast()` gives the context
    to compute in; call this outside of any other. `stop()`, asked once a round of world_size batches, on every rank
    equally often, ends it. `progress(n)` is told of n questions more.
    """
    config = model.config
    if benchmark.block_size > config.block_size or config.vocab_size < tokenizer.VOCAB_SIZE:
        raise UserError(
            f"the model has a vocabulary of {config.vocab_size} and a context of {config.block_size}, HellaSwag needs "
            f"{tokenizer.VOCAB_SIZE} and was read for a context of {benchmark.block_size}: give a model of that shape"
        )
    counts = dict.fromkeys(("rows", *VARIANTS), 0)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with autocast():  # once, so that autocast casts each weight once
            for first in range(0, len(benchmark.batches), world_size):
                if check_stop is not None:
                    check_stop()
                for batch in benchmark.batches[first + rank : first + world_size][:1]:  # none in a short last round
                    scores = ending_scores(model, batch, device, benchmark.head_rows)
                    for variant, predicted in predictions(scores, batch).items():
                        counts[variant] += (predicted == batch.label).sum().item()
                    counts["rows"] += len(batch.label)
                    if progress is not None:
                        progress(len(batch.label))
    finally:
        for module in in_training:
            module.training = True
    return counts


# ---------------------------------------------------------------------------------------------------------------
# CLI
# ---------------------------------------------------------------------------------------------------------------


def report(counts):
    """The table that the command prints: each variant with its standard error, and the published numbers."""
    rows = counts["rows"]
    lines = []
    for variant in VARIANTS:
        p = counts[variant] / rows
        lines.append(f"{variant:13} {p:.4f} ± {(p * (1 - p) / max(rows - 1, 1)) ** 0.5:.4f}")
    lines += ["", f"{'published':22}" + "".join(f"{variant:>15}" for variant in VARIANTS)]
    for name, numbers in PUBLISHED.items():
        lines.append(f"{name:22}" + "".join(f"{'-' if n is None else format(n, '.4f'):>15}" for n in numbers))
    return "\n".join(lines)


def main(argv=None):
    from tqdm import tqdm

    from harness.runtime import Runtime
    from train_gpt2 import GPT

    parser = Parser(description="HellaSwag accuracy of a GPT-2, beside the published numbers")
    parser.add_argument("--model", default="log", help="gpt2 ... gpt2-xl, a folder, checkpoint or log folder [log]")
    parser.add_argument("--hellaswag_path", help="the official hellaswag_val.jsonl; downloaded when not given")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--lm_eval_context", action="store_true", help="text made as lm-evaluation-harness makes it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    parser.add_argument("--cache_dir", default=".cache", help="where a download is kept")
    args = parser.parse_args(argv)

    rt = Runtime.start(device=args.device, dtype=args.dtype)
    path = args.hellaswag_path or fetch(args.cache_dir)
    model = GPT.from_checkpoint(args.model).to(rt.device)
    how = {"block_size": model.config.block_size, "device": rt.device}
    benchmark = load(path, **how, limit=args.limit, lm_eval_context=args.lm_eval_context)
    print(", ".join((args.model, *rt.notes)), benchmark, sep="\n", file=sys.stderr)
    with tqdm(total=benchmark.rows, unit=" questions", disable=None) as bar:
        counts = evaluate(model, benchmark, rt.device, rt.autocast, progress=bar.update)
    print(report(counts))


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
