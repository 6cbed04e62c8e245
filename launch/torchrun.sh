#!/usr/bin/env bash
# One run on machines without a scheduler: start this on every machine, with the same arguments.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh stage=ppo zero=zero3
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh stage=ppo zero=zero3
#   launch/torchrun.sh --dry-run stage=ppo      print what would run here
#
#   NNODES (1): number of machines; for several also NODE_RANK, MASTER_ADDR (machine 0) and MASTER_PORT (29500)
#   NPROC_PER_NODE: ranks on each machine (as many as GPUs; 1 without)
#   OMP_NUM_THREADS: threads of each rank (the machine's cores, shared by its ranks)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: the network to use, if host names resolve to another one
#   PROLOGUE: a file that is read first, for modules and such variables (launch/prologue.sh)
#
# All machines must share store_dir and runs_dir. SIGTERM, SIGUSR1 or Ctrl-C on any of them lets all ranks save
# and end; a second signal ends the ranks of its machine at once. The exit code is that of `python -m rlhf`; after 75
# the same commands continue.
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi

if [ -n "${PROLOGUE:-}" ]; then
  if [ ! -r "$PROLOGUE" ]; then
    echo "Error: PROLOGUE=$PROLOGUE: no such file, seen from $PWD." >&2
    exit 2
  fi
  set +u # `module` reads unset variables
  # shellcheck source=launch/prologue.sh
  . "$PROLOGUE"
  set -u
fi

: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then # with several ranks torchrun would give each one thread
  OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
  if [ "$OMP_NUM_THREADS" -eq 0 ]; then OMP_NUM_THREADS=1; fi
fi
export OMP_NUM_THREADS

RLHF_NOTES=$(mktemp -d)
export RLHF_NOTES
collector=
trap 'rm -rf "$RLHF_NOTES"; if [ -n "$collector" ]; then kill "$collector" 2>/dev/null || true; fi' EXIT

if [ "$NNODES" = 1 ]; then # rendezvous in a file: torchrun's own port would be open to the network
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # torchrun opens no port for the ranks either:
  export RLHF_MEETING=$RLHF_NOTES             # they meet in a file that no other user can read
  meet=(--rdzv-backend=c10d --rdzv-conf=store_type=file "--rdzv-endpoint=$RLHF_NOTES/rendezvous"
    --local-addr=127.0.0.1)
else
  meet=("--node-rank=$NODE_RANK" "--master-addr=$MASTER_ADDR" "--master-port=$MASTER_PORT")
fi
# torch.distributed.run is torchrun, run by the Python that has rlhf.
# setsid: Ctrl-C must reach torchrun only once, through the trap below.
# signals-to-handle: any other signal kills torchrun and leaves its ranks running.
run=(setsid python -m torch.distributed.run "--nnodes=$NNODES" "--nproc-per-node=$NPROC_PER_NODE" "${meet[@]}"
  --signals-to-handle "SIGTERM,SIGUSR1,SIGINT" -m rlhf "$@")
if $dry_run; then
  printf '%q ' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${run[@]}"
  echo
  exit
fi

# Otherwise torchrun kills the ranks 30 s after a signal, in the middle of a long step or a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}

# shellcheck disable=SC2329 # the traps call these functions
signal_ranks() { # the ranks are torchrun's children
  # shellcheck disable=SC2046 # one word per rank
  kill "-$1" $(cat "/proc/$torchrun/task/$torchrun/children" 2>/dev/null) 2>/dev/null || true
}
# shellcheck disable=SC2329
kill_ranks() {
  touch "$RLHF_NOTES/killed"
  signal_ranks KILL
}
# shellcheck disable=SC2329
collect() { # after one rank has ended, the others have a minute, as under srun: a rank that hangs ignores signals
  until ls "$RLHF_NOTES"/rank* >/dev/null 2>&1; do sleep 1; done
  for _ in {1..60}; do sleep 1; done
  kill_ranks
}
# shellcheck disable=SC2329
stop() {
  trap 'stop_at_once "$signal"' TERM USR1 INT
  signal=$1
  kill "-$signal" "$torchrun"
  collect >/dev/null 2>&1 &
  collector=$!
}
# shellcheck disable=SC2329
stop_at_once() { # torchrun would leave its ranks running
  trap '' TERM USR1 INT
  # Ranks count equal signals within a second as one, and torchrun may have passed on the first one late.
  for _ in {1..5}; do
    sleep 1.2
    signal_ranks "$1"
  done
  kill_ranks
}
trap 'stop TERM' TERM
trap 'stop USR1' USR1
trap 'stop INT' INT

"${run[@]}" &
torchrun=$!
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ended `wait`, not torchrun
  code=0
  wait "$torchrun" || code=$?
done

if [ "$code" -ne 0 ]; then # torchrun always returns 1: use the ranks' exit codes
  failed=$(cat "$RLHF_NOTES"/rank* 2>/dev/null | grep -vx -e 0 -e 75 | head -n 1) || true
  stopped=$(cat "$RLHF_NOTES"/rank* 2>/dev/null | grep -cx 75) || true
  if [ -n "$failed" ]; then
    code=$failed
  elif [ "$stopped" = "$NPROC_PER_NODE" ] || [ -e "$RLHF_NOTES/killed" ]; then
    code=75
  fi
fi
exit "$code"
