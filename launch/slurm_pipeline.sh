#!/usr/bin/env bash
# Runs each stage as its own SLURM job with its own size, started when the job before it is done. Prints the job ids.
#
#   launch/slurm_pipeline.sh [--dry-run] [KEY=VALUE ...]      the keys go to every stage
#
#   SIZE="--nodes=1 --gpus-per-node=8 --exclusive" \
#   SIZE_PPO="--nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00" \
#     launch/slurm_pipeline.sh zero=zero3 model=hub model.id=OWNER/NAME ppo.minibatch_episodes=48
#
# The ranks must be able to share the batches equally. If only some of the jobs that train have GPUs, set the precision
# (precision=bf16): it is part of the keys of all stages except prepare, and each job must find the others' artifacts.
# `prepare` computes on one machine's CPUs: it gets SIZE without options for GPUs, several or complete machines.
#
#   SIZE       sbatch's options for every stage (--nodes=1)
#   SIZE_PREPARE SIZE_SFT SIZE_REWARD SIZE_GENERATE SIZE_PPO SIZE_EVALUATE      for one stage instead
#   STAGES     which stages, in order (all)
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi

without_gpus() { # prints the given options, changed for one machine's CPUs
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
  if [ -n "$previous" ]; then # without kill-on-invalid-dep the next jobs would wait forever after a stage has failed
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
