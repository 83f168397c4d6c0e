//! containerd's Task service: decode, call the sandbox's handle, encode.
//!
//! One object serves `containerd.task.v2.Task` and `containerd.task.v3.Task`, which differ in their package's name only.
//! Contract: <https://github.com/containerd/containerd/blob/main/core/runtime/v2/README.md>

use std::path::PathBuf;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result as TtrpcResult;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;

use crate::container::{ContainerId, ProcessId};
use crate::error::{Error, Result};
use crate::sandbox::boot::SandboxIdentity;
use crate::sandbox::{CreateTask, SandboxHandle};
use crate::service::{convert, serve};
use crate::{metrics, paths};

/// The Task service of one sandbox.
#[derive(Debug, Clone)]
pub struct TaskService {
    sandbox: SandboxHandle,
    metrics: metrics::Format,
    /// Run state of the sandbox; every bundle of the pod links to it, so that `delete` finds it.
    directory: PathBuf,
    /// Where containerd reaches the shim; every bundle of the pod says so.
    address: String,
}

impl TaskService {
    /// Serves `sandbox`, which is `identity`.
    pub fn new(sandbox: SandboxHandle, identity: &SandboxIdentity) -> Self {
        Self {
            sandbox,
            metrics: metrics::Format::of_host(),
            directory: identity.directory.clone(),
            address: format!("unix://{}", identity.socket_path.display()),
        }
    }

    /// Decodes Create and marks the bundle as one of this pod: `start` may never have seen it. Blocks.
    fn accept(&self, request: api::CreateTaskRequest) -> Result<CreateTask> {
        let task = convert::create_task(request)?;
        paths::link_bundle(&task.bundle, &self.directory)?;
        paths::write_address(&task.bundle, &self.address)?;
        Ok(task)
    }
}

type Empty = containerd_shim_protos::protobuf::well_known_types::empty::Empty;

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> TtrpcResult<api::StateResponse> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("State", &request.id, &request.exec_id, async {
            let state = self.sandbox.state(id.clone()).await?;
            Ok(convert::state_response(&id, state))
        })
        .await
    }

    async fn create(&self, _: &TtrpcContext, request: api::CreateTaskRequest) -> TtrpcResult<api::CreateTaskResponse> {
        let id = request.id.clone();
        serve("Create", &id, "", async {
            let service = self.clone();
            let task = tokio::task::spawn_blocking(move || service.accept(request))
                .await
                .map_err(|error| Error::internal(format!("read spec: {error}")))??;
            let pid = self.sandbox.create(task).await?;
            Ok(api::CreateTaskResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> TtrpcResult<api::StartResponse> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("Start", &request.id, &request.exec_id, async {
            let pid = self.sandbox.start(id).await?;
            Ok(api::StartResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> TtrpcResult<api::DeleteResponse> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("Delete", &request.id, &request.exec_id, async {
            self.sandbox.delete(id).await.map(convert::delete_response)
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> TtrpcResult<api::PidsResponse> {
        serve("Pids", &request.id, "", async {
            let pids = self.sandbox.pids(ContainerId(request.id.clone())).await?;
            let processes = pids.into_iter().map(|pid| api::ProcessInfo { pid, ..Default::default() }).collect();
            Ok(api::PidsResponse { processes, ..Default::default() })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> TtrpcResult<Empty> {
        serve("Pause", &request.id, "", async {
            self.sandbox.pause(ContainerId(request.id.clone())).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> TtrpcResult<Empty> {
        serve("Resume", &request.id, "", async {
            self.sandbox.resume(ContainerId(request.id.clone())).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: api::CheckpointTaskRequest) -> TtrpcResult<Empty> {
        serve("Checkpoint", &request.id, "", async {
            Err(Error::unimplemented("checkpoint: a container in a microVM cannot be checkpointed by CRIU"))
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> TtrpcResult<Empty> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("Kill", &request.id, &request.exec_id, async {
            self.sandbox.kill(id, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> TtrpcResult<Empty> {
        let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
        serve("Exec", &id, &exec_id, async {
            self.sandbox.exec(convert::exec_task(request)?).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> TtrpcResult<Empty> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("ResizePty", &request.id, &request.exec_id, async {
            self.sandbox.resize_pty(id, request.height, request.width).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> TtrpcResult<Empty> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("CloseIO", &request.id, &request.exec_id, async {
            if request.stdin {
                self.sandbox.close_stdin(id).await?;
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> TtrpcResult<Empty> {
        let id = request.id.clone();
        serve("Update", &id, "", async {
            let resources = convert::json(request.resources, "resources")?;
            self.sandbox.update(ContainerId(request.id), resources).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let id = ProcessId::new(request.id.clone(), request.exec_id.clone());
        serve("Wait", &request.id, &request.exec_id, async {
            let exit = self.sandbox.wait(id).await?;
            Ok(api::WaitResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(convert::timestamp(exit.at)),
                ..Default::default()
            })
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> TtrpcResult<api::StatsResponse> {
        serve("Stats", &request.id, "", async {
            let sample = self.sandbox.stats(ContainerId(request.id.clone())).await?;
            let stats: Any = metrics::encode(&sample, self.metrics)?;
            Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> TtrpcResult<api::ConnectResponse> {
        serve("Connect", &request.id, "", async {
            let task_pid = self.sandbox.task_pid(ContainerId(request.id.clone())).await?;
            Ok(api::ConnectResponse {
                shim_pid: std::process::id(),
                task_pid,
                version: env!("CARGO_PKG_VERSION").into(),
                ..Default::default()
            })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> TtrpcResult<Empty> {
        serve("Shutdown", &request.id, "", async {
            // Granted or not, the answer is the same: while anything lives, Shutdown is to be ignored.
            self.sandbox.shutdown().await?;
            Ok(Empty::new())
        })
        .await
    }
}
