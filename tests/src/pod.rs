//! A pod made with `crictl runp`.

use std::cell::Cell;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command::{Output, Run};
use crate::container::{Container, ContainerSpec};
use crate::containerd::{CRI_NAMESPACE, Node};

/// Namespace modes of CRI (`NamespaceMode` of the CRI's api.proto).
pub mod namespace_mode {
    /// Shared by all containers of the pod.
    pub const POD: i32 = 0;
    /// Each container its own.
    pub const CONTAINER: i32 = 1;
    /// The node's.
    pub const NODE: i32 = 2;
    /// That of another container.
    pub const TARGET: i32 = 3;
}

/// What a pod is asked to be: CRI's `PodSandboxConfig` as JSON.
#[derive(Debug, Clone)]
pub struct PodSpec {
    config: Value,
    cgroup_memory_bytes: Option<u64>,
}

impl Default for PodSpec {
    fn default() -> Self {
        Self::new()
    }
}

impl PodSpec {
    /// A pod with a network, one PID namespace per container, and nothing special.
    pub fn new() -> Self {
        let config = json!({
            "metadata": {"namespace": "tests", "attempt": 0},
            "hostname": "compartment",
            "dns_config": {"servers": ["10.0.0.10"], "searches": ["tests.local"], "options": ["ndots:2"]},
            "linux": {"security_context": {"namespace_options": {"pid": namespace_mode::CONTAINER}}},
        });
        Self { config, cgroup_memory_bytes: None }
    }

    /// Limits the memory of the pod's cgroup, as the kubelet does for a pod whose containers have limits.
    #[must_use]
    pub fn cgroup_memory(mut self, bytes: u64) -> Self {
        self.cgroup_memory_bytes = Some(bytes);
        self
    }

    /// Sets the field at `pointer`, such as `/linux/sysctls/kernel.shmmax`; objects on the way are made.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, pointer, value.into());
        self
    }
}

/// Sets one field of a JSON document, by a path whose parts are separated by `/` (`~1` stands for a slash in a name).
pub(crate) fn set(document: &mut Value, pointer: &str, value: Value) {
    let mut place = document;
    for part in pointer.trim_start_matches('/').split('/') {
        let key = part.replace("~1", "/");
        if !place.is_object() {
            *place = json!({});
        }
        place = &mut place[key];
    }
    *place = value;
}

/// A pod that runs. Dropping it removes it by force; tests call [`Pod::remove`], which tells errors.
#[derive(Debug)]
pub struct Pod {
    /// The node it runs on.
    pub node: Arc<Node>,
    /// CRI's id of the sandbox.
    pub id: String,
    /// Where the sandbox's configuration is.
    pub config_path: PathBuf,
    /// Where its containers' logs go.
    pub log_directory: PathBuf,
    name: String,
    removed: Cell<bool>,
}

/// Starts a pod and hands back what `crictl runp` said, whether it worked or not.
pub fn try_start(node: &Arc<Node>, handler: &str, spec: PodSpec) -> Result<(Option<Pod>, Output)> {
    let number = node.next_number();
    let name = format!("pod-{number}");
    let directory = node.layout.root.join(&name);
    let log_directory = directory.join("log");
    fs::create_dir_all(&log_directory).with_context(|| format!("make {}", log_directory.display()))?;
    let cgroup = node.make_pod_cgroup(&name)?;
    if let Some(bytes) = spec.cgroup_memory_bytes {
        node.cgroups.limit_memory(&name, bytes)?;
    }
    let mut config = spec.config;
    config["metadata"]["name"] = json!(name);
    config["metadata"]["uid"] = json!(format!("{}-{number}", node.name));
    config["log_directory"] = json!(log_directory);
    config["linux"]["cgroup_parent"] = json!(cgroup);
    let config_path = directory.join("pod.json");
    fs::write(&config_path, serde_json::to_vec_pretty(&config)?)?;
    let output = node.crictl(&["runp", "--runtime", handler]).arg(&config_path).output()?;
    if output.code != 0 {
        node.forget_pod_cgroup(&name);
        // containerd keeps no trace of a sandbox that failed to start, or keeps it until it is removed: both occur.
        let left = node.crictl(&["pods", "-q", "--name", &format!("^{name}$")]).success()?.text();
        for id in left.lines() {
            node.remember(CRI_NAMESPACE, id);
            node.crictl(&["rmp", "-f", id]).success()?;
        }
        return Ok((None, output));
    }
    let id = output.text();
    node.remember(CRI_NAMESPACE, &id);
    let pod = Pod { node: Arc::clone(node), id, config_path, log_directory, name, removed: Cell::new(false) };
    Ok((Some(pod), output))
}

