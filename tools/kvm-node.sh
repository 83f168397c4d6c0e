#!/usr/bin/env bash
# Runs a command inside a node that has /dev/kvm, /dev/vhost-vsock, /dev/vhost-net and pure cgroup v2, on a machine
# that has none of them.
#
# Usage: kvm-node.sh COMMAND [ARGUMENT...]
#
# The node is a QEMU guest under TCG, whose `-cpu max` emulates AMD SVM with nested paging. Its kernel is Debian's cloud
# image; its root is this machine's own `/`, shared read-only by virtiofs under a tmpfs, so every program and file is
# there under its own path and nothing the command writes survives; /run, /tmp and /var/lib/containerd start empty. The
# command runs as root in the current directory, with PATH, HOME and the BULKHEAD_* and CARGO_* variables of the
# caller; its output and exit status are this script's, or 125 when the node itself came to an end before the command did.
# BULKHEAD_NODE_MEMORY (MiB), BULKHEAD_NODE_CPUS and BULKHEAD_NODE_TIMEOUT (seconds) change the size and the deadline.
#
# CPU 0 of the node runs no program, and comes on top of BULKHEAD_NODE_CPUS. In QEMU's emulation, whichever CPU restores its
# floating-point state (FXRSTOR, XRSTOR: each switch of tasks) clears a bit among the first CPU's flags, of all CPUs', by a read
# and a write that nothing makes one (`cpu_clear_ignne` in target/i386/tcg/sysemu/fpu_helper.c, QEMU 7.2 and later). What CPU 0
# changes meanwhile is lost, and among these flags are "nested paging is on" and "interrupts are held back": on CPU 0 a virtual
# machine now and then triple-faults or hangs at a VMRUN, and the node's kernel takes an interrupt between VMEXIT and VMLOAD.
set -euo pipefail

