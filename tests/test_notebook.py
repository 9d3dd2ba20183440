"""play.ipynb runs from top to bottom on a fresh clone without a network; its figures are true, its outputs current."""

import base64
import io
import re
import textwrap

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scripts.store_notebook import copy_project, digest, execute, isolated
from test_curves import write_run

# Each of these runs in the notebook's own kernel, after the last cell.
CHECKS = {
    "parts": """
        padding = config.padded_vocab_size - config.vocab_size
        assert total == sum(p.numel() for p in model.parameters()) - padding * config.n_embd
        ax = fig_parts.axes[0]
        assert [label.get_text() for label in ax.get_yticklabels()] == list(counts)
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [n / 1e6 for n in counts.values()])
        blocks = config.n_layer * 12 * config.n_embd**2  # the matrices of a block: 4 C^2 of attention, 8 C^2 of MLP
        assert 0 <= counts["attention"] + counts["MLP"] - blocks <= 0.02 * blocks  # and a few biases
        """,
    "positions": """
        assert "fig_positions" not in globals()  # the model is untrained
        waves = torch.sin(torch.arange(config.block_size)[:, None] / torch.arange(20, 20 + config.n_embd))
        noise = model.transformer.wpe.weight.detach().clone()
        model.transformer.wpe.weight.data.copy_(waves)
        {cell}
        model.transformer.wpe.weight.data.copy_(noise)
        image, *_ = fig_positions.axes[0].images
        np.testing.assert_array_equal(image.get_array(), waves)
        lines = {{line.get_label(): line for line in fig_positions.axes[1].lines}}
        assert len(lines) == 3 and fig_positions.axes[1].get_xlabel() == "position"
        for label, line in lines.items():
            np.testing.assert_array_equal(line.get_ydata(), waves[:, int(label.split()[1])])
        """,
    "attention": """
        assert weights.shape == (config.n_layer, config.n_head, len(shown), len(shown)) and difference < 1e-4
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert (weights * np.triu(np.ones(weights.shape[-2:]), 1) == 0).all()  # no token looks ahead
        panels = [ax for ax in fig_attention.axes if ax.images]
        assert [ax.get_title(loc="left") for ax in panels] == [f"layer {layer}, head {head}" for head in heads]
        for head, ax in zip(heads, panels):
            np.testing.assert_allclose(ax.images[0].get_array(), weights[layer, head] ** 0.5)
        assert [label.get_text() for label in panels[0].get_yticklabels()] == words(shown)
        assert [label.get_text() for label in panels[-1].get_xticklabels()] == words(shown)
        assert enc.decode(shown) == sentence
        """,
    "heads": """
        for l in range(config.n_layer):
            for h in range(config.n_head):
                w = weights[l, h]
                assert np.isclose(before[l, h], np.mean([w[t, t - 1] for t in range(1, len(shown))]))
        assert all(shown[then - 1] == shown[now] and then < now for now, then in pairs)
        assert enc.decode([shown[now] for now, _ in pairs]).endswith(", the bell rang, the old sailor")
        np.testing.assert_array_equal(fig_heads.axes[0].images[0].get_array(), before)
        np.testing.assert_array_equal(fig_heads.axes[1].images[0].get_array(), repeats)
        for score, now in zip(alike, (range(1, len(shown)), [now for now, _ in pairs])):
            assert np.isclose(score, np.mean([1 / (1 + t) for t in now]))  # each token has t + 1 to look at
        """,
    "nearest": """
        table = model.transformer.wte.weight.detach().numpy()
        for word, found in nearest.items():
            (i,) = enc.encode(word).tolist()
            norm = np.linalg.norm
            near = {j: table[i] @ table[j] / norm(table[i]) / norm(table[j]) for j in known if j != i}
            best = sorted(near, key=near.get, reverse=True)[:6]
            np.testing.assert_allclose(list(found.values()), [near[j] for j in best], rtol=1e-4)
            assert list(found) == words(best)
        """,
    "xy": """
        assert example_x.shape == example_y.shape == (2, 6)
        np.testing.assert_array_equal(example_x.flatten(), [enc.end_of_text, *tokens[:11]])
        np.testing.assert_array_equal(example_y.flatten(), tokens[:12])
        """,
    "init": """
        for ax, scaled in zip(fig_init.axes, (False, True)):
            for n_layer, line in zip((32, 16, 8, 4), ax.lines):
                assert line.get_label().startswith(f"{n_layer} layers") and len(line.get_ydata()) == n_layer + 1
                np.testing.assert_array_equal(line.get_ydata(), spreads[n_layer, scaled])
        scaled, bare = ([spreads[n, s][-1] for n in (4, 8, 16, 32)] for s in (True, False))
        assert max(scaled) < 1.2 * min(scaled) and bare[3] > 2 * bare[0]  # what the section says
        """,
    "accumulation": """
        _, loss = small(x, y)
        small.zero_grad(); loss.backward()
        np.testing.assert_allclose(whole, torch.cat([p.grad.flatten() for p in small.parameters()]), atol=1e-6)
        assert micro_batches == 8 and error < 1e-5 and abs(undivided - 8) < 1e-3
        """,
    "curves": """
        assert run == Path("log")
        loss, hella = fig_curves.axes[:2]
        flat = {line.get_ydata()[0] for line in loss.lines + hella.lines if len(line.get_xdata()) == 2}
        assert flat == {3.2924, 3.07, 0.2945, 0.307, 0.337, 0.25}
        labels = [text.get_text() for text in loss.get_legend().get_texts() + hella.texts]
        assert {"GPT-2 124M (OpenAI)  3.2924", "GPT-3 125M  0.337", "GPT-2 124M  0.2945"} < set(labels)
        rows = [line.split() for line in (run / "log.txt").read_text().splitlines()]
        for ax, kind, label in ((loss, "val", "validation"), (hella, "hella", "log")):
            (line,) = [line for line in ax.lines if line.get_label() == label]
            logged = [(int(step), float(value)) for step, what, value in rows if what == kind]
            np.testing.assert_array_equal(line.get_xydata(), logged)
        """,
    "samples": """
        assert list(samples) == [0.0, 0.7, 1.0, 1.4] and len(set(samples.values())) == 4
        greedy = model.generate(start, 32, temperature=0)
        assert samples[0.0] == enc.decode(greedy[0].tolist()) and all(t.startswith(prompt) for t in samples.values())
        """,
    "surprise": """
        ids = [enc.end_of_text, *enc.encode(passage).tolist()]
        with torch.no_grad():
            _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
        ax = fig_surprise.axes[0]
        assert np.isclose(np.mean([bar.get_height() for bar in ax.patches]), loss.item(), rtol=1e-4)
        assert ax.texts[0].get_text() == f"mean {loss:.2f}" and ax.lines[0].get_ydata()[0] == losses.mean()
        assert [label.get_text() for label in ax.get_xticklabels()] == words(ids[1:])
        """,
    "experiment": """
        import json
        for folders in (idea, baseline):
            records = [[json.loads(line) for line in Path(folder, "metrics.jsonl").open()] for folder in folders]
            ends = [[row["loss"] for row in rows if row["kind"] == "val"][-1] for rows in records]
            assert len(set(ends)) == 3 and f"{np.mean(ends):.4f}" in " ".join(verdict)
        assert "3 seeds" in " ".join(verdict) or "n 3" in " ".join(verdict)
        """,
}
# The model cell once more, with a checkpoint in log/ and then with the hub's model available.
OTHER_MODELS = """
import shutil
shutil.copy(next(Path(".cache/play").glob("model_*.pt")), "log")
{cell}
assert source == "the checkpoint in log/", source
GPT.from_pretrained = classmethod(lambda cls, name: cls(GPTConfig(n_layer=1)) if name == "gpt2" else None)
{cell}
assert source == "OpenAI's GPT-2 124M" and config.n_layer == 1
"""


