#!/bin/bash
# The contract tests of the engine and of attention under AddressSanitizer + UndefinedBehavior-
# Sanitizer, and under ThreadSanitizer. No suppressions: what the kernel hands over (a completion
# means that it wrote to the memory) is invisible to ThreadSanitizer but happens under no lock of
# ours, and every access of ours to a ticket is ordered by its scheduler's lock or by its atomics.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
[ -x "$bin/cmake" ] && PATH="$PWD/$bin:$PATH"

check() {
    local name=$1 sanitizers=$2
    local build=build/native-$name
    cmake -S . -B "$build" -G Ninja -DDUALBLADE_PYTHON=OFF -DDUALBLADE_TESTS=ON \
        -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDUALBLADE_SANITIZE="$sanitizers" >/dev/null
    cmake --build "$build"
    # Fixed addresses: older ThreadSanitizers cannot map their shadow beside randomised ones.
    setarch "$(uname -m)" -R "$build/engine_test"
    setarch "$(uname -m)" -R "$build/attention_test"
    echo "$name: clean"
}

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
check address address,undefined
check thread thread
