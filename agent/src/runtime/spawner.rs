//! The single-threaded process that forks workers, and PID 1's handle on it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{Line, Request, SPAWNER_ARGUMENT, Started, create, exec, holder, isolate, rlimit, wire};
use crate::error::{During, Error, Result};
use crate::sys::{self, Fork};

/// Longest that a worker may take; a container on a busy share needs seconds under emulation.
const ANSWER: Duration = Duration::from_secs(60);

/// PID 1's handle: starts the spawner when it is not there.
#[derive(Default)]
pub struct Spawner {
    socket: Mutex<Option<UnixStream>>,
}

impl Spawner {
    /// Starts the spawner before it is needed.
    pub fn warm_up(&self) -> Result<()> {
        self.worker().map(drop)
    }

    /// Has a worker carry out `request`. Blocks.
    pub fn run(&self, request: &Request, fds: &[OwnedFd]) -> Result<Started> {
        let socket = self.worker().map_err(|error| error.during("reach the spawner"))?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        wire::send_request(&socket, request, &borrowed).during(|| "ask the spawner")?;

        let mut received = Vec::new();
        let (mut pid, mut failed, mut log) = (None, None, None);
        wire::receive_lines(&socket, &mut received, |line| {
            match line {
                Line::Pid(started) => pid = Some(started),
                Line::Failed(text) => failed = Some(text),
                Line::Terminal => {}
                Line::Log(text) => drop(log.get_or_insert(text)),
                Line::Done => return false,
            }
            failed.is_none()
        })
        .during(|| "hear from the spawner's worker")?;
        match (failed, pid) {
            (Some(text), _) => {
                tracing::warn!(error = %text, detail = log.as_deref().unwrap_or(""), "process did not start");
                Err(Error::internal(text))
            }
            (None, Some(pid)) => Ok(Started { pid, terminal: received.pop() }),
            (None, None) => Err(Error::internal(match log {
                Some(log) => format!("the worker ended without an answer: {log}"),
                None => "the worker ended without an answer".to_owned(),
            })),
        }
    }

    /// A connection to a fresh worker.
    fn worker(&self) -> Result<UnixStream> {
        let mut spawner = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let (ours, theirs) = UnixStream::pair().during(|| "make a socket pair")?;
        ours.set_read_timeout(Some(ANSWER)).during(|| "set a deadline")?;
        ours.set_write_timeout(Some(ANSWER)).during(|| "set a deadline")?;
        if let Some(socket) = spawner.as_ref()
            && wire::send(socket, b"w", &[theirs.as_fd()]).is_ok()
        {
            return Ok(ours);
        }
        let socket = spawner.insert(start().during(|| "start the spawner")?);
        wire::send(&*socket, b"w", &[theirs.as_fd()]).during(|| "ask the spawner")?;
        Ok(ours)
    }
}

/// Re-executes this binary as the spawner.
fn start() -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    Command::new("/proc/self/exe")
        .arg(SPAWNER_ARGUMENT)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .env_clear()
        .spawn()?;
    Ok(ours)
}

/// The spawner's main: forks a worker for each socket that PID 1 sends; ends with PID 1's end of the connection.
pub fn serve() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdin(rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?)?;
    loop {
        let mut fds = Vec::new();
        if wire::receive(&socket, &mut [0; 1], &mut fds)? == 0 {
            return Ok(());
        }
        let Some(theirs) = fds.pop() else { continue };
        match sys::fork_sibling() {
            Ok(Fork::Parent(_)) => {}
            Ok(Fork::Child) => {
                drop(socket);
                work(&UnixStream::from(theirs));
                std::process::exit(0);
            }
            Err(error) => {
                let failed = Line::Failed(format!("fork a worker: {error}"));
                // PID 1 has gone if this fails, and the next receive tells.
                drop(wire::send_line(&UnixStream::from(theirs), &failed, &[]));
            }
        }
    }
}

/// A worker's main.
fn work(socket: &UnixStream) {
    if let Err(error) = sys::default_sigpipe() {
        drop(wire::send_line(socket, &Line::Failed(format!("restore SIGPIPE: {error}")), &[]));
        return;
    }
    let (request, fds) = match wire::receive_request(socket) {
        Ok(received) => received,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return,
        Err(error) => {
            drop(wire::send_line(socket, &Line::Failed(format!("read the request: {error}")), &[]));
            return;
        }
    };
    let done = match request {
        Request::Create { id, bundle, state, terminal, limits } => {
            rlimit::allow(&limits).and_then(|()| create::create(socket, &id, &bundle, &state, terminal, fds))
        }
        Request::Exec(request) => exec::exec(socket, *request, fds),
        Request::Hold { user_namespace } => holder::start(socket, user_namespace.as_deref()),
        Request::Isolate(request) => isolate::start(socket, &request),
    };
    if let Err(text) = done {
        // Nothing is left to do when PID 1 does not listen.
        drop(wire::send_line(socket, &Line::Failed(text), &[]));
    }
}
