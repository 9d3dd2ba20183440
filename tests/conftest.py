"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests compute little: threads would only wait for one another
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real data beside the checkout; never a part of it


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
