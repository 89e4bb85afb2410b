#!/usr/bin/env bash
# Installs tpu_lm with what its tests need into .venv and runs them:
#   bash scripts/test.sh [slow] [PYTEST ARGUMENTS]
# `slow` runs the tests that are marked slow instead of the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements/dev.txt
which='not slow'
if [ "${1:-}" = slow ]; then
  which=slow
  shift
fi
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
exec .venv/bin/python -m pytest --numprocesses=2 -m "$which" "$@"
