#!/usr/bin/env bash
# Writes requirements/cpu.txt and dev.txt: what setup.py resolves to today.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
lock() {
  "$folder/venv/bin/python" -m pip install --quiet "$1"
  {
    echo "# Locked by scripts/lock.sh from setup.py ($1); Linux, Python 3.11."
    "$folder/venv/bin/python" -m pip freeze --exclude tpu_lm |
      grep -v '^-e\|^tpu_lm'
  } >"requirements/$2.txt"
}
lock . cpu
lock '.[dev]' dev
