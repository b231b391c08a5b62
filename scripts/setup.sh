#!/usr/bin/env bash
# Make a virtual environment and install lcmlora in it, in the versions of constraints.txt.
#
#     scripts/setup.sh VENV [dev]
#
# A machine without an NVIDIA GPU gets the CPU build of torch wherever one is offered (PyTorch's own index, or what pip is
# configured with), instead of several GB of CUDA libraries.
set -euo pipefail
venv=$1 kind=${2:-}
cd "$(dirname "$0")/.."
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet 'pip>=25.1'
if ! "$venv/bin/python" -m pip show --quiet torch 2>/dev/null; then
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # The newest of equal versions wins, and 2.13.0+cpu is newer than 2.13.0. Where the index can't be reached, pip goes on
    # with what it has. Alone, so that this index is asked for nothing else.
    "${pip[@]}" --no-deps --retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu torch
  else
    "${pip[@]}" torch
  fi
fi
"${pip[@]}" -e '.[train]'
if [ "$kind" = dev ]; then
  "${pip[@]}" --group test --group lint --group docs --group examples --group live
fi
