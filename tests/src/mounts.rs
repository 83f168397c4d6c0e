//! Mounts of the host's that rows make and undo.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags};

/// How mounts below a volume propagate (`MountPropagation` of the CRI's api.proto).
pub mod propagation {
    /// Not at all.
    pub const PRIVATE: i32 = 0;
    /// From the host to the container.
    pub const HOST_TO_CONTAINER: i32 = 1;
    /// Both ways.
    pub const BIDIRECTIONAL: i32 = 2;
}

/// A mount of the host, undone with it.
#[derive(Debug)]
pub struct HostMount(PathBuf);

impl HostMount {
    /// Mounts a tmpfs on `path`, a directory that it makes unless it is there.
    pub fn tmpfs(path: &Path) -> Result<Self> {
        Self::tmpfs_with(path, "")
    }

    /// The same, with options of its own (tmpfs(5)).
    pub fn tmpfs_with(path: &Path, options: &str) -> Result<Self> {
        fs::create_dir_all(path)?;
        nix::mount::mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some(options))?;
        Ok(Self(path.to_owned()))
    }

    /// The same, from which mounts propagate.
    pub fn shared_tmpfs(path: &Path) -> Result<Self> {
        let mount = Self::tmpfs(path)?;
        nix::mount::mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
        Ok(mount)
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // What stays is found by the leak check.
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
