#!/usr/bin/env bash
# Lays out a built Bulkhead under ROOT (PREFIX, with DESTDIR in front of it where one packages).
#
# Usage: install.sh ROOT
#
#   bin/                       containerd-shim-bulkhead-v2, which containerd must have in its PATH; bulkhead, the node CLI
#   libexec/bulkhead/          virtiofsd and bulkhead-vsock
#   share/bulkhead/VERSION/    vmlinux and initramfs; links without a version beside it name the current ones
#   share/bulkhead/runtimeclass/  manifests and containerd snippets
#
# Every file arrives under a new name and is renamed: what runs keeps the files that it started with.
set -euo pipefail

(($# == 1)) || { echo "usage: install.sh ROOT" >&2; exit 2; }
root=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
tools=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}/tools
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)

# place FILE DESTINATION MODE
place() {
    [[ -r $1 ]] || { echo "install: $1 is missing: run make setup and make guest first" >&2; exit 1; }
    install -D --mode="$3" "$1" "$root/$2.new.$$"
    mv "$root/$2.new.$$" "$root/$2"
}

for source in shim/src/bin/*.rs; do
    program=$(basename "$source" .rs)
    place "$target/release/$program" "bin/$program" 755
done
place "$tools/virtiofsd/bin/virtiofsd" libexec/bulkhead/virtiofsd 755
place "$target/release/bulkhead-vsock" libexec/bulkhead/bulkhead-vsock 755
for asset in vmlinux initramfs; do
    place "$target/guest/$asset" "share/bulkhead/$version/$asset" 644
    ln -s "$version/$asset" "$root/share/bulkhead/$asset.new.$$"
    mv -T "$root/share/bulkhead/$asset.new.$$" "$root/share/bulkhead/$asset"
done
for manifest in runtimeclass/*; do
    place "$manifest" "share/bulkhead/$manifest" 644
done
echo "installed Bulkhead $version under $root"
