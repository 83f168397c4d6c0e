#!/usr/bin/env bash
# Installs what Bulkhead is built and tested with on Debian 12 or newer and Ubuntu, as root; `make setup` calls it.
#
# Distribution packages through apt (no daemon is started), Rust as rust-toolchain.toml pins it, a new enough Go,
# virtiofsd through cargo, crictl, critest, nerdctl and two containerds from the Go modules under tests/tools.
# What is built lands under $BULKHEAD_CACHE/tools/NAME-VERSION, with a link NAME beside it
# and the programs themselves linked into tools/bin; a second run takes seconds.
# `setup.sh kubernetes` adds a Kubernetes of one node and its end-to-end suite, which only `make cluster-up`, `make test-k8s`
# and `make conformance` want.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}
tools=$cache/tools

virtiofsd_version=1.14.0
# Brought along where no Go, or one too old to fetch its own toolchain, is installed.
go_version=1.26.8
kernel_minimum=6.12

packages=(
    bc bison build-essential busybox-static ca-certificates containerd containernetworking-plugins cpio curl
    e2fsprogs flex iproute2 iptables kmod libcap-ng-dev libelf-dev libseccomp-dev libssl-dev nftables pkg-config
    procps qemu-system-x86 runc util-linux xz-utils
)
# What the images of Kubernetes' suite have in them, and what makes a cluster's certificates.
kubernetes_packages=(bind9-dnsutils hostname netcat-openbsd openssl wget)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
steps=10
if [[ ${1-} == kubernetes ]]; then
    steps=11
    packages+=("${kubernetes_packages[@]}")
fi
step=0
next() { step=$((step + 1)); say "[$step/$steps, ${SECONDS}s] $*"; }

# Runs a long command with its output in a file, a sign of life every 20 seconds, and the file's end if it fails.
quietly() {
    local log=$1 pid beat=0
    shift
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        beat=$((beat + 1))
        ((beat % 20)) || say "    ${beat}s: $(tail -n 1 "$log" | tr -d '\r' | cut -c1-100)"
    done
    if ! wait "$pid"; then
        tail -n 40 "$log" >&2
        die "failed: $* (log: $log)"
    fi
}

