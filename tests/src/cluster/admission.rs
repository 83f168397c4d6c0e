//! Where pods that name no RuntimeClass are virtual machines: has them name one after all, so that their overhead counts.
//!
//! Kubernetes takes `spec.overhead` from a RuntimeClass and from nowhere else. Without, the cgroup of a pod gets the mere sum
//! of what its containers may use, and the virtual machine has to live on that.
//!
//! A policy's change has the apiserver's own admission plugins run once more, so that setting the class is enough: the plugin
//! for RuntimeClasses, which has had its turn by then, sets overhead and node selector.
//! <https://kubernetes.io/docs/reference/access-authn-authz/mutating-admission-policy/>

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::cluster::user::wait_for;
use crate::image::BUSYBOX;

/// Name of the policy and of its binding.
const NAME: &str = "default-runtime-class";

/// The apiserver hears of its policies by a watch, and looks at the schema of pods every five seconds.
const TAKES_EFFECT: Duration = Duration::from_secs(60);

/// Holds for pods whose cgroup gets a limit: a resource is limited for all of the containers, or for the pod.
///
/// The others lack nothing, and dozens of them at a time would no longer fit on a node of two CPUs.
const IS_LIMITED: &str = "['cpu', 'memory'].exists(resource, object.spec.containers.all(container, \
     has(container.resources) && has(container.resources.limits) && resource in container.resources.limits) || \
     has(object.spec.resources) && has(object.spec.resources.limits) && resource in object.spec.resources.limits)";

/// Label that the conformance suite gives to the namespaces of its specs, and its values where no pod is touched: the specs
/// of the one reckon to the byte what a quota counts, with pods that never start; those of the other make pods that are large
/// enough, and would take the CPUs of the specs beside them.
const UNTOUCHED: (&str, [&str; 2]) = ("e2e-framework", ["resourcequota", "limitrange"]);

/// Installs the policy that names `class`, and waits until it is in effect.
pub fn install(cluster: &Cluster, class: &str) -> Result<()> {
    for object in [policy(class), binding()] {
        cluster.kubectl(&["apply", "-f", "-"]).input(object.to_string()).success()?;
    }
    let pod = limited_pod().to_string();
    wait_for("pods to be given a RuntimeClass", TAKES_EFFECT, || {
        let create = cluster.kubectl(&["create", "--dry-run=server", "--output=json", "-f", "-"]);
        let pod: Value = serde_json::from_slice(&create.input(pod.as_str()).success()?.stdout)?;
        let spec = &pod["spec"];
        let is_given = spec["runtimeClassName"] == class && spec["overhead"].is_object();
        ensure!(is_given, "a pod has {} and the overhead {}", spec["runtimeClassName"], spec["overhead"]);
        Ok(())
    })
}

fn policy(class: &str) -> Value {
    let (label, values) = UNTOUCHED;
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy", "metadata": {"name": NAME},
        "spec": {
            "matchConstraints": {
                "resourceRules": [{
                    "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"],
                }],
                "namespaceSelector": {
                    "matchExpressions": [{"key": label, "operator": "NotIn", "values": values}],
                },
            },
            "matchConditions": [
                {"name": "names-none", "expression": "!has(object.spec.runtimeClassName)"},
                {"name": "is-limited", "expression": IS_LIMITED},
            ],
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patch(class)}}],
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
        },
    })
}

fn patch(class: &str) -> String {
    format!(r#"[JSONPatch{{op: "add", path: "/spec/runtimeClassName", value: "{class}"}}]"#)
}

fn binding() -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": NAME}, "spec": {"policyName": NAME},
    })
}

/// One that the policy is for.
fn limited_pod() -> Value {
    let container = json!({"name": "main", "image": BUSYBOX, "resources": {"limits": {"memory": "64Mi"}}});
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe", "namespace": "default"},
        "spec": {"containers": [container]},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_is_an_expression_of_one_operation() {
        let expected = r#"[JSONPatch{op: "add", path: "/spec/runtimeClassName", value: "bulkhead"}]"#;
        assert_eq!(policy("bulkhead")["spec"]["mutations"][0]["jsonPatch"]["expression"], expected);
    }
}
