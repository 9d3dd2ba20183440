"""HellaSwag: scores against transformers and lm-evaluation-harness, ranks, what evaluating leaves alone, bad input."""

import copy
import hashlib
import http.client
import io
import json
import subprocess
import sys
import urllib.error

import pytest
import torch
from conftest import ROOT

import hellaswag
from harness import machine, tokenizer
from harness.cli import UserError
from hellaswag import VARIANTS, ending_scores, evaluate, load, predictions
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


def scores_by_endings(model, benchmark, **options):
    """{the four endings' tokens: (scores, predictions by variant)}: the order of questions is the batches' affair."""
    found = {}
    for batch in benchmark.batches:
        with torch.no_grad():
            scores = ending_scores(model, batch, "cpu", benchmark.head_rows)
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


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_every_score_is_that_of_transformers_one_row_at_a_time(models, exported, weights, shared_hellaswag, tmp_path):
    """Guards packing: an ending that sees another, a wrong position, a token scored twice or at the wrong place."""
    from transformers import GPT2LMHeadModel

    rows = read(shared_hellaswag, every=6)  # 500
    benchmark = loaded(write(tmp_path / "rows.jsonl", rows))
    found = scores_by_endings(models[weights], benchmark)
    transformers_model = GPT2LMHeadModel.from_pretrained(exported[weights]).eval()
    right = dict.fromkeys(VARIANTS, 0)
    for row in rows:
        key, scores, best = reference(transformers_model, row)
        assert torch.allclose(found[key][0], scores, rtol=0, atol=1e-4)
        assert found[key][1] == best
        for variant in VARIANTS:
            right[variant] += best[variant] == row["label"]
    assert len(rows) >= 500
    assert evaluate(models[weights], benchmark, "cpu") == {"rows": len(rows), **right}


