#!/usr/bin/env bash
# Cloud TPU, from nothing to a training run and back:
#   bash scripts/tpu/tpu.sh COMMAND [--OPTION=VALUE …] [-- WORD …]
#
#   create    asks for the TPUs and waits until they are there
#   install   copies this working tree to all workers and installs it there
#   run       starts the words after -- on all workers, and leaves them running
#             when the connection ends
#   exec      runs the words after -- on all workers, and waits for the end
#   logs      follows the log of a worker; --worker=all for all of them
#   status    the state of the TPUs, and of what runs on each worker
#   resume    after a preemption: waits for the TPUs or creates them again,
#             installs, and starts the words after --; where they still run, or
#             ended well, it does nothing, so it may be called again and again
#   stop      asks what runs to save and end, and kills it after a while
#   delete    gives the TPUs back; nothing on their disks stays
#
# Which TPUs; each may be an environment variable: TPU_NAME, TPU_NUM_SLICES, …
#   --name=NAME --project=PROJECT --zone=ZONE
#   --accelerator=v5e-256     or v4-N, v5p-N, v6e-N, v5litepod-N, 2xv5e-256
#   --num-slices=N            slices that train together (multislice)
#   --runtime-version=NAME    by default the one for the accelerator
#   --spot, --reserved        else on demand
#   --kind=queued             a queued resource; --kind=vm: a TPU VM at once
# More:
#   --dry-run                 prints every command, as a script, and runs none
#   --yes                     does not ask before it deletes
#   --env=NAME=VALUE          for what is run; may be given again
#   --include=PATH            copied too, relative to the working tree; again
#   --create-option=OPTION    for gcloud's create, such as --network=NAME; again
#   --ssh-option=OPTION       for its ssh and scp, such as --tunnel-through-iap
#   --worker=N|all, --slice=N|all, --lines=N, --no-follow
#   --poll=SECONDS            between looks at the state (30)
#   --grace=SECONDS           from asking to killing (300)
program=tpu.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# ---- what runs on a worker

# A worker has ~/tpu_lm, the code with its environment, and ~/tpu_lm_run with
# `log`, `pid` (of a process group) and `status`, once it ended.
is_running='[ -s ~/tpu_lm_run/pid ] && [ ! -s ~/tpu_lm_run/status ] &&
  kill -0 -- "-$(cat ~/tpu_lm_run/pid)" 2>/dev/null'

# The images have Python 3.10, so uv brings the one that the locked versions
# are for. The old code goes, lest a deleted file be imported.
install_script() {
  cat <<'END'
set -eu
mkdir -p ~/tpu_lm
cd ~/tpu_lm
find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +
tar -xzf ~/tpu_lm.tar.gz
if [ ! -x .venv/bin/tpu_lm ]; then
  python3 -m pip install --quiet --user uv
  rm -rf .venv
  python3 -m uv venv --quiet --seed --python 3.11 .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint requirements/cpu.txt --editable '.[tpu]'
echo "$(hostname): tpu_lm $(.venv/bin/tpu_lm --version)"
END
}

