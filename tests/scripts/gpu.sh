#!/usr/bin/env bash
# Everything that only a GPU can show, in two calls of at most seven minutes on one H100 or H200, each by itself:
#
#     pip install -r requirements.txt -r requirements-dev.txt pytest-xdist -c constraints.txt
#     bash tests/scripts/gpu.sh first        settings of torch's that cost no line; memory of the large models; NCCL
#     bash tests/scripts/gpu.sh second       peers, a curve of 124M with a kill and a resume, the GPU tests
#     bash tests/scripts/gpu.sh curve tests  only these parts; --list: the parts and how many seconds each may take
#     ON_CPU=1 bash tests/scripts/gpu.sh     all of it with very small models on a CPU, to see that it runs
#
# Run it from the root of the checkout. Output and figures go to $FIGURES [gpu_figures]. $SHARED [../shared] may hold
# documents/ (parquet files with a column `text`) and hellaswag/hellaswag_val.jsonl: without the first the curve is of
# random tokens, whose losses say nothing, without the second it has no HellaSwag. A part that fails, or whose time is
# over, is noted and the rest goes on; the exit status is the number of such parts.
set -u
FIRST=(switches memory ddp)
SECOND=(peers curve tests)
declare -A SECONDS_OF=([switches]=315 [memory]=70 [ddp]=35 [peers]=130 [curve]=200 [tests]=90)
OUT=${FIGURES:-gpu_figures}
SHARED=${SHARED:-../shared}
STEP=(--micro_batch_size 64 --total_batch_size 524288)
MODEL=(--total_batch_size 65536)
if [ -n "${ON_CPU:-}" ]; then
    STEP=(--n_layer 1 --n_head 2 --n_embd 32 --seq_len 32 --micro_batch_size 2 --total_batch_size 256 --device cpu)
    MODEL=("${STEP[@]}" --seq_len 128 --no-compile --val_tokens 4096 --hellaswag_limit 40)
    for name in "${!SECONDS_OF[@]}"; do SECONDS_OF[$name]=600; done
fi

switches() { # one process each, the base first and last; what pays 0.7% and keeps the tests may be set for CUDA
    local softmax=TORCHINDUCTOR_ONLINE_SOFTMAX=0 math=TORCHINDUCTOR_USE_FAST_MATH=1
    local reduction=TORCHINDUCTOR_MIX_ORDER_REDUCTION=0
    python tests/scripts/peers.py "${STEP[@]}" --steps 3 --repeats 1 --contestants ours --out "$OUT/switches" \
        --env "$softmax" "$math" "$softmax $math" "$reduction" "$softmax $math $reduction"
}

memory() { # the large models with --memory_budget, against the formula
    pytest_within $((SECONDS_OF[memory] - 5)) tests/test_gpu.py -k wide $(workers 2)
}

