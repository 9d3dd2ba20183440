"""HellaSwag (Zellers et al. 2019): which of four endings does a language model find the most likely?

    python hellaswag.py --model gpt2        # or a Hugging Face folder, a checkpoint, a log folder

The trainer calls the same `fetch`, `load` and `evaluate`. Three accuracies come from one pass, because tools differ
in how they compare endings of different lengths:

    acc            by the sum of the log-probabilities of an ending's tokens
    acc_norm       by their mean: the choice of GPT-3 and of build-nanogpt, and the number in `log.txt`
    acc_norm_char  by their sum divided by the ending's characters: `acc_norm` of lm-evaluation-harness

The simple form takes one question at a time: four rows, each of them the context and one ending, one forward pass,
and the mean log-probability of the ending's tokens; the row with the largest mean is the model's answer. (Ten lines:
`one_by_one` in tests/scripts/hellaswag_speed.py.) It computes the context four times, pads the rows, and multiplies
every position with the 50,257 columns of the head, also those that predict nothing that counts.

Here a question is **one row**: its context once, then the four endings, each without its last token, which has
nothing left to predict. A mask lets an ending see the context and itself, and every token has the position that it
would have in a row of its own, so the scores are those of the simple form. Many questions of like length make a
batch, and only positions that predict an ending's token reach the head. That is three times as fast on a CPU, and
the whole benchmark takes 2 s on an H100.

The context `a b c` with the endings `p q r`, `s t`, `u` and `v w x`:

    token      a  b  c  p  q  s  v  w      `u` is a single token: `c` predicts it, and it predicts nothing
    position   0  1  2  3  4  3  3  4
    predicts         *  q  r  t  w  x      * `c` predicts the first token of each ending: p, s, u and v

    a          1  .  .  .  .  .  .  .      who sees whom: the token of a line sees the tokens marked 1
    b          1  1  .  .  .  .  .  .
    c          1  1  1  .  .  .  .  .
    p          1  1  1  1  .  .  .  .
    q          1  1  1  1  1  .  .  .
    s          1  1  1  .  .  1  .  .
    v          1  1  1  .  .  .  1  .
    w          1  1  1  .  .  .  1  1

    until      8  8  8  5  5  6  8  8      the same as numbers: from itself on, token j is seen as far as until[j]
"""

if __name__ == "__main__":
    import sys
    sys.path.insert(0, __file__.removesuffix("hellaswag.py"))  # python -P leaves it out
    from harness.cli import quiet_imports
    quiet_imports()

import http.client
import json
import math
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
from harness.cli import Parser, UserError, exit_status, say
from harness.files import atomic_file, sha256
from harness.runtime import Runtime
from harness.tokenizer import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 questions
VARIANTS = ("acc", "acc_norm", "acc_norm_char")

# Published results (acc, acc_norm, acc_norm_char). GPT-2: completion style as here, and lm-evaluation-harness, whose
# context differs (`--lm_eval_context`). GPT-3: Brown et al. 2020, appendix H, zero-shot.
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
    """How much work the device gets at once. On a GPU each new shape costs time once, padding costs time always."""

    tokens: int  # in a batch, padding included
    multiple: int  # the width of a batch is rounded up to a multiple of this
    logits: int  # positions whose logits, 50,257 floats each, are in memory at the same time


CPU_SIZES = Sizes(tokens=1024, multiple=8, logits=256)
GPU_SIZES = Sizes(tokens=16384, multiple=32, logits=2048)


