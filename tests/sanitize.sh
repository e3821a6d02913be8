#!/usr/bin/env bash
# The native library under AddressSanitizer and UndefinedBehaviorSanitizer: tests/native/digest.cpp on every instruction
# set that this processor has, then the tests of the kernel. Ends non-zero on any finding.
#   bash tests/sanitize.sh [ARGUMENT OF PYTEST...]   (default: tests/test_cpu_kernel.py)
#   LOWMEM_ADAM_SANITIZE_BUILD  folder of the build (default: build/sanitize); a second run builds only what has changed
# Needs Linux, g++ (clang's sanitizer libraries have other names) and what launch/environment.sh installs.
# Building takes 5 minutes of processor time.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test

build="${LOWMEM_ADAM_SANITIZE_BUILD:-build/sanitize}"
compiler="${CXX:-g++}"
(($# > 0)) || set -- tests/test_cpu_kernel.py

stage() {
    printf '\n== %s\n' "$*"
    "$@"
}

stage cmake -S lowmem_adam/native -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" \
    -DLOWMEM_ADAM_SANITIZE="address;undefined"
stage cmake --build "$build" --parallel 2
build="$(cd "$build" && pwd)"

# Without this a library that came from a build folder of other options would pass with nothing looked at.
functions="$(nm --dynamic --undefined-only "$build/liblowmem_adam.so")"
for prefix in __asan_report __ubsan_handle; do
    if [[ "$functions" != *"$prefix"* ]]; then
        printf '%s calls no %s..., so it was built without that sanitizer: remove %s and run again.\n' \
            "$build/liblowmem_adam.so" "$prefix" "$build" >&2
        exit 1
    fi
done

# Memory that is never freed is Python's, and torch's; the step itself keeps none.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1

stage "$compiler" -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all \
    -Ilowmem_adam/native tests/native/digest.cpp -o "$build/digest" \
    -L"$build" -llowmem_adam -Wl,-rpath,"$build"
expected=
isas="$("$build/digest" list)"
for isa in $isas; do
    printf '\n== %s %s\n' "$build/digest" "$isa"
    digests="$("$build/digest" "$isa")"
    printf '%s groups\n' "$(wc -l <<<"$digests")"
    if [[ -n "$expected" && "$digests" != "$expected" ]]; then
        printf 'The digests of %s differ from those of scalar (<):\n' "$isa" >&2
        diff <(printf '%s\n' "$expected") <(printf '%s\n' "$digests") >&2 || true
        exit 1
    fi
    expected="$digests"
done

# The interpreter is not built with the sanitizers, so they have to be there before it; and so has libstdc++, or they do
# not find the functions of it that they watch.
preload=()
for library in libasan.so libubsan.so libstdc++.so; do
    preload+=("$("$compiler" -print-file-name="$library")")
done
stage env LD_PRELOAD="${preload[*]}" LOWMEM_ADAM_LIBRARY="$build/liblowmem_adam.so" \
    python -m pytest -p no:cacheprovider --timeout 1800 -o faulthandler_timeout=1700 "$@"
