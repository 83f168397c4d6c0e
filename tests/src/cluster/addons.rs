//! What is installed on a fresh cluster: the RuntimeClasses as they are shipped, and DNS.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::cluster::images::COREDNS;
use crate::cluster::network::DNS_SERVICE;
use crate::row::Runtime;

/// The manifest that users are told to apply.
const RUNTIME_CLASS: &str = include_str!("../../../runtimeclass/runtimeclass.yaml");

/// Two servers, since `template` answers before `kubernetes` within one.
const COREFILE: &str = "cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {
  errors
  health
  ready
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    pods insecure
    ttl 5
  }
  cache 5
  loadbalance
}
.:53 {
  errors
  template ANY ANY {
    rcode NXDOMAIN
  }
}
";

/// Installs everything; does not wait for DNS to be ready.
pub fn install(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["apply", "-f", "-"]).input(RUNTIME_CLASS).success().context("apply the RuntimeClass")?;
    for object in runtime_classes().into_iter().chain(dns()) {
        cluster.kubectl(&["apply", "-f", "-"]).input(object.to_string()).success()?;
    }
    Ok(())
}

/// Those that name the measure and Bulkhead's second door; a user's pod names no class for the former.
fn runtime_classes() -> Vec<Value> {
    [Runtime::Runc, Runtime::BulkheadSandbox]
        .iter()
        .map(|runtime| {
            json!({
                "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
                "metadata": {"name": runtime.handler()}, "handler": runtime.handler(),
            })
        })
        .collect()
}

fn dns() -> Vec<Value> {
    let (namespace, labels) = ("kube-system", json!({"k8s-app": "kube-dns"}));
    let named = |name: &str| json!({"name": name, "namespace": namespace});
    let list_and_watch = |group: &str, resources: &[&str]| {
        let verbs = ["list", "watch"];
        json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
    };
    vec![
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named("coredns")}),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "system:coredns"},
            "rules": [
                list_and_watch("", &["endpoints", "services", "pods", "namespaces"]),
                list_and_watch("discovery.k8s.io", &["endpointslices"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": namespace}],
        }),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": named("coredns"), "data": {"Corefile": COREFILE},
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "coredns", "namespace": namespace, "labels": labels},
            "spec": {
                "replicas": 1, "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        // So that a runtime under test does not take the cluster's DNS along.
                        "runtimeClassName": Runtime::Runc.handler(),
                        "serviceAccountName": "coredns", "dnsPolicy": "Default",
                        "priorityClassName": "system-cluster-critical",
                        "tolerations": [{"operator": "Exists"}],
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{
                            "name": "coredns", "image": COREDNS, "args": ["-conf", "/etc/coredns/Corefile"],
                            "resources": {"requests": {"cpu": "10m", "memory": "30Mi"}},
                            "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}],
                            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
                            "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
                        }],
                        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
                    },
                },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": namespace, "labels": labels},
            "spec": {
                "clusterIP": DNS_SERVICE, "selector": labels,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        }),
    ]
}