@dataclass(frozen=True)
class Questions:
    """Q tokenized questions. Five texts belong to each: its context and its four endings, in this order.

    ids: (N,) uint16, the tokens of all texts. start, length: (Q, 5), where each text lies in `ids`.
    chars: (Q, 4), characters of an ending, without the space before it. label: (Q,), which ending is the true one.
    """

    ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    chars: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Batch:
    """R questions, one per row, in rows of W tokens. P of the tokens predict something, N tokens are predicted.

    tokens, positions: (R, W). until: (R, W), token j is seen by the tokens j..until[j]-1 of its row.
    predicting: (P,), indices into the R*W tokens, rising. source: (N,), indices into `predicting`, rising.
    target: (N,), the predicted token. ending: (N,), which of the R*4 endings it belongs to.
    lengths, chars: (R, 4), tokens and characters of an ending. label: (R,). All int64 and on the CPU.
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
    """The whole benchmark, tokenized and batched once a run. `str()` describes it in a line."""

    batches: list
    questions: int
    cropped: int  # questions whose context was too long for the model and lost tokens on the left
    block_size: int
    sizes: Sizes
    tokenizer: Tokenizer
    sha256: str  # of all texts and labels

    def __str__(self):
        shapes = {tuple(batch.tokens.shape) for batch in self.batches}
        what = f"{self.questions:,} questions in {len(self.batches)} batches of {len(shapes)} shapes"
        return f"{what}, {self.cropped} contexts cropped on the left to fit {self.block_size} tokens"


# --- reading ---


def fetch(cache_dir):
    """Path of the official validation set in `cache_dir`; downloaded if it is not there or not complete.

    Raises `UserError` when the download fails, is not the published file, or cannot be saved.
    """
    path = Path(cache_dir) / "hellaswag_val.jsonl"
    if path.is_file() and sha256(path) == SHA256:
        return path
    fix = f"download {URL} elsewhere and save it as {path}, or name your copy with --hellaswag_path"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = response.read()
        if sha256_of(data).hexdigest() != SHA256:
            raise UserError(f"the {len(data):,} bytes from {URL} are not HellaSwag's validation set: {fix}")
        with atomic_file(path) as file:
            file.write(data)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"HellaSwag is not at {path} and could not be downloaded ({error}): choose another "
                        f"--cache_dir, {fix}") from error
    return path


def load(path, *, block_size, device, limit=None, lm_eval_context=False, own=None):
    """Read, check, tokenize and batch the file at `path` for a model with a context of `block_size`: a `Benchmark`.

    `own`: the model's `Tokenizer`, GPT-2's by default; the published numbers are of models with GPT-2's.
    The batches depend on the kind of `device`, never on how many ranks share them. `limit`: only the first so many
    questions.
    `lm_eval_context`: the text as lm-evaluation-harness makes it, the activity first and WikiHow's marks removed.
    Raises `UserError`, naming the line, for a row that is not a HellaSwag question.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of HellaSwag questions is {limit}: it must be at least 1")
    places, texts, chars, labels = [], [], [], []
    for place, row in islice(_read_rows(path), limit):
        context, endings, label, space = _check_row(row, place, lm_eval_context)
        places.append(place)
        texts += [context, *(space + ending for ending in endings)]
        chars.append([len(ending) for ending in endings])
        labels.append(label)
    if not places:
        raise UserError(f"{path} is empty: it should hold HellaSwag's questions, one JSON object a line")

    own = own or tokenizer.gpt2_tokenizer()
    tokens = [own.encode(text) for text in texts]
    ids, lengths = np.concatenate(tokens), np.array([len(text) for text in tokens])
    start = np.cumsum(lengths) - lengths
    questions = Questions(ids, start.reshape(-1, 5), lengths.reshape(-1, 5), np.array(chars), np.array(labels))
    cropped = _crop(questions, block_size, places)
    sizes = GPU_SIZES if torch.device(device).type == "cuda" else CPU_SIZES
    digest = sha256_of(repr((texts, labels)).encode(errors="backslashreplace")).hexdigest()
    return Benchmark(_batches(questions, sizes), len(places), cropped, block_size, sizes, own, digest)


