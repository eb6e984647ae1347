#!/usr/bin/env bash
# Train on all GPUs of this machine, and continue after a crash:
#
#     scripts/train.sh --config configs/tool_n1_7b.toml --run-dir runs/7b
#
# When a process dies, torchrun ends the others and starts all of them again, up to 3 times; --resume auto then goes on
# from the last complete checkpoint of the run directory, and so does the same command given once more.
# NPROC=2 starts two processes instead of one per GPU. After a signal, torch 2.12 and later wait SHUTDOWN seconds for
# the run to save (540 unless set); torch 2.11 waits 30.
set -euo pipefail
train="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN:-540}"
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" --max-restarts 3 "$train" --resume auto "$@"
