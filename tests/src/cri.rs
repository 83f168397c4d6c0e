//! The one call of CRI that `crictl` has no command for, made as kubelet makes it: over gRPC to containerd's socket.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Uri};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::pod::Pod;

/// Long enough for a containerd that is busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// CRI's `LinuxContainerResources`, as far as a pod's limits go.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resources {
    /// Microseconds.
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    /// Microseconds of each period; zero for no limit.
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    /// Bytes; zero for no limit.
    #[prost(int64, tag = "4")]
    pub memory_limit_in_bytes: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePodSandboxResourcesRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "3")]
    resources: Option<Resources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePodSandboxResourcesResponse {}

/// Asks for new limits of `pod`; the error has containerd's own text.
pub fn update_pod_resources(pod: &Pod, resources: Resources) -> Result<()> {
    let request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.id.clone(), resources: Some(resources) };
    let socket = pod.node.layout.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("make a runtime")?;
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, call(socket, request)).await.context("containerd does not answer")?
    })
}

async fn call(socket: PathBuf, request: UpdatePodSandboxResourcesRequest) -> Result<()> {
    let connector = service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://containerd");
    let channel = endpoint.connect_with_connector(connector).await.context("connect to containerd")?;
    let mut client = Grpc::new(channel);
    client.ready().await.context("connect to containerd")?;
    let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/UpdatePodSandboxResources");
    let codec = ProstCodec::<_, UpdatePodSandboxResourcesResponse>::default();
    match client.unary(tonic::Request::new(request), path, codec).await {
        Ok(_) => Ok(()),
        Err(status) => Err(anyhow!("{}", status.message())),
    }
}
