#!/usr/bin/env bash
# Trains the same small language model twice on the sources of Python's standard library, with torch.optim.AdamW
# and with AdamW8bit sharded, in two processes on one machine without a GPU, and compares the two runs.
# Arguments go on to both runs: bash launch/quickstart.sh --steps 20 (all but --optimizer, --shard, --output-dir and
# --expect-world-size, which are set here; --no-shard leaves the whole state of both in each process).
set -euo pipefail

# The last of two equal options wins: these would take the place of the ones below and leave nothing to compare.
for argument in "$@"; do
    case "${argument%%=*}" in
        --optimizer | --shard | --output-dir | --expect-world-size)
            printf '%s: quickstart.sh sets %s itself, once for each run; for a run of your own see %s\n' \
                "$argument" "${argument%%=*}" docs/training.md >&2
            exit 2
            ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh train

processes=2
results=runs/quickstart

# The configuration alone starts the processes; this makes accelerate join them over gloo instead of looking for GPUs.
export ACCELERATE_USE_CPU=true
# accelerate would give each process one thread.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

for optimizer in torch adamw8bit; do
    choice=(--optimizer "$optimizer")
    if [[ "$optimizer" == adamw8bit ]]; then
        choice+=(--shard)
    fi
    printf '\n== %s, %s processes with %s thread(s) each\n' "$optimizer" "$processes" "$OMP_NUM_THREADS"
    accelerate launch --config_file launch/configs/cpu_2.yaml launch/train_lm.py \
        "${choice[@]}" --expect-world-size "$processes" --output-dir "$results/$optimizer" "$@"
done

printf '\n== comparison\n'
python launch/compare_runs.py "$results/torch" "$results/adamw8bit" --output-dir "$results"
