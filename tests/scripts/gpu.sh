#!/usr/bin/env bash
# Everything that only a GPU can show, in about 20 minutes on one H100 or H200; all output and figures go to a folder.
#
#     pip install -r requirements.txt -r requirements-dev.txt -c constraints.txt
#     bash tests/scripts/gpu.sh [FIGURES [TEXT]]         from the root of the checkout
#
# FIGURES: the folder to write [gpu_figures]. TEXT: a .txt, .jsonl or .parquet file or folder to train on; without it
# the training run reads input.txt over and over, which is as fast but says nothing about losses.
# HELLASWAG=FILE scores the benchmark from that file; without it the file is downloaded.
# A part that fails is noted and the rest goes on; the exit status is the number of parts that failed.
set -u
out=$(realpath -m "${1:-gpu_figures}")
text=${2:-}
failed=0
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR=$out/kernels

part() { # part NAME SECONDS COMMAND...: its output to NAME.txt, its time and status to summary.txt
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    echo "$name: status $status, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    tail -n 5 "$out/$name.txt"
}

python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no CUDA device"; exit 2; }
{ date -u; git rev-parse HEAD; nvidia-smi; python --version; python -m torch.utils.collect_env; } >"$out/machine.txt" 2>&1
: >"$out/summary.txt"

part tests 420 python -m pytest -m gpu -v

# 60M tokens: 100 steps of 524,288 and a validation split
if [ -n "$text" ]; then
    part shards 300 python fineweb.py --source "$text" --out "$out/shards" --shard_size 10000000 --max_shards 7
else
    part shards 300 python - "$out/shards" <<'EOF'
import sys
from pathlib import Path

import fineweb

play = Path("input.txt").read_text(encoding="utf-8")
fineweb.write_shards((play for _ in range(60_000_000 * 3 // len(play))), sys.argv[1], "plays", 10_000_000)
EOF
fi

# as shipped: shuffled shards, fp32 master weights, clipping, a log row a step
part train 420 python train_gpt2.py --preset gpt2 --data "$out/shards" --allow_incomplete --log_dir "$out/train" \
    --max_steps 100 --warmup_steps 10 --val_every 50 --val_tokens 1048576 --hellaswag_every 0 --sample_every 50 \
    --save_minutes 0
part steady 60 python - "$out/train/metrics.jsonl" <<'EOF'
import json
import statistics
import sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
steps = [row for row in rows if row["kind"] == "train"][10:]
rates = sorted(row["tokens_per_sec"] for row in steps)
print(f"{len(steps)} steps after the first 10: median {statistics.median(rates):,.0f} tokens/s, "
      f"slowest {rates[0]:,.0f}, fastest {rates[-1]:,.0f}; mfu {statistics.median(r['mfu'] or 0 for r in steps):.1%}, "
      f"waiting for data {sum(r['data_seconds'] for r in steps) / sum(r['seconds'] for r in steps):.2%}, "
      f"memory reserved {steps[-1]['memory_reserved_gb'] or 0:.1f} GB; "
      f"loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
for kind in sorted({row["kind"] for row in rows}):
    print(f"{kind}: {sum(row.get('seconds', 0) for row in rows if row['kind'] == kind):.1f} s")
EOF

part peers 360 python tests/scripts/peers.py --micro_batch_size 32 --total_batch_size 131072 --repeats 2 \
    --out "$out/peers" --cache_dir "$out"
part ladder 900 python bench.py --repeats 2 --steps 4 --total_batch_size 65536 --profile --measure_memory \
    --out "$out/bench" --cache_dir "$out"
part hellaswag 300 python hellaswag.py --model "$out/train/hf" ${HELLASWAG:+--hellaswag_path "$HELLASWAG"}

echo "$failed parts failed; figures are in $out"
exit $failed