installed() { dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

# A policy-rc.d that refuses keeps apt from starting the daemons it installs; one that exists is the admin's and stays.
apt_install() {
    local guard=/usr/sbin/policy-rc.d
    if [[ ! -e $guard ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$guard"
        chmod 755 "$guard"
        # shellcheck disable=SC2064 # the name is wanted as it is now
        trap "rm -f $guard" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    quietly "$cache/apt-update.log" apt-get update
    quietly "$cache/apt-install.log" apt-get install --yes --no-install-recommends "$@"
}

# The kernel source: the version that kernel.config is written for where it exists, else the newest above it.
kernel_package() {
    local candidates newest
    candidates=$(apt-cache search --names-only '^linux-source-[0-9.]+$' | cut -d' ' -f1 | sort -V)
    if grep -qx "linux-source-$kernel_minimum" <<<"$candidates"; then
        echo "linux-source-$kernel_minimum"
        return
    fi
    newest=$(tail -n 1 <<<"$candidates")
    [[ -n $newest && $(printf 'linux-source-%s\n%s\n' "$kernel_minimum" "$newest" | sort -V | tail -n 1) == "$newest" ]] ||
        die "no linux-source package of $kernel_minimum or newer in apt's lists (newest: ${newest:-none}): add the suite that has one, such as Debian backports"
    echo "$newest"
}

setup_packages() {
    next "distribution packages"
    local missing=() package
    for package in "${packages[@]}"; do
        installed "$package" || missing+=("$package")
    done
    ((${#missing[@]} == 0)) || { say "    installing ${missing[*]}"; apt_install "${missing[@]}"; }

    next "kernel source"
    if ! compgen -G "/usr/src/linux-source-*.tar.xz" >/dev/null; then
        [[ -n $(apt-cache search --names-only '^linux-source-[0-9.]+$') ]] || quietly "$cache/apt-update.log" apt-get update
        package=$(kernel_package)
        say "    installing $package"
        apt_install "$package"
    fi
}

setup_rust() {
    next "Rust toolchain"
    local pinned
    pinned=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' "$repository/rust-toolchain.toml")
    if ! command -v cargo >/dev/null; then
        if [[ -n $(apt-cache search --names-only '^rustup$') ]]; then
            apt_install rustup
        else
            die "there is no cargo and this suite has no rustup package: install Rust $pinned through https://rustup.rs and run this again"
        fi
    fi
    cd "$repository"
    if ! cargo --version >/dev/null 2>&1; then
        command -v rustup >/dev/null || die "cargo is there but does not run, and rustup is not there to mend it: install Rust $pinned"
        quietly "$cache/rustup.log" rustup toolchain install "$pinned" --profile minimal --component rustfmt --component clippy
    fi
    local have
    have=$(rustc --version | cut -d' ' -f2)
    [[ $(printf '%s\n%s\n' "$pinned" "$have" | sort -V | head -n 1) == "$pinned" ]] ||
        die "rustc $have is too old and not managed by rustup: $pinned or newer is needed"
}

# Puts a Go that can follow the go.mod files first in PATH. Go 1.21 and newer fetch the toolchain a go.mod asks for by
# themselves; an older one (or none: then Debian's) fetches that same toolchain as the module which it is.
setup_go() {
    next "Go"
    export GOTOOLCHAIN=auto CGO_ENABLED=0
    export GOFLAGS=-buildvcs=false
    local have own=$cache/go-$go_version
    if [[ -x $own/bin/go ]]; then
        PATH=$own/bin:$PATH
        return
    fi
    command -v go >/dev/null || apt_install golang-go
    have=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
    if [[ $(printf 'go1.21\n%s\n' "$have" | sort -V | head -n 1) == go1.21 ]]; then
        return
    fi
    say "    $have cannot fetch a newer Go by itself; bringing $go_version along"
    # 1.19 knows neither the variable nor the module's meaning, and downloads it like any other.
    local module=golang.org/toolchain@v0.0.1-go$go_version.linux-amd64
    quietly "$cache/go.log" env -C / GOFLAGS=-mod=mod go mod download "$module"
    rm -rf "$own.new"
    cp -a "$(cd / && go env GOMODCACHE)/$module" "$own.new"
    # Modules lose the execute bits.
    chmod -R u+w "$own.new"
    find "$own.new/bin" "$own.new/pkg/tool" -type f -exec chmod +x {} +
    mv -T "$own.new" "$own"
    PATH=$own/bin:$PATH
}

# current DIRECTORY LINK: names DIRECTORY without its version too, and links its programs into bin/, except those of
# which several versions are used side by side. Done on every run, as a checkout may go back to an older version.
current() {
    ln -sfn "$1" "$tools/$2"
    [[ $1 == containerd-* || ! -d $tools/$1/bin ]] || ln -sf "$tools/$2/bin/"* "$tools/bin/"
}

# Makes the finished DIRECTORY.new current.
publish() {
    mv -T "$tools/$1.new" "$tools/$1"
    current "$1" "$2"
}

# Whether DIRECTORY is there already, and then current.
present() {
    [[ -d $tools/$1 ]] || return 1
    current "$1" "$2"
}

# setup_crate NAME VERSION [cargo install's flags]. Links C libraries statically, so that `make dist` needs none.
setup_crate() {
    local name=$1 version=$2 libraries
    shift 2
    next "$name $version"
    if present "$name-$version" "$name"; then return; fi
    libraries=$(dirname "$(gcc -print-file-name=libseccomp.a)")
    [[ $libraries != . ]] || die "libseccomp.a was not found by gcc: is libseccomp-dev installed?"
    quietly "$cache/$name.log" env -u CARGO_TARGET_DIR -u RUSTFLAGS -C "$repository" \
        LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH="$libraries" \
        LIBCAPNG_LINK_TYPE=static LIBCAPNG_LIB_PATH="$libraries" \
        cargo install --locked --force --root "$tools/$name-$version.new" "$name" --version "$version" "$@"
    publish "$name-$version" "$name"
}

# setup_go_module LINK NAME MODULE PACKAGE...: builds packages of the module at the version that tests/tools/LINK pins.
setup_go_module() {
    local link=$1 name=$2 module=$3 directory=$repository/tests/tools/$1 version package
    shift 3
    version=$(sed -n "s|^\s*\(require \)\?$module v\([^ ]*\).*|\2|p" "$directory/go.mod")
    [[ -n $version ]] || die "$directory/go.mod does not name $module"
    next "$name $version"
    if present "$name-$version" "$link"; then return; fi
    mkdir -p "$tools/$name-$version.new/bin"
    for package in "$@"; do
        local -a build=(go build -trimpath -ldflags '-s -w')
        # critest is a test binary that one installs.
        [[ $package != */critest ]] || build=(go test -c -ldflags '-s -w')
        quietly "$cache/$name.log" env -C "$directory" "${build[@]}" \
            -o "$tools/$name-$version.new/bin/${package##*/}" "$module/$package"
    done
    publish "$name-$version" "$link"
}

# The conformance suite wants a web server in an image. Its packages are unpacked, not installed: an installed nginx would
# start with the machine. Only the libraries that they need are installed.
setup_nginx() {
    local version directory=$tools/nginx.new package
    [[ -n $(apt-cache show nginx 2>/dev/null) ]] || quietly "$cache/apt-update.log" apt-get update
    version=$(apt-cache show --no-all-versions nginx | sed -n 's/^Version: //p')
    next "nginx $version"
    if present "nginx-$version" nginx; then return; fi
    rm -rf "$directory"
    mkdir -p "$directory/packages"
    # Releases differ in which of the packages holds the program.
    for package in nginx nginx-core nginx-common; do
        (cd "$directory/packages" && quietly "$cache/nginx.log" apt-get download "$package")
        dpkg-deb --extract "$directory/packages/$package"_*.deb "$directory"
        [[ ! -x $directory/usr/sbin/nginx || $package == nginx-common ]] || local holder=$package
    done
    [[ -n ${holder-} ]] || die "neither nginx nor nginx-core has usr/sbin/nginx"
    local -a libraries
    mapfile -t libraries < <(dpkg-deb --field "$directory/packages/${holder}_"*.deb Depends | tr ',' '\n' |
        sed -n 's/^ *\(lib\(c6\|crypt\|pcre\|ssl\)[^ (|]*\|zlib1g\).*/\1/p')
    for package in "${libraries[@]}"; do
        installed "$package" || apt_install "$package"
    done
    rm -r "$directory/packages"
    mv -T "$directory" "$tools/nginx-$version"
    current "nginx-$version" nginx
}

# The node of `make cluster-up`. The servers tell the version that is linked into them; without it they call themselves v0.0.0.
setup_kubernetes() {
    local directory=$repository/tests/tools/kubernetes version name package flags
    version=$(sed -n 's|^\s*\(require \)\?k8s.io/kubernetes v||p' "$directory/go.mod")
    [[ -n $version ]] || die "$directory/go.mod does not name k8s.io/kubernetes"
    # The other modules of the file, etcd and CoreDNS among them, have versions of their own.
    name=kubernetes-$version-$(sha256sum "$directory/go.mod" | cut -c1-12)
    next "Kubernetes $version, its suite, etcd and CoreDNS"
    if present "$name" kubernetes; then return; fi
    flags="-s -w -X k8s.io/component-base/version.gitVersion=v$version"
    flags+=" -X k8s.io/component-base/version.gitMajor=${version%%.*}"
    flags+=" -X k8s.io/component-base/version.gitMinor=$(cut -d. -f2 <<<"$version")"
    flags+=" -X k8s.io/component-base/version.gitCommit=unknown -X k8s.io/component-base/version.buildDate=1970-01-01T00:00:00Z"
    rm -rf "$tools/$name.new"
    mkdir -p "$tools/$name.new/bin"
    for package in k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kube-proxy,kubelet,kubectl} \
        k8s.io/kubernetes/test/images/{agnhost,nonewprivs,regression-issue-74839} k8s.io/sample-apiserver \
        github.com/onsi/ginkgo/v2/ginkgo github.com/coredns/coredns go.etcd.io/etcd/server/v3; do
        local program=${package##*/}
        [[ $program != v3 ]] || program=etcd
        say "    $program"
        quietly "$cache/kubernetes.log" env -C "$directory" go build -trimpath -ldflags "$flags" \
            -o "$tools/$name.new/bin/$program" "$package"
    done
    say "    e2e.test"
    quietly "$cache/kubernetes.log" env -C "$directory" go test -c -trimpath -ldflags "$flags" \
        -o "$tools/$name.new/bin/e2e.test" k8s.io/kubernetes/test/e2e
    publish "$name" kubernetes
}

[[ ${1-} =~ ^(kubernetes)?$ ]] || die "there is nothing called $1 to set up: kubernetes, or nothing, is accepted"
[[ $(uname -s)-$(uname -m) == Linux-x86_64 ]] || die "this is $(uname -s) on $(uname -m): only Linux on x86_64 is supported"
command -v apt-get >/dev/null || die "apt-get was not found: Debian 12 or newer, or Ubuntu, is needed"
((EUID == 0)) || die "run as root: packages are installed, and everything that follows mounts and makes namespaces"
mkdir -p "$tools/bin"
exec {lock}>"$cache/setup.lock"
flock --nonblock "$lock" || { say "another run is at work, waiting"; flock "$lock"; }

setup_packages
setup_rust
setup_nginx
setup_crate virtiofsd "$virtiofsd_version"
setup_go
setup_go_module cri-tools cri-tools sigs.k8s.io/cri-tools cmd/crictl cmd/critest
setup_go_module nerdctl nerdctl github.com/containerd/nerdctl/v2 cmd/nerdctl
setup_go_module containerd-1.7 containerd github.com/containerd/containerd \
    cmd/containerd cmd/ctr cmd/containerd-shim-runc-v2
setup_go_module containerd-2.4 containerd github.com/containerd/containerd/v2 \
    cmd/containerd cmd/ctr cmd/containerd-shim-runc-v2
[[ ${1-} != kubernetes ]] || setup_kubernetes
say "done after ${SECONDS}s; tools are in $tools"
