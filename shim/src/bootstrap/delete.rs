//! `delete`: removes what is left of a container, or of a whole pod whose server is gone.
//!
//! containerd runs it after every container, for all containers of a dead server at once, and for bundles it finds at its own
//! start; it passes no options, and waits. So everything that is needed lies in the bundle (`address`, the link to the
//! run state) and in the journal there; every step may have been done before; and a container whose pod lives costs no more
//! than a look at the socket.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::flags::Flags;
use super::socket;
use crate::paths;

/// Exit status of what did not end by itself: 128 and SIGKILL.
const KILLED: u32 = 137;

/// Mounts on top of each other on a rootfs at most.
const MAX_LAYERS: usize = 64;

/// Does what `delete` is for and returns the bytes to print.
pub fn run(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    paths::check_id("container id", &flags.id)?;
    let bundle = match flags.bundle.as_os_str() {
        dir if dir.is_empty() => std::env::current_dir().context("find the bundle, the working directory")?,
        _ => flags.bundle.clone(),
    };
    if !(is_member(&flags.id, &bundle)? && server_answers(&bundle)?) {
        remove_pod(&bundle)?;
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

/// Whether the container is one of several of a pod, and not its sandbox.
fn is_member(id: &str, bundle: &Path) -> anyhow::Result<bool> {
    let sandbox_dir = paths::linked_sandbox_dir(bundle)?;
    Ok(sandbox_dir.is_some_and(|dir| dir.file_name().is_some_and(|sandbox_id| sandbox_id != id)))
}

fn server_answers(bundle: &Path) -> anyhow::Result<bool> {
    match socket_of(bundle)? {
        Some(path) => socket::answers(Path::new(&path)),
        None => Ok(false),
    }
}

fn socket_of(bundle: &Path) -> anyhow::Result<Option<String>> {
    let path = bundle.join("address");
    match fs::read_to_string(&path) {
        Ok(address) => Ok(address.trim().strip_prefix("unix://").map(str::to_owned)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Removes everything that the server of this bundle's pod had made. Nothing is left, or an error says what.
fn remove_pod(bundle: &Path) -> anyhow::Result<()> {
    if let Some(socket_path) = socket_of(bundle)? {
        let socket_path = Path::new(&socket_path);
        if !socket::answers(socket_path)? {
            socket::remove(socket_path)?;
        }
    }
    Ok(())
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
