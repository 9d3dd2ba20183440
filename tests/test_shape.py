"""The shape of the program: what a reader of train_gpt2.py may rely on, and rooms that do not know one another."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT, TRAINER, tiny_flags

pytestmark = pytest.mark.quick

COMMANDS = {"train_gpt2", "fineweb", "hellaswag", "sample", "convert", "curves", "bench"}
TREE = ast.parse(TRAINER.read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)}


def imports(path, top_level=True):
    """Names of this project's modules that the file at `path` imports when it loads, or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = COMMANDS | {f"harness.{file.stem}" for file in (ROOT / "harness").glob("*.py")}
    return {name for name in found if name in ours}


def test_the_trainer_is_read_in_one_sitting():
    """A file that grows a line here and a line there until nobody reads it whole."""
    lines = TRAINER.read_text(encoding="utf-8").splitlines()
    banners = {line.split()[2]: i for i, line in enumerate(lines) if line.startswith("# === ")}
    assert banners["CLI"] - banners["Model"] <= 850, "from Model to the end of Training"
    assert [f"{i}: {line}" for i, line in enumerate(lines, 1) if len(line) > 100] == []


def test_the_program_does_not_grow():
    """A house that grows a room with every feature. Lower a cap when lines go; do not raise one."""
    def lines(*patterns):
        files = {file for pattern in patterns for file in ROOT.glob(pattern)}
        return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)

    assert lines("*.py", "harness/*.py") <= 10_452
    assert lines("harness/*.py") <= 6_356
    assert lines("tests/*.py") <= 12_005


def test_the_top_level_holds_commands_only():
    """A module at the top level that is no command, or a command that is not the documented one."""
    assert {file.stem for file in ROOT.glob("*.py")} == COMMANDS


def test_the_harness_knows_no_command():
    """A room under the trainer that imports it, or a command, back."""
    for file in sorted((ROOT / "harness").glob("*.py")):
        assert not imports(file, top_level=False) & COMMANDS, file.name


def test_imports_go_round_in_no_circle():
    """Two files that need one another to load."""
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in COMMANDS}
    files |= {f"harness.{file.stem}": file for file in (ROOT / "harness").glob("*.py")}
    left = {name: imports(path) - {name} for name, path in files.items()}
    while ready := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_functions_ask_for_few_things():
    """A chain of functions that pass seven values to one another."""
    for node in FUNCTIONS.values():
        required = [arg.arg for arg in node.args.posonlyargs + node.args.args if arg.arg not in ("self", "cls")]
        required = required[: len(required) - len(node.args.defaults)]
        required += [arg.arg for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults) if default is None]
        assert len(required) <= 5, (node.name, required)


def test_the_loop_is_on_one_screen():
    """A loop that is spread over functions, or longer than a screen; lambdas that hide what runs on which rank."""
    train = FUNCTIONS["train"]
    (loop,) = (node for node in ast.walk(train) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno < 50
    assert train.end_lineno - train.lineno < 120
    assert not any(isinstance(node, ast.Lambda) for node in ast.walk(train))
    assert FUNCTIONS["train_step"].end_lineno - FUNCTIONS["train_step"].lineno < 60
    names = {node.id for node in ast.walk(FUNCTIONS["train_step"]) if isinstance(node, ast.Name)}
    assert "time" not in names, "a step knows no clock"


@pytest.mark.parametrize("options", [(), ("-OO", "-P")], ids=" ".join)
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help(name, options, tmp_path):
    """A command that needs a model, data or a network to say what it does; or its docstring (`python -OO`), or its own
    folder in the path (`python -P`)."""
    command = [sys.executable, *options, ROOT / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--" in done.stdout and not done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def test_commands_work_without_docstrings_and_safely(tmp_path):
    """What --help does not reach under `python -OO -P`: shards, a run on them, its picture."""
    (tmp_path / "a.txt").write_text("some words in a row\n" * 99)
    for words in (["fineweb.py", "--source", "a.txt", "--out", "shards", "--shard_size", "200"],
                  ["train_gpt2.py", *tiny_flags("shards", "log", max_steps=1)], ["curves.py", "log"]):
        command = [sys.executable, "-OO", "-P", ROOT / words[0], *map(str, words[1:])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "curves.png").exists()
