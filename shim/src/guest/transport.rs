//! The way between guest and host: vsock, by the kernel or by a helper process.
//!
//! Where `/dev/vhost-vsock` opens, the kernel carries the bytes: QEMU gets the file, and the shim listens on a port of its own
//! in AF_VSOCK. Elsewhere `bulkhead-vsock` does, one for each pod, confined like QEMU: it passes each connection of
//! the guest on to the Unix socket `<uds>_<port>`, where the shim listens. The guest sees AF_VSOCK in both.
//!
//! vsock(7); the helper is the crate `bulkhead-vsock`

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
use crate::process::{Child, ChildConfig, Credentials, Namespaces};
use crate::seccomp::Filter;
use crate::sys;
use crate::timeouts;

/// The kernel's device.
pub const VHOST_VSOCK: &str = "/dev/vhost-vsock";

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
        let guest_cid = take_cid(&file).or_kind(Kind::Internal, "take an address for the guest's vsock")?;
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

        let mut config = ChildConfig::new("bulkhead-vsock", program, credentials);
        config.args = [
            format!("--guest-cid={HELPER_CID}"),
            format!("--socket={QEMU_SOCKET}"),
            format!("--uds-path={GUEST_SOCKET}"),
        ]
        .map(Into::into)
        .to_vec();
        // It is put into its directory before it loses root, and names files relative to it: so the way there need not be
        // open to its user, and may be as long as it likes.
        config.cwd = Some(place.path);
        config.cgroup = cgroup;
        config.oom_score_adj = oom_score_adj;
        config.namespaces = Namespaces { net: true, ipc: true, uts: true, mount: true };
        config.devices = Some(Vec::new());
        config.seccomp = Some(Filter::unix_socket_server()?);
        let child = Child::spawn(host, config).await?;
        let listens = tokio::select! {
            connected = timeout(timeouts::HELPER_READY, connect_when_there(place.directory, place.watch)) => connected,
            _ = child.wait() => return Err(Error::unavailable(child.obituary())),
        };
        let socket = match listens {
            Ok(connected) => connected?,
            Err(_) => {
                return Err(Error::deadline(format!(
                    "bulkhead-vsock does not listen after {:?}",
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

/// Takes an address that no other guest of this host has: QEMU would fail on one that is taken.
fn take_cid(file: &OwnedFd) -> io::Result<u32> {
    let mut tries = 0;
    loop {
        // All ones mean "any".
        let guest_cid = rand::rng().random_range(FIRST_CID..u32::MAX);
        match sys::set_guest_cid(file, guest_cid) {
            Ok(()) => return Ok(guest_cid),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < 16 => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Where the helper listens for QEMU, in its directory.
const QEMU_SOCKET: &str = "qemu";
/// Where it would listen for the host, and the stem of where we listen for the guest.
const GUEST_SOCKET: &str = "guest";

/// The helper's directory, which is its own since it makes sockets there.
struct Place {
    path: PathBuf,
    directory: OwnedFd,
    listener: std::os::unix::net::UnixListener,
    watch: Inotify,
}

impl Place {
    fn make(parent: &Path, uid: u32) -> Result<Self> {
        let path = parent.join("vsock");
        let what = format!("prepare {} for the vsock helper", path.display());
        let make = || -> io::Result<_> {
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            let directory = OwnedFd::from(fs::File::open(&path)?);
            let guest = within(&directory, &format!("{GUEST_SOCKET}_{DEFAULT_PORT}"));
            let listener = std::os::unix::net::UnixListener::bind(&guest)?;
            listener.set_nonblocking(true)?;
            chown(&guest, Some(uid), Some(uid))?;
            chown(&path, Some(uid), Some(uid))?;
            let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            watch.add_watch(&path, AddWatchFlags::IN_CREATE)?;
            Ok((directory, listener, watch))
        };
        let (directory, listener, watch) = make().context(what)?;
        Ok(Self { path, directory, listener, watch })
    }
}

/// A way to `name` in `directory` that is short: the path of a socket has 107 bytes at most.
fn within(directory: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()).into()
}

/// Connects to the helper as soon as it listens; `watch` tells of every file that appears in its directory.
async fn connect_when_there(directory: OwnedFd, watch: Inotify) -> Result<UnixStream> {
    let socket = within(&directory, QEMU_SOCKET);
    let appeared = sys::watch(watch.into()).or_kind(Kind::Internal, "watch the vsock helper's directory")?;
    loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => return Ok(stream),
            // Bound and not listening yet: the helper is between two system calls, and no event tells of the second.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let ready = appeared.readable().await;
                let mut ready = ready.or_kind(Kind::Internal, "watch the vsock helper's directory")?;
                // What appeared does not matter, only that something did; without an event there is nothing to read.
                let _events = rustix::io::read(appeared.get_ref(), &mut [0; 4096]);
                ready.clear_ready();
            }
            Err(error) => return Err(error).or_kind(Kind::Internal, "connect to the vsock helper"),
        }
    }
}
