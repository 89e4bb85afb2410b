#!/usr/bin/env bash
# Installs tpu_lm into .venv and takes a tiny model through its life on the CPU:
#   bash scripts/quickstart.sh [WORKDIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements/cpu.txt
JAX_PLATFORMS=cpu exec .venv/bin/tpu_lm quickstart \
  --workdir="${1:-runs/quickstart}"
