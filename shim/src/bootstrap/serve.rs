//! `serve`: the process that is a pod's server, from exec to the first line of the service.
//!
//! It is told everything by the `start` that ran it: the socket is file 3, containerd file 4, the rest comes as JSON on stdin.
//! All is of one binary and one moment, so that the JSON needs no version.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::input::read_to_end;
use crate::config::{Config, LogLevel};
use crate::{log, sys};

/// Where the server finds its listening socket.
pub const LISTENER_FD: i32 = 3;

/// Where it finds the pidfd of the containerd that wants it, if `start` has one.
pub const CREATOR_FD: i32 = 4;

/// `start` writes what it has to say at once.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(10);

/// Threads that run tasks: a pod's streams and calls, none of which computes.
const WORKERS: usize = 2;

/// Threads for blocking calls at most; they end when idle.
const BLOCKING_THREADS: usize = 16;

/// Stack of each thread.
const STACK_BYTES: usize = 512 << 10;

/// What `start` tells the server.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub sandbox_id: String,
    pub namespace: String,
    pub bundle: PathBuf,
    pub socket_path: PathBuf,
    pub sandbox_dir: PathBuf,
    pub exe: PathBuf,
    pub grpc_address: String,
    pub ttrpc_address: Option<String>,
    pub containerd_binary: String,
    pub containerd_version: Option<String>,
    pub log_level: LogLevel,
    pub options_given: bool,
    pub has_creator: bool,
    pub config: Config,
}

/// Everything a server begins with.
#[derive(Debug)]
pub struct ServeConfig {
    /// Listens already, and may have connections waiting; in blocking mode.
    pub listener: UnixListener,
    /// Where it is bound; the server removes it as its last act.
    pub socket_path: PathBuf,
    /// Directory of the run state; not made yet. Every bundle of the pod must link to it: [`crate::paths::link_bundle`].
    pub sandbox_dir: PathBuf,
    /// The sandbox, or the lone container.
    pub sandbox_id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Bundle of the sandbox, also the working directory.
    pub bundle: PathBuf,
    /// This binary, beside which an installation has its files: see [`Config::find`].
    pub exe: PathBuf,
    /// containerd's gRPC socket; empty under CRI-O.
    pub grpc_address: String,
    /// containerd's ttrpc socket, where events go; `None` under CRI-O.
    pub ttrpc_address: Option<String>,
    /// Path of containerd's binary; may be empty.
    pub containerd_binary: String,
    /// Version of containerd as it calls itself; `None` before 2.3.
    pub containerd_version: Option<String>,
    /// Level of the log, from configuration and containerd.
    pub log_level: LogLevel,
    /// The configuration, as it was when the sandbox began.
    pub config: Config,
    /// The containerd that wants a sandbox here, as a pidfd; `None` if there is no telling.
    pub creator: Option<OwnedFd>,
    /// Whether `config` came of runtime options; if not, those of the first Create count ([`Config::adopt`]).
    pub options_given: bool,
}

impl ServeConfig {
    fn receive() -> anyhow::Result<Self> {
        // The pipe ends with `start`, and its number must not: a child would get whatever takes it next as its stdin.
        let handover = read_to_end(std::io::stdin(), HANDOVER_PATIENCE)?;
        let null = std::fs::File::open("/dev/null").context("open /dev/null")?;
        rustix::stdio::dup2_stdin(&null).context("close stdin")?;
        let handover: Handover = serde_json::from_slice(&handover).context("only start runs serve: read stdin")?;
        let listener = sys::inherited_listener(LISTENER_FD).context("only start runs serve: take over the socket")?;
        let creator = handover.has_creator.then(|| sys::inherited_file(CREATOR_FD)).transpose();
        let creator = creator.context("only start runs serve: take over containerd's pidfd")?;
        Ok(Self {
            listener,
            creator,
            socket_path: handover.socket_path,
            sandbox_dir: handover.sandbox_dir,
            sandbox_id: handover.sandbox_id,
            namespace: handover.namespace,
            bundle: handover.bundle,
            exe: handover.exe,
            grpc_address: handover.grpc_address,
            ttrpc_address: handover.ttrpc_address,
            containerd_binary: handover.containerd_binary,
            containerd_version: handover.containerd_version,
            log_level: handover.log_level,
            config: handover.config,
            options_given: handover.options_given,
        })
    }
}

/// Becomes the server.
pub fn run<F>(serve: impl FnOnce(ServeConfig) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    // containerd's process group and terminal are not ours. It fails only for who leads a group already, which is as good.
    let _ = nix::unistd::setsid();
    let config = ServeConfig::receive()?;
    log::init(&config.bundle, config.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(STACK_BYTES)
        .thread_name("shim")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let served = runtime.block_on(serve(config));
    // Whatever blocks still must not keep a server alive that has said good-bye.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(error) = &served {
        tracing::error!(error = format!("{error:#}"), "shim failed");
    }
    served
}