environment_script() {
  local pair
  echo 'export PATH=~/tpu_lm/.venv/bin:"$PATH"'
  need_environment
  for pair in "${env[@]}"; do
    printf 'export %s=%s\n' "${pair%%=*}" "$(quote "${pair#*=}")"
  done
  echo 'cd ~/tpu_lm'
}

# A session of its own, without a terminal: nothing of the connection's end
# reaches it. SIGTERM is for the words; the shell around them only waits.
start_script() {
  echo "command=$(quote "$(quote "${words[@]}")")"
  echo 'set -eu'
  echo "if $is_running; then"
  cat <<'END'
  echo "$(hostname): already running; stop it first" >&2
  exit 3
fi
mkdir -p ~/tpu_lm_run
rm -f ~/tpu_lm_run/status
END
  environment_script
  cat <<'END'
echo "=== $(date -u +%FT%TZ) $command" >>~/tpu_lm_run/log
setsid nohup bash -c \
  'trap : TERM INT; eval "$1"; echo $? >~/tpu_lm_run/status' \
  tpu_lm_run "$command" </dev/null >>~/tpu_lm_run/log 2>&1 &
echo $! >~/tpu_lm_run/pid
echo "$(hostname): started"
END
}

# True where there is nothing to resume.
probe_script() {
  echo "if $is_running; then exit 0; fi"
  echo '[ "$(cat ~/tpu_lm_run/status 2>/dev/null)" = 0 ]'
}

status_script() {
  echo "if $is_running; then state=running"
  cat <<'END'
elif [ -s ~/tpu_lm_run/status ]; then
  state="ended with status $(cat ~/tpu_lm_run/status)"
elif [ -s ~/tpu_lm_run/pid ]; then state='gone: killed, or a restart'
else state='nothing was started'; fi
last=$(tail -n 1 ~/tpu_lm_run/log 2>/dev/null) || last=
echo "$(hostname): $state${last:+: $last}"
END
}

stop_script() {
  echo "seconds=$grace"
  echo "is_running() { $is_running; }"
  cat <<'END'
if ! is_running; then echo "$(hostname): nothing runs"; exit 0; fi
kill -TERM -- "-$(cat ~/tpu_lm_run/pid)"
while is_running && [ "$seconds" -gt 0 ]; do
  sleep 1
  seconds=$((seconds - 1))
done
if is_running; then
  kill -KILL -- "-$(cat ~/tpu_lm_run/pid)"
  echo "$(hostname): killed"
else
  echo "$(hostname): stopped"
fi
END
}

log_script() {
  local follow=' -F'
  [[ ! $no_follow ]] || follow=''
  echo "tail -n $lines$follow ~/tpu_lm_run/log | sed -u \"s/^/\$(hostname): /\""
}

# ---- gcloud

# Sets the words that all commands about these TPUs begin and end with.
choose_kind() {
  place=(--project="$project" --zone="$zone")
  case ${kind:=queued} in
    queued)
      gcloud=(gcloud compute tpus queued-resources)
      field=state.state ready=ACTIVE
      ;;
    vm)
      gcloud=(gcloud compute tpus tpu-vm)
      field=state ready=READY
      ;;
    *) fail "--kind=$kind: choose one of queued, vm" ;;
  esac
}

targets() {  # WORKER SLICE: sets `target`, the options that choose workers
  target=(--worker="$1")
  # Of a queued resource 64 at a time is the default, and all must start.
  [[ $kind == vm ]] || target+=(--node="$2" --batch-size=all)
}

on_workers() {  # SCRIPT
  execute "${gcloud[@]}" ssh "$name" "${place[@]}" "${target[@]}" \
    "${ssh_option[@]}" --command="$1"
}

# Sets `state`; where there are no such TPUs: MISSING. A dry run takes all for
# ready.
read_state() {
  local describe errors
  describe=("${gcloud[@]}" describe "$name" "${place[@]}"
    --format="value($field)")
  announce "${describe[@]}"
  state=$ready
  [[ ! $dry_run ]] || return 0
  errors=$(mktemp)
  if state=$("${describe[@]}" 2>"$errors" 3>&-); then
    rm -f "$errors"
  elif grep -qiE 'not[_ ]found|was not found' "$errors"; then
    rm -f "$errors"
    state=MISSING
  else
    cat "$errors" >&2
    rm -f "$errors"
    exit 1
  fi
  note "$name: $state"
}

wait_until_ready() {
  while true; do
    read_state
    case $state in
      "$ready") return ;;
      FAILED | SUSPEND* | PREEMPTED | STOPP* | TERMINATED | DELETING | MISSING)
        echo "error: $name is $state, so it will not become $ready;" \
          "see ${gcloud[*]} describe $name, or use \`resume\`" >&2
        exit 1
        ;;
    esac
    sleep "$poll"
  done
}

