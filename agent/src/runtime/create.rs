//! In a worker: creates a container with libcontainer, up to its init waiting for the start.
//!
//! libcontainer keeps its state below `state/<id>`; [`crate::container`] starts the init through the socket in there, and
//! removes the directory. Limits and the device filter are set by [`crate::cgroup`] before this runs.

use std::fmt::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

use super::{Line, exec, lookup, wire};

/// Opens a text that is meant for the user inside libcontainer's chain of errors.
const FOR_USER: char = '\u{1}';
/// Longest text taken from libcontainer's log.
const LOG_AT_MOST: usize = 600;

/// Name of libcontainer's socket below `state/<id>`: a connection to it starts the init.
pub use libcontainer::notify_socket::NOTIFY_FILE;

/// Creates the container and tells its pid.
pub fn create(
    socket: &UnixStream,
    id: &str,
    bundle: &Path,
    state: &Path,
    terminal: bool,
    fds: Vec<OwnedFd>,
) -> Result<(), String> {
    if let Ok(socket) = socket.try_clone() {
        // Only a worker that already has a log could refuse, and none has.
        drop(tracing::subscriber::set_global_default(ErrorsTo { socket }));
    }
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(state)
        .map_err(|error| chain(&error))?
        .with_executor(Program);
    let console = bundle.join("console.sock");
    let mut listener = None;
    if terminal {
        listener = Some(UnixListener::bind(&console).map_err(|error| format!("listen for the pty: {error}"))?);
        builder = builder.with_console_socket(Some(console));
    } else {
        let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| "expected three descriptors")?;
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
    }
    let container = builder
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| chain(&error))?;
    let pid = container.pid().ok_or("libcontainer knows no pid")?.as_raw();

    let mut master = Vec::new();
    if let Some(listener) = listener {
        let (console, _) = listener.accept().map_err(|error| format!("receive the pty: {error}"))?;
        wire::receive(&console, &mut [0; 256], &mut master).map_err(|error| format!("receive the pty: {error}"))?;
        if master.is_empty() {
            return Err("the container's init sent no pty".to_owned());
        }
    }
    if let Some(master) = master.first() {
        wire::send_line(socket, &Line::Terminal, &[master.as_fd()]).map_err(|error| error.to_string())?;
    }
    wire::send_line(socket, &Line::Pid(pid), &[]).map_err(|error| error.to_string())?;
    wire::send_line(socket, &Line::Done, &[]).map_err(|error| error.to_string())
}

/// An error with its causes in one line, or the part that was meant for the user.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    match text.split_once(FOR_USER) {
        Some((_, for_user)) => for_user.trim_end_matches(['"', ')']).to_owned(),
        None => text,
    }
}

/// Executes the container's program; looks for it while an error still reaches the caller of create.
#[derive(Clone)]
struct Program;

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        program(spec).map(drop).map_err(|text| ExecutorValidationError::ArgValidationError(format!("{FOR_USER}{text}")))
    }

    fn setup_envs(
        &self,
        _: std::collections::HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        // `exec` passes the spec's own list, in its order.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let env = spec.process().as_ref().and_then(|process| process.env().clone()).unwrap_or_default();
        if let Err(error) = reopen_null() {
            return Err(ExecutorError::Other(format!("open /dev/null: {error}")));
        }
        let failed = match program(spec) {
            Ok((path, args)) => exec::replace(&path, &args, &env),
            Err(text) => text,
        };
        // Create has long returned: as with runc, this is a line of the container's log and an exit code.
        eprintln!("{failed}");
        std::process::exit(1);
    }
}

/// Makes a /dev/null on stdout or stderr writable: libcontainer 0.7 opens the container's own for reading only.
fn reopen_null() -> std::io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let device = rustix::fs::fstat(&null)?.st_rdev;
    if rustix::fs::fstat(std::io::stdout())?.st_rdev == device {
        rustix::stdio::dup2_stdout(&null)?;
    }
    if rustix::fs::fstat(std::io::stderr())?.st_rdev == device {
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

fn program(spec: &Spec) -> Result<(std::path::PathBuf, Vec<String>), String> {
    let process = spec.process().as_ref().ok_or("the spec has no process")?;
    let args = process.args().clone().unwrap_or_default();
    let name = args.first().ok_or("process.args must not be empty")?;
    let env = process.env().as_deref().unwrap_or_default();
    Ok((lookup::find(name, env)?, args))
}

/// Sends what libcontainer logs as errors to PID 1: its error values alone do not say which mount failed.
struct ErrorsTo {
    socket: UnixStream,
}

impl Subscriber for ErrorsTo {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        text.0
            .truncate((0..=LOG_AT_MOST.min(text.0.len())).rev().find(|&end| text.0.is_char_boundary(end)).unwrap_or(0));
        // A log line that cannot be sent has no other place to go.
        drop(wire::send_line(&self.socket, &Line::Log(text.0), &[]));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = if field.name() == "message" { "" } else { field.name() };
        let separator = if self.0.is_empty() { "" } else { ", " };
        let equals = if name.is_empty() { "" } else { "=" };
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{separator}{name}{equals}{value:?}");
    }
}
