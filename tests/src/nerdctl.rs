//! Containers made with `nerdctl`: one container is one sandbox, and its network is what an OCI hook of nerdctl's sets up.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};

use crate::command::Run;
use crate::containerd::Node;
use crate::image::BUSYBOX;
use crate::row::Runtime;
use crate::tools;

/// `nerdctl` on one node, with one runtime.
#[derive(Debug, Clone)]
pub struct Nerdctl {
    /// The node.
    pub node: Arc<Node>,
    runtime: Runtime,
    program: PathBuf,
}

impl Nerdctl {
    /// `nerdctl` for containers of `runtime` on `node`.
    pub fn new(node: &Arc<Node>, runtime: Runtime) -> Result<Self> {
        Ok(Self { node: Arc::clone(node), runtime, program: tools::nerdctl()? })
    }

    /// A `nerdctl` command in the node's own namespace, with directories and a network of the node's.
    pub fn command(&self, args: &[&str]) -> Run {
        let root = &self.node.layout.root;
        Run::new(&self.program)
            .arg("--address")
            .arg(&self.node.layout.socket)
            .args(["--namespace", &self.node.name, "--cgroup-manager", "cgroupfs", "--insecure-registry"])
            .args(["--cni-path", "/usr/lib/cni", "--cni-netconfpath"])
            .arg(root.join("cni/conf"))
            .arg("--data-root")
            .arg(root.join("nerdctl"))
            .args(args)
            .env("NERDCTL_TOML", "/dev/null")
    }

    /// `nerdctl run OPTIONS` on the node's own network; image and command are the caller's to add. Nothing is pulled.
    pub fn bare_run(&self, options: &[&str]) -> Run {
        self.command(&["run", "--runtime", self.runtime.runtime_type(), "--pull", "never"])
            .args(["--net", &self.node.name, "--cgroup-parent", &self.node.name])
            .args(options)
    }

    /// `nerdctl run OPTIONS IMAGE COMMAND` on the node's own network.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Run {
        self.bare_run(options).arg(BUSYBOX).args(command)
    }

    /// A name that no other container has.
    pub fn new_name(&self) -> String {
        format!("nerd-{}", self.node.next_number())
    }

    /// Address of a running container on the node's network.
    pub fn address(&self, name: &str) -> Result<IpAddr> {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
        let said = self.command(&["inspect", "--format", format, name]).success()?.text();
        let address = said.split_whitespace().next().with_context(|| format!("nerdctl knows no address of {name}"))?;
        address.parse().with_context(|| format!("address {address:?} of {name}"))
    }

    /// Kills and removes a container, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.command(&["rm", "--force", name]).output()?;
        Ok(())
    }
}
