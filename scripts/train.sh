#!/usr/bin/env bash
# Train on all GPUs of this machine, and continue after a crash:
#
#     scripts/train.sh --config configs/tool_n1_7b.toml --run-dir runs/7b
#
# When a process dies, torchrun ends the others and starts all of them again, up to 3 times; --resume auto then goes on
# from the last complete checkpoint of the run directory, and so does the same command given once more.
# NPROC=2 starts two processes instead of one per GPU.
set -euo pipefail
train="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py"
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" --max-restarts 3 "$train" --resume auto "$@"
