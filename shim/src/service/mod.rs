//! The shim's server: containerd's services in front of one sandbox, and one of our own for the node CLI.
//!
//! containerd's generated types stop here: [`convert`] turns them into ours, and errors into status codes.

pub mod connection;
pub mod control;
pub mod convert;
pub mod cri;
pub mod sandbox;
pub mod streaming;
pub mod task;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::Service;
use containerd_shim_protos::ttrpc::{self, Result as TtrpcResult};
use futures::FutureExt as _;
use tokio::net::UnixListener;
use tracing::Instrument as _;

use crate::bootstrap::{ServeConfig, creator};
use crate::error::Result;
use crate::events::EventQueue;
use crate::sandbox::SandboxHandle;
use crate::sandbox::boot::{self, SandboxIdentity};
use crate::sandbox::driver::Driver;
use connection::Connections;
use streaming::StreamingService;
use task::TaskService;

/// What containerd gives the events of a shim that ends; it allows Shutdown three seconds.
const LAST_EVENTS: Duration = Duration::from_secs(2);

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Serves one sandbox until its shutdown is granted; then nothing of it is left but what containerd owns.
pub async fn run(config: ServeConfig) -> anyhow::Result<()> {
    let events = EventQueue::start(config.ttrpc_address.as_deref(), config.namespace.clone());
    let identity = Arc::new(SandboxIdentity::new(&config));
    let (sandbox, commands) = SandboxHandle::new();
    let socket_path = config.socket_path.clone();
    let connections = Connections::default();
    let listener = listener(config.listener.try_clone().context("take over the shim's socket")?)?;
    let (calls, streaming) = StreamingService::start(listener, connections.clone(), identity.streams.clone());
    let mut server = Server::new()
        .add_listener(calls)
        .register_service(task_services(sandbox.clone(), &identity))
        .register_service(control::services(sandbox.clone(), &identity.sandbox_id))
        .register_service(sandbox::services(sandbox, &identity));
    server.start().await.context("serve containerd")?;
    let booter = Box::new(move |request| boot::boot(Arc::clone(&identity), request).boxed());
    let creator_gone = creator::gone(config.creator).boxed();
    Driver::new(booter, events.events()).created_by(creator_gone).run(commands).await;
    if !connections.hung_up().await {
        tracing::debug!("connections are still open and will be closed");
    }
    server.shutdown().await.context("stop serving containerd")?;
    streaming.close().await;
    if !events.shutdown(LAST_EVENTS).await {
        tracing::warn!("containerd did not take the last events");
    }
    match std::fs::remove_file(&socket_path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %socket_path.display(), %error, "socket cannot be removed");
        }
        _ => {}
    }
    Ok(())
}

/// The Task service under both names that containerd calls it by.
fn task_services(sandbox: SandboxHandle, identity: &SandboxIdentity) -> HashMap<String, Service> {
    let service = Arc::new(TaskService::new(sandbox, identity));
    let mut services = create_task(service.clone());
    // 1.6 and 1.7, and whoever was answered with a bare address, call the same methods by the older name.
    if let Some(v2) = create_task(service).remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), v2);
    }
    services
}

/// Runs one request in its span and turns its error into a status, once.
async fn serve<T>(
    rpc: &'static str,
    id: &str,
    exec_id: &str,
    request: impl Future<Output = Result<T>>,
) -> TtrpcResult<T> {
    let span = tracing::info_span!("request", rpc, container_id = %id, exec_id = %exec_id);
    async {
        match request.await {
            Ok(answer) => {
                tracing::debug!("request served");
                Ok(answer)
            }
            Err(error) => {
                tracing::debug!(%error, kind = ?error.kind(), "request failed");
                Err(convert::status(&error))
            }
        }
    }
    .instrument(span)
    .await
}

/// The answer of a method that no generated code serves: a message's bytes, or the error's status.
fn response(answer: TtrpcResult<Vec<u8>>) -> ttrpc::Response {
    let mut response = ttrpc::Response::new();
    let status = match answer {
        Ok(payload) => {
            response.set_payload(payload);
            ttrpc::get_status(ttrpc::Code::OK, String::new())
        }
        Err(ttrpc::Error::RpcStatus(status)) => status,
        Err(other) => ttrpc::get_status(ttrpc::Code::UNKNOWN, other.to_string()),
    };
    response.set_status(status);
    response
}

fn listener(listener: std::os::unix::net::UnixListener) -> anyhow::Result<UnixListener> {
    listener.set_nonblocking(true).context("prepare the shim's socket")?;
    UnixListener::from_std(listener).context("prepare the shim's socket")
}
