//! A call over gRPC to containerd's socket, for what neither `crictl` nor `ctr` has a command for.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Endpoint, Uri};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::containerd::Node;

/// Long enough for a containerd that is busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer without fields, or of whose fields none is wanted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Nothing {}

/// Calls the method at `path` in containerd's `namespace` and waits for the answer; the error has containerd's own text.
pub fn unary<Q, A>(node: &Node, namespace: &'static str, path: &'static str, request: Q) -> Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let socket = node.layout.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("make a runtime")?;
    runtime.block_on(async {
        let call = call(socket, namespace, path, request);
        tokio::time::timeout(PATIENCE, call).await.context("containerd does not answer")?
    })
}

async fn call<Q, A>(socket: PathBuf, namespace: &'static str, path: &'static str, request: Q) -> Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let connector = service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://containerd");
    let channel = endpoint.connect_with_connector(connector).await.context("connect to containerd")?;
    let mut client = Grpc::new(channel);
    client.ready().await.context("connect to containerd")?;
    let mut request = tonic::Request::new(request);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(namespace));
    match client.unary(request, PathAndQuery::from_static(path), ProstCodec::<Q, A>::default()).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(anyhow!("{}", status.message())),
    }
}
