# Makes .venv from a locked list; sourced by the other scripts.
#   make_environment requirements/FILE.txt
# Does nothing when the list was installed before.

make_environment() {
  local list=$1 stamp=.venv/installed python=${PYTHON:-python3}
  local wanted
  wanted=$(cat "$list" setup.py | cksum)
  if [ -f "$stamp" ] && grep -qxF "$list $wanted" "$stamp"; then
    return
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; set PYTHON=python3.11" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing $list into .venv (some minutes the first time) …"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --requirement "$list"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --editable .
  echo "$list $wanted" >>"$stamp"
}
