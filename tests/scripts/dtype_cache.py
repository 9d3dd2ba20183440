"""Whether torch.compile's cache on disk gives a float16 run the graph of a bfloat16 one, as in torch 2.11 and 2.12.

    python tests/scripts/dtype_cache.py                 both in one folder, as torch does it
    python tests/scripts/dtype_cache.py --as_harness    with harness.device's tag and its folder per dtype

A forward and a backward pass under autocast in two processes, one after the other. Returns 1 where the second one's
output or gradient is not what it gets without compiling.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PASS = """
import sys, torch
from harness.runtime import Runtime
name, as_harness = sys.argv[1:]
if as_harness:
    Runtime().choose("cpu", name, compile=True)
torch.manual_seed(0)
layer, data, results = torch.nn.Linear(64, 64), torch.randn(8, 64), []
def forward(x):
    y = torch.nn.functional.gelu(layer(x))
    return y, y.float().square().sum()
for function in (torch.compile(forward), forward):
    x = data.clone().requires_grad_()
    with torch.autocast("cpu", dtype=getattr(torch, name)):
        y, loss = function(x)
    loss.backward()
    results.append((y, x.grad))
(y, grad), (plain_y, plain_grad) = results
off = ((grad - plain_grad).abs().max() / plain_grad.abs().max()).item()
print(f"{name}: output {y.dtype}, gradient off by {off:.0e}")
sys.exit(y.dtype != plain_y.dtype or off > {"bfloat16": 2e-2, "float16": 2e-3}[name])
"""


def main(argv):
    """Run both processes; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        as_harness = "--as_harness" in argv
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        env["XDG_CACHE_HOME" if as_harness else "TORCHINDUCTOR_CACHE_DIR"] = folder
        command = [sys.executable, "-c", PASS]
        ends = [subprocess.run([*command, name, "as_harness" * as_harness], env=env).returncode
                for name in ("bfloat16", "float16")]
    return int(any(ends))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
