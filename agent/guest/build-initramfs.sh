#!/usr/bin/env bash
# Packs the guest's initramfs: the static agent as /init, the directories it mounts on, a console node. Nothing else.
#
# Usage: build-initramfs.sh AGENT OUT
#
# Writes an uncompressed newc cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst): under TCG
# copying a few megabytes is faster than decompressing them. Needs no root, and the same agent gives the same bytes.
set -euo pipefail

(($# == 2)) || { echo "usage: build-initramfs.sh AGENT OUT" >&2; exit 2; }
agent=$1
out=$2
[[ -f $agent ]] || { echo "initramfs: agent $agent does not exist" >&2; exit 1; }
if readelf --program-headers "$agent" 2>/dev/null | grep -q INTERP; then
    echo "initramfs: agent $agent is linked dynamically; the guest has no libraries, link it with +crt-static" >&2
    exit 1
fi

inode=0

# entry NAME MODE(octal, with the file type) LINKS DEVICE_MAJOR DEVICE_MINOR [FILE]
entry() {
    local name=$1 mode=$2 links=$3 major=$4 minor=$5 file=${6:-} size=0
    [[ -z $file ]] || size=$(stat --format=%s "$file")
    inode=$((inode + 1))
    # magic, inode, mode, uid, gid, links, mtime, size, device of the archive (2), device node (2), name length, checksum
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X' \
        "$inode" "$((mode))" 0 0 "$links" 0 "$size" 0 0 "$major" "$minor" "$((${#name} + 1))" 0
    printf '%s\0' "$name"
    pad $((110 + ${#name} + 1))
    if [[ -n $file ]]; then
        cat "$file"
        pad "$size"
    fi
}

# Header with name, and contents, each end on a multiple of four bytes.
pad() {
    local rest=$((($1 + 3) / 4 * 4 - $1))
    ((rest == 0)) || head -c "$rest" /dev/zero
}

mkdir -p "$(dirname "$out")"
{
    entry dev 040755 2 0 0
    entry dev/console 020600 1 5 1
    entry init 0100755 1 0 0 "$agent"
    entry proc 040755 2 0 0
    entry run 040755 2 0 0
    entry sys 040755 2 0 0
    inode=-1 # the end mark carries inode 0
    entry 'TRAILER!!!' 0 1 0 0
} >"$out.new.$$"
# Through a new name: a running pod keeps the file that it started with.
mv "$out.new.$$" "$out"