STORED = nbformat.read(ROOT / "play.ipynb", as_version=4)


def by_tag(notebook):
    return {cell.metadata.tags[0]: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The cells after a run in a copy of the project: no checkpoint, a FineWeb-Edu run's log, no network."""
    clone = tmp_path_factory.mktemp("clone")
    copy_project(clone)
    losses = 3.1 + 7.8 * np.exp(-np.arange(300) / 40)
    vals, hella = {0: 10.9, 150: 3.4, 300: 3.2}, {100: 0.26, 200: 0.28, 300: 0.298}
    write_run(clone / "log", losses, vals, hella, total_batch_size=524288, data="edu_fineweb10B")
    notebook = nbformat.read(clone / "play.ipynb", as_version=4)
    cells = by_tag(notebook)
    assert set(CHECKS) == set(cells) - {"setup", "model"}
    checks = {tag: textwrap.dedent(check) for tag, check in CHECKS.items()}
    checks["positions"] = checks["positions"].format(cell=cells["positions"].source)
    checks["other models"] = OTHER_MODELS.format(cell=cells["model"].source)
    for tag, check in checks.items():
        notebook.cells.append(nbformat.v4.new_code_cell(check, metadata={"tags": [f"check {tag}"]}))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # more threads crawl on a busy machine
        for name, value in isolated(clone).items():
            environment.setenv(name, value)
        execute(notebook, clone, timeout=400, allow_errors=True)
    return by_tag(notebook)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_every_cell_runs(executed):
    """Catches a notebook that a change of the program has broken."""
    for tag, cell in executed.items():
        for output in cell.outputs:
            assert output.output_type != "error" or tag.startswith("check"), f"{tag}: {output.ename}: {output.evalue}"


@pytest.mark.parametrize("tag", [*CHECKS, "other models"])
def test_what_is_shown_is_true(executed, tag):
    """Catches figures and tables against wrong data, labels and baselines."""
    errors = [output for output in executed[f"check {tag}"].outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)


FIGURES = {"parts", "attention", "heads", "init", "curves", "surprise"}  # and positions, of a trained model only


def test_each_figure_is_displayed(executed):
    """Catches a figure that is made and never seen, or seen twice, and warnings in the page."""
    for tag, cell in executed.items():
        assert len(pictures(cell)) == (tag in FIGURES | {"check positions"}), tag
        assert "Warning" not in printed(cell), printed(cell)


def test_it_says_what_model_it_looks_at(executed):
    """Catches OpenAI's name on the output of a small model, and its noise drawn as a lesson."""
    text = printed(executed["model"])
    assert "No GPT-2 from the hub: gpt2 is not on this machine" in text
    assert "Training a very small model" in text and "the checkpoint in .cache/play/" in text.replace("\\", "/")
    assert re.search(r"neighbouring positions: -?0\.[01]", printed(executed["positions"]))


def test_stored_outputs_are_current(executed):
    """Catches a page that shows what its code no longer does.

    After a change of the notebook: python tests/scripts/store_notebook.py
    """
    assert STORED.metadata.outputs_of == digest(STORED)
    stored = by_tag(STORED)
    assert [cell.execution_count for cell in stored.values()] == list(range(1, len(stored) + 1))
    assert "the checkpoint in log/" in printed(stored["model"])
    for tag, cell in stored.items():
        assert len(pictures(cell)) == len(pictures(executed[tag])) and bool(cell.outputs) == bool(executed[tag].outputs)
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data"}, tag
        assert {output.name for output in cell.outputs if output.output_type == "stream"} <= {"stdout"}, tag
    assert printed(stored["xy"]) == printed(executed["xy"])  # the one output that no model changes


def test_stored_outputs_are_small_and_legible():
    """Catches the repository's size, a reader's eyes, and the paths of the machine that ran the notebook."""
    assert (ROOT / "play.ipynb").stat().st_size < 1_000_000
    for tag, cell in by_tag(STORED).items():
        assert not re.search(r"(?<![\w.])/(tmp|home|root|Users|var|usr)/|[A-Z]:\\", printed(cell)), tag
        for picture in pictures(cell):
            image = Image.open(io.BytesIO(base64.b64decode(picture)))
            assert min(image.info["dpi"]) > 109 and image.width <= 1150, tag  # a browser scales a wider one down
