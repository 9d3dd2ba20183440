"""What older versions of this program wrote: it opens, resumes and reads as if it had been written today.

tests/fixtures/f510d01.tar.xz was made by commit f510d01: the log folder of a run of 10 steps (Muon, dropout, 1 layer of
width 2), killed after step 6; its data; and log.txt of the run that was not killed.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import log_rows, run_trainer

FIXTURE = Path(__file__).parent / "fixtures" / "f510d01.tar.xz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_of_f510d01_is_resumed(old):
    """Catches a key, a row or a file name of an older version that this one does not read any more."""
    straight = json.loads((old / "straight.json").read_text())["log"].splitlines()
    before = torch.load(old / "log" / "rolling_00006.pt", weights_only=True)
    done = run_trainer(["--resume", "--log_dir", "log", "--checkpoint_every", "7"], cwd=old)
    assert done.returncode == 0, done.stderr
    rows = [f"{step} {kind} {value}" for step, kind, value in log_rows(old / "log")]
    at_6 = straight.index(next(line for line in straight if line.startswith("6 ")))
    assert rows[:at_6] == straight[:at_6]
    assert [row.split()[:2] for row in rows] == [line.split()[:2] for line in straight]
    for row, line in zip(rows, straight):  # other CPUs round otherwise
        assert float(row.split()[2]) == pytest.approx(float(line.split()[2]), abs=2e-4)
    after = torch.load(old / "log" / "model_00010.pt", weights_only=True)
    assert after["model"].keys() == before["model"].keys() and after["optimizer"].keys() == before["optimizer"].keys()
    assert before.keys() <= after.keys()
