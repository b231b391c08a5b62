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

python pictures.py --data "$work" --folder "$work/pictures"
[ -f "$work/vae/config.json" ] || python train_vae.py --data "$work" --output "$work/vae"
[ -d "$work/base/pipeline" ] || python train_base.py --data "$work" --vae "$work/vae" --output "$work/base"
[ -f "$work/lcm/pytorch_lora_weights.safetensors" ] || lcmlora distill "$work/base/pipeline" "$work/pictures" "$work/lcm" \
  --rank 8 --steps 700 --batch-size 64 --learning-rate 1e-3 --warmup 50 --schedule cosine --weight-decay 0 \
  --w 1.5 --ema 0.99 --checkpoint-every 100
[ -f "$work/style/pytorch_lora_weights.safetensors" ] || python train_style.py --data "$work" --base "$work/base/pipeline" --output "$work/style"
[ -d "$work/chalk/unet" ] || python train_finetune.py --data "$work" --base "$work/base/pipeline" --output "$work/chalk"
python export.py --base "$work/base/pipeline" --lcm "$work/lcm" --style "$work/style" --chalk "$work/chalk" --output "$model"
