#!/usr/bin/env bash
# What only a graphics card can show, in two calls of at most ten minutes: bash benchmarks/on_a_card.sh PHASE
#   measure   alone on the card: Stage 2's memory and speed at SDXL's size, painting at SDXL's size beside plain diffusers, Stage 1's speed;
#             photos for the identity net are rendered beside it by a few quiet processes
#   presets   the other presets' memory beside their plans, while the demo runs on the card and the identity net trains: no speeds here
# Results go to OUT. It installs nothing; stage2_gpu.py says what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/card} WORK=${WORK:-/tmp/deephair_card}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=.:${PYTHONPATH:-}
mkdir -p "$OUT" "$WORK"

measure() {
  OMP_NUM_THREADS=1 setsid nice -n 19 python3 -c "
from pathlib import Path
from backend.demo.training_data import Photos
for split, count in (('held_out', 128), ('train', 4096)):
    Photos(Path('$WORK/photos'), split, count, workers=4)" >"$OUT/render.log" 2>&1 &
  python3 benchmarks/stage2_gpu.py --budget "${BUDGET:-310}" --seconds 30 --out "$OUT/stage2_gpu.json" \
    --arms kernel-check,ours,reference-vae,ours-vae,ours-capped,reference-cached,ours-b2,ours-profile,ours-b4
  echo "== $SECONDS s"
  timeout 60 python3 benchmarks/stage1.py speed --device cuda --batch 64 --workers 8 --steps 20
  echo "== $SECONDS s"
  timeout 150 python3 benchmarks/serve.py paths --size sdxl --steps 30 --config configs/rtx3060.yaml --repeats 2 --compile --json \
    --arms "reference remembered,ours lcm,channels first,ours compiled" 2>&1 | tee "$OUT/serve.log"
  echo "== $SECONDS s"
}

presets() {
  local pids=()
  {
    OMP_NUM_THREADS=2 timeout 200 python3 -m backend.demo.train_weights --parts identity --device cuda --loaders 5 --workers 4 \
      --work "$WORK" --out "$WORK/weights" >"$OUT/identity.log" 2>&1
    cp "$WORK"/weights/face/adaface* "$WORK"/weights/face/*card* "$OUT"/ 2>/dev/null
    echo "identity ends, $SECONDS s"
  } &
  pids+=($!)
  {
    export OMP_NUM_THREADS=4
    local here="--config configs/demo.yaml device=cuda data.workers=4"
    { python3 -m backend.cli demo-data $here && timeout 150 python3 -m backend.cli run $here; echo "code $?"; } >"$OUT/demo.log" 2>&1
    timeout 60 python3 -m backend.cli train $here train.preset=full-12gb train.steps=60 train.batch_size=8 train.save_every=20 \
      train.start=null paths.checkpoints="$WORK/full12" >"$OUT/full12.log" 2>&1
    echo "demo ends, $SECONDS s"
  } &
  pids+=($!)
  timeout 200 python3 benchmarks/stage2_gpu.py --budget 170 --seconds 20 --out "$OUT/presets.json" \
    --arms preset-lora,preset-partial,preset-full-8gb,adafactor-hooks,ours-eager,preset-full-80gb,preset-full-exact
  echo "presets end, $SECONDS s"
  wait "${pids[@]}"
  tail -n 3 "$OUT/render.log" "$OUT/identity.log" "$OUT/demo.log" "$OUT/full12.log" 2>/dev/null
}

"$1"