def _read_rows(path):
    """Yield `(place, row)` for every row of the file: words that say where it stands, and what JSON made of it."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield place, json.loads(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it should be HellaSwag's JSONL, {URL}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, brackets without end
        raise UserError(f"{place} is not JSON ({error}): HellaSwag is JSON Lines, fetch it again from {URL}") from error


def _check_row(row, place, lm_eval_context):
    """`(context, endings, label, space)` of a row, or `UserError`; `space` belongs between context and ending."""
    names = ("activity_label", "ctx_a", "ctx_b") if lm_eval_context else ("ctx",)
    question = row if isinstance(row, dict) else {}
    endings, label = question.get("endings"), question.get("label")
    # a label is a number in the official file, a text in Hugging Face's copy
    is_right = {**{name: isinstance(question.get(name), str) for name in names},
                "endings": isinstance(endings, list) and [type(ending) for ending in endings] == [str] * 4,
                "label": str(label) in ("0", "1", "2", "3")}
    if wrong := [name for name, right in is_right.items() if not right]:
        raise UserError(f"{place} has no good {wrong[0]!r} ({question.get(wrong[0])!r:.80}): a question has "
                        f"{', '.join(names)}, 4 endings, and a label from 0 to 3, which HellaSwag's test split does "
                        f"not have; the validation split is {URL}")
    space = " "
    context = row["ctx"] if not lm_eval_context else ""
    if lm_eval_context:
        context = _without_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [_without_marks(ending) for ending in endings]
        # GPT-2's tokens begin with a space and never end with one: spaces go from the context to the ending
        space = context[len(context.rstrip()) :] + space
        context = context.rstrip()
    if not context:
        raise UserError(f"{place}: the context is empty, so nothing predicts the first token of an ending")
    for index, ending in enumerate(endings):
        if not ending.strip():
            raise UserError(f"{place}: ending {index} is empty")
    return context, endings, int(label), space


def _without_marks(text):
    """lm-evaluation-harness's clean-up of WikiHow's "[title]", "[header]" and the like, to the letter."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _crop(questions, block_size, places):
    """Crop contexts on the left to what fits `block_size`, in place; returns how many were cropped."""
    longest = questions.length[:, 1:].max(axis=1)  # (Q,)
    worst = longest.argmax()
    if longest[worst] > block_size:
        whole = (questions.length[:, 0] + longest - 1).max()
        raise UserError(
            f"HellaSwag does not fit a context of {block_size} tokens, an ending in {places[worst]} has "
            f"{longest[worst]}: train with --seq_len {longest[worst]} or more ({whole} is enough for every context), "
            "or without HellaSwag, --hellaswag_every 0"
        )
    room = block_size - (longest - 1)  # the last token is predicted, but predicts nothing
    too_long = np.maximum(questions.length[:, 0] - room, 0)  # (Q,) tokens that do not fit
    questions.start[:, 0] += too_long
    questions.length[:, 0] -= too_long
    return int((too_long > 0).sum())


# --- packing ---


