#!/usr/bin/env bash
# Builds the guest's agent: one static, non-PIE binary (profile `agent`), as the initramfs wants it.
#
# The explicit --target keeps the static flags away from proc-macros and build scripts, which cannot live with them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

libseccomp=$(gcc -print-file-name=libseccomp.a)
[[ $libseccomp == /* ]] || { echo "build-agent: gcc finds no libseccomp.a: install libseccomp-dev (make setup does)" >&2; exit 1; }
export LIBSECCOMP_LINK_TYPE=static
LIBSECCOMP_LIB_PATH=$(dirname "$libseccomp")
export LIBSECCOMP_LIB_PATH
export RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static'
cargo build --locked --profile agent --target x86_64-unknown-linux-gnu -p bulkhead-agent
