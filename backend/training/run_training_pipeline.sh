#!/usr/bin/env bash
# The four stages in order. Arguments go to every stage: bash backend/training/run_training_pipeline.sh --config configs/demo.yaml
# Stopped or killed, run it again: finished work is skipped and training goes on from its last checkpoint.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"

run() {
    echo "== $1"
    local code=0
    shift
    "$python" "$@" || code=$?
    # 3: done, with some inputs quarantined; Stage 0's report lists them
    if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then
        exit "$code"
    fi
}

run "Stage 0: prepare the dataset" "$root/backend/training/prepare_dataset_deephair.py" "$@"
run "Stage 1: texture encoder" "$root/backend/training/models/texture_encoder.py" "$@"
run "Stage 2: fine-tune the inpainting UNet" "$root/backend/training/train_stage2.py" "$@"
run "Stage 3: evaluate and deploy" "$root/backend/training/export_model.py" "$@"
