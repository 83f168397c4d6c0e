//! containerd's Sandbox service: the second door to the same handle. Decode, call, encode.
//!
//! Served beside the Task service, for handlers with `sandboxer = "shim"`. Status, platform and metrics are answered from the
//! host: containerd asks for them with every container it creates, each second, and when kubelet relists.
//! <https://github.com/containerd/containerd/blob/main/api/runtime/sandbox/v1/sandbox.proto>

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Result as TtrpcResult};
use serde_json::json;

use super::{convert, cri, response, serve};
use crate::RUNTIME_NAME;
use crate::container::{ContainerId, ProcessId};
use crate::error::{Error, Kind, Result, WithKind};
use crate::metrics;
use crate::sandbox::boot::SandboxIdentity;
use crate::sandbox::{SandboxHandle, SandboxStatus};

const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// The words of CRI's `PodSandboxState`, which containerd's CRI compares as text.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxService {
    sandbox: SandboxHandle,
    sandbox_id: String,
    metrics: metrics::Format,
}

/// The service under its name, with the method that the generated code does not know yet.
pub fn services(sandbox: SandboxHandle, identity: &SandboxIdentity) -> HashMap<String, Service> {
    let sandbox_id = identity.sandbox_id.clone();
    let service = Arc::new(SandboxService { sandbox, sandbox_id, metrics: metrics::Format::of_host() });
    let mut services = create_sandbox(service.clone());
    if let Some(methods) = services.get_mut(SERVICE).map(|service| &mut service.methods) {
        methods.insert("UpdateSandbox".to_owned(), Box::new(UpdateSandbox(service)));
    }
    services
}

impl SandboxService {
    /// The id as our type, if it is that of the one sandbox there is.
    fn known(&self, id: &str) -> Result<ContainerId> {
        if id == self.sandbox_id {
            return Ok(ContainerId(id.to_owned()));
        }
        Err(Error::not_found(format!("sandbox {id} does not exist: this shim serves {}", self.sandbox_id)))
    }

    async fn create(&self, request: api::CreateSandboxRequest) -> Result<()> {
        let id = self.known(&request.sandbox_id)?;
        if !request.rootfs.is_empty() {
            return Err(Error::invalid(format!(
                "sandbox {id} has {} rootfs mounts, accepted are none: nothing of a pod runs but its containers",
                request.rootfs.len()
            )));
        }
        let host_name = nix::unistd::gethostname().or_kind(Kind::Internal, "read the node's name")?;
        let options = request.options.as_ref().map(|any| (any.type_url.as_str(), any.value.as_slice()));
        let mut spec = cri::sandbox_spec(&id.0, options, &request.netns_path, &host_name.to_string_lossy())?;
        // Those of the request are for clients without CRI; CRI leaves them empty.
        spec.annotations.extend(request.annotations);
        self.sandbox.create_sandbox(spec).await.map(drop)
    }

