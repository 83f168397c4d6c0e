//! What the node CLI asks a shim: one ttrpc service of ours beside containerd's, on the same socket.
//!
//! A CLI meets shims of other versions: the service's name carries one, and messages only gain fields. A shim that does not know
//! the service answers that it is not implemented, as gRPC would.

use serde::Serialize;

/// Name of the service.
pub const SERVICE: &str = "bulkhead.control.v1.Control";
/// Its one method: an empty request, answered by a [`Report`] from what the shim knows, without a word to the guest.
pub const REPORT: &str = "Report";

/// A sandbox as its shim knows it.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Report {
    /// Version of the shim.
    #[prost(string, tag = "1")]
    pub version: String,
    /// As [`crate::sandbox::state::State::name`] has it.
    #[prost(string, tag = "2")]
    pub state: String,
    /// Its containers; the pod itself is the one whose role is `sandbox`.
    #[prost(message, repeated, tag = "3")]
    pub containers: Vec<Container>,
}

/// One container.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Container {
    /// containerd's id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `sandbox`, `container`, or `single` for one without a pod.
    #[prost(string, tag = "2")]
    pub role: String,
    /// Where its first process stands.
    #[prost(message, optional, tag = "3")]
    pub init: Option<Process>,
    /// Its execs.
    #[prost(message, repeated, tag = "4")]
    pub execs: Vec<Process>,
    /// It is frozen.
    #[prost(bool, tag = "5")]
    pub paused: bool,
    /// Its bundle on the host; empty for a sandbox of the sandbox API.
    #[prost(string, tag = "6")]
    pub bundle: String,
}

/// One process that containerd can name.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct Process {
    /// Id of the exec; empty for a container's first process.
    #[prost(string, tag = "1")]
    pub exec_id: String,
    /// `created`, `starting`, `running` or `stopped`.
    #[prost(string, tag = "2")]
    pub phase: String,
    /// The pid that stands for it on the host.
    #[prost(uint32, tag = "3")]
    pub host_pid: u32,
    /// Exit code, or 128 + signal; None until it has ended.
    #[prost(uint32, optional, tag = "4")]
    pub exit_status: Option<u32>,
}
