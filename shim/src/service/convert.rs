//! Between containerd's generated types and ours. Pure; containerd's types stop here and in the events.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim_protos::ttrpc;

use crate::container::process::Phase;
use crate::container::stdio::StdioPaths;
use crate::container::{ContainerId, ProcessId};
use crate::error::{Error, Kind, Result, WithKind};
use crate::sandbox::{CreateTask, Deleted, ExecTask, ProcessState};
use crate::storage::plan::Mount;

/// An OCI `config.json` larger than this is a mistake; containerd's own messages end at 4 MiB.
const MAX_SPEC_BYTES: u64 = 4 << 20;

/// The gRPC code that containerd gives a meaning to.
pub fn status(error: &Error) -> ttrpc::Error {
    let code = match error.kind() {
        Kind::NotFound => ttrpc::Code::NOT_FOUND,
        Kind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Kind::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Kind::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Kind::Unavailable => ttrpc::Code::UNAVAILABLE,
        Kind::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Kind::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        // containerd wraps what a runtime says of itself as unknown.
        Kind::Internal => ttrpc::Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
}

/// A point in time on the host's clock.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

/// A rootfs mount of a Create.
pub fn mount(message: &api::Mount) -> Mount {
    Mount {
        fstype: message.type_.clone(),
        source: message.source.clone(),
        target: message.target.clone(),
        options: message.options.clone(),
    }
}

/// The same for the create event.
pub fn mount_message(mount: &Mount) -> api::Mount {
    api::Mount {
        type_: mount.fstype.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Default::default()
    }
}

/// Decodes Create and reads the bundle's `config.json`. Blocks on the file system.
pub fn create_task(request: api::CreateTaskRequest) -> Result<CreateTask> {
    if !request.checkpoint.is_empty() {
        return Err(Error::unimplemented(format!(
            "container {}: restoring from checkpoint {} is not supported",
            request.id, request.checkpoint
        )));
    }
    let bundle = PathBuf::from(&request.bundle);
    let path = bundle.join("config.json");
    let size = std::fs::metadata(&path).or_kind(Kind::InvalidArgument, format!("read spec {}", path.display()))?.len();
    if size > MAX_SPEC_BYTES {
        return Err(Error::invalid(format!(
            "spec {} has {size} bytes, expected at most {MAX_SPEC_BYTES}",
            path.display()
        )));
    }
    let text = std::fs::read(&path).or_kind(Kind::InvalidArgument, format!("read spec {}", path.display()))?;
    let spec: serde_json::Value = serde_json::from_slice(&text)
        .or_kind(Kind::InvalidArgument, format!("spec {} is not JSON of the OCI runtime spec", path.display()))?;
    if !spec.is_object() {
        return Err(Error::invalid(format!("spec {} is not a JSON object of the OCI runtime spec", path.display())));
    }
    Ok(CreateTask {
        id: ContainerId(request.id),
        bundle,
        rootfs: request.rootfs.iter().map(mount).collect(),
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        spec,
        options: request.options.into_option().map(|any| (any.type_url, any.value)),
    })
}

/// Decodes Exec.
pub fn exec_task(request: api::ExecProcessRequest) -> Result<ExecTask> {
    let process = json(request.spec, "exec spec")?;
    Ok(ExecTask {
        id: ProcessId::new(request.id, request.exec_id),
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        process,
    })
}

/// An `Any` that holds JSON, as containerd packs OCI types.
pub fn json(any: MessageField<Any>, what: &'static str) -> Result<serde_json::Value> {
    let any = any.into_option().ok_or_else(|| Error::invalid(format!("{what} is missing")))?;
    serde_json::from_slice(&any.value)
        .or_kind(Kind::InvalidArgument, format!("{what} is not JSON of the OCI runtime spec"))
}

/// Encodes State's answer.
pub fn state_response(id: &ProcessId, state: ProcessState) -> api::StateResponse {
    let status = match state.phase {
        Phase::Created | Phase::Starting => api::Status::CREATED,
        Phase::Running if state.paused => api::Status::PAUSED,
        Phase::Running => api::Status::RUNNING,
        Phase::Exited => api::Status::STOPPED,
    };
    api::StateResponse {
        id: id.container.0.clone(),
        exec_id: id.exec_id().to_owned(),
        bundle: state.bundle.display().to_string(),
        pid: state.pid,
        status: EnumOrUnknown::new(status),
        stdin: state.stdio.stdin,
        stdout: state.stdio.stdout,
        stderr: state.stdio.stderr,
        terminal: state.stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
        ..Default::default()
    }
}

/// Encodes Delete's answer.
pub fn delete_response(deleted: Deleted) -> api::DeleteResponse {
    api::DeleteResponse {
        pid: deleted.pid,
        exit_status: deleted.exit.map_or(0, |exit| exit.status),
        // Never zero: containerd shows it.
        exited_at: MessageField::some(timestamp(deleted.exit.map_or_else(SystemTime::now, |exit| exit.at))),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_the_code_of_its_name() {
        let code = |error: &Error| match status(error) {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        };
        assert_eq!(code(&Error::not_found("x")), ttrpc::Code::NOT_FOUND);
        assert_eq!(code(&Error::failed_precondition("x")), ttrpc::Code::FAILED_PRECONDITION);
        assert_eq!(code(&Error::unimplemented("x")), ttrpc::Code::UNIMPLEMENTED);
    }

    #[test]
    fn an_unreadable_spec_is_told_with_its_path() {
        let bundle = tempfile::tempdir().expect("makes a directory");
        let request = || api::CreateTaskRequest {
            id: "a".into(),
            bundle: bundle.path().display().to_string(),
            ..Default::default()
        };
        let missing = create_task(request()).expect_err("refused");
        assert_eq!(missing.kind(), Kind::InvalidArgument);
        assert!(missing.to_string().contains("config.json"), "{missing}");
        std::fs::write(bundle.path().join("config.json"), "{").expect("writes");
        let broken = create_task(request()).expect_err("refused");
        assert!(broken.to_string().contains("not JSON"), "{broken}");
    }
}
