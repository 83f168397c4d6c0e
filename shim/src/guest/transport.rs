//! The way between guest and host: vsock, by the kernel or by a helper process.
//!
//! Where `/dev/vhost-vsock` opens, the kernel carries the bytes: QEMU gets the file, and the shim listens on a port of its own
//! in AF_VSOCK. Elsewhere `vhost-device-vsock` does, one for each pod, confined like QEMU: it passes each connection of
//! the guest on to the Unix socket `<uds>_<port>`, where the shim listens. The guest sees AF_VSOCK in both.
//!
//! <https://github.com/rust-vmm/vhost-device/tree/main/vhost-device-vsock>, vsock(7)

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bulkhead_proto::DEFAULT_PORT;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rand::RngExt;
use tokio::net::UnixListener;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::device::DeviceId;
use crate::device::file::FileRole;
use crate::device::vsock::Backend;
use crate::error::{Error, Kind, Result, WithKind};
use crate::guest::listener::Acceptor;
use crate::host::HostThread;
use crate::process::{Child, ChildConfig, Credentials};
use crate::seccomp::Filter;
use crate::sys;
use crate::timeouts;

/// The kernel's device.
const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// Guest addresses below are reserved (vsock(7)).
const FIRST_CID: u32 = 3;
/// The address inside the one VM that a helper serves; nobody else can reach it.
const HELPER_CID: u32 = 3;

/// Everything about the transport that is decided before it starts.
#[derive(Debug)]
pub struct TransportLaunch<F> {
    /// Finds the helper; asked only where the kernel has no vhost-vsock. Blocks.
    pub program: F,
    /// A directory of ours.
    pub directory: PathBuf,
    /// Whom the helper runs as.
    pub credentials: Credentials,
    /// `cgroup.procs` files that it enters.
    pub cgroup: Vec<OwnedFd>,
    /// None leaves what the shim has.
    pub oom_score_adj: Option<i32>,
}

/// A transport for one VM.
#[derive(Debug)]
pub struct Transport {
    backend: Backend,
    port: u32,
    acceptor: Option<Acceptor>,
    /// What QEMU gets.
    file: Option<OwnedFd>,
    child: Option<Child>,
}

impl Transport {
    /// Chooses and prepares the transport. Not cancel safe in so far as a helper that nobody holds is killed.
    pub async fn start<F>(host: &HostThread, launch: TransportLaunch<F>) -> Result<Self>
    where
        F: FnOnce() -> Result<PathBuf> + Send + 'static,
    {
        match OpenOptions::new().read(true).write(true).open(VHOST_VSOCK) {
            Ok(file) => Self::in_kernel(file.into()),
            Err(error) => {
                tracing::debug!(path = VHOST_VSOCK, %error, "vsock is carried by a helper");
                Self::by_helper(host, launch).await
            }
        }
    }

