#!/usr/bin/env bash
# From a fresh clone to samples: bash examples/quickstart.sh [PROMPT]
# Trains a small model on the source text of Python's own standard library: two processes, on GPUs where there are two, else on CPU.
# Settings by environment: RUN_DIR (default runs/quickstart), TRAIN_ITERS, PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh

PROMPT=${1:-"def "}
RUN_DIR=${RUN_DIR:-runs/quickstart}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "== environment =="
make_environment ""
PATH="$PWD/.venv/bin:$PATH"

echo "== tokens =="
STDLIB=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
if [ ! -e "$RUN_DIR/data/stdlib_text_document.idx" ]; then
    # Top-level modules only: a few megabytes, without packages that happen to be installed beside them.
    python -m sedd_megatron.prepare_data --input "$STDLIB"/*.py --output-prefix "$RUN_DIR/data/stdlib" \
        --tokenizer-type ByteTokenizer
fi
DATA="$RUN_DIR/data/stdlib_text_document"

echo "== training =="
torchrun --standalone --nproc-per-node 2 examples/pretrain_sedd.py --config examples/configs/tiny.yaml \
    --tensor-model-parallel-size 2 --data-path "$DATA" --save "$RUN_DIR/checkpoints" \
    ${TRAIN_ITERS:+--train-iters "$TRAIN_ITERS"}

echo "== result =="
python - "$RUN_DIR/checkpoints/metrics.jsonl" "${DATA}_stats.json" <<'PY'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    lines = [json.loads(line) for line in file]
# A run cut short by TRAIN_ITERS may end before its first validation.
name = "validation_loss" if any("validation_loss" in line for line in lines) else "loss"
last = [line[name] for line in lines if name in line][-1]
with open(sys.argv[2], encoding="utf-8") as file:
    unigram = json.load(file)["unigram_entropy_nats"]
print(f"{name.replace('_', ' ')} {last:.3f} nats per token; unigram entropy of the corpus {unigram:.3f} nats per token")
PY

echo "== samples =="
python -m sedd_megatron.generate --load "$RUN_DIR/checkpoints" --num-samples 3 --prompt "$PROMPT" \
    --output "$RUN_DIR/samples.jsonl" --trace "$RUN_DIR/samples.html"
