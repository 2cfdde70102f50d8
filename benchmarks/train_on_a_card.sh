#!/usr/bin/env bash
# Trains the miniature weights in their long form on a graphics card, in lanes that share it: bash benchmarks/train_on_a_card.sh PHASE
#   smoke   every part, 3 steps, in folders of its own; stops at the first error
#   first   photos, perceptual net and autoencoder; identity net, Stage 0 and Stage 1; parser
#   second  what is left, base UNet, Stage 2's start and ControlNet
# A phase stops after MINUTES (default 9) and the next run goes on from there. Weights go to backend/demo/weights, the rest to WORK.
# It installs nothing; it needs the package's own requirements, 16 cores and a card of 16 GB.
set -uo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-/tmp/deephair_card} MINUTES=${MINUTES:-9} DEVICE=${DEVICE:-cuda}
export OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
LOGS=${OUT:-$WORK}/logs
mkdir -p "$LOGS" "$WORK"

train() { # PARTS LOADERS LOG
  python3 -m backend.demo.train_weights --parts "$1" --loaders "$2" --length long --device "$DEVICE" --workers 12 \
    --work "$WORK" --budget-minutes "$(awk "BEGIN { print ($MINUTES * 60 - $SECONDS) / 60 }")" >>"$LOGS/$3.log" 2>&1
}

smoke() {
  local common="--steps 3 --length long --device $DEVICE --loaders 2 --workers 8 --out $WORK/smoke/weights"
  rm -rf "$WORK/smoke"
  python3 -c "
from pathlib import Path
from backend.demo.training_data import Photos
for split, count in (('train', 64), ('held_out', 32)):
    Photos(Path('$WORK/smoke/a/photos'), split, count, workers=16)"
  cp -r "$WORK/smoke/a" "$WORK/smoke/b"
  python3 -m backend.demo.train_weights $common --work "$WORK/smoke/a" --parts perceptual,vae,text,unet,controlnet >"$LOGS/smoke_a.log" 2>&1 &
  local first=$!
  python3 -m backend.demo.train_weights $common --work "$WORK/smoke/b" --parts identity,parser,resnet >"$LOGS/smoke_b.log" 2>&1 || { tail -25 "$LOGS/smoke_b.log"; return 1; }
  wait $first || { tail -25 "$LOGS/smoke_a.log"; return 1; }
  python3 -m backend.demo.train_weights $common --work "$WORK/smoke/b" --parts stage2 >>"$LOGS/smoke_b.log" 2>&1 || { tail -25 "$LOGS/smoke_b.log"; return 1; }
  echo "smoke: every part runs, $SECONDS s"
}

first() {
  python3 -c "
from pathlib import Path
from backend.demo.training_data import Photos
for split, count in (('held_out', 128), ('train', 6144)):
    Photos(Path('$WORK/photos'), split, count, workers=16)" >"$LOGS/render.log" 2>&1
  echo "photos rendered, $SECONDS s"
  python3 -m backend.cli demo-data --config configs/miniature.yaml --set learn-long paths.weights="$WORK/unused" \
    data.images="$WORK/learn/khairstyle/images" data.labels="$WORK/learn/khairstyle/labels" >"$LOGS/portraits.log" 2>&1 &
  local portraits=$!
  { train perceptual,vae,text,unet 5 lane_a; echo "lane a ends, $SECONDS s"; } &
  { train identity 5 lane_b; wait_for $portraits; train resnet 5 lane_b; echo "lane b ends, $SECONDS s"; } &
  { train parser 4 lane_c; echo "lane c ends, $SECONDS s"; } &
  finish
}

second() {
  { train unet 4 lane_a; train controlnet 4 lane_c; echo "base and ControlNet end, $SECONDS s"; } &
  { train identity,parser 5 lane_c; train resnet 8 lane_b; until [ -f "$UNET_CARD" ]; do sleep 1; done; train stage2 8 lane_b; echo "stages end, $SECONDS s"; } &
  finish
}

UNET_CARD=backend/demo/weights/stable-diffusion/sd_xl_inpainting/unet/card.json

wait_for() { while kill -0 "$1" 2>/dev/null; do sleep 1; done; }

finish() { # lanes end by themselves or, at the limit, with a checkpoint
  while [ -n "$(jobs -rp)" ] && [ $SECONDS -lt $(( MINUTES * 60 + 20 )) ]; do sleep 1; done
  pkill -INT -f backend.demo.train_weights && sleep 6
  pkill -KILL -f backend.demo.train_weights
  true
}

"$1"