    fn in_kernel(file: OwnedFd) -> Result<Self> {
        // QEMU sets the guest's address and fails if another VM has it; a random one of four thousand million rarely is.
        let guest_cid = rand::rng().random_range(FIRST_CID..u32::MAX);
        let address = VsockAddr::new(VMADDR_CID_HOST, libc::VMADDR_PORT_ANY);
        let listener = VsockListener::bind(address)
            .or_else(|_| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, libc::VMADDR_PORT_ANY)))
            .or_kind(Kind::Internal, "listen on AF_VSOCK")?;
        let port = listener.local_addr().or_kind(Kind::Internal, "listen on AF_VSOCK")?.port();
        Ok(Self {
            backend: Backend::Vhost { guest_cid },
            port,
            acceptor: Some(Acceptor::Vsock { listener, guest_cid }),
            file: Some(file),
            child: None,
        })
    }

    async fn by_helper<F>(host: &HostThread, launch: TransportLaunch<F>) -> Result<Self>
    where
        F: FnOnce() -> Result<PathBuf> + Send + 'static,
    {
        let TransportLaunch { program, directory, credentials, cgroup, oom_score_adj } = launch;
        let uid = credentials.uid;
        let prepared = tokio::task::spawn_blocking(move || {
            let program = program()?;
            let place = Place::make(&directory, uid)?;
            Ok::<_, Error>((program, place))
        });
        let (program, place) =
            prepared.await.map_err(|error| Error::internal(format!("prepare the vsock helper: {error}")))??;
        let listener = UnixListener::from_std(place.listener).or_kind(Kind::Internal, "listen for the guest")?;

        let mut config = ChildConfig::new("vhost-device-vsock", program, credentials);
        config.args = [
            format!("--guest-cid={HELPER_CID}"),
            format!("--socket={}", place.socket.display()),
            format!("--uds-path={}", place.uds.display()),
        ]
        .map(Into::into)
        .to_vec();
        config.cgroup = cgroup;
        config.oom_score_adj = oom_score_adj;
        config.namespaces.net = true;
        config.namespaces.ipc = true;
        config.namespaces.uts = true;
        config.seccomp = Some(Filter::unix_socket_server()?);
        let child = Child::spawn(host, config).await?;
        let listens = tokio::select! {
            connected = timeout(timeouts::HELPER_READY, connect_when_there(&place.socket, place.watch)) => connected,
            _ = child.wait() => return Err(Error::unavailable(child.obituary())),
        };
        let socket = match listens {
            Ok(connected) => connected?,
            Err(_) => {
                return Err(Error::deadline(format!(
                    "vhost-device-vsock does not listen after {:?}",
                    timeouts::HELPER_READY
                )));
            }
        };
        Ok(Self {
            backend: Backend::VhostUser,
            port: DEFAULT_PORT,
            acceptor: Some(Acceptor::Unix(listener)),
            file: Some(socket.into()),
            child: Some(child),
        })
    }

    /// The helper; None where the kernel serves.
    pub fn child(&self) -> Option<&Child> {
        self.child.as_ref()
    }

    /// Where the guest's connections arrive. An error the second time.
    pub fn take_acceptor(&mut self) -> Result<Acceptor> {
        self.acceptor.take().ok_or_else(|| Error::internal("the guest's connections are accepted already"))
    }

    /// Who serves the device.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The host's port, which the guest must be told.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The file that QEMU serves the device `id` with. An error the second time.
    pub fn take_file(&mut self, id: DeviceId) -> Result<(FileRole, OwnedFd)> {
        let file = self.file.take().ok_or_else(|| Error::internal("the vsock device's file is taken already"))?;
        let role = match self.backend {
            Backend::Vhost { .. } => FileRole::VhostVsock(id),
            Backend::VhostUser => FileRole::VhostUser(id),
        };
        Ok((role, file))
    }

    /// Ends the helper; with it every connection of the guest ends. Its files go with the sandbox's directory.
    pub async fn close(self) -> anyhow::Result<()> {
        match &self.child {
            Some(child) => child.kill().await,
            None => Ok(()),
        }
    }
}

/// The helper's directory: its own, since it makes a socket there; ours to reach, since we connect.
struct Place {
    /// Where it will listen for QEMU.
    socket: PathBuf,
    /// Where it would listen for the host, and the stem of where we listen for the guest.
    uds: PathBuf,
    listener: std::os::unix::net::UnixListener,
    watch: Inotify,
}

impl Place {
    fn make(directory: &Path, uid: u32) -> Result<Self> {
        // Names are short: a socket's whole path has 107 bytes at most.
        let own = directory.join("v");
        let what = || format!("prepare {} for the vsock helper", own.display());
        let make = || -> io::Result<_> {
            fs::DirBuilder::new().mode(0o700).create(&own)?;
            let (socket, uds) = (own.join("q"), own.join("v"));
            let guest = own.join(format!("v_{DEFAULT_PORT}"));
            let listener = std::os::unix::net::UnixListener::bind(&guest)?;
            listener.set_nonblocking(true)?;
            chown(&guest, Some(uid), Some(uid))?;
            chown(&own, Some(uid), Some(uid))?;
            // The way there is searched, never listed.
            fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
            let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            watch.add_watch(&own, AddWatchFlags::IN_CREATE)?;
            Ok(Self { socket, uds, listener, watch })
        };
        Ok(make().with_context(what)?)
    }
}

/// Connects to `socket` as soon as somebody listens there; `watch` tells of every file that appears beside it.
async fn connect_when_there(socket: &Path, watch: Inotify) -> Result<UnixStream> {
    let appeared = sys::watch(watch.into()).or_kind(Kind::Internal, "watch the vsock helper's directory")?;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                // Bound and not listening yet: the helper is between two system calls, and no event tells the second.
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    tokio::task::yield_now().await;
                    continue;
                }
                let mut ready =
                    appeared.readable().await.or_kind(Kind::Internal, "watch the vsock helper's directory")?;
                let mut events = [0; 4096];
                // What appeared does not matter, only that something did.
                let _ = rustix::io::read(appeared.get_ref(), &mut events);
                ready.clear_ready();
            }
            Err(error) => {
                return Err(error).or_kind(Kind::Internal, format!("connect to {}", socket.display()));
            }
        }
    }
}