(($# > 0)) || { echo "usage: kvm-node.sh COMMAND [ARGUMENT...]" >&2; exit 2; }
cache=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}
memory=${BULKHEAD_NODE_MEMORY:-6144}
cpus=${BULKHEAD_NODE_CPUS:-$(nproc)}
deadline=${BULKHEAD_NODE_TIMEOUT:-2700}

say() { printf 'kvm-node: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Downloads (without installing) the newest cloud kernel of the suite; prints the directory it was unpacked to.
fetch_kernel() {
    local package directory
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [[ -n $package ]] || die "apt knows no linux-image-cloud-amd64: run apt-get update, on Debian"
    directory=$cache/kvm-node/$package
    if [[ ! -d $directory ]]; then
        say "fetching $package"
        rm -rf "$directory.new"
        mkdir -p "$directory.new"
        (cd "$directory.new" && apt-get download --quiet=2 -o APT::Sandbox::User=root "$package") >&2 || die "apt-get could not download $package"
        dpkg-deb --extract "$directory.new/"*.deb "$directory.new"
        rm "$directory.new/"*.deb
        depmod --basedir "$directory.new" "${package#linux-image-}"
        mv -T "$directory.new" "$directory"
    fi
    echo "$directory"
}

kernel=$(fetch_kernel)
release=$(basename "$kernel")
release=${release#linux-image-}
virtiofsd=$cache/tools/bin/virtiofsd
for program in qemu-system-x86_64 cpio modprobe "$virtiofsd" /bin/busybox; do
    command -v "$program" >/dev/null || die "$program was not found: run make setup"
done

work=$(mktemp -d "${TMPDIR:-/tmp}/kvm-node.XXXXXX")
pids=()
# shellcheck disable=SC2317 # the trap calls it
cleanup() {
    local pid
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

# --- initramfs: busybox, what it takes to reach the root, and the two stages of init -------------------------------
initramfs=$work/initramfs
mkdir -p "$initramfs"/{bin,dev,proc,sys,modules,machine,scratch,node}
cp /bin/busybox "$initramfs/bin/busybox"
modules=()
for module in virtio_pci virtiofs overlay virtio_console; do
    while read -r _ path _; do
        [[ -n $path ]] || continue
        [[ " ${modules[*]} " == *" ${path##*/} "* ]] && continue
        modules+=("${path##*/}")
        cp "$path" "$initramfs/modules/"
    done < <(modprobe --dirname "$kernel" --set-version "$release" --show-depends "$module" | grep '^insmod')
done

cat >"$initramfs/init" <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in ${modules[*]}; do insmod "/modules/\$module" || echo "kvm-node: insmod \$module failed"; done
mount -t virtiofs -o ro machine /machine || poweroff -f
mount -t tmpfs -o mode=755,size=75% tmpfs /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/machine,upperdir=/scratch/upper,workdir=/scratch/work overlay /node || poweroff -f
cp /stage2 /node/kvm-node-init
umount /proc /sys /dev
exec switch_root /node /bin/bash /kvm-node-init
INIT
{
    cat <<'STAGE2'
#!/bin/bash
# PID 1 of the node once its root is the machine's own.
rm -f /kvm-node-init
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o mode=755 devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
ln -sf /proc/self/fd /dev/fd; ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr
for directory in /run /tmp /dev/shm /var/lib/containerd /var/tmp; do
    mkdir -p "$directory"
    mount -t tmpfs -o mode=1777 tmpfs "$directory"
done
chmod 755 /run
mkdir -p /run/lock /run/netns
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
# As under systemd: the processes live in a leaf, so that the root may hand every controller down.
mkdir /sys/fs/cgroup/init.scope
echo 1 >/sys/fs/cgroup/init.scope/cgroup.procs
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control; done
hostname kvm-node
# The ports of the virtio console by the names they were given; udev would do this.
for port in /sys/class/virtio-ports/*; do ln -s "/dev/${port##*/}" "/dev/vport-$(cat "$port/name")"; done
ip link set lo up
STAGE2
    cat <<STAGE2
mkdir -p /lib/modules/$release
mount --bind $kernel/lib/modules/$release /lib/modules/$release
export PATH=$(printf %q "$PATH") HOME=$(printf %q "$HOME") BULKHEAD_CACHE=$(printf %q "$cache")
$(export -p | grep -E '^declare -x (BULKHEAD|CARGO|RUST)_?[A-Z_]*=' || true)
for module in kvm-amd vhost_vsock vhost_net tun loop overlay bridge br_netfilter veth; do modprobe "\$module"; done
for device in /dev/kvm /dev/vhost-vsock /dev/vhost-net /dev/net/tun; do
    [[ -e \$device ]] || echo "kvm-node: there is no \$device" >/dev/console
done
cd $(printf %q "$PWD") || exit
$(printf '%q ' "$@") </dev/null >/dev/vport-output 2>&1
STAGE2
    cat <<'STAGE2'
echo $? >/dev/vport-status
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
STAGE2
} >"$initramfs/stage2"
chmod +x "$initramfs/init" "$initramfs/stage2"
(cd "$initramfs" && find . -print0 | cpio --null --create --quiet --format=newc) >"$work/initramfs.cpio"

# --- the node --------------------------------------------------------------------------------------------------------
"$virtiofsd" --socket-path="$work/fs.sock" --shared-dir=/ --readonly --sandbox=none --seccomp=none --cache=always --no-announce-submounts \
    --log-level=error >"$work/virtiofsd.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do
    [[ -S $work/fs.sock ]] && break
    kill -0 "${pids[0]}" 2>/dev/null || { cat "$work/virtiofsd.log" >&2; die "virtiofsd ended at once"; }
    sleep 0.05
done

# Through a pipe of its own: a stdio chardev counts as closed, and swallows what is written, once stdin is at its end.
touch "$work/status"
mkfifo "$work/output"
cat "$work/output" &
output=$!
qemu-system-x86_64 -machine q35,accel=tcg,memory-backend=ram -cpu max -smp "$((cpus + 1))" -m "${memory}M" \
    -object "memory-backend-memfd,id=ram,size=${memory}M,share=on" \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$kernel/boot/vmlinuz-$release" -initrd "$work/initramfs.cpio" \
    -append 'console=ttyS0 loglevel=4 panic=-1 mitigations=off isolcpus=0' \
    -chardev "file,id=console,path=$work/console.log" -serial chardev:console \
    -chardev "socket,id=fs,path=$work/fs.sock" -device vhost-user-fs-pci,chardev=fs,tag=machine \
    -device virtio-serial-pci \
    -chardev "file,id=output,path=$work/output" -device virtserialport,chardev=output,name=output \
    -chardev "file,id=status,path=$work/status" -device virtserialport,chardev=status,name=status \
    </dev/null 2>"$work/qemu.log" &
node=$!
pids=("$node" "${pids[@]}")
begin=$SECONDS
while kill -0 "$node" 2>/dev/null; do
    if ((SECONDS - begin > deadline)); then
        tail -n 30 "$work/console.log" >&2
        die "the command did not end within ${deadline}s (BULKHEAD_NODE_TIMEOUT)"
    fi
    sleep 0.5
done
wait "$output"
status=$(tr -d '\r\n' <"$work/status")
if [[ ! $status =~ ^[0-9]+$ ]]; then
    tail -n 200 "$work/console.log" "$work/qemu.log" >&2
    say "the node ended without an exit status of the command; above is the end of its console"
    exit 125
fi
grep '^kvm-node:' "$work/console.log" >&2 || true
exit "$status"
