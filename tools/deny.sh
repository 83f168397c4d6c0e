#!/usr/bin/env bash
# Checks licences, sources and bans of every dependency with cargo-deny, which is built once into the cache.
#
# `make check` leaves out known vulnerabilities, whose list lives on GitHub: `tools/deny.sh advisories` asks for them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.20.2
cache=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}
deny=$cache/tools/cargo-deny-$version
if [[ ! -x $deny/bin/cargo-deny ]]; then
    echo "deny: building cargo-deny $version, once" >&2
    env -u CARGO_TARGET_DIR -u RUSTFLAGS cargo install --locked --force --quiet --root "$deny.new" cargo-deny --version "$version"
    rm -rf "$deny"
    mv -T "$deny.new" "$deny"
fi
if (($# == 0)); then set -- bans licenses sources; fi
exec "$deny/bin/cargo-deny" --locked --log-level warn check "$@"
