#!/usr/bin/env bash
# Each stage as a SLURM job of its own size, started when the one before it is done. Prints the job ids.
#
#   launch/slurm_pipeline.sh [--dry-run] [KEY=VALUE ...]      the keys go to every stage
#
#   SIZE="--nodes=1 --gpus-per-node=8 --exclusive" \
#   SIZE_PPO="--nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00" \
#     launch/slurm_pipeline.sh zero=zero3 model=hub model.id=OWNER/NAME ppo.minibatch_episodes=48
#
# Batches must divide over the ranks. Where some jobs that train have GPUs and others not, set the precision
# (precision=bf16): it is part of the keys of all stages but prepare, and each must find what the others made.
# `prepare` computes on one machine's CPUs: it gets SIZE without what asks for GPUs or for several or whole machines.
#
#   SIZE       sbatch's options for every stage (--nodes=1)
#   SIZE_PREPARE SIZE_SFT SIZE_REWARD SIZE_GENERATE SIZE_PPO SIZE_EVALUATE      for one stage instead
#   STAGES     which stages, in order (all)
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi

without_gpus() { # these options, for one machine's CPUs
  local word keep=true
  for word in "$@"; do
    case $word in
      -G* | --gpu* | --gres* | --*-per-gpu* | --tres-per-* | --exclusive* | -N* | --nodes*) keep=false ;;
      -*) keep=true ;; # another word is the value of the option before it
    esac
    if $keep; then printf '%s ' "$word"; fi
  done
  printf -- '--nodes=1'
}

previous=
for stage in ${STAGES:-prepare sft reward generate ppo evaluate}; do
  size=SIZE_${stage^^}
  read -ra options <<<"${!size:-${SIZE:---nodes=1}}"
  if [ "$stage" = prepare ] && [ -z "${!size:-}" ]; then
    read -ra options <<<"$(without_gpus "${options[@]}")"
  fi
  if [ -n "$previous" ]; then # without kill-on-invalid-dep the rest waits for ever behind a stage that failed
    options+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
  fi
  submit=(sbatch --parsable "--job-name=rlhf-$stage" "${options[@]}" "$(dirname -- "$0")/slurm.sbatch" "stage=$stage" "$@")
  if $dry_run; then
    printf '%q ' "${submit[@]}"
    echo
    previous=${stage^^}_JOB
  else
    previous=$("${submit[@]}")
    previous=${previous%%;*} # the cluster's name may follow
    echo "$stage $previous"
  fi
done