create() {
  need_accelerator
  need_one_tier
  local options=(--accelerator-type="$accelerator")
  runtime_version=${runtime_version:-$default_runtime}
  if [[ $kind == vm ]]; then
    ((num_slices == 1)) ||
      fail "--kind=vm: is one slice; use --kind=queued for $num_slices"
    options+=(--version="$runtime_version")
  else
    options+=(--runtime-version="$runtime_version")
    if ((num_slices == 1)); then
      options+=(--node-id="$name")
    else
      options+=(--node-count="$num_slices" --node-prefix="$name")
    fi
  fi
  [[ ! $spot ]] || options+=(--spot)
  [[ ! $reserved ]] || options+=(--reserved)
  execute "${gcloud[@]}" create "$name" "${place[@]}" "${options[@]}" \
    "${create_option[@]}"
  wait_until_ready
}

delete() {
  local options=()
  [[ $kind == vm ]] || options+=(--force)
  [[ ! $yes ]] || options+=(--quiet)
  execute "${gcloud[@]}" delete "$name" "${place[@]}" "${options[@]}"
}

install() {
  targets all all
  pack "$tree/.cache/tpu/tpu_lm.tar.gz"
  execute "${gcloud[@]}" scp "$tree/.cache/tpu/tpu_lm.tar.gz" \
    "$name:tpu_lm.tar.gz" "${place[@]}" "${target[@]}" "${ssh_option[@]}"
  on_workers "$(install_script)"
}

start() {
  local script
  script=$(start_script)
  targets all all
  on_workers "$script"
}

# The program finds its checkpoints by itself; here it only gets machines.
resume() {
  need_accelerator  # its mistakes are told before anything is deleted
  need_one_tier
  local script
  script=$(start_script)
  read_state
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    sleep "$poll"
    read_state
  done
  if [[ $dry_run || $state == "$ready" ]]; then
    targets all all
    if on_workers "$(probe_script)" && [[ ! $dry_run ]]; then
      note 'runs, or ended well: nothing to resume'
      return
    fi
    on_workers "$(stop_script)"
  fi
  if [[ $dry_run ]]; then note "if $name is gone:"; fi
  case $dry_run$state in
    yes* | SUSPENDED | PREEMPTED | FAILED)
      yes=yes  # what was on its disks is lost already
      delete
      create
      ;;
    MISSING) create ;;
    "$ready") ;;
    *) wait_until_ready ;;  # in the queue; or an error that says what it is
  esac
  install
  on_workers "$script"
}

main() {
  command=${1:---help}
  case $command in
    create | install | run | exec | logs | status | resume | stop | delete)
      shift
      ;;
    --help) print_help && return ;;
    *) fail "$command: unknown command; see bash scripts/tpu/tpu.sh --help" ;;
  esac
  parse_options 'name project zone accelerator num-slices runtime-version kind
    worker slice lines poll grace' 'spot reserved dry-run yes no-follow' \
    'env include create-option ssh-option' "$@"
  need name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' my-tpu
  need_place
  need_number poll 30 0
  need_number grace 300 0
  need_number lines 100 0
  choose_kind
  need_program gcloud 'install it: https://cloud.google.com/sdk/docs/install'
  case $command in run | exec | resume) need_words ;; esac
  local script
  case $command in
    create | install | resume | delete) "$command" ;;
    run) start ;;
    exec)
      script=$(environment_script)
      script+=$'\n'$(quote "${words[@]}")
      targets "${worker:-all}" "${slice:-all}"
      on_workers "$script"
      ;;
    logs)
      targets "${worker:-0}" "${slice:-0}"
      on_workers "$(log_script)"
      ;;
    stop)
      targets all all
      on_workers "$(stop_script)"
      ;;
    status)
      read_state
      targets all all
      [[ $state != "$ready" ]] || on_workers "$(status_script)"
      ;;
  esac
}

main "$@"