def _batches(questions, sizes):
    """Every question once, the longest first: rows of a batch are of like length, and memory peaks at the start."""
    packed = questions.length.sum(axis=1) - 4  # (Q,) tokens of a row: each ending goes without its last
    order = np.argsort(-packed, kind="stable")
    batches, first = [], 0
    while first < len(order):
        width = -(-packed[order[first]] // sizes.multiple) * sizes.multiple
        last = first + max(1, sizes.tokens // width)
        batches.append(_pack(questions, order[first:last], int(width)))
        first = last
    return batches


def _pack(questions, chosen, width):
    """The `Batch` of the questions with the indices `chosen` (R,), in rows of `width` tokens; see the head of the file.

    Padding is token 0 at position 0; it sees itself and is seen by nothing else.
    """
    R = len(chosen)
    start, length = questions.start[chosen], questions.length[chosen]  # (R, 5)
    fed = length - [0, 1, 1, 1, 1]  # (R, 5) tokens of context and endings that are in the row
    stop = fed.cumsum(axis=1)  # (R, 5) the column behind each
    row = np.arange(R)[:, None] * width  # (R, 1) where a row begins among the R*W tokens
    context = length[:, :1]  # (R, 1)

    tokens = np.zeros(R * width, np.int64)
    positions = np.zeros(R * width, np.int64)
    until = np.tile(np.arange(1, width + 1), R)
    column = _ranges(row + stop - fed, fed)  # where the tokens go, text by text
    tokens[column] = questions.ids[_ranges(start, fed)]
    positions[column] = _ranges(np.hstack([0 * context, *[context] * 4]), fed)
    until[column] = np.hstack([stop[:, 4:], stop[:, 1:]]).repeat(fed.ravel())  # all see the context

    # a context's last token and all tokens of the endings predict: a run without a gap in every row
    runs = stop[:, 4:] - context + 1  # (R, 1)
    predicting = _ranges(row + context - 1, runs)
    # in the order of their sources: the first tokens of the four endings, then what follows them, ending by ending
    count = np.hstack([np.ones_like(fed[:, 1:]), fed[:, 1:]])  # (R, 8)
    target = questions.ids[_ranges(np.hstack([start[:, 1:], start[:, 1:] + 1]), count)]
    first = runs.cumsum(axis=0) - runs  # (R, 1) where a row's run begins in `predicting`
    after_context = first + 1 + (stop - fed)[:, 1:] - context
    source = _ranges(np.hstack([*[first] * 4, after_context]), count)
    ending = np.tile(np.arange(R * 4).reshape(R, 4), 2).repeat(count.ravel())

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array, np.int64))

    return Batch(
        tokens=tensor(tokens).view(R, width),
        positions=tensor(positions).view(R, width),
        until=tensor(until).view(R, width),
        predicting=tensor(predicting),
        source=tensor(source),
        target=tensor(target),
        ending=tensor(ending),
        lengths=tensor(length[:, 1:]),
        chars=tensor(questions.chars[chosen]),
        label=tensor(questions.label[chosen]),
    )


def _ranges(first, count):
    """The numbers first[i], first[i] + 1, ..., `count[i]` of them, for all i, in one array."""
    first, count = first.ravel(), count.ravel()
    before = count.cumsum() - count
    return (first - before).repeat(count) + np.arange(count.sum())


# --- scoring ---


def ending_scores(model, batch, device, logits_at_once, head=None):
    """Log-probabilities in nats of the endings of a batch's questions, summed over tokens: (R, 4) fp64 on the CPU.

    `head`: what `model.centered_head()` returned, where several batches share it; else it is made here.
    """
    tokens, positions, until, predicting, source, target = (
        tensor.to(device)
        for tensor in (batch.tokens, batch.positions, batch.until, batch.predicting, batch.source, batch.target)
    )
    column = torch.arange(tokens.size(1), device=device)
    row = column[:, None]
    mask = (column <= row) & (row < until[:, None, None, :])  # (R, 1, W, W)
    hidden = model.hidden(tokens, positions, mask).flatten(0, 1)[predicting]  # (P, C)

    head = model.centered_head() if head is None else head
    # `source` rises, so that the targets of one slice of `hidden` are neighbours too
    firsts = range(0, len(hidden), logits_at_once)
    edges = torch.searchsorted(batch.source, torch.tensor([*firsts, len(hidden)])).tolist()
    logprobs = []
    for first, begin, end in zip(firsts, edges[:-1], edges[1:], strict=True):
        logits = model.logits(hidden[first : first + logits_at_once], head).float()
        logprobs.append(logits.log_softmax(dim=-1)[source[begin:end] - first, target[begin:end]])
    sums = torch.zeros(len(batch.label) * 4, dtype=torch.float64)
    return sums.index_add_(0, batch.ending, torch.cat(logprobs).cpu().double()).view(-1, 4)


def predictions(scores, batch):
    """{variant: (R,) the ending that the model prefers} from `ending_scores`."""
    return {
        "acc": scores.argmax(dim=1),
        "acc_norm": (scores / batch.lengths).argmax(dim=1),
        "acc_norm_char": (scores / batch.chars).argmax(dim=1),
    }


