#!/usr/bin/env bash
# TPUs of a GKE cluster through XPK (pip install xpk), with kubectl and docker:
#   bash scripts/tpu/xpk.sh COMMAND [--OPTION=VALUE …] [-- WORD …]
#
#   cluster-create   a cluster with the slices
#   cluster-delete   the cluster and all that runs in it
#   run              queues the words after -- as a workload of all slices; it
#                    is started again where it fails or is preempted
#   list             the workloads of the cluster
#   logs             follows the logs of all workers of a workload
#   delete           ends a workload
#
# Each of these may be an environment variable: TPU_CLUSTER, TPU_NAME, …
#   --cluster=NAME --project=PROJECT --zone=ZONE
#   --name=NAME               the workload
#   --accelerator=v5e-256     or v4-N, v5p-N, v6e-N, v5litepod-N, 2xv5e-256
#   --num-slices=N            slices that train together (multislice)
#   --spot, --reservation=ID  else on demand; of cluster-create
#   --image=IMAGE             has tpu_lm installed; else this working tree is
#                             laid over python:3.11 and installed at each start
#   --max-restarts=N          of a workload (50)
# More:
#   --dry-run                 prints every command, as a script, and runs none
#   --yes                     does not ask before it deletes a cluster
#   --env=NAME=VALUE          for what is run; may be given again
#   --include=PATH            copied too, relative to the working tree; again
#   --xpk-option=OPTION       for xpk's own command; may be given again
#   --lines=N, --no-follow
program=xpk.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

container=jax-tpu  # as XPK names it

cluster_create() {
  need_accelerator
  need_one_tier
  local tier=(--on-demand)
  [[ ! $spot ]] || tier=(--spot)
  [[ ! $reservation ]] || tier=(--reservation="$reservation")
  execute xpk cluster create "${place[@]}" --tpu-type="$accelerator" \
    --num-slices="$num_slices" "${tier[@]}" "${xpk_option[@]}"
}

cluster_delete() {
  local force=()
  [[ ! $yes ]] || force=(--force)
  execute xpk cluster delete "${place[@]}" "${force[@]}" "${xpk_option[@]}"
}

run() {
  need_accelerator
  need_number max-restarts 50 0
  need_environment
  local image_options line
  line="exec $(quote_on_one_line env "${env[@]}" "${words[@]}")"
  if [[ $image ]]; then
    image_options=(--docker-image="$image")
  else
    stage
    image_options=(--base-docker-image=python:3.11
      --script-dir="$tree/.cache/tpu/tree")
    line="python -m pip install --quiet --constraint requirements/cpu.txt\
 --editable '.[tpu]' && $line"
  fi
  execute xpk workload create "${place[@]}" --workload="$name" \
    --tpu-type="$accelerator" --num-slices="$num_slices" \
    --max-restarts="$max_restarts" "${image_options[@]}" \
    "${xpk_option[@]}" --command="$line"
}

# XPK copies a whole folder into the image: one without .git and environments.
stage() {
  pack "$tree/.cache/tpu/tpu_lm.tar.gz"
  execute rm -rf "$tree/.cache/tpu/tree"
  execute mkdir -p "$tree/.cache/tpu/tree"
  execute tar -xzf "$tree/.cache/tpu/tpu_lm.tar.gz" -C "$tree/.cache/tpu/tree"
}

logs() {
  need_number lines 100 0
  local follow=(--follow)
  [[ ! $no_follow ]] || follow=()
  need_program kubectl 'install it: gcloud components install kubectl'
  # XPK's clusters are regional: the zone without its letter.
  execute gcloud container clusters get-credentials "$cluster" \
    --project="$project" --location="${zone%-*}"
  execute kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" \
    --container="$container" --prefix --tail="$lines" \
    --max-log-requests=1000 "${follow[@]}"
}

main() {
  command=${1:---help}
  case $command in
    cluster-create | cluster-delete | run | list | logs | delete) shift ;;
    --help) print_help && return ;;
    *) fail "$command: unknown command; see bash scripts/tpu/xpk.sh --help" ;;
  esac
  parse_options 'cluster name project zone accelerator num-slices reservation
    image max-restarts lines' 'spot dry-run yes no-follow' \
    'env include xpk-option' "$@"
  need cluster '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-cluster
  need_place
  place=(--cluster="$cluster" --project="$project" --zone="$zone")
  need_program xpk 'install it: pip install xpk'
  case $command in
    run | logs | delete) need name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-run ;;
  esac
  case $command in
    run)
      need_words
      run
      ;;
    cluster-* | logs) "${command/-/_}" ;;
    list) execute xpk workload list "${place[@]}" "${xpk_option[@]}" ;;
    delete)
      execute xpk workload delete "${place[@]}" --workload="$name" \
        "${xpk_option[@]}"
      ;;
  esac
}

main "$@"
