#!/usr/bin/env bash
# What only a graphics card can show, sized for short leases: bash benchmarks/on_a_card.sh PHASE
#   measure   alone on the card: Stage 2's memory and speed at SDXL's size, Stage 1's speed, painting at SDXL's size beside plain diffusers;
#             once plain diffusers is timed, the demo runs on the card in preset full-12gb and then as it is: does the product work there?
#   presets   the other presets' memory beside their plans
# Results go to OUT, rewritten as they come. BUDGET: seconds for Stage 2's arms. It installs nothing; stage2_gpu.py says what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/card} WORK=${WORK:-/tmp/deephair_card}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=.:${PYTHONPATH:-}
mkdir -p "$OUT" "$WORK"

measure() {
  python3 benchmarks/stage2_gpu.py --budget "${BUDGET:-150}" --seconds "${ARM:-15}" --out "$OUT/stage2_gpu.json" \
    --arms "${ARMS:-ours,ours-compiled,reference-vae,ours-vae-compiled,ours-vae}"
  echo "== $SECONDS s"
  for batch in 256 64; do  # of configs/h100.yaml, which keeps such a card busy, and of configs/rtx3060.yaml
    timeout 75 python3 benchmarks/stage1.py speed --device cuda --batch $batch --workers 8 --steps 20
  done
  echo "== $SECONDS s"
  { until [ "$(grep -c '^diffusers:' "$OUT/serve.log" 2>/dev/null)" -ge 3 ]; do sleep 0.5; done; product; } &
  timeout 140 python3 benchmarks/serve.py paths --size sdxl --steps 30 --config configs/rtx3060.yaml --repeats 2 --compile --json \
    --arms "${PATHS:-compiled}" 2>&1 | tee "$OUT/serve.log" | grep -v "kept in float32"
  echo "== $SECONDS s"
  wait
}

product() {
  local here="--config configs/demo.yaml device=${DEVICE:-cuda} data.workers=4 texture.steps=40 train.steps=60 train.save_every=20 evaluate.samples=8
    evaluate.samples_reconstruction=8"
  export OMP_NUM_THREADS=2
  {
    for verb in demo-data prepare texture; do nice python3 -m backend.cli $verb $here || echo "$verb: code $?"; done
    mkdir -p "$WORK/full12" && cp runs/demo/checkpoints/texture_encoder.safetensors "$WORK/full12"
    nice python3 -m backend.cli train $here train.preset=full-12gb paths.checkpoints="$WORK/full12" train.start=null
    echo "full-12gb: code $?"
    nice timeout "${PRODUCT:-60}" python3 -m backend.cli run $here
    echo "run: code $?"
  } >"$OUT/product.log" 2>&1
}

presets() {
  python3 benchmarks/stage2_gpu.py --budget "${BUDGET:-170}" --seconds 20 --out "$OUT/presets.json" \
    --arms preset-lora,preset-partial,preset-full-8gb,preset-full-80gb,preset-full-exact,adafactor-hooks
}

"$1"
