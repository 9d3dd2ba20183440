"""Execute play.ipynb on a longer run of the small model and store it with its outputs. Needs no network.

    python tests/scripts/store_notebook.py        # trains that run in a temporary copy first: minutes
    python tests/scripts/store_notebook.py log    # looks at the finished run in log/

The run's log.txt goes to reference/long_run.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
LONGER = ("--max_steps", "1000", "--dropout", "0.2")
RUN_FILES = ("log.txt", "metrics.jsonl", "config.json", "*.pt")


def copy_project(folder):
    """Copy what the notebook needs to `folder`: the program without runs, caches and downloads."""
    for file in [*ROOT.glob("*.py"), ROOT / "input.txt", ROOT / "play.ipynb"]:
        shutil.copy(file, folder)
    for name in ("harness", "reference"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def isolated(folder):
    """Environment variables that keep a process in `folder` from the network and from this machine's downloads."""
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "IPYTHONDIR": str(folder / "ipython")}


def execute(notebook, folder, **options):
    """Run the cells of `notebook` in `folder`, in place."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources, record_timing=False, coalesce_streams=True, **options).execute()


def digest(notebook):
    """SHA-256 of the code, by which a notebook that was edited after its outputs were stored is recognised."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("log_dir", nargs="?", type=Path, help="a finished run (default: train one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.update(isolated(folder))
        copy_project(folder)
        if args.log_dir:
            (folder / "log").mkdir()
            for file in [file for name in RUN_FILES for file in args.log_dir.glob(name)]:
                shutil.copy(file, folder / "log")
        else:
            subprocess.run([sys.executable, "train_gpt2.py", *LONGER], cwd=folder, check=True)
        (ROOT / "reference" / "long_run").mkdir(exist_ok=True)
        shutil.copy(folder / "log" / "log.txt", ROOT / "reference" / "long_run")
        notebook = nbformat.read(folder / "play.ipynb", as_version=4)
        metadata = dict(notebook.metadata)
        execute(notebook, folder, timeout=600)
    notebook.metadata = {**metadata, "outputs_of": digest(notebook)}  # without the kernel's version, which changes
    text = nbformat.writes(notebook) + "\n"
    (ROOT / "play.ipynb").write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote play.ipynb with outputs, {len(text.encode()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
