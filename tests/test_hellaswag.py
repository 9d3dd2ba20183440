"""HellaSwag: scores against transformers and lm-evaluation-harness, precision, ranks,
what an evaluation leaves alone, copies of the file, bad input."""

import copy
import hashlib
import http.client
import io
import json
import math
import re
import subprocess
import sys
import urllib.error
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

import hellaswag
from harness import machine, tokenizer
from harness.cli import UserError
from hellaswag import CPU_SIZES, GPU_SIZES, VARIANTS, ending_scores, evaluate, load, predictions
from train_gpt2 import GPT, GPTConfig

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 256}
ROW = {
    "ind": 4, "activity_label": "Baking cookies", "ctx_a": "A woman puts a tray in the oven.", "ctx_b": "she",
    "ctx": "A woman puts a tray in the oven. she", "split": "val", "split_type": "zeroshot", "source_id": "",
    "endings": ["waits for the cookies.", "paints it blue", "is a tray of tall oven.", "jumps into a river, singing."],
    "label": 0,
}
WIKIHOW = {
    **ROW, "activity_label": "Home and Garden", "ctx_b": "", "label": 3,
    "ctx_a": "[header] How to bake [title] Heat the oven. [step] Turn the dial. [substeps]",
    "endings": ["[title] Wait a while. [step] It takes long.", "Sing  loudly.", "Open [title] Look.", "Leave."],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, every=1):
    return [json.loads(line) for line in path.read_text().splitlines()[::every]]


def loaded(path, block_size=256, **options):
    return load(path, block_size=block_size, device="cpu", **options)


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def models():
    """{"random": ..., "trained": ...}: the second has learned which words are frequent, so its scores are peaked."""
    machine.keep_freed_memory()  # as the trainer and the commands do: a third of the time here
    random, trained = GPT(GPTConfig(**SMALL), seed=1), GPT(GPTConfig(**SMALL), seed=1)
    ids = torch.tensor(tokenizer.gpt2().encode_ordinary((ROOT / "input.txt").read_text()[:20_000]))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-2, fused=True)
    for step in range(20):
        x = ids[step * 128 : step * 128 + 129]
        trained(x[:-1].view(2, 64), x[1:].view(2, 64))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"random": random, "trained": trained}


