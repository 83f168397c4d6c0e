//! `delete`: removes what is left of a container, or of a whole pod whose server is gone.
//!
//! containerd runs it after every container, for all containers of a dead server at once, and for bundles it finds at its own
//! start; it passes no options, and waits. So everything that is needed lies in the bundle (`address`, the link to the
//! run state) and in the journal there; every step may have been done before; and a container whose pod lives costs no more
//! than a look at the socket.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::flags::Flags;
use super::socket;
use crate::{paths, timeouts};

/// Exit status of what did not end by itself: 128 and SIGKILL.
const KILLED: u32 = 137;

/// Mounts on top of each other on a rootfs at most.
const MAX_LAYERS: usize = 64;

/// A server that was told to end is given this long to do so by itself; it does most of what teardown would.
const FAREWELL: Duration = Duration::from_secs(1);

/// Does what `delete` is for and returns the bytes to print. `teardown`: see [`super::main`].
pub fn run(flags: &Flags, teardown: fn(&Path) -> anyhow::Result<()>) -> anyhow::Result<Vec<u8>> {
    paths::check_id("container id", &flags.id)?;
    let bundle = match flags.bundle.as_os_str() {
        dir if dir.is_empty() => std::env::current_dir().context("find the bundle, the working directory")?,
        _ => flags.bundle.clone(),
    };
    let server = Server::of_bundle(&bundle)?;
    let sandbox_dir = paths::linked_sandbox_dir(&bundle)?;
    match sandbox_dir {
        // One of several of a pod that lives on.
        Some(dir) if !paths::is_dir_of(&dir, &flags.id) && server.answers()? => {}
        Some(dir) => {
            server.wait_for_end()?;
            server.dismiss()?;
            if dir.exists() {
                teardown(&dir).with_context(|| format!("tear down {}", dir.display()))?;
            }
            // Of a process that was killed, a thread may hold the socket a moment longer than the first one is to be seen.
            server.wait_for_end()?;
            server.remove_dead_socket()?;
        }
        // No server was ever made from this bundle.
        None => {}
    }
    unmount_rootfs(&bundle.join("rootfs"))?;
    // Nobody knows any more how and when it ended; this is what runc's shim says then.
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp::now()),
        ..DeleteResponse::default()
    };
    response.write_to_bytes().context("encode the answer")
}

/// The server that a bundle's `address` names; none if the bundle has no such file.
struct Server {
    socket_path: Option<PathBuf>,
}

impl Server {
    fn of_bundle(bundle: &Path) -> anyhow::Result<Self> {
        Ok(Self { socket_path: paths::read_address(bundle)? })
    }

    fn answers(&self) -> anyhow::Result<bool> {
        self.socket_path.as_deref().map_or(Ok(false), socket::answers)
    }

    /// Returns after [`FAREWELL`] at most, whether it has ended or not.
    fn wait_for_end(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + FAREWELL;
        while self.answers()? && Instant::now() < deadline {
            #[expect(clippy::disallowed_methods, reason = "nothing tells when a socket loses its last listener")]
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Asks a server that still answers to end, as containerd does after the last task: one that has no task does so, and
    /// containerd may know nothing of it any more. Of any other, the teardown that follows knows the process.
    fn dismiss(&self) -> anyhow::Result<()> {
        let Some(path) = self.socket_path.as_deref() else { return Ok(()) };
        if !self.answers()? {
            return Ok(());
        }
        let address = format!("unix://{}", path.display());
        let ask = async {
            let task = TaskClient::new(Client::connect(&address).await?);
            task.shutdown(context::with_duration(timeouts::DISMISSAL), &ShutdownRequest::default()).await
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        match runtime.block_on(async { tokio::time::timeout(timeouts::DISMISSAL, ask).await }) {
            Ok(Ok(_)) => self.wait_for_end(),
            // It hangs, or is on its way out.
            _ => Ok(()),
        }
    }

    fn remove_dead_socket(&self) -> anyhow::Result<()> {
        match &self.socket_path {
            Some(path) if !socket::answers(path)? => socket::remove(path),
            _ => Ok(()),
        }
    }
}

/// Unmounts whatever is mounted on `rootfs` in this mount namespace; containerd removes the bundle with all that is in it.
fn unmount_rootfs(rootfs: &Path) -> anyhow::Result<()> {
    for _ in 0..MAX_LAYERS {
        match unmount(rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => {
                return Err(std::io::Error::from(errno)).with_context(|| format!("unmount {}", rootfs.display()));
            }
        }
    }
    bail!("unmount {}: more than {MAX_LAYERS} mounts lie on it", rootfs.display())
}
