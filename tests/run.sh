#!/usr/bin/env bash
# Everything that must pass: lint, format, types, tests with the native library and without it. Stops at the first stage
# that fails.
# Arguments go on to pytest: bash tests/run.sh -k codec
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test train bench integrations docs
# Kernels for GPUs are interpreted and compiled by Triton, which needs none.
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' ||
    python -m pip --disable-pip-version-check install --quiet --requirement launch/triton.txt

stage() {
    printf '\n== %s\n' "$*"
    "$@"
}

stage ruff check .
stage ruff format --check .
stage mypy
# Tests are single processes with one thread, most of them, so two files at a time fill two cores. A file stays with one
# worker: its tests share ranks, builds and launches. In the order of their names the long files come neither last nor
# together. More than four workers are not taken unasked: one whose tests start ranks takes up to 3 GB.
#   bash tests/run.sh -n 0 --pdb    all in one process
tests=(python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
stage "${tests[@]}" "$@"
# Once more as on a machine without a compiler. What says nothing about the step need not be run again, nor what calls the
# reference itself, nor the parity of trainings and of free runs, as the reference takes the same bits (test_cpu_kernel.py).
again=()
for name in package environment native_isas configs multi_node foreign foreign_refusals checkpoint bench_low_precision \
    bench_sharding bench_long_run bench_offload bench_deepspeed bench_gpu bench_host_time bench_growth bench_memory \
    readme_figures run_all migration \
    deepspeed_config deepspeed_example deepspeed_universal trainer trainer_deepspeed trainer_examples sft \
    plan plan_measured plan_models convert verify command_line completion workflows gpu gpu_exact gpu_code gpu_interpreted \
    interpreted_optimizer triton compile compile_operator \
    accelerate accelerate_launch threads shard_accelerate shard_faults shard_loads shard_checkpoints shard_groups \
    sim_device offload out_of_memory in_backward in_backward_ranks docs docs_ladder format_bounds \
    in_backward_refusals reference rounding codec layout peer_formats peer_free_running parity_short; do
    again+=(--ignore "tests/test_$name.py")
done
# Nor, in other files, loads of what any number of ranks saved (test_dtensor.py loads shards), resumed launches, launches
# with torch's own optimizer, and programs that are told in the test which library to take.
for name in shard.py::test_saved_by_any_number_of_ranks train_lm.py::test_checkpoint_resumes_with_and_without_shards \
    train_lm.py::test_launch_that_silently_starts_one_process train_images.py::test_two_processes \
    lightning.py::test_example cli.py::test_help cli.py::test_info_without_the_library; do
    again+=(--deselect "tests/test_$name")
done
LOWMEM_ADAM_LIBRARY=none stage "${tests[@]}" "${again[@]}" "$@" || (($? == 5)) # 5: arguments left no test