@torch.no_grad()
def evaluate(model, benchmark, device, autocast=nullcontext, rank=0, world_size=1, check_stop=None, progress=None):
    """This rank's counts of right answers: {"questions": n, "acc": k, "acc_norm": k, "acc_norm_char": k}.

    Batch i belongs to rank i mod world_size, so that summed over the ranks every question counts once. `model`: the
    raw GPT, whose mode is left as it was; no RNG is touched. Where it computes nan, the counts are nan. `autocast()`
    gives the context to compute in; do not call this inside another one. `check_stop()` is called once for every
    world_size batches, on every rank equally often, and raises to stop. `progress(n)` is called when n more questions
    are done.
    """
    config = model.config
    if tokenizer.of(model) != benchmark.tokenizer or benchmark.block_size > config.block_size:
        raise UserError(
            f"the model has {tokenizer.of(model)} and a context of {config.block_size}: HellaSwag was loaded for "
            f"{benchmark.tokenizer} and a context of {benchmark.block_size}"
        )
    counts = dict.fromkeys(("questions", *VARIANTS), 0)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with autocast():  # one for all batches: it casts each weight once
            head = model.centered_head()
            for first in range(0, len(benchmark.batches), world_size):
                if check_stop is not None:
                    check_stop()
                if first + rank >= len(benchmark.batches):  # the last round may have fewer batches than ranks
                    break
                batch = benchmark.batches[first + rank]
                scores = ending_scores(model, batch, device, benchmark.sizes.logits, head)
                for variant, predicted in predictions(scores, batch).items():
                    right = (predicted == batch.label).sum().item()
                    counts[variant] += right if scores.isfinite().all() else math.nan  # argmax of nan is 0
                counts["questions"] += len(batch.label)
                if progress is not None:
                    progress(len(batch.label))
    finally:
        for module in in_training:
            module.training = True
    return counts


# --- CLI ---


def report(counts):
    """The table that the command prints: each variant with its standard error, and the published numbers."""
    n = counts["questions"]
    lines = []
    for variant in VARIANTS:
        p = counts[variant] / n
        lines.append(f"{variant:13} {p:.4f} ± {(p * (1 - p) / max(n - 1, 1)) ** 0.5:.4f}")
    lines += ["", f"{'published':22}" + "".join(f"{variant:>15}" for variant in VARIANTS)]
    for name, numbers in PUBLISHED.items():
        columns = ["-" if number is None else f"{number:.4f}" for number in numbers]
        lines.append(f"{name:22}" + "".join(f"{column:>15}" for column in columns))
    return "\n".join(lines)


def main(argv=None):
    from tqdm import tqdm

    from train_gpt2 import GPT  # late: the trainer imports this file

    parser = Parser(description="HellaSwag accuracy of a GPT-2, beside the published numbers")
    parser.add_argument("-m", "--model", default="log", metavar="NAME|DIR|FILE",
                        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder, a checkpoint file or a "
                             "log folder [log]")
    parser.add_argument("--hellaswag_path", metavar="FILE",
                        help="the validation set, JSON Lines; downloaded when not given")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--lm_eval_context", action="store_true", help="prepare the text as lm-evaluation-harness does")
    parser.add_argument("-d", "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--cache_dir", default=".cache", metavar="DIR", help="where the download is kept [.cache]")
    args = parser.parse_args(argv)

    rt = Runtime.start(device=args.device, dtype=args.dtype)
    model = GPT.from_checkpoint(args.model).to(rt.device)
    path = args.hellaswag_path or fetch(args.cache_dir)
    benchmark = load(path, block_size=model.config.block_size, device=rt.device, limit=args.limit,
                     lm_eval_context=args.lm_eval_context, own=tokenizer.of(model, args.model))
    say(", ".join((args.model, *rt.notes)), sys.stderr)
    say(benchmark, sys.stderr)
    if model.tokenizer and model.tokenizer.json:
        say(f"the model has {model.tokenizer}: the published numbers are of models with GPT-2's", sys.stderr)
    with tqdm(total=benchmark.questions, unit=" questions", disable=None) as bar:
        counts = evaluate(model, benchmark, rt.device, rt.autocast, progress=bar.update)
    print(report(counts), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main, output_is_product=True))
