#!/usr/bin/env bash
# Packs dist/bulkhead-VERSION-x86_64.tar.gz: the installed tree, checksums and an install.sh that needs no compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)
name=bulkhead-$version-x86_64
work=dist/$name
rm -rf "$work"
mkdir -p "$work"
tools/install.sh "$work/root"
install --mode=755 tools/dist-install.sh "$work/install.sh"
install --mode=644 LICENSE README.md ARCHITECTURE.md "$work/"
install -D --mode=644 docs/differences.md "$work/docs/differences.md"
# Where README has its links.
ln --symbolic root/share/bulkhead/runtimeclass "$work/runtimeclass"
(cd "$work/root" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/SHA256SUMS"
# The same inputs give the same bytes.
tar --create --gzip --file "dist/$name.tar.gz" --directory dist --sort=name --owner=0 --group=0 --numeric-owner \
    --mtime="@$(git log -1 --format=%ct 2>/dev/null || echo 0)" "$name"
rm -rf "$work"
echo "dist/$name.tar.gz: $(($(stat --format=%s "dist/$name.tar.gz") / 1024)) KiB"
