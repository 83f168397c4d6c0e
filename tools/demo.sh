#!/bin/bash
# Sets up what is missing, builds, and shows one pod from start to end (tests/src/bin/bulkhead-demo.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

make setup
make guest
exec cargo run --quiet --locked --release -p bulkhead-tests --bin bulkhead-demo
