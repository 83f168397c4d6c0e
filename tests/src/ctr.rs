//! Containers made with `ctr`, without CRI: one container is one sandbox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::command::Run;
use crate::containerd::Node;
use crate::image::BUSYBOX;
use crate::row::Runtime;

/// `ctr` on one node, with one runtime.
#[derive(Debug, Clone)]
pub struct Ctr {
    /// The node.
    pub node: Arc<Node>,
    runtime: Runtime,
}

impl Ctr {
    /// `ctr` for containers of `runtime` on `node`.
    pub fn new(node: &Arc<Node>, runtime: Runtime) -> Self {
        Self { node: Arc::clone(node), runtime }
    }

    /// A `ctr` command in the node's own namespace.
    pub fn command(&self, args: &[&str]) -> Run {
        Run::new(self.node.tools().join("ctr"))
            .arg("--address")
            .arg(&self.node.layout.socket)
            .args(["--namespace", &self.node.name])
            .args(args)
    }

    /// An id that no other container has.
    pub fn new_id(&self, what: &str) -> String {
        let id = format!("{what}-{}", self.node.next_number());
        self.node.remember(&self.node.name, &id);
        id
    }

    /// `ctr run` with the runtime's own options; what to run is the caller's to add.
    pub fn bare_run(&self) -> Run {
        let run = self.command(&["run", "--runtime", self.runtime.runtime_type()]);
        if !self.runtime.is_bulkhead() {
            return run;
        }
        run.arg("--runtime-config-path").arg(self.node.layout.root.join("bulkhead.toml"))
    }

    /// `ctr run OPTIONS IMAGE ID COMMAND` with the runtime's own options.
    pub fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Run {
        self.bare_run().args(options).args([BUSYBOX, id]).args(command)
    }

    /// Kills and removes a container, if it is there.
    pub fn remove(&self, id: &str) -> Result<()> {
        // Each of these is refused when there is nothing to do.
        self.command(&["task", "kill", "--signal", "SIGKILL", id]).output()?;
        self.command(&["task", "delete", "--force", id]).output()?;
        self.command(&["container", "delete", id]).output()?;
        Ok(())
    }
}

/// Makes the directory `root`, which can be a container's: a shell in it and the usual mount points.
pub fn make_root(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("bin"))?;
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    Ok(())
}