@pytest.mark.parametrize("offset", [0, 100])
def test_bfloat16_agrees_with_float32(models, shared_hellaswag, tmp_path, offset):
    """Guards a low-precision softmax or sum, and logits far from 0, like those of OpenAI's weights: 98% must agree."""
    model = copy.deepcopy(models["trained"])
    with torch.no_grad():  # all tokens share their first coordinate: what it adds to the logits is the same for all
        model.transformer.wte.weight[:, 0] = 1.0
        model.transformer.ln_f.bias[0] -= offset
    benchmark = loaded(write(tmp_path / "rows.jsonl", read(shared_hellaswag, every=20)))
    exact = scores_by_endings(model, benchmark)
    with bfloat16():
        rough = scores_by_endings(model, benchmark)
    assert sum((exact[key][0] - rough[key][0]).abs().mean() for key in exact) < 0.1 * len(exact)  # nats an ending
    for variant in VARIANTS:
        assert sum(exact[key][1][variant] == rough[key][1][variant] for key in exact) >= 0.98 * len(exact)


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_lm_evaluation_harness_agrees(models, exported, weights, shared_hellaswag, tmp_path):
    """Guards `--lm_eval_context` and `acc_norm_char`: the harness's own task, on the same rows and weights."""
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
    assert counts["rows"] == len(samples) == len(rows)
    assert counts["acc"] == sum(sample["acc"] for sample in samples)
    assert counts["acc_norm_char"] == sum(sample["acc_norm"] for sample in samples)
    theirs = sorted([response[0] for response in sample["filtered_resps"]] for sample in samples)
    ours = sorted(scores.tolist() for scores, _ in scores_by_endings(models[weights], benchmark).values())
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_every_question_once(models, shared_hellaswag, world_size):
    """Guards counts that depend on the number of ranks, and ranks that ask a collective `stop` unequally often."""
    benchmark = loaded(shared_hellaswag, limit=90)
    whole = evaluate(models["trained"], benchmark, "cpu")
    assert whole["rows"] == 90 and len(benchmark.batches) % 3 and len(benchmark.batches) % 7  # a short last round
    asked, shares = [0] * world_size, []
    for rank in range(world_size):

        def stop(rank=rank):
            asked[rank] += 1
            return False

        shares.append(evaluate(models["trained"], benchmark, "cpu", rank=rank, world_size=world_size, check_stop=stop))
    assert {name: sum(share[name] for share in shares) for name in whole} == whole
    assert asked == [-(-len(benchmark.batches) // world_size)] * world_size


def test_a_stop_ends_it_at_once(models, shared_hellaswag):
    """Guards a signal that waits for the end of a long evaluation."""
    answers, done = iter([False, True]), []
    benchmark = loaded(shared_hellaswag, limit=90)
    assert evaluate(models["random"], benchmark, "cpu", check_stop=lambda: next(answers), progress=done.append) is None
    assert done == [len(benchmark.batches[0].label)]


def test_training_goes_on_as_if_nothing_had_happened(shared_hellaswag):
    """Guards mode, RNG, gradients and autocast's weight cache: what an evaluation between two steps could spoil."""
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
    """Guards an evaluation in training mode, and a mode that an exception leaves changed."""
    benchmark = loaded(shared_hellaswag, limit=8)
    model = GPT(GPTConfig(**SMALL, dropout=0.5), seed=1).train()
    assert evaluate(model, benchmark, "cpu") == evaluate(models["random"], benchmark, "cpu")

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, benchmark, "cpu", stop=fail)
    assert all(module.training for module in model.modules())


def test_few_shapes_little_padding(shared_hellaswag):
    """Guards the speed that a count can show: rows of like length together, few shapes, everything once."""
    for device, most_padding, most_shapes in (("cpu", 0.06, 25), ("cuda", 0.25, 10)):
        benchmark = load(shared_hellaswag, block_size=1024, device=device)
        assert sum(len(batch.label) for batch in benchmark.batches) == benchmark.rows == 3000
        places = sum(batch.tokens.numel() for batch in benchmark.batches)
        tokens = sum(batch.until[:, 0].sum().item() for batch in benchmark.batches)  # to where token 0 is seen
        assert tokens < places < tokens * (1 + most_padding)
        assert len({batch.tokens.shape for batch in benchmark.batches}) <= most_shapes


def test_long_contexts_are_cropped_on_the_left_and_counted(models, exported, shared_hellaswag, tmp_path):
    """Guards a position beyond the model's context, a cropped ending, and cropping that nobody hears of."""
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
    with pytest.raises(UserError, match="context of 16, .* context of 24"):
        evaluate(GPT(GPTConfig(**{**SMALL, "block_size": 16})), benchmark, "cpu")


def changed(**changes):
    return json.dumps({name: value for name, value in {**ROW, **changes}.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "line, complaint",
    [
        (changed(ctx=None), "no 'ctx'"),
        (changed(endings=None), "no 'endings'"),
        (changed(label=None), "no 'label'"),
        (changed(ctx=7), "'ctx' is 7"),
        (changed(ctx=""), "context is empty"),
        (changed(endings=["a", "b", "c"]), "4 texts"),
        (changed(endings=["a", "b", "c", "d", "e"]), "4 texts"),
        (changed(endings=["a", "b", "c", 4]), "4 texts"),
        (changed(endings="abcd"), "4 texts"),
        (changed(endings=["a", "b", " ", "d"]), "ending 2 is empty"),
        (changed(endings=["a", "b", "c", "very " * 300]), "ending of 301 tokens"),
        (changed(label=4), "'label' is 4"),
        (changed(label=-1), "'label' is -1"),
        (changed(label=True), "'label' is True"),
        (changed(label=""), "'label' is ''"),
        (changed()[:90], "not JSON"),
        (b'{"ctx": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, complaint):
    """Guards a question that is silently skipped, guessed at, or reported without saying where it stands."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(changed() + b"\n\n" + line)
    with pytest.raises(UserError, match=complaint) as error:
        loaded(path)
    assert f"{path}, line 3" in str(error.value)


def test_bad_files(tmp_path):
    """Guards a traceback, or an accuracy of nothing, for a file that is not there or holds no rows."""
    for path in (tmp_path / "none.jsonl", tmp_path, write(tmp_path / "empty.jsonl", [])):
        with pytest.raises(UserError, match=path.name):
            loaded(path)
    path = write(tmp_path / "rows.jsonl", [ROW, WIKIHOW])
    with pytest.raises(UserError, match="limit of HellaSwag questions is 0"):
        loaded(path, limit=0)
    assert loaded(path, limit=1).rows == 1 and loaded(path, limit=9).rows == 2
    with pytest.raises(UserError, match="line 2 has no 'ctx_b'"):
        loaded(write(path, [ROW, {k: v for k, v in ROW.items() if k != "ctx_b"}]), lm_eval_context=True)
    with pytest.raises(UserError, match="line 1: ending 1 is empty"):
        loaded(write(path, [{**ROW, "endings": ["a", "[header]", "c", "d"]}]), lm_eval_context=True)


def test_labels_may_be_text(models, tmp_path):
    """Guards Hugging Face's copy of the data, where the labels are text."""
    path = write(tmp_path / "rows.jsonl", [{**ROW, "label": label} for label in (2, "2")])
    counts = evaluate(models["random"], loaded(path), "cpu")
    assert all(counts[variant] in (0, 2) for variant in VARIANTS)


def test_fetch(tmp_path, monkeypatch):
    """Guards a torn or foreign download that is taken for the benchmark, a second download, half a file left."""
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
        (whole[:-9], "is not HellaSwag's validation set"),
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


def test_by_itself(models, exported, shared_hellaswag):
    """Guards the command: numbers to four decimals with standard errors, the published ones, exit status 2."""

    def run(*flags):
        command = [sys.executable, ROOT / "hellaswag.py", "--model", exported["trained"], "--device", "cpu", *flags]
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
