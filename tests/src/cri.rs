//! CRI's calls for new limits, made as kubelet makes them: `crictl` has none for a pod, and not every field for a container.

use std::collections::HashMap;

use anyhow::Result;

use crate::container::Container;
use crate::containerd::CRI_NAMESPACE;
use crate::grpc::{self, Nothing};
use crate::pod::Pod;

/// CRI's `LinuxContainerResources`, as far as tests go.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resources {
    /// Microseconds.
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    /// Microseconds of each period; zero for no limit of a pod, and for no change of a container.
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    /// Relative to other containers.
    #[prost(int64, tag = "3")]
    pub cpu_shares: i64,
    /// Bytes; zero as for the quota.
    #[prost(int64, tag = "4")]
    pub memory_limit_in_bytes: i64,
    /// The node's CPUs that it may run on.
    #[prost(string, tag = "6")]
    pub cpuset_cpus: String,
    /// Files of its cgroup.
    #[prost(map = "string, string", tag = "9")]
    pub unified: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePodSandboxResourcesRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "3")]
    resources: Option<Resources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdateContainerResourcesRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, optional, tag = "2")]
    linux: Option<Resources>,
}

/// Asks for new limits of `pod`; the error has containerd's own text.
pub fn update_pod_resources(pod: &Pod, resources: Resources) -> Result<()> {
    let request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.id.clone(), resources: Some(resources) };
    let path = "/runtime.v1.RuntimeService/UpdatePodSandboxResources";
    grpc::unary(&pod.node, CRI_NAMESPACE, path, request).map(|Nothing {}| ())
}

/// Asks for new limits of `container`; the error has containerd's own text.
pub fn update_container_resources(container: &Container<'_>, resources: Resources) -> Result<()> {
    let request = UpdateContainerResourcesRequest { container_id: container.id.clone(), linux: Some(resources) };
    let path = "/runtime.v1.RuntimeService/UpdateContainerResources";
    grpc::unary(&container.pod.node, CRI_NAMESPACE, path, request).map(|Nothing {}| ())
}
