#!/usr/bin/env bash
# Installs the Bulkhead that lies beside this script.  Usage: install.sh [PREFIX]   (default /usr/local)
set -euo pipefail
prefix=${1:-/usr/local}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

(cd "$here/root" && sha256sum --check --quiet ../SHA256SUMS) || { echo "install: the files do not match SHA256SUMS: unpack the tarball again" >&2; exit 1; }
mkdir -p "$prefix"
# tar unlinks a file before it writes one of that name, so running pods keep the files that they started with.
(cd "$here/root" && find . ! -type d -print0 | tar --create --null --files-from=-) | tar --extract --no-same-owner --directory "$prefix"
echo "installed under $prefix"
if ! command -v qemu-system-x86_64 >/dev/null; then
    echo "qemu-system-x86_64 was not found: install QEMU 7.2 or newer (Debian: apt-get install qemu-system-x86)"
fi
cat <<TEXT
Next: merge the snippet for your containerd into its configuration and restart it:
  containerd 1.6, 1.7   $prefix/share/bulkhead/runtimeclass/containerd-config-v2.toml (into config.toml; not as a drop-in)
  containerd 2.0 - 2.2  $prefix/share/bulkhead/runtimeclass/containerd-config-v3.toml
  containerd 2.3 on     $prefix/share/bulkhead/runtimeclass/containerd-config-v4.toml
then see what this node has and lacks: $prefix/bin/bulkhead check
and on Kubernetes: kubectl label node NAME bulkhead.io/ready=true
                   kubectl apply -f $prefix/share/bulkhead/runtimeclass/runtimeclass.yaml
TEXT
