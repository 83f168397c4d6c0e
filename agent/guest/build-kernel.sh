#!/usr/bin/env bash
# Builds the guest kernel (an uncompressed vmlinux that boots by PVH) from Debian's linux-source and kernel.config.
#
# Usage: build-kernel.sh [OUT]     prints the path of the cached vmlinux; with OUT also copies it there.
#
# The result is cached by the hash of the fragment, this script, the patches, the source package and the compiler, so a
# second run only copies. Two runs at a time are safe: the second waits for the first. Progress goes to stderr.
# BULKHEAD_CACHE moves the cache; BULKHEAD_KERNEL_SOURCE names a linux-source tarball other than the newest installed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fragment=$here/kernel.config
cache=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}
out=${1:-}
minimum=6.12
# What a build prints, a line an object: only the progress figure depends on it.
expected_lines=2450

say() { printf 'kernel: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_source() {
    if [[ -n ${BULKHEAD_KERNEL_SOURCE:-} ]]; then
        [[ -r $BULKHEAD_KERNEL_SOURCE ]] || die "BULKHEAD_KERNEL_SOURCE=$BULKHEAD_KERNEL_SOURCE cannot be read"
        echo "$BULKHEAD_KERNEL_SOURCE"
        return
    fi
    local newest
    newest=$(printf '%s\n' /usr/src/linux-source-*.tar.xz | sort -V | tail -n 1)
    [[ -r $newest ]] || die "no /usr/src/linux-source-*.tar.xz: install Debian's linux-source-$minimum (make setup does)"
    local version=${newest##*linux-source-}
    version=${version%.tar.xz}
    [[ $(printf '%s\n' "$minimum" "$version" | sort -V | head -n 1) == "$minimum" ]] ||
        die "linux-source $version is too old: $minimum or newer is needed"
    echo "$newest"
}

# Identifies a tarball without reading its 150 MB: the package version where dpkg knows it.
source_identity() {
    dpkg-query --show --showformat='${Package} ${Version}' "$(basename "$1" .tar.xz)" 2>/dev/null ||
        stat --format='%n %s %Y' "$1"
}

# Fails with the names of the options that kernel.config asks for and Kconfig did not grant.
verify_config() {
    local config=$1 line missing=()
    while IFS= read -r line; do
        case $line in
            CONFIG_*=n) if grep -q "^${line%%=*}=" "$config"; then missing+=("$line"); fi ;;
            CONFIG_*) grep -qxF "$line" "$config" || missing+=("$line") ;;
        esac
    done <"$fragment"
    if ((${#missing[@]})); then
        die "these options of kernel.config did not land (a dependency is missing or the name is gone): ${missing[*]}"
    fi
    if grep -q '=m$' "$config"; then
        die "modules are never loaded, yet these would be built as such: $(grep '=m$' "$config" | tr '\n' ' ')"
    fi
}

# Turns make's line per object into a figure: in place on a terminal, else a line for each tenth.
show_progress() {
    local lines=0 percent shown=-1 step=10
    [[ -t 2 ]] && step=1
    while IFS= read -r _; do
        lines=$((lines + 1))
        percent=$((lines * 100 / expected_lines))
        ((percent > 99)) && percent=99
        if ((percent / step != shown)); then
            shown=$((percent / step))
            if [[ -t 2 ]]; then
                printf '\rkernel: compiling, %d%%' "$percent" >&2
            else
                say "compiling, $percent% after ${SECONDS}s"
            fi
        fi
    done
    if [[ -t 2 ]]; then printf '\r' >&2; fi
}

build() {
    local result=$1 work=$1.build jobs
    jobs=$(nproc)
    rm -rf "$work"
    mkdir -p "$work/src" "$work/obj"
    say "unpacking $(basename "$source")"
    # The largest headers in the tree belong to a graphics driver that is never configured.
    tar --extract --file "$source" --directory "$work/src" --strip-components=1 --exclude='*/drivers/gpu/drm/amd/include'

    # They only make a guest faster, so a kernel that they do not fit does without.
    for change in "$here"/patches/*.patch; do
        patch --directory "$work/src" --strip=1 --fuzz=0 --dry-run --silent <"$change" >/dev/null &&
            patch --directory "$work/src" --strip=1 --fuzz=0 --silent <"$change" ||
            say "this source is not the one that $(basename "$change") was made for: built without it"
    done

    # With the driver's receive buffers of one page, 64 KiB from the host are 17 packets.
    local header=$work/src/include/linux/virtio_vsock.h
    sed -i -E 's/^(#define VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE\s+).*1024 \* 4.*/\1SKB_WITH_OVERHEAD(1024 * 16)/' "$header"
    grep -q 'RX_BUF_SIZE.*1024 \* 16)' "$header" || die "this kernel's vsock receive buffers are declared in another way: $header"

    # gcc would inline `rep movsq` and `rep stosq`, which start slowly on real processors and go word by word on emulated ones:
    # short copies are unrolled instead, and long ones are left to the kernel's own functions.
    local calls=unrolled_loop:256:noalign,libcall:-1:noalign
    local -a make=(make -C "$work/src" "O=$work/obj" ARCH=x86_64
        "KCFLAGS=-mmemcpy-strategy=$calls -mmemset-strategy=$calls"
        KBUILD_BUILD_USER=bulkhead KBUILD_BUILD_HOST=bulkhead 'KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970')
    "${make[@]}" "KCONFIG_ALLCONFIG=$fragment" allnoconfig >"$work/log" 2>&1 || {
        tail -n 20 "$work/log" >&2
        die "allnoconfig failed, log: $work/log"
    }
    verify_config "$work/obj/.config"

    say "compiling with $jobs jobs; some minutes, once for this configuration"
    if ! "${make[@]}" -j"$jobs" vmlinux 2>&1 | tee -a "$work/log" | show_progress; then
        grep -E -B2 -A8 'error|Error' "$work/log" | tail -n 40 >&2
        die "the build failed, log: $work/log"
    fi
    objcopy --strip-all "$work/obj/vmlinux" "$work/vmlinux"
    # QEMU starts an uncompressed kernel through the Xen note PHYS32_ENTRY (type 0x12).
    readelf --notes "$work/vmlinux" 2>/dev/null | grep -q '0x00000012' ||
        die "vmlinux has no PVH entry note; QEMU could not start it"
    cp "$work/obj/.config" "$work/config"
    cp "$work/obj/include/config/kernel.release" "$work/release"
    mkdir -p "$work/result"
    mv "$work/vmlinux" "$work/config" "$work/release" "$work/result/"
    mv -T "$work/result" "$result"
    rm -rf "$work"
    say "$(cat "$result/release"): $(($(stat --format=%s "$result/vmlinux") / 1024)) KiB after ${SECONDS}s"
}

source=$(find_source)
key=$({
    cat "$fragment" "${BASH_SOURCE[0]}" "$here"/patches/*.patch
    source_identity "$source"
    gcc --version | head -n 1
} | sha256sum | cut -c1-16)
result=$cache/kernel-$key

mkdir -p "$cache"
if [[ ! -e $result/vmlinux ]]; then
    exec {lock}>"$result.lock"
    flock --nonblock "$lock" || { say "another run is building it, waiting"; flock "$lock"; }
    [[ -e $result/vmlinux ]] || build "$result"
fi
if [[ -n $out ]]; then
    mkdir -p "$(dirname "$out")"
    # Through a new name: a running pod keeps the file that it started with.
    cp "$result/vmlinux" "$out.new.$$"
    mv "$out.new.$$" "$out"
fi
echo "$result/vmlinux"
