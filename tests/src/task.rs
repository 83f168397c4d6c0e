//! containerd's own update of a task, by OCI resources as they are: CRI fills in what it remembers, and has no limit on
//! processes.

use anyhow::Result;
use serde_json::Value;

use crate::container::Container;
use crate::containerd::CRI_NAMESPACE;
use crate::grpc::{self, Nothing};

#[derive(Clone, PartialEq, prost::Message)]
struct UpdateTaskRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, optional, tag = "2")]
    resources: Option<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// Changes what OCI `linux.resources` mention; the error has containerd's own text.
pub fn update(container: &Container<'_>, resources: &Value) -> Result<()> {
    let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
    let resources = Some(Any { type_url, value: resources.to_string().into_bytes() });
    let request = UpdateTaskRequest { container_id: container.id.clone(), resources };
    grpc::unary(&container.pod.node, CRI_NAMESPACE, "/containerd.services.tasks.v1.Tasks/Update", request)
        .map(|Nothing {}| ())
}