impl Pod {
    /// Starts a pod with `crictl runp --runtime HANDLER`.
    pub fn start(node: &Arc<Node>, handler: &str, spec: PodSpec) -> Result<Self> {
        let (pod, output) = try_start(node, handler, spec)?;
        pod.with_context(|| output.describe())
    }

    /// Creates a container, not started.
    pub fn create(&self, spec: ContainerSpec) -> Result<Container<'_>> {
        Container::create(self, spec)
    }

    /// Creates and starts a container.
    pub fn run(&self, spec: ContainerSpec) -> Result<Container<'_>> {
        let container = self.create(spec)?;
        container.start()?;
        Ok(container)
    }

    /// `crictl inspectp`, as JSON.
    pub fn inspect(&self) -> Result<Value> {
        let output = self.node.crictl(&["inspectp", "-o", "json", &self.id]).success()?;
        serde_json::from_slice(&output.stdout).context("parse the answer of crictl inspectp")
    }

    /// Whether CRI calls the sandbox ready.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.inspect()?["status"]["state"] == "SANDBOX_READY")
    }

    /// Addresses of the pod, the first one first.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        let status = self.inspect()?;
        let network = &status["status"]["network"];
        let more = network["additionalIps"].as_array().cloned().unwrap_or_default();
        let all = std::iter::once(&network["ip"]).chain(more.iter().map(|entry| &entry["ip"]));
        all.map(|address| {
            let address = address.as_str().with_context(|| format!("no address in {network}"))?;
            address.parse().with_context(|| format!("address {address}"))
        })
        .collect()
    }

    /// `crictl stopp`: ends the pod, keeps its record.
    pub fn stop(&self) -> Result<Output> {
        self.node.crictl(&["stopp", &self.id]).success()
    }

    /// Removes the pod after a stop.
    pub fn remove(self) -> Result<()> {
        self.stop()?;
        self.node.crictl(&["rmp", &self.id]).success()?;
        self.gone();
        Ok(())
    }

    /// `crictl rmp -f`, whatever state the pod is in.
    pub fn remove_by_force(self) -> Result<()> {
        self.force()?;
        self.gone();
        Ok(())
    }

    fn force(&self) -> Result<Output> {
        self.node.crictl(&["rmp", "-f", &self.id]).success()
    }

    /// Fails unless a pod's record is gone.
    pub fn check_unknown(node: &Node, id: &str) -> Result<()> {
        let left = node.crictl(&["pods", "-q", "--no-trunc"]).success()?.text();
        ensure!(!left.contains(id), "pod {id} is still listed");
        Ok(())
    }

    /// Leaves the pod's cgroup no more memory than it uses now, and `spare_bytes`.
    pub fn limit_memory(&self, spare_bytes: u64) -> Result<()> {
        let used = self.node.cgroups.memory_usage(&self.name)?;
        self.node.cgroups.limit_memory(&self.name, used + spare_bytes)
    }

    /// A command of `crictl` about this pod.
    pub fn crictl(&self, args: &[&str]) -> Run {
        self.node.crictl(args)
    }

    fn gone(&self) {
        self.removed.set(true);
        self.node.forget_pod_cgroup(&self.name);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if !self.removed.get() {
            // The failure that led here is being reported; what is left behind is found by the leak check.
            let _ = self.force();
            self.gone();
        }
    }
}
