#!/usr/bin/env bash
# Everything that must pass: lint, format, types, tests. Stops at the first stage that fails.
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
