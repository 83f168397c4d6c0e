#!/usr/bin/env bash
# Runs the core of the end-to-end tests inside a node with real KVM, vhost and pure cgroup v2 (tools/kvm-node.sh).
#
# Usage: test-kvm.sh [FILTER...]   the arguments go to every test binary.
# BULKHEAD_TEST_CONTAINERDS and BULKHEAD_TEST_RUNTIMES narrow the table as they do outside; here to what the node is
# for. BULKHEAD_TEST_SUITES names the binaries; processor time is not among what they measure by default, since the
# node's is emulated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra suites <<<"${BULKHEAD_TEST_SUITES:-host ctr cri streams faults}"
export BULKHEAD_TEST_CONTAINERDS=${BULKHEAD_TEST_CONTAINERDS:-2.4}
export BULKHEAD_TEST_RUNTIMES=${BULKHEAD_TEST_RUNTIMES:-bulkhead}

flags=()
for suite in "${suites[@]}"; do flags+=(--test "$suite"); done
# Built out here, where compiling is not emulated. Cargo names each binary as `Executable tests/NAME.rs (PATH)`.
listing=$(cargo test --locked --no-run -p bulkhead-tests "${flags[@]}" 2>&1) || { echo "$listing" >&2; exit 1; }
mapfile -t binaries < <(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' <<<"$listing")
((${#binaries[@]} == ${#suites[@]})) || { echo "test-kvm: cargo built ${#binaries[@]} of ${#suites[@]} test binaries" >&2; exit 1; }

failed=0
for binary in "${binaries[@]}"; do
    echo "=== ${binary##*/}"
    tools/kvm-node.sh "$binary" "$@" || failed=1
done
exit "$failed"
