# Every target is a line or two that calls cargo or a script in tools/; `make help` lists them.
PREFIX ?= /usr/local
DESTDIR ?=
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# Kernels and tools that are built once and shared by checkouts.
export BULKHEAD_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bulkhead

.DEFAULT_GOAL := help
.PHONY: help setup setup-kubernetes build guest install dist demo test test-all test-kvm test-k8s critest critest-sample
.PHONY: conformance conformance-sample cluster-up cluster-status cluster-down soak check fmt lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what building and testing takes (Debian 12+ or a new Ubuntu, as root)
	tools/setup.sh

setup-kubernetes: ## the same, and a Kubernetes of one node with its own end-to-end suite
	tools/setup.sh kubernetes

build: ## the shim, the node CLI, the vsock helper and the guest's agent, optimised
	cargo build --locked --release -p bulkhead-shim -p bulkhead-vsock
	tools/build-agent.sh

guest: build ## the guest's kernel (cached) and initramfs
	agent/guest/build-kernel.sh $(TARGET)/guest/vmlinux
	agent/guest/build-initramfs.sh $(TARGET)/x86_64-unknown-linux-gnu/agent/bulkhead-agent $(TARGET)/guest/initramfs

install: guest ## install under PREFIX (default /usr/local), below DESTDIR if given
	tools/install.sh "$(DESTDIR)$(PREFIX)"

dist: guest ## a tarball that installs on a machine without compilers
	tools/dist.sh

demo: ## set up, build and show one pod from start to end
	tools/demo.sh

test: guest ## every test but those of Kubernetes, emulated where there is no KVM
	BULKHEAD_TEST_ASSETS=$(TARGET)/guest cargo test --locked --workspace

test-all: ## every test, and its table with every containerd that is supported
	BULKHEAD_TEST_CONTAINERDS=1.6,1.7,2.4 $(MAKE) test

test-kvm: guest ## the core of the tests inside a node with KVM, vhost and pure cgroup v2
	tools/test-kvm.sh

cluster-up: setup-kubernetes guest ## a Kubernetes of one node, runc and Bulkhead side by side; prints how to use it
	cargo run --quiet --locked --release -p bulkhead-tests --bin cluster -- up

cluster-status: ## its node and its pods
	cargo run --quiet --locked --release -p bulkhead-tests --bin cluster -- status

cluster-down: ## ends it, and leaves nothing of it
	cargo run --quiet --locked --release -p bulkhead-tests --bin cluster -- down

test-k8s: setup-kubernetes guest ## what users do on Kubernetes, with runc and with Bulkhead, on such a node of its own
	cargo test --locked -p bulkhead-tests --test k8s

critest: guest ## the CRI's conformance suite, with runc and both doors of Bulkhead (FOCUS=regex picks specs)
	cargo run --locked --release -p bulkhead-tests --bin critest -- "$(FOCUS)"

critest-sample: guest ## two dozen specs of critest, with both doors of Bulkhead
	BULKHEAD_TEST_RUNTIMES=bulkhead,bulkhead-sandbox cargo run --locked --release -p bulkhead-tests --bin critest -- --sample

conformance: setup-kubernetes guest ## Kubernetes' conformance suite, with Bulkhead and runc (FOCUS=regex picks specs)
	cargo run --locked --release -p bulkhead-tests --bin conformance -- "$(FOCUS)"

conformance-sample: setup-kubernetes guest ## two dozen of them, with Bulkhead
	BULKHEAD_TEST_RUNTIMES=bulkhead cargo run --locked --release -p bulkhead-tests --bin conformance -- --sample

soak: guest ## five hundred containers in one pod and fifty pods in a row: nothing may grow
	BULKHEAD_SOAK_CYCLES=500 BULKHEAD_SOAK_PODS=50 BULKHEAD_TEST_ASSETS=$(TARGET)/guest \
	  cargo test --locked -p bulkhead-tests --test soak

check: lint ## what must pass before a change lands: format, lints, dependencies, unit tests
	tools/deny.sh
	cargo test --locked --workspace --exclude bulkhead-tests

fmt: ## format the sources
	cargo fmt --all

lint: ## formatting and clippy, warnings refused
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings

bench: guest ## times and memory against runc, as a table and as JSON
	cargo run --locked --release -p bulkhead-tests --bin bench

clean: ## remove what was built (the cache of kernels and tools stays)
	cargo clean
	rm -rf dist
