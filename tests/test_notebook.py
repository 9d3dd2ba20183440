"""play.ipynb, run from top to bottom as on a fresh clone without a network, and its figures held against the truth."""

import json
import shutil
import textwrap

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from test_curves import write_run

# Each runs in the notebook's own kernel, after its last cell.
CHECKS = {
    "parts": """
        assert total == sum(p.numel() for p in model.parameters()) - 47 * config.n_embd  # padding
        ax = fig_parts.axes[0]
        assert [label.get_text() for label in ax.get_yticklabels()] == list(counts)
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [n / 1e6 for n in counts.values()])
        blocks = config.n_layer * 12 * config.n_embd**2  # the matrices of a block: 4 C^2 of attention, 8 C^2 of MLP
        assert 0 <= counts["attention"] + counts["MLP"] - blocks <= 0.02 * blocks  # and a few biases
        """,
    "positions": """
        image, *_ = fig_positions.axes[0].images
        np.testing.assert_array_equal(image.get_array(), model.transformer.wpe.weight.detach())
        lines = {line.get_label(): line for line in fig_positions.axes[1].lines}
        assert len(lines) == 3 and fig_positions.axes[1].get_xlabel() == "position"
        for label, line in lines.items():
            np.testing.assert_array_equal(line.get_ydata(), wpe[:, int(label.split()[1])])
        """,
    "attention": """
        assert weights.shape == (config.n_layer, config.n_head, len(shown), len(shown)) and difference < 1e-4
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert (weights * np.triu(np.ones(weights.shape[-2:]), 1) == 0).all()  # nobody looks ahead
        heads = [ax for ax in fig_attention.axes if ax.images]
        assert [ax.get_title(loc="left") for ax in heads] == [f"head {head}" for head in range(config.n_head)]
        for head, ax in enumerate(heads):
            np.testing.assert_allclose(ax.images[0].get_array(), weights[layer, head] ** 0.5)
        assert [label.get_text() for label in heads[0].get_yticklabels()] == words(shown)
        assert [label.get_text() for label in heads[-1].get_xticklabels()] == words(shown)
        assert enc.decode(shown) == sentence
        """,
    "heads": """
        for l in range(config.n_layer):
            for h in range(config.n_head):
                w = weights[l, h]
                assert np.isclose(before[l, h], np.mean([w[t, t - 1] for t in range(1, len(shown))]))
        assert all(shown[then - 1] == shown[now] and then < now for now, then in pairs)
        assert enc.decode([shown[now] for now, _ in pairs]) == " the the, the bell rang, the old sailor"
        np.testing.assert_array_equal(fig_heads.axes[0].images[0].get_array(), before)
        np.testing.assert_array_equal(fig_heads.axes[1].images[0].get_array(), repeats)
        """,
    "nearest": """
        table = model.transformer.wte.weight.detach().numpy()
        for word, found in nearest.items():
            (i,) = enc.encode_ordinary(word)
            norm = np.linalg.norm
            near = {j: table[i] @ table[j] / norm(table[i]) / norm(table[j]) for j in known if j != i}
            best = sorted(near, key=near.get, reverse=True)[:6]
            np.testing.assert_allclose(list(found.values()), [near[j] for j in best], rtol=1e-4)
            assert list(found) == words(best)
        """,
    "xy": """
        assert lesson_x.shape == lesson_y.shape == (2, 8)
        np.testing.assert_array_equal(lesson_x.flatten(), [tokenizer.END_OF_TEXT, *tokens[:15]])
        np.testing.assert_array_equal(lesson_y.flatten(), tokens[:16])
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
        assert flat == {3.2924, 0.2945, 0.337, 0.25}
        labels = [text.get_text() for text in loss.texts + hella.texts]
        assert {"GPT-2 124M (OpenAI)  3.2924", "GPT-3 124M  0.337", "GPT-2 124M  0.2945"} < set(labels)
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
        ids = [tokenizer.END_OF_TEXT, *enc.encode_ordinary(passage)]
        with torch.no_grad():
            _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
        ax = fig_surprise.axes[0]
        assert np.isclose(np.mean([bar.get_height() for bar in ax.patches]), loss.item(), rtol=1e-4)
        assert ax.texts[0].get_text() == f"mean {loss:.2f}" and ax.lines[0].get_ydata()[0] == losses.mean()
        assert [label.get_text() for label in ax.get_xticklabels()] == words(ids[1:])
        """,
}
# The model cell once more, with a checkpoint in log/ and then with the hub's model at hand.
OTHER_MODELS = """
import shutil
shutil.copy(next(Path(".cache/play").glob("model_*.pt")), "log")
{cell}
assert source == "the checkpoint in log/", source
GPT.from_pretrained = classmethod(lambda cls, name: cls(GPTConfig(n_layer=1)) if name == "gpt2" else None)
{cell}
assert source == "OpenAI's GPT-2 124M" and config.n_layer == 1
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after its run in a copy of the project: no checkpoint, a FineWeb-Edu run's log, no network."""
    clone = tmp_path_factory.mktemp("clone")
    for file in [*ROOT.glob("*.py"), ROOT / "input.txt", ROOT / "play.ipynb"]:
        shutil.copy(file, clone)
    losses = 3.1 + 7.8 * np.exp(-np.arange(300) / 40)
    vals, hella = {0: 10.9, 150: 3.4, 300: 3.2}, {100: 0.26, 200: 0.28, 300: 0.298}
    write_run(clone / "log", losses, vals, hella, total_batch_size=524288, data="edu_fineweb10B")
    notebook = nbformat.read(clone / "play.ipynb", as_version=4)
    cells = {cell.metadata.tags[0]: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert set(CHECKS) == set(cells) - {"setup", "model"}
    for tag, check in CHECKS.items():
        notebook.cells.append(nbformat.v4.new_code_cell(textwrap.dedent(check), metadata={"tags": [f"check {tag}"]}))
    again = OTHER_MODELS.format(cell=cells["model"].source)
    notebook.cells.append(nbformat.v4.new_code_cell(again, metadata={"tags": ["check other models"]}))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # threads that wait for one another crawl on a busy machine
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("HF_HOME", str(clone / "hub"))  # whatever this machine has downloaded before
        environment.setenv("IPYTHONDIR", str(clone / "ipython"))
        resources = {"metadata": {"path": str(clone)}}
        NotebookClient(notebook, timeout=400, allow_errors=True, resources=resources).execute()
    return {cell.metadata.tags[0]: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_every_cell_runs(executed):
    """Guards against a notebook left behind by a change of the program."""
    for tag, cell in executed.items():
        for output in cell.outputs:
            assert output.output_type != "error" or tag.startswith("check"), f"{tag}: {output.ename}: {output.evalue}"


@pytest.mark.parametrize("tag", [*CHECKS, "other models"])
def test_what_is_shown_is_true(executed, tag):
    """Guards figures and tables against wrong data, labels and baselines."""
    errors = [output for output in executed[f"check {tag}"].outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)


def test_each_figure_is_displayed(executed):
    """Guards against a figure that is made and never seen, or seen twice, and against warnings in the page."""
    figures = {"parts", "positions", "attention", "heads", "init", "curves", "surprise"}
    for tag, cell in executed.items():
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == (tag in figures), tag
        assert "Warning" not in printed(cell), printed(cell)


def test_it_says_what_model_it_looks_at(executed):
    """Guards against OpenAI's name on what a small model says."""
    said = printed(executed["model"])
    assert "No GPT-2 from the hub: gpt2 is not on this machine" in said
    assert "Training a very small model" in said and "the checkpoint in .cache/play/" in said.replace("\\", "/")


def test_committed_small_and_clean():
    """Guards the repository against outputs, which grow it and name a machine's paths."""
    text = (ROOT / "play.ipynb").read_text(encoding="utf-8")
    assert len(text) < 300_000
    for cell in json.loads(text)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