@pytest.fixture(scope="session")
def exported(models, tmp_path_factory):
    """Folder by name in `models`: the same weights for transformers, which shares no code with ours."""
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def shifted(model, offset):
    """A copy whose logits are all about `-offset`, as those of OpenAI's weights (100).

    All tokens share four coordinates: what these add to the logits is the same for every token.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.wte.weight[: model.config.vocab_size, :4] = 0.7
        model.transformer.ln_f.bias[:4] -= offset / 4 / 0.7
    return model


def scores_by_endings(model, benchmark, **options):
    """{the four endings' tokens: (scores, predictions by variant)}, since batches have an order of their own."""
    found = {}
    for batch in benchmark.batches:
        with torch.no_grad():
            scores = ending_scores(model, batch, "cpu", benchmark.sizes.logits)
        guesses = predictions(scores, batch)
        for r in range(len(batch.label)):
            key = tuple(tuple(batch.target[batch.ending == 4 * r + e].tolist()) for e in range(4))
            found[key] = (scores[r], {variant: guesses[variant][r].item() for variant in VARIANTS})
    return found


@torch.no_grad()
def reference(transformers_model, row, block_size=256):
    """One row at a time through transformers: the endings' tokens, their scores, and the prediction by variant."""
    encode = tokenizer.gpt2().encode_ordinary
    endings, scores = [tuple(encode(" " + ending)) for ending in row["endings"]], []
    room = block_size + 1 - max(len(ending) for ending in endings)
    for ending in endings:
        ids = torch.tensor(encode(row["ctx"])[-room:] + list(ending))
        logits = transformers_model(ids[None], logits_to_keep=len(ending) + 1).logits[0, :-1]
        logprobs = logits.log_softmax(dim=-1)
        scores.append(logprobs[range(len(ending)), list(ending)].double().sum())
    by = {"acc": [1] * 4, "acc_norm": [len(e) for e in endings], "acc_norm_char": [len(e) for e in row["endings"]]}
    best = {name: max(range(4), key=lambda e, n=n: scores[e] / n[e]) for name, n in by.items()}
    return tuple(endings), torch.stack(scores), best


@pytest.mark.parametrize(("weights", "device"), [("random", "cpu"), ("trained", "cpu"), ("trained", "cuda")])
def test_every_score_is_that_of_transformers_one_row_at_a_time(
    models, exported, weights, device, shared_hellaswag, tmp_path
):
    """Catches packing, for both kinds of device: an ending that sees another, a wrong position, a token scored twice or
    at the wrong place, endings of one token, texts that are no ASCII."""
    from transformers import GPT2LMHeadModel

    rows = read(shared_hellaswag, every=60)
    rows += [{**ROW, "endings": ["a", "b", "run away", "c"]}, {**ROW, "ctx": "zwölf 🙂\n\n", "endings": [*"日本語文"]}]
    benchmark = load(write(tmp_path / "rows.jsonl", rows), block_size=256, device=device)
    assert benchmark.sizes is (GPU_SIZES if device == "cuda" else CPU_SIZES)
    found = scores_by_endings(models[weights], benchmark)
    transformers_model = GPT2LMHeadModel.from_pretrained(exported[weights]).eval()
    right = dict.fromkeys(VARIANTS, 0)
    for row in rows:
        key, scores, best = reference(transformers_model, row)
        assert torch.allclose(found[key][0], scores, rtol=0, atol=1e-4)
        assert found[key][1] == best
        for variant in VARIANTS:
            right[variant] += best[variant] == row["label"]
    assert evaluate(models[weights], benchmark, "cpu") == {"questions": len(rows), **right}


def test_packed_is_the_simple_form_under_autocast(models, shared_hellaswag, tmp_path):
    """Catches packing that loses precision of its own in bfloat16: the head of hellaswag.py calls it the simple form"""
    model = shifted(models["trained"], 100).eval()
    rows = read(shared_hellaswag, every=120)
    benchmark = loaded(write(tmp_path / "rows.jsonl", rows))
    encode = tokenizer.gpt2().encode_ordinary
    apart = {}
    for name, autocast in (("bfloat16", bfloat16), ("float32", nullcontext)):
        with torch.no_grad(), autocast():
            head, packed = model.centered_head(), scores_by_endings(model, benchmark)
            differences = []
            for row in rows:
                endings = [encode(" " + ending) for ending in row["endings"]]
                for e, ending in enumerate(endings):
                    tokens = torch.tensor([encode(row["ctx"]) + ending])
                    hidden = model.hidden(tokens)[0, -len(ending) - 1 : -1]
                    logprobs = model.logits(hidden, head).float().log_softmax(-1)
                    simple = logprobs.gather(1, torch.tensor(ending)[:, None])
                    differences.append(((simple.sum() - packed[tuple(map(tuple, endings))][0][e]) / len(ending)).abs())
        apart[name] = torch.stack(differences)
    assert apart["float32"].max() < 1e-4  # nats a token
    assert apart["bfloat16"].max() < 0.05 and apart["bfloat16"].mean() < 0.01


def test_probabilities_are_fp32_under_autocast(models, shared_hellaswag):
    """Catches a softmax in bfloat16, whose steps are 0.03 nats at log-probabilities of a token of -10."""
    model, logits = copy.deepcopy(models["trained"]).eval(), []
    model.logits = lambda hidden, head: logits.append(GPT.logits(model, hidden, head)) or logits[-1]
    batch = loaded(shared_hellaswag, limit=20).batches[0]
    with torch.no_grad(), bfloat16():
        scores = ending_scores(model, batch, "cpu", logits_at_once=10**6)
    logprobs = logits[0].double().log_softmax(-1)[batch.source, batch.target]
    due = torch.zeros(scores.numel(), dtype=torch.float64).index_add_(0, batch.ending, logprobs)
    assert logits[0].dtype == torch.bfloat16 and torch.allclose(scores.flatten(), due, rtol=0, atol=1e-3)


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_lm_evaluation_harness_agrees(models, exported, weights, shared_hellaswag, tmp_path):
    """Catches `--lm_eval_context` and `acc_norm_char`: the harness's own task, on the same rows and weights."""
    pytest.importorskip("lm_eval.models.huggingface", reason="needs lm_eval: pip install lm_eval[hf]")
    import yaml
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM

    folder = next(path for path in tasks.__path__) + "/hellaswag/"
    config = yaml.load((ROOT / folder / "hellaswag.yaml").read_text().replace("!function", ""), yaml.SafeLoader)
    process_docs = __import__("lm_eval.tasks.hellaswag.utils", fromlist=["process_docs"]).process_docs
    rows = [*read(shared_hellaswag, every=75), ROW, WIKIHOW]
    path = write(tmp_path / "rows.jsonl", rows)
    config |= {"process_docs": process_docs, "training_split": None}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(path)}}}
    results = evaluator.simple_evaluate(
        HFLM(pretrained=str(exported[weights]), device="cpu", dtype="float32", batch_size=1),
        tasks=[config], log_samples=True, bootstrap_iters=0,
    )
    samples = results["samples"]["hellaswag"]
    benchmark = loaded(path, lm_eval_context=True)
    counts = evaluate(models[weights], benchmark, "cpu")
    assert counts["questions"] == len(samples) == len(rows)
    assert counts["acc"] == sum(sample["acc"] for sample in samples)
    assert counts["acc_norm_char"] == sum(sample["acc_norm"] for sample in samples)
    theirs = sorted([response[0] for response in sample["filtered_resps"]] for sample in samples)
    ours = sorted(scores.tolist() for scores, _ in scores_by_endings(models[weights], benchmark).values())
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


