//! What shim and agent agree on: the gRPC messages ([`agent`]), the framing of connections ([`wire`]), and what both do in the
//! same way: to carry a TCP connection ([`bridge`]), and to widen one between guest and host ([`vsock`]).
//!
//! Both sides depend on this crate and never on each other. Apart from the bridge it does no I/O.

pub mod bridge;
pub mod vsock;
pub mod wire;

/// Messages, client and server of the agent's API, generated from `proto/agent.proto`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    reason = "generated code; its documentation is the comments of the proto file"
)]
pub mod agent {
    tonic::include_proto!("bulkhead.agent.v1");
}

/// Version of the agent's API; raised when a change is not compatible. See `HelloRequest.api_version`.
pub const API_VERSION: u32 = 1;

/// Port of the host that the guest dials when its kernel command line names none.
pub const DEFAULT_PORT: u32 = 1024;

/// Kernel command line parameter that names the port of the host: `bulkhead.port=1024`.
pub const PORT_PARAMETER: &str = "bulkhead.port";

/// Mount tag of the pod's virtiofs share.
pub const SHARE_TAG: &str = "share";

/// Scheme of a bind's source in the guest spec that lies below the share: `share:<path below the share>`.
pub const SHARE_SCHEME: &str = "share:";

/// Scheme of a bind's source in the guest spec that is a memory-backed volume of the pod's, or a path in one:
/// `memory:<volume>[/<path>]`.
pub const MEMORY_SCHEME: &str = "memory:";

/// Source of a bind in the guest spec that means the pod-wide /dev/shm.
pub const SHM_SOURCE: &str = "shm:";
