//! The manifests that are shipped do as their comments say.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_tests::cluster::NODE;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, wait_for};
use bulkhead_tests::image::BUSYBOX;
use bulkhead_tests::row::Runtime;

use crate::volumes::{Claimed, loop_device};
use crate::workloads::rolled_out;

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("every manifest that is shipped is tried out", all_known).only(BULKHEAD),
    Row::new("the example pod shows the guest's kernel", example).only(BULKHEAD),
    Row::new("the sized pod has the machine that its annotations ask for", sized).only(BULKHEAD),
    Row::new("the example Deployments answer behind one Service, each with its own kernel", deployments).only(BULKHEAD),
    Row::new("the pod with a raw block volume shows the size of the device", block_volume).only(BULKHEAD),
];

/// What the manifests name themselves.
const BULKHEAD: &[Runtime] = &[Runtime::Bulkhead];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtimeclass")
}

/// Applies a manifest as it is, but for the image, which no registry is asked for.
fn apply(user: &User, name: &str) -> Result<()> {
    apply_with(user, name, &[])
}

/// Applies a manifest like [`apply`], with each first text replaced by the second, as its comment asks.
fn apply_with(user: &User, name: &str, replaced: &[(&str, &str)]) -> Result<()> {
    let path = directory().join(name);
    let mut text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let image = format!("image: {BUSYBOX}");
    for (shipped, ours) in replaced.iter().copied().chain([("image: busybox:stable", image.as_str())]) {
        ensure!(text.contains(shipped), "{} has no {shipped:?}", path.display());
        text = text.replace(shipped, ours);
    }
    user.kubectl(&["apply", "-f", "-"]).input(text).success()?;
    Ok(())
}

/// Has the pods of the namespace go sooner than their grace period says; nobody waits for it.
fn hurry(user: &User) -> Result<()> {
    user.kubectl(&["delete", "deployments", "--all", "--wait=false"]).success()?;
    user.kubectl(&["delete", "pods", "--all", "--grace-period=1", "--wait=false"]).success()?;
    Ok(())
}

fn node_kernel() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

fn all_known(user: &User) -> Result<()> {
    let entries = fs::read_dir(directory()).context("list the manifests")?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found: BTreeSet<_> =
        names.filter(|name| Path::new(name).extension().is_some_and(|end| end == "yaml")).collect();
    // A row each, but for the RuntimeClass, which the cluster has been given.
    let known = ["block-volume.yaml", "deployment.yaml", "example-pod.yaml", "runtimeclass.yaml", "sized-pod.yaml"];
    ensure!(found == BTreeSet::from(known.map(str::to_owned)), "the manifests are {found:?}");
    let path = directory().join("runtimeclass.yaml");
    let path = path.to_str().context("a path that is no text")?;
    // Nothing is said where the cluster has the very same.
    let said = user.kubectl(&["diff", "-f", path]).success()?.text();
    ensure!(said.is_empty(), "the cluster's RuntimeClass is another one: {said}");
    Ok(())
}

fn example(user: &User) -> Result<()> {
    apply(user, "example-pod.yaml")?;
    user.ready("bulkhead-example")?;
    let kernel = user.wait_log("bulkhead-example", ".")?;
    ensure!(kernel.lines().count() == 1 && kernel != node_kernel()?, "the pod says {kernel:?}");
    hurry(user)
}

fn sized(user: &User) -> Result<()> {
    apply(user, "sized-pod.yaml")?;
    user.ready("bulkhead-sized")?;
    let said = user.wait_log("bulkhead-sized", "kB")?;
    let words: Vec<_> = said.split_whitespace().collect();
    let [cpus, "MemTotal:", kib, "kB"] = words[..] else { bail!("the pod says {said:?}") };
    let mib = kib.parse::<u32>().with_context(|| format!("the memory is {kib:?}"))? / 1024;
    ensure!(cpus == "2" && (430..=512).contains(&mib), "the machine has {cpus} CPUs and {mib} MiB");
    hurry(user)
}

fn deployments(user: &User) -> Result<()> {
    apply(user, "deployment.yaml")?;
    rolled_out(user, "deployment/hello-bulkhead")?;
    rolled_out(user, "deployment/hello-node")?;
    let node = node_kernel()?;
    let ask = "for i in $(seq 20); do wget -q -O - http://hello || exit 1; done";
    wait_for("answers of both kinds", SOON, || {
        let said = user.kubectl(&["exec", "deploy/hello-bulkhead", "--", "sh", "-c", ask]).success()?.text();
        let kernels: BTreeSet<_> = said.lines().collect();
        ensure!(kernels.len() == 2 && kernels.contains(node.as_str()), "the kernels are {kernels:?}");
        Ok(())
    })?;
    let guest = user.kubectl(&["exec", "deploy/hello-bulkhead", "--", "uname", "-r"]).success()?.text();
    ensure!(guest != node, "the kernel of the virtual machine is the node's");
    hurry(user)
}

fn block_volume(user: &User) -> Result<()> {
    let device = loop_device(user)?;
    let _claimed = Claimed::of(user, "bulkhead-block-volume");
    let path = format!("path: {}", device.path);
    apply_with(user, "block-volume.yaml", &[("path: /dev/vdb", path.as_str()), ("NODE", NODE)])?;
    user.ready("bulkhead-block-volume")?;
    let said = user.wait_log("bulkhead-block-volume", "8388608")?;
    ensure!(said == "8388608", "the pod says {said:?}");
    let deletion = ["delete", "pod", "bulkhead-block-volume", "--grace-period=1"];
    user.kubectl(&deletion).deadline(SOON).success()?;
    Ok(())
}
