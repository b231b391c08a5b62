#!/usr/bin/env bash
# From two npm packages of drawings to the model inside the wheel. On two cores: about two hours and a half.
#
#     pip install -e '.[train]' --group pocket && examples/pocket/make.sh WORK
#
# Every step resumes from its checkpoint in WORK, so the script can be stopped and started again. Needs `npm`.
set -euo pipefail
work=$1
here=$(cd "$(dirname "$0")" && pwd)
model=$here/../../src/lcmlora/pocket/model
cd "$here"

python pictures.py --data "$work"
[ -f "$work/vae/config.json" ] || python train_vae.py --data "$work" --output "$work/vae"
[ -f "$work/decoder/config.json" ] || python train_vae.py --data "$work" --start "$work/vae" --decoder-only \
  --output "$work/decoder" --lr 1e-3 --steps 2800 --crop-steps 0
[ -d "$work/base/pipeline" ] || python train_base.py --data "$work" --vae "$work/vae" --output "$work/base"
# Distilled from what is shipped, so that comes first.
python export.py --base "$work/base/pipeline" --vae "$work/decoder" --output "$model"
python ../../benchmarks/objectives.py train "$work/objectives" "paths, then schedule"
[ -f "$work/style/pytorch_lora_weights.safetensors" ] || python train_style.py --data "$work" --base "$work/base/pipeline" --output "$work/style"
[ -d "$work/chalk/unet" ] || python train_finetune.py --data "$work" --base "$work/base/pipeline" --output "$work/chalk"
[ -f "$work/tiny/config.json" ] || python train_tiny.py --data "$work" --vae "$work/vae" --output "$work/tiny"
python export.py --base "$work/base/pipeline" --vae "$work/decoder" --tiny "$work/tiny" --style "$work/style" --chalk "$work/chalk" \
  --lcm "$work/objectives/paths-then-schedule-0" --output "$model"
