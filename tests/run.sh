#!/usr/bin/env bash
# Everything that must pass: lint, format, types, tests with the native library and without it. Stops at the first stage
# that fails.
# Arguments go on to pytest: bash tests/run.sh -k codec
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test train bench

stage() {
    printf '\n== %s\n' "$*"
    "$@"
}

stage ruff check .
stage ruff format --check .
stage mypy
stage python -m pytest "$@"
# Once more as on a machine without a compiler. What says nothing about the step need not be run again.
ignored=()
for name in package environment native_isas configs foreign foreign_refusals checkpoint bench_low_precision \
    bench_sharding bench_offload shard_accelerate shard_faults shard_loads shard_checkpoints shard_groups sim_device offload; do
    ignored+=(--ignore "tests/test_$name.py")
done
LOWMEM_ADAM_LIBRARY=none stage python -m pytest "${ignored[@]}" "$@" || (($? == 5)) # 5: arguments left no test