def test_a_model_that_computes_nan_has_no_score(models, shared_hellaswag, tmp_path):
    """Catches nan scored as the first ending, which is right for a quarter of the questions."""
    benchmark = loaded(write(tmp_path / "rows.jsonl", read(shared_hellaswag)[:40]))
    model = copy.deepcopy(models["trained"])
    model.transformer.wpe.weight.data[60] = math.nan  # some questions are that long
    counts = evaluate(model, benchmark, "cpu")
    assert counts["questions"] == 40 and all(math.isnan(counts[variant]) for variant in hellaswag.VARIANTS)
    assert "acc_norm      nan" in hellaswag.report(counts)


@pytest.mark.parametrize("world_size", [2, 7])
def test_ranks_share_every_question_once(models, shared_hellaswag, world_size):
    """Catches counts that depend on the number of ranks, and a collective `check_stop` called unequally often."""
    benchmark = loaded(shared_hellaswag, limit=90)
    whole = evaluate(models["trained"], benchmark, "cpu")
    assert whole["questions"] == 90 and len(benchmark.batches) % 3 and len(benchmark.batches) % 7  # a short last round
    asked, shares = [0] * world_size, []
    for rank in range(world_size):

        def check_stop(rank=rank):
            asked[rank] += 1

        share = evaluate(models["trained"], benchmark, "cpu", rank=rank, world_size=world_size, check_stop=check_stop)
        shares.append(share)
    assert {name: sum(share[name] for share in shares) for name in whole} == whole
    assert asked == [-(-len(benchmark.batches) // world_size)] * world_size


def test_a_stop_ends_it_at_once(models, shared_hellaswag):
    """Catches a signal that waits for the end of a long evaluation."""
    done = []

    def check_stop():
        if done:
            raise InterruptedError

    benchmark = loaded(shared_hellaswag, limit=90)
    with pytest.raises(InterruptedError):
        evaluate(models["random"], benchmark, "cpu", check_stop=check_stop, progress=done.append)
    assert done == [len(benchmark.batches[0].label)]


def test_training_goes_on_as_if_nothing_had_happened(shared_hellaswag):
    """Catches mode, RNG, gradients and autocast's weight cache: what an evaluation between two steps could spoil."""
    benchmark = loaded(shared_hellaswag, limit=8)

    def train(evaluating):
        model = GPT(GPTConfig(**SMALL, dropout=0.5), seed=2).train()
        model.transformer.drop.eval()  # a part that somebody keeps out of training
        torch.manual_seed(3)
        for _ in range(2):
            if evaluating:
                evaluate(model, benchmark, "cpu", bfloat16)
            with bfloat16():
                loss = model(torch.arange(32)[None], torch.arange(1, 33)[None])[1]
            loss.backward()
        return [p.grad for p in model.parameters()], [m.training for m in model.modules()], torch.get_rng_state()

    for plain, evaluated in zip(train(False), train(True)):
        assert all(map(torch.equal, plain, evaluated)) if isinstance(plain[0], torch.Tensor) else plain == evaluated


def test_dropout_is_off_and_the_mode_comes_back_after_an_error(models, shared_hellaswag):
    """Catches an evaluation in training mode, and a mode that an exception leaves changed."""
    benchmark = loaded(shared_hellaswag, limit=8)
    model = GPT(GPTConfig(**SMALL, dropout=0.5), seed=1).train()
    assert evaluate(model, benchmark, "cpu") == evaluate(models["random"], benchmark, "cpu")

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, benchmark, "cpu", check_stop=fail)
    assert all(module.training for module in model.modules())


def test_few_shapes_little_padding(shared_hellaswag):
    """Catches the speed that a count can show: rows of like length together, few shapes, everything once."""
    for device, most_padding, most_shapes in (("cpu", 0.06, 25), ("cuda", 0.25, 10)):
        benchmark = load(shared_hellaswag, block_size=1024, device=device)
        assert sum(len(batch.label) for batch in benchmark.batches) == benchmark.questions == 3000
        places = sum(batch.tokens.numel() for batch in benchmark.batches)
        tokens = sum(batch.until[:, 0].sum().item() for batch in benchmark.batches)  # to where token 0 is seen
        assert tokens < places < tokens * (1 + most_padding)
        assert len({batch.tokens.shape for batch in benchmark.batches}) <= most_shapes


def test_long_contexts_are_cropped_on_the_left_and_counted(models, exported, shared_hellaswag, tmp_path):
    """Catches a position beyond the model's context, a cropped ending, and cropping that nobody hears of."""
    from transformers import GPT2LMHeadModel

    rows = [row for row in read(shared_hellaswag)[:100] if max(map(len, row["endings"])) < 80]
    benchmark = loaded(write(tmp_path / "rows.jsonl", rows), block_size=24)
    found = scores_by_endings(models["trained"], benchmark)
    transformers_model = GPT2LMHeadModel.from_pretrained(exported["trained"]).eval()
    for row in rows:
        key, scores, best = reference(transformers_model, row, block_size=24)
        assert torch.allclose(found[key][0], scores, rtol=0, atol=1e-4) and found[key][1] == best
    assert max(batch.positions.max() for batch in benchmark.batches) == 23
    assert 0 < benchmark.cropped < len(rows) and f"{benchmark.cropped} contexts cropped" in str(benchmark)
    with pytest.raises(UserError, match="context of 16: .* context of 24"):
        evaluate(GPT(GPTConfig(**{**SMALL, "block_size": 16})), benchmark, "cpu")
    for vocab_size in (65, 32_000, 50_258):
        with pytest.raises(UserError, match=f"vocabulary of {vocab_size:,}"):
            evaluate(GPT(GPTConfig(**SMALL, vocab_size=vocab_size)), benchmark, "cpu")


def test_a_context_too_short_is_named_with_the_one_that_does(shared_hellaswag):
    """Catches `--seq_len 32` ending with a complaint about a line and no word of what would do."""
    with pytest.raises(UserError, match=r"context of 32 .* --seq_len (\d+) or more \((\d+) is enough") as error:
        loaded(shared_hellaswag, block_size=32)
    least, whole = map(int, re.search(r"--seq_len (\d+) or more \((\d+)", str(error.value)).groups())
    assert str(shared_hellaswag) in str(error.value)
    with pytest.raises(UserError, match="does not fit"):
        loaded(shared_hellaswag, block_size=least - 1)
    assert loaded(shared_hellaswag, block_size=least).cropped > 0
    assert loaded(shared_hellaswag, block_size=whole - 1).cropped > 0
    assert loaded(shared_hellaswag, block_size=whole).cropped == 0


def changed(**changes):
    return json.dumps({name: value for name, value in {**ROW, **changes}.items() if value is not None}).encode()


@pytest.mark.parametrize("line, complaint", [
    (changed(ctx=None), r"'ctx' \(None\)"),
    (changed(label=None), r"'label' \(None\): .*test split does not have"),
    (changed(label="", split="test"), r"'label' \(''\): .*test split does not have"),
    (changed(ctx=7), r"'ctx' \(7\)"),
    (changed(ctx=""), "context is empty"),
    *((changed(endings=endings), "'endings'.*4 endings") for endings in (
        None, ["a", "b", "c"], ["a", "b", "c", "d", "e"], ["a", "b", "c", 4], "abcd")),
    (changed(endings=["a", "b", " ", "d"]), "ending 2 is empty"),
    *((changed(label=label), rf"'label' \({label}\)") for label in (4, -1, True, 2.0)),
    *((torn, "not JSON") for torn in (changed()[:90], b'{"ctx": "\xff"}', b"[" * 100_000, b"9" * 5000)),
    *((row, "'ctx'") for row in (b"[1, 2]", b'"\\ud800"')),
])
def test_a_bad_row_is_named(tmp_path, line, complaint):
    """Catches a question that is silently skipped, guessed at, or reported without saying where it stands."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(changed() + b"\n\n" + line)
    with pytest.raises(UserError, match=complaint) as error:
        loaded(path)
    assert f"{path}, line 3" in str(error.value)


def test_bad_files(tmp_path):
    """Catches a traceback, or an accuracy of nothing, for a file that is not there, is damaged, or is empty."""
    for path in (tmp_path / "none.jsonl", tmp_path, write(tmp_path / "empty.jsonl", [])):
        with pytest.raises(UserError, match=path.name):
            loaded(path)
    for data in (b"\x1f\x8b\x08\x00", b"PAR1\x15\x04"):  # how a file of gzip, of Parquet begins
        (tmp_path / "packed").write_bytes(data)
        with pytest.raises(UserError, match="packed, line 1 is not JSON .*: HellaSwag is JSON Lines"):
            loaded(tmp_path / "packed")
    path = write(tmp_path / "rows.jsonl", [ROW, WIKIHOW])
    with pytest.raises(UserError, match="limit of HellaSwag questions is 0"):
        loaded(path, limit=0)
    assert loaded(path, limit=1).questions == 1 and loaded(path, limit=9).questions == 2
    with pytest.raises(UserError, match="line 2 has no good 'ctx_b'"):
        loaded(write(path, [ROW, {k: v for k, v in ROW.items() if k != "ctx_b"}]), lm_eval_context=True)
    with pytest.raises(UserError, match="line 1: ending 1 is empty"):
        loaded(write(path, [{**ROW, "endings": ["a", "[header]", "c", "d"]}]), lm_eval_context=True)


def test_fetch(tmp_path, monkeypatch):
    """Catches a torn or foreign download that is taken for the benchmark, a second download, half a file left."""
    whole, answers = changed() + b"\n", []
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(whole).hexdigest())

    def urlopen(url, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    path = tmp_path / "cache" / "hellaswag_val.jsonl"
    for answer, complaint in (
        (urllib.error.URLError("no route to host"), "no route to host"),
        (http.client.IncompleteRead(b"12", 5), "could not be downloaded"),
        (whole[:-9], "are not HellaSwag's validation set"),
    ):
        answers.append(answer)
        with pytest.raises(UserError, match=complaint) as error:
            hellaswag.fetch(tmp_path / "cache")
        assert str(path) in str(error.value) and hellaswag.URL in str(error.value)
        assert not path.parent.exists() or not list(path.parent.iterdir())
    answers.append(whole)
    assert hellaswag.fetch(tmp_path / "cache") == path and path.read_bytes() == whole
    assert hellaswag.fetch(tmp_path / "cache") == path  # there is no second answer to be had
    path.write_bytes(whole[:-9])
    answers.append(whole)
    assert hellaswag.fetch(tmp_path / "cache").read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "file").touch()
    answers.append(whole)
    with pytest.raises(UserError, match="file/hellaswag_val.jsonl .*choose another --cache_dir"):
        hellaswag.fetch(tmp_path / "file")


def test_by_itself(models, exported, shared_hellaswag):
    """Catches the command: numbers to four decimals with standard errors, the published ones, exit status 2."""

    def run(*flags):
        command = [sys.executable, ROOT / "hellaswag.py", "-m", exported["trained"], "--device", "cpu", *flags]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=120)

    counts = evaluate(models["trained"], loaded(shared_hellaswag, limit=40), "cpu")
    done = run("--hellaswag_path", shared_hellaswag, "--limit", 40, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    printed = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    for variant in VARIANTS:
        p = counts[variant] / 40
        assert printed[variant] == [f"{p:.4f}", "±", f"{(p * (1 - p) / 39) ** 0.5:.4f}"]
    assert "GPT-2 124M" in done.stdout and "0.2955" in done.stdout
    done = run("--hellaswag_path", "missing.jsonl")
    assert done.returncode == 2 and done.stderr.count("missing.jsonl") == 1 and "Traceback" not in done.stderr


@pytest.mark.network
@pytest.mark.slow
def test_openai_weights_score_what_is_published(tmp_path):
    """Catches everything at once: 0.2955 (acc_norm) and 0.2859 (acc) of GPT-2 124M on the 10,042 questions, in fp32."""
    try:
        path, model = hellaswag.fetch(tmp_path), GPT.from_pretrained("gpt2")
    except UserError as error:
        pytest.skip(f"no network: {error}")
    counts = evaluate(model, load(path, block_size=1024, device="cpu"), "cpu")
    assert counts["questions"] == 10_042
    acc, acc_norm, _ = hellaswag.PUBLISHED["GPT-2 124M"]
    assert abs(counts["acc_norm"] / 10_042 - acc_norm) < 0.00055  # five questions
    assert abs(counts["acc"] / 10_042 - acc) < 0.00055
