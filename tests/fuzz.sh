#!/bin/bash
# Fuzzes the parsers of etcd's keys and values, with libFuzzer and the address sanitizer.
#
#   ./tests/fuzz.sh [SECONDS]      runs each target for that long (60), starting with the kept corpus
#
# The kept inputs are in tests/fuzz/corpus/ and are repeated by every test run (test `invalid_values`). It needs a nightly
# compiler (rustup toolchain install nightly), a C++ compiler, and cargo-fuzz, which it installs.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}

if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "tests/fuzz.sh: no nightly compiler: run  rustup toolchain install nightly" >&2
    exit 2
fi
if ! command -v c++ >/dev/null; then
    echo "tests/fuzz.sh: no C++ compiler: run  apt-get install g++" >&2
    exit 2
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --locked
fi
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../target/fuzz}
for target in entry config; do
    echo "=== $target, $seconds s"
    found=$(mktemp -d)
    # New inputs go to the first directory. The corpus is only read; the merge adds inputs with new coverage to it.
    cargo +nightly fuzz run --fuzz-dir fuzz "$target" "$found" "fuzz/corpus/$target" -- -max_total_time="$seconds" -max_len=4096 -timeout=5 -rss_limit_mb=1024
    cargo +nightly fuzz run --fuzz-dir fuzz "$target" "fuzz/corpus/$target" "$found" -- -merge=1 -max_len=4096 2>&1 | grep -e MERGE-OUTER | tail -1
    rm -rf "$found"
    echo "the corpus holds $(find "fuzz/corpus/$target" -type f | wc -l) inputs"
done
