//! What a user of the cluster does: `kubectl` in a namespace of their own, with pods of one runtime.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::command::{Run, wait_at};
use crate::row::Runtime;

/// How long a pod may take to become ready or to end, unless a row says otherwise: an emulated guest boots in two to five
/// seconds, and much slower while others boot beside it.
pub const SOON: Duration = Duration::from_secs(90);

/// Between two looks at an object of the API: a look is a run of `kubectl`, which costs a tenth of a CPU second.
const PACE: Duration = Duration::from_millis(400);

/// A namespace of the cluster, and the runtime that its pods name.
#[derive(Debug)]
pub struct User {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// The namespace, which is this user's alone.
    pub namespace: String,
    /// What runs the pods.
    pub runtime: Runtime,
}

impl User {
    /// Makes the namespace.
    pub fn new(cluster: &Arc<Cluster>, namespace: &str, runtime: Runtime) -> Result<Self> {
        cluster.kubectl(&["create", "namespace", namespace]).success()?;
        let user = Self { cluster: Arc::clone(cluster), namespace: namespace.to_owned(), runtime };
        // Until these are there, pods are refused, or wait for a volume that is looked for again only after a while.
        wait_for("what controllers put into a namespace", SOON, || {
            user.kubectl(&["get", "serviceaccount/default", "configmap/kube-root-ca.crt"]).success()
        })?;
        Ok(user)
    }

    /// Whether the pods are virtual machines.
    pub fn is_bulkhead(&self) -> bool {
        self.runtime.is_bulkhead()
    }

