//! Where everything of a cluster is: one directory, which is the same inside the node and outside.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Paths of a cluster.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The directory of everything.
    pub root: PathBuf,
    /// containerd's socket.
    pub socket: PathBuf,
    /// Configuration of whoever administers the cluster.
    pub kubeconfig: PathBuf,
    /// Manifests of static pods.
    pub manifests: PathBuf,
    /// What a `localhostProfile` of seccomp is relative to.
    pub seccomp: PathBuf,
    /// Bulkhead's run state: in the node's `/run`, which a node without power forgets.
    pub bulkhead_state: PathBuf,
}

impl Layout {
    /// The layout below `root`; nothing is made.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            socket: root.join("c.sock"),
            kubeconfig: root.join("kubeconfig"),
            manifests: root.join("manifests"),
            seccomp: root.join("kubelet/seccomp"),
            bulkhead_state: PathBuf::from("/run/bulkhead"),
        }
    }

    /// Makes the directories. Pods' programs run as users who have to pass through the upper one.
    pub fn make(&self) -> Result<()> {
        for directory in ["bin", "pki", "log", "cni", "cni/net.d", "cni/state", "kubelet", "plugins"] {
            make(&self.root.join(directory))?;
        }
        make(&self.manifests)?;
        make(&self.seccomp)
    }

    /// The log of a daemon; the node's own is called `node`.
    pub fn log(&self, daemon: &str) -> PathBuf {
        self.root.join("log").join(format!("{daemon}.log"))
    }

    /// A file of the public key infrastructure.
    pub fn pki(&self, file: &str) -> PathBuf {
        self.root.join("pki").join(file)
    }

    /// Configuration with which `component` speaks to the apiserver.
    pub fn kubeconfig_of(&self, component: &str) -> PathBuf {
        self.root.join("pki").join(format!("{component}.kubeconfig"))
    }
}

fn make(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))
}
