//! Certificates of a cluster, by the `openssl` command line, and a kubeconfig for each component.
//!
//! One authority for servers and clients, one for the aggregation layer's front proxy, and a pair of keys for the tokens of
//! service accounts (<https://kubernetes.io/docs/setup/best-practices/certificates/>).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::cluster::NODE;
use crate::cluster::layout::Layout;
use crate::command::Run;

const DAYS: &str = "365";

/// Makes all keys, certificates and kubeconfigs. `addresses` are those that the apiserver is reached by.
pub fn make(layout: &Layout, addresses: &[String]) -> Result<()> {
    authority(layout, "ca", "bulkhead-cluster")?;
    authority(layout, "front-proxy-ca", "bulkhead-cluster-front-proxy")?;
    openssl(layout, &["genrsa", "-out", "sa.key", "2048"])?;
    openssl(layout, &["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"])?;

    let mut names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        .iter()
        .map(|name| format!("DNS:{name}"))
        .collect::<Vec<_>>();
    names.push("DNS:kubernetes.default.svc.cluster.local".into());
    names.extend(addresses.iter().map(|address| format!("IP:{address}")));
    sign(layout, "ca", "apiserver", "/CN=kube-apiserver", &names)?;
    let mut names = vec![format!("DNS:{NODE}")];
    names.extend(addresses.iter().map(|address| format!("IP:{address}")));
    sign(layout, "ca", "kubelet", &format!("/O=system:nodes/CN=system:node:{NODE}"), &names)?;
    sign(layout, "front-proxy-ca", "front-proxy", "/CN=front-proxy-client", &[])?;
    for (component, subject) in [
        ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
        ("admin", "/O=system:masters/CN=admin"),
        ("controller-manager", "/CN=system:kube-controller-manager"),
        ("scheduler", "/CN=system:kube-scheduler"),
        ("kube-proxy", "/CN=system:kube-proxy"),
    ] {
        sign(layout, "ca", component, subject, &[])?;
    }
    Ok(())
}

/// Writes a kubeconfig with `component`'s certificate for the apiserver at `server`. Everything is in the file itself, so
/// that it works wherever it is copied to.
pub fn kubeconfig(layout: &Layout, component: &str, server: &str, path: &Path) -> Result<()> {
    let embedded = |file: String| -> Result<String> {
        let output = Run::new("/usr/bin/openssl").args(["base64", "-A", "-in"]).arg(layout.pki(&file)).success()?;
        Ok(output.text())
    };
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bulkhead-cluster",
        "clusters": [{"name": "bulkhead-cluster", "cluster": {
            "server": server, "certificate-authority-data": embedded("ca.crt".into())?,
        }}],
        "users": [{"name": component, "user": {
            "client-certificate-data": embedded(format!("{component}.crt"))?,
            "client-key-data": embedded(format!("{component}.key"))?,
        }}],
        "contexts": [{"name": "bulkhead-cluster", "context": {"cluster": "bulkhead-cluster", "user": component}}],
    });
    fs::write(path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("write {}", path.display()))
}

fn authority(layout: &Layout, name: &str, common_name: &str) -> Result<()> {
    let (key, certificate) = (format!("{name}.key"), format!("{name}.crt"));
    openssl(
        layout,
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            DAYS,
            "-keyout",
            &key,
            "-out",
            &certificate,
            "-subj",
            &format!("/CN={common_name}"),
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,digitalSignature,keyEncipherment,keyCertSign",
        ],
    )
}

/// A key `name.key` and its certificate for clients, and for servers of `names` if there are any.
fn sign(layout: &Layout, authority: &str, name: &str, subject: &str, names: &[String]) -> Result<()> {
    let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
    openssl(
        layout,
        &["req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", &key, "-out", &request, "-subj", subject],
    )?;
    let mut extensions = String::from("basicConstraints=CA:FALSE\nkeyUsage=digitalSignature,keyEncipherment\n");
    if names.is_empty() {
        extensions.push_str("extendedKeyUsage=clientAuth\n");
    } else {
        extensions.push_str("extendedKeyUsage=clientAuth,serverAuth\nsubjectAltName=");
        extensions.push_str(&names.join(","));
        extensions.push('\n');
    }
    let file = format!("{name}.ext");
    fs::write(layout.pki(&file), extensions).with_context(|| format!("write {file}"))?;
    openssl(
        layout,
        &[
            "x509",
            "-req",
            "-days",
            DAYS,
            "-in",
            &request,
            "-CA",
            &format!("{authority}.crt"),
            "-CAkey",
            &format!("{authority}.key"),
            "-CAcreateserial",
            "-out",
            &certificate,
            "-extfile",
            &file,
        ],
    )
}

fn openssl(layout: &Layout, args: &[&str]) -> Result<()> {
    Run::new("/usr/bin/env").arg("-C").arg(layout.root.join("pki")).arg("openssl").args(args).success()?;
    Ok(())
}
