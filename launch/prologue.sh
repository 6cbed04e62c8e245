#!/usr/bin/env bash
# Settings of a cluster before `python -m rlhf` starts. Copy this file, remove the # of the lines that you need, and
# name the copy:
#
#   PROLOGUE=my-cluster.sh sbatch launch/slurm.sbatch stage=ppo
#   PROLOGUE=my-cluster.sh launch/torchrun.sh stage=ppo
#
# The scripts source it, and the ranks get the variables that it exports. If a line fails, nothing starts.

# Software. Modules have no effect in a container.
# module purge
# module load cuda/13.0
# . /shared/rlhf/.venv/bin/activate

# The network between machines, for NCCL (GPUs) and gloo (CPUs). `ip -brief address` lists the names. A run on one
# machine always uses `lo`.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# export NCCL_DEBUG=WARN

# SLURM only.
# CONTAINER_IMAGE=/shared/images/rlhf.sqsh
# CONTAINER_MOUNTS=/shared:/shared
# SRUN_ARGS="--mpi=none --network=sn_all"