peers() { # tokens/s beside the others' forms of a compiled GPT-2, in turns
    python tests/scripts/peers.py "${STEP[@]}" --steps 3 --repeats 1 --out "$OUT/peers" \
        --contestants ours tutorial "tutorial, loss alone" nanoGPT
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

first_update() { # wait for the train row of step $2 of the run in $1, and say how long it took since second $3
    until grep -qs "\"step\": $2, \"kind\": \"train\"" "$1/metrics.jsonl"; do
        kill -0 "$trainer" 2>/dev/null || return
        sleep 0.2
    done
    echo "== first update $((SECONDS - $3)) s after the command"
}

curve() { # 100 updates of 65,536 tokens by AdamW at 6e-4, killed at 50 and resumed; the same by Muon, and by Muon
    # whose embeddings are not decayed
    local questions=$SHARED/hellaswag/hellaswag_val.jsonl hellaswag=(--hellaswag_every 0) began trainer run=$OUT/adamw
    [ -f "$questions" ] && hellaswag=(--hellaswag_every 100 --hellaswag_path "$questions")
    shards || return
    local flags=(--preset gpt2 --data "$OUT/shards" --allow_incomplete --max_steps 100 --val_every 25 --val_tokens 1048576
        --sample_every 100 --checkpoint_every 50 --save_minutes 0 "${hellaswag[@]}" "${MODEL[@]}")
    export TORCHINDUCTOR_CACHE_DIR=$OUT/kernels_of_curve # none are there: the first update compiles them
    began=$SECONDS
    python train_gpt2.py "${flags[@]}" --optimizer adamw --max_lr 6e-4 --warmup_steps 10 --log_dir "$run" --profile 3 &
    trainer=$!
    first_update "$run" 0 "$began"
    until [ -e "$run/model_00050.pt" ] || ! kill -0 $trainer 2>/dev/null; do sleep 0.2; done
    kill -KILL $trainer 2>/dev/null
    wait $trainer
    began=$SECONDS
    python train_gpt2.py --resume --log_dir "$run" --profile 0 &
    trainer=$!
    first_update "$run" 50 "$began"
    wait $trainer || return
    python - "$run" <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

lines = Path(sys.argv[1], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines]
train = [row for row in rows if row["kind"] == "train"]
assert [row["step"] for row in train] == list(range(100)), "a row is missing or doubled"
steady = [row for row in train if row["step"] > 55]  # after the resume at 50
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
    python train_gpt2.py "${flags[@]}" --optimizer muon --log_dir "$OUT/muon" >"$OUT/muon.txt" || return
    python curves.py "$run" --versus "$OUT/muon" --out "$OUT/versus.png"
    python - "${flags[@]}" --optimizer muon --log_dir "$OUT/undecayed" >"$OUT/undecayed.txt" <<'PYTHON' || return
import sys

sys.path.insert(0, ".")
import train_gpt2 as t

muon = t.OPTIMIZERS["muon"]


def make_undecayed(model, cfg):
    optimizers = t.make_muon(model, cfg)
    for group in optimizers["adamw"].param_groups:
        group["weight_decay"] = 0.0
    return optimizers


t.OPTIMIZERS["muon"] = muon._replace(make=make_undecayed)
sys.exit(t.main())
PYTHON
    python curves.py "$run" "$OUT/muon" "$OUT/undecayed" --table
}

workers() { python -c 'import xdist' 2>/dev/null && echo "-n $1 --dist worksteal"; }

pytest_within() { # pytest with arguments $2..., told by Ctrl-C's signal after $1 seconds, so that it says what failed
    timeout --foreground --signal=INT "$1" python -m pytest -m gpu -v --tb short "${@:2}"
}

tests() { # in ten processes where pytest-xdist is installed; each starts compilers of its own, so few of them
    TORCHINDUCTOR_COMPILE_THREADS=2 pytest_within $((SECONDS_OF[tests] - 10)) --durations 10 $(workers 10) \
        -k "not wide and not world_of_one"
}

ddp() { # NCCL, DDP around the compiled model, no_sync and the control group, with a world of one
    pytest_within $((SECONDS_OF[ddp] - 5)) tests/test_gpu.py -k world_of_one
}

if [ "${1:-}" = --part ]; then # one part, in a process that a limit of time can end
    "$2"
    exit
fi
if [ "${1:-}" = --list ]; then
    for name in "${FIRST[@]}"; do echo "first $name ${SECONDS_OF[$name]}"; done
    for name in "${SECOND[@]}"; do echo "second $name ${SECONDS_OF[$name]}"; done
    exit
fi
chosen=("$@")
[ $# -eq 0 ] && chosen=("${FIRST[@]}" "${SECOND[@]}")
[ "$*" = first ] && chosen=("${FIRST[@]}")
[ "$*" = second ] && chosen=("${SECOND[@]}")
for name in "${chosen[@]}"; do
    [ -n "${SECONDS_OF[$name]:-}" ] || { echo "gpu.sh: no part $name: take first, second, ${FIRST[*]} ${SECOND[*]}" >&2; exit 2; }
done
[ -n "${ON_CPU:-}" ] || python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no CUDA device" >&2; exit 2; }
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
    [ $status -ne 124 ] || cat "$OUT/$name/peers.md" 2>/dev/null
    echo "== $name: status $status, $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
done
echo "$failed parts failed; figures are in $OUT"
exit $failed
