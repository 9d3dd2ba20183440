#!/usr/bin/env bash
# Everything that only a GPU can show, in at most nine minutes on one H100, the most telling part first.
#
#     pip install -r requirements.txt -r requirements-dev.txt pytest-xdist -c constraints.txt
#     bash tests/scripts/gpu.sh             every part, from the root of the checkout
#     bash tests/scripts/gpu.sh run tests   only these parts
#     bash tests/scripts/gpu.sh --list      the parts and how many seconds each may take
#
# Output and figures go to $FIGURES [gpu_figures]. $SHARED [../shared] may hold documents/ (parquet files with a column
# `text`) and hellaswag/hellaswag_val.jsonl: without the first the run trains on random tokens, whose losses say nothing,
# without the second it has no HellaSwag. A part that fails is noted and the rest goes on; the exit status is the number
# of parts that failed.
set -u
PARTS=(peers run tests rungs ddp)
declare -A SECONDS_OF=([peers]=150 [run]=130 [tests]=130 [rungs]=90 [ddp]=40)
OUT=${FIGURES:-gpu_figures}
SHARED=${SHARED:-../shared}

peers() { # tokens/s beside a tutorial's compiled GPT-2, in turns
    python tests/scripts/peers.py --micro_batch_size 64 --total_batch_size 524288 --steps 3 --repeats 2 \
        --contestants ours tutorial "tutorial, loss alone" --out "$OUT/peers"
}

shards() {
    if [ -d "$SHARED/documents" ]; then
        python fineweb.py --source "$SHARED/documents" --shard_size 1000000 --out "$OUT/shards"
    else
        python - "$OUT/shards" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)
for name, tokens in (("val_000000", 2_000_000), ("train_000001", 60_000_000)):
    np.save(folder / f"random_{name}.npy", rng.integers(0, 50257, tokens, dtype=np.uint16))
PYTHON
    fi
}

first_update() { # wait for the train row of step $1 and say how long it took since second $2
    until grep -qs "\"step\": $1, \"kind\": \"train\"" "$OUT/run/metrics.jsonl"; do
        kill -0 "$trainer" 2>/dev/null || return
        sleep 0.2
    done
    echo "== first update $((SECONDS - $2)) s after the command"
}

run() { # the real run: 16 updates of 124M with everything on and a profile, killed after 8, resumed
    local questions=$SHARED/hellaswag/hellaswag_val.jsonl hellaswag=(--hellaswag_every 0) trainer began
    [ -f "$questions" ] && hellaswag=(--hellaswag_every 8 --hellaswag_path "$questions")
    shards || return
    began=$SECONDS
    export TORCHINDUCTOR_CACHE_DIR=$OUT/kernels_of_run  # none are there: the first update compiles them
    python train_gpt2.py --preset gpt2 --data "$OUT/shards" --allow_incomplete --log_dir "$OUT/run" \
        --max_steps 16 --warmup_steps 4 --val_every 8 --val_tokens 524288 --sample_every 8 --checkpoint_every 8 \
        --save_minutes 0 --profile 4 "${hellaswag[@]}" &
    trainer=$!
    first_update 0 "$began"
    until [ -e "$OUT/run/model_00008.pt" ] || ! kill -0 $trainer 2>/dev/null; do sleep 0.2; done
    kill -KILL $trainer 2>/dev/null
    wait $trainer
    began=$SECONDS
    python train_gpt2.py --resume --log_dir "$OUT/run" --profile 0 &
    trainer=$!
    first_update 8 "$began"
    wait $trainer || return
    python - "$OUT/run" <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

lines = Path(sys.argv[1], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines]
train = [row for row in rows if row["kind"] == "train"]
assert [row["step"] for row in train] == list(range(16)), "a row is missing or doubled"
steady = [row for row in train if row["step"] > 10]  # after the profile, and after the resume at 8
seconds = sum(row["seconds"] for row in steady)
rates = sorted(row["tokens_per_sec"] for row in steady)
print(f"{len(steady)} updates: median {statistics.median(rates):,.0f} tokens/s, {rates[0]:,.0f} to {rates[-1]:,.0f}; "
      f"waiting for data {sum(row['data_seconds'] for row in steady) / seconds:.2%}; "
      f"mfu {statistics.median(row['mfu'] or 0 for row in steady):.1%}; memory allocated "
      f"{train[-1]['memory_allocated_gb'] or 0:.1f} GB, reserved {train[-1]['memory_reserved_gb'] or 0:.1f} GB; "
      f"loss {train[0]['loss']:.4f} to {train[-1]['loss']:.4f}")
for row in rows:
    if row["kind"] != "train":
        print({key: value for key, value in row.items() if key != "texts"})
PYTHON
}

pytest_within() { # pytest with arguments $2..., told by Ctrl-C's signal after $1 seconds, so that it says what failed
    timeout --foreground --signal=INT "$1" python -m pytest -m gpu -v --tb short "${@:2}"
}

tests() { # in ten processes where pytest-xdist is installed; each starts compilers of its own, so few of them
    local workers=()
    python -c 'import xdist' 2>/dev/null && workers=(-n 10 --dist worksteal)
    TORCHINDUCTOR_COMPILE_THREADS=2 pytest_within $((SECONDS_OF[tests] - 10)) --durations 10 "${workers[@]}" \
        --deselect tests/test_gpu.py::test_ddp_with_a_world_of_one
}

rungs() { # the head, the stream and the early batch, each on all before it
    python bench.py --rungs micro_batch head stream prefetch early_batch --micro_batch_size 64 --total_batch_size 131072 \
        --steps 4 --repeats 1 --out "$OUT/bench"
}

ddp() { # NCCL, DDP around the compiled model, no_sync and the control group, with a world of one
    pytest_within $((SECONDS_OF[ddp] - 5)) tests/test_gpu.py -k world_of_one
}

if [ "${1:-}" = --part ]; then # one part, in a process that a limit of time can end
    "$2"
    exit
fi
if [ "${1:-}" = --list ]; then
    for name in "${PARTS[@]}"; do echo "$name ${SECONDS_OF[$name]}"; done
    exit
fi
chosen=("$@")
[ $# -eq 0 ] && chosen=("${PARTS[@]}")
for name in "${chosen[@]}"; do
    [ -n "${SECONDS_OF[$name]:-}" ] || { echo "gpu.sh: no part $name: take ${PARTS[*]}" >&2; exit 2; }
done
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no CUDA device" >&2; exit 2; }
mkdir -p "$OUT"
{ date -u; git rev-parse HEAD; nvidia-smi; python --version; python -m pip list; } >"$OUT/machine.txt" 2>&1
: >"$OUT/summary.txt"
failed=0
for name in "${chosen[@]}"; do
    began=$SECONDS
    timeout --kill-after=5 "${SECONDS_OF[$name]}" bash "$0" --part "$name" >"$OUT/$name.txt" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    tail -n 25 "$OUT/$name.txt"
    echo "== $name: status $status, $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
done
echo "$failed parts failed; figures are in $OUT"
exit $failed
