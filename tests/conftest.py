"""Fixtures that several test files share, and what two processes of pytest-xdist need to stay out of each other's way.

Each has a temporary folder, a server of forked trainers and a range of ports (helpers.free_port) of its own.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests compute little: threads would only wait for one another
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real data beside the checkout; never a part of it
LONGEST_FIRST = ["test_ranks", "test_readme", "test_resume", "test_fineweb", "test_console", "test_hellaswag",
                 "test_notebook", "test_faults", "test_convert", "test_machine", "test_bench", "test_curves",
                 "test_plan", "test_config", "test_optimizer", "test_loader"]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process is left with one of them at the end."""
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def _shared(path):
    if not path.exists():
        pytest.skip(f"no {path.relative_to(SHARED)} beside the checkout")
    return path


@pytest.fixture
def shared_documents():
    """Folder of real documents in FineWeb-Edu's schema (`*.parquet`)."""
    return _shared(SHARED / "documents")


@pytest.fixture
def shared_hellaswag():
    """The first 3,000 rows of HellaSwag's validation set, in the official schema."""
    return _shared(SHARED / "hellaswag" / "hellaswag_val.jsonl")