    async fn start(&self, id: &str) -> Result<api::StartSandboxResponse> {
        let id = self.known(id)?;
        let status = self.sandbox.status(id.clone()).await?;
        let pid = self.sandbox.start(ProcessId::init(&id)).await?;
        let created_at = MessageField::some(convert::timestamp(status.created_at));
        Ok(api::StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn status(&self, id: &str, verbose: bool) -> Result<api::SandboxStatusResponse> {
        let status = self.sandbox.status(self.known(id)?).await?;
        let info = if verbose { info(&status) } else { HashMap::new() };
        Ok(api::SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            pid: status.pid,
            state: if status.ready { READY } else { NOT_READY }.to_owned(),
            created_at: MessageField::some(convert::timestamp(status.created_at)),
            exited_at: status.exit.map(|exit| convert::timestamp(exit.at)).into(),
            info,
            ..Default::default()
        })
    }

    async fn ping(&self, id: &str) -> Result<()> {
        let id = self.known(id)?;
        if self.sandbox.status(id.clone()).await?.ready {
            return Ok(());
        }
        Err(Error::failed_precondition(format!("sandbox {id} is not running")))
    }

    async fn sample(&self, id: &str) -> Result<api::SandboxMetricsResponse> {
        let sample = self.sandbox.stats(self.known(id)?).await?;
        let mut response = api::SandboxMetricsResponse::default();
        let metric = response.mut_metrics();
        metric.id = id.into();
        metric.timestamp = MessageField::some(convert::timestamp(SystemTime::now()));
        metric.data = MessageField::some(metrics::encode(&sample, self.metrics)?);
        Ok(response)
    }

    async fn update(&self, request: cri::UpdateSandboxRequest) -> Result<()> {
        let id = self.known(&request.sandbox_id)?;
        match request.resources()? {
            Some(resources) => self.sandbox.update_sandbox(id, resources).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> TtrpcResult<api::CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        serve("CreateSandbox", &id, "", async {
            self.create(request).await.map(|()| api::CreateSandboxResponse::default())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> TtrpcResult<api::StartSandboxResponse> {
        serve("StartSandbox", &request.sandbox_id, "", self.start(&request.sandbox_id)).await
    }

    async fn platform(&self, _: &TtrpcContext, request: api::PlatformRequest) -> TtrpcResult<api::PlatformResponse> {
        serve("Platform", &request.sandbox_id, "", async {
            let mut response = api::PlatformResponse::default();
            let platform = response.mut_platform();
            platform.os = "linux".into();
            platform.architecture = architecture(std::env::consts::ARCH).into();
            Ok(response)
        })
        .await
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> TtrpcResult<api::StopSandboxResponse> {
        // `timeout_secs` is left alone: the guest is given little time, and always the same.
        serve("StopSandbox", &request.sandbox_id, "", async {
            self.sandbox
                .stop_sandbox(self.known(&request.sandbox_id)?)
                .await
                .map(|()| api::StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> TtrpcResult<api::WaitSandboxResponse> {
        serve("WaitSandbox", &request.sandbox_id, "", async {
            let exit = self.sandbox.wait(ProcessId::init(&self.known(&request.sandbox_id)?)).await?;
            let exited_at = MessageField::some(convert::timestamp(exit.at));
            Ok(api::WaitSandboxResponse { exit_status: exit.status, exited_at, ..Default::default() })
        })
        .await
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> TtrpcResult<api::SandboxStatusResponse> {
        serve("SandboxStatus", &request.sandbox_id, "", self.status(&request.sandbox_id, request.verbose)).await
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: api::PingRequest) -> TtrpcResult<api::PingResponse> {
        serve("PingSandbox", &request.sandbox_id, "", async {
            self.ping(&request.sandbox_id).await.map(|()| api::PingResponse::default())
        })
        .await
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> TtrpcResult<api::ShutdownSandboxResponse> {
        serve("ShutdownSandbox", &request.sandbox_id, "", async {
            self.known(&request.sandbox_id)?;
            self.sandbox.shutdown_sandbox().await.map(|()| api::ShutdownSandboxResponse::default())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> TtrpcResult<api::SandboxMetricsResponse> {
        serve("SandboxMetrics", &request.sandbox_id, "", self.sample(&request.sandbox_id)).await
    }
}

/// `UpdateSandbox`, a method since version 1.12 of containerd's API.
struct UpdateSandbox(Arc<SandboxService>);

#[async_trait]
impl MethodHandler for UpdateSandbox {
    async fn handler(&self, _: TtrpcContext, request: ttrpc::Request) -> TtrpcResult<ttrpc::Response> {
        let updated = async {
            let request = cri::UpdateSandboxRequest::parse(&request.payload)?;
            self.0.update(request).await
        };
        // The answer has no fields.
        let updated = serve("UpdateSandbox", &self.0.sandbox_id, "", updated).await.map(|()| Vec::new());
        Ok(response(updated))
    }
}

/// What a verbose status adds, under the key and in the fields that containerd's CRI tells of a pod with a pause container:
/// it reads them and writes them anew, and would drop any others. `crictl inspectp` shows them.
/// <https://github.com/containerd/containerd/blob/main/internal/cri/server/podsandbox/types/sandbox_info.go>
fn info(status: &SandboxStatus) -> HashMap<String, String> {
    let told = json!({
        "pid": status.pid,
        "processStatus": if status.ready { "running" } else { "stopped" },
        "runtimeType": RUNTIME_NAME,
        "runtimeSpec": &*status.oci_spec,
    });
    HashMap::from([("info".to_owned(), told.to_string())])
}

/// The architecture as Go names it: guest and node have the same.
fn architecture(ours: &str) -> &str {
    match ours {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