    /// Name of the RuntimeClass, which is that of the handler.
    pub fn runtime_class(&self) -> &'static str {
        self.runtime.handler()
    }

    /// A `kubectl` command in the namespace.
    pub fn kubectl(&self, args: &[&str]) -> Run {
        self.cluster.kubectl(&["--namespace", &self.namespace]).args(args)
    }

    /// Makes or changes an object; what it lacks of a namespace is this user's.
    pub fn apply(&self, manifest: &Value) -> Result<()> {
        self.kubectl(&["apply", "-f", "-"]).input(manifest.to_string()).success()?;
        Ok(())
    }

    /// A pod's template: `spec` with the runtime in it, and a grace period of one second unless it has another.
    pub fn pod_spec(&self, mut spec: Value) -> Value {
        spec["runtimeClassName"] = json!(self.runtime_class());
        if spec.get("terminationGracePeriodSeconds").is_none() {
            spec["terminationGracePeriodSeconds"] = json!(1);
        }
        spec
    }

    /// The manifest of a pod, labelled `app: NAME`.
    pub fn manifest(&self, name: &str, spec: Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
            "spec": self.pod_spec(spec),
        })
    }

    /// Makes a pod.
    pub fn pod(&self, name: &str, spec: Value) -> Result<()> {
        self.apply(&self.manifest(name, spec))
    }

    /// Makes a pod and waits until it is ready; its object.
    pub fn ready_pod(&self, name: &str, spec: Value) -> Result<Value> {
        self.pod(name, spec)?;
        self.ready(name)
    }

    /// Makes a pod and waits until it has succeeded or failed; its object.
    pub fn finished_pod(&self, name: &str, spec: Value) -> Result<Value> {
        self.pod(name, spec)?;
        self.finished(name)
    }

    /// An object, `kubectl get WHAT... --output json`.
    pub fn get(&self, what: &[&str]) -> Result<Value> {
        let text = self.kubectl(&["get"]).args(what).args(["--output", "json"]).success()?.stdout;
        serde_json::from_slice(&text).with_context(|| format!("parse {what:?}"))
    }

    /// Waits until `probe` has an answer about a pod; fails with the pod's state and events.
    pub fn wait_pod<T>(
        &self,
        name: &str,
        what: &str,
        deadline: Duration,
        mut probe: impl FnMut(&Value) -> Result<T>,
    ) -> Result<T> {
        wait_for(&format!("pod {name} {what}"), deadline, || probe(&self.get(&["pod", name])?))
            .map_err(|error| anyhow!("{error:#}\n{}", self.describe(name)))
    }

    /// Waits until a pod is ready; its object. A pod that has ended meanwhile is an error at once.
    pub fn ready(&self, name: &str) -> Result<Value> {
        let pod = self.wait_pod(name, "to be ready", SOON, |pod| {
            ensure!(condition(pod, "Ready") == "True" || has_ended(pod), "its status is {}", pod["status"]);
            Ok(pod.clone())
        })?;
        ensure!(!has_ended(&pod), "pod {name} has ended\n{}", self.describe(name));
        Ok(pod)
    }

    /// Waits until a pod has succeeded or failed; its object.
    pub fn finished(&self, name: &str) -> Result<Value> {
        self.wait_pod(name, "to end", SOON, |pod| {
            ensure!(has_ended(pod), "its status is {}", pod["status"]);
            Ok(pod.clone())
        })
    }

    /// Deletes an object and waits until it is gone.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.kubectl(&["delete", kind, name, "--timeout=80s"]).deadline(SOON).success()?;
        Ok(())
    }

    /// `kubectl exec` in a pod's first container.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Run {
        self.kubectl(&["exec", pod, "--quiet", "--"]).args(command)
    }

    /// What a shell in a pod's first container writes to its stdout; it has to exit with 0.
    pub fn sh(&self, pod: &str, script: &str) -> Result<String> {
        Ok(self.exec(pod, &["sh", "-c", script]).success()?.text())
    }

    /// What a pod's first container wrote.
    pub fn logs(&self, pod: &str) -> Result<String> {
        Ok(self.kubectl(&["logs", pod]).success()?.text())
    }

    /// Waits until a pod's log has `text` in it; the log.
    pub fn wait_log(&self, pod: &str, text: &str) -> Result<String> {
        wait_for(&format!("{text:?} in the log of {pod}"), SOON, || {
            let log = self.logs(pod)?;
            ensure!(log.contains(text), "the log is {log:?}");
            Ok(log)
        })
    }

    /// Address of a pod, of the first family unless `v6`.
    pub fn address(&self, pod: &str, v6: bool) -> Result<String> {
        let pod = self.get(&["pod", pod])?;
        let addresses = pod["status"]["podIPs"].as_array().cloned().unwrap_or_default();
        let found = addresses.iter().filter_map(|entry| entry["ip"].as_str()).find(|ip| ip.contains(':') == v6);
        Ok(found.with_context(|| format!("no such address in {addresses:?}"))?.to_owned())
    }

    /// A pod's state and events, for messages.
    pub fn describe(&self, name: &str) -> String {
        let mut text = String::new();
        for args in [vec!["describe", "pod", name], vec!["logs", name, "--all-containers", "--prefix", "--tail=20"]] {
            if let Ok(output) = self.kubectl(&args).output() {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{}", output.describe());
            }
        }
        text
    }

    /// Has the namespace deleted, without waiting for that.
    pub fn leave(&self) -> Result<()> {
        self.cluster.kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]).success()?;
        Ok(())
    }
}

/// Whether a pod has succeeded or failed.
pub fn has_ended(pod: &Value) -> bool {
    ["Succeeded", "Failed"].map(Value::from).contains(&pod["status"]["phase"])
}

/// Status of a pod's condition: `True`, `False`, `Unknown`, or nothing if it has none.
pub fn condition<'a>(object: &'a Value, kind: &str) -> &'a str {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == kind);
    found.and_then(|condition| condition["status"].as_str()).unwrap_or_default()
}

/// Status of one of a pod's containers; also of its init containers.
pub fn container_status(pod: &Value, container: &str) -> Result<Value> {
    for list in ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"] {
        let statuses = pod["status"][list].as_array().map(Vec::as_slice).unwrap_or_default();
        if let Some(status) = statuses.iter().find(|status| status["name"] == container) {
            return Ok(status.clone());
        }
    }
    bail!("no container {container} in {}", pod["status"])
}

/// [`crate::command::wait_for`] at a pace that suits `kubectl`.
pub fn wait_for<T>(what: &str, deadline: Duration, probe: impl FnMut() -> Result<T>) -> Result<T> {
    wait_at(PACE, what, deadline, probe)
}
