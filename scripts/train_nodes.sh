#!/usr/bin/env bash
# Train on all GPUs of several machines, and continue after a crash; the same command on each of them:
#
#     NNODES=4 HEAD_NODE=node1 scripts/train_nodes.sh --config configs/tool_n1_14b.toml --run-dir /shared/runs/14b
#
# HEAD_NODE is one of them, where they meet at port 29500 or PORT; the others wait for it as long as torchrun does. JOB
# tells two jobs with one meeting point apart. --run-dir is on storage that all of them share. NPROC as in train.sh.
# After a signal, torch 2.12 and later wait SHUTDOWN seconds for the run to save; torch 2.11 waits 30.
set -euo pipefail
train="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN:-540}"
exec torchrun --nnodes "$NNODES" --nproc-per-node "${NPROC:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:${PORT:-29500}" --rdzv-id "${JOB:-tooln1}" \
    "$train" --resume auto "$@"
