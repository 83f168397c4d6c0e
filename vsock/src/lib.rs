//! The virtio vsock device of one VM, as a vhost-user back end: for hosts whose kernel has no `/dev/vhost-vsock`.
//!
//! Each connection that the guest makes to port `P` of the host becomes a connection to the Unix socket `<uds>_P`, both ways
//! with their half-closes, resets and flow control. The host never dials: a connection request of its own does not exist.
//! One process serves one VM; it holds nothing but sockets and the guest's memory, and trusts neither the guest nor a
//! length that the guest gives.
//!
//! - [`packet`]: the header of every packet;
//! - [`connection`]: one connection, its credit and what waits to be passed on;
//! - [`device`]: the queues, and who is served when.
//!
//! <https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html> section 5.10,
//! <https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>

pub mod connection;
pub mod device;
pub mod packet;
