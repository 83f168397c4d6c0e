//! Kubernetes' own end-to-end suite, `e2e.test`, on our cluster of one node ([`crate::cluster`]), whose pods are all of
//! one runtime.
//!
//! What runs is what every cluster and every node has to pass ("Kinds of tests" in
//! <https://github.com/kubernetes/community/blob/master/contributors/devel/sig-testing/e2e-tests.md>), but for specs
//! that want the cluster for themselves or take many minutes each. Nothing is pulled: the images that the suite names
//! are made here under those names ([`images`]). Specs name no RuntimeClass, and some of them limit a pod to less than a
//! virtual machine takes: their overhead counts by a policy ([`crate::cluster::admission`]).

pub mod images;
pub mod inherent;
pub mod sample;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::user::wait_for;
use crate::cluster::{Cluster, leaks};
use crate::command::Run;
use crate::ginkgo::literally;
use crate::ginkgo::report::Report;
use crate::row::Runtime;
use crate::tools;

/// The specs, by ginkgo's labels.
const LABELS: &str = "(Conformance || NodeConformance) && !Serial && !Slow && !Disruptive";

/// Specs that are left out beyond that, and why.
const LEFT_OUT: [(&str, &str); 2] = [
    (
        "[sig-architecture] Conformance Tests should have at least two untainted nodes [Conformance]",
        "left out: it wants a second node",
    ),
    (
        "[sig-node] ImageVolume should succeed with pod and pull policy of Always [LinuxOnly] \
         [MinimumKubeletVersion:1.35] [Conformance]",
        "left out: it pulls an image, and this suite does without a network",
    ),
];

/// How many specs run at a time unless `BULKHEAD_CONFORMANCE_PROCS` says otherwise.
const PROCS: u8 = 4;
/// ginkgo ends the suite by itself, with a report: two busy CPUs take about an hour with runc, and several under TCG.
const SUITE_TIMEOUT: &str = "11h";
/// Beyond [`SUITE_TIMEOUT`], by what the specs that run then have for cleaning up.
const SUITE_DEADLINE: Duration = Duration::from_hours(12);
/// How long the pods of the last specs may take to be gone.
const SETTLE: Duration = Duration::from_mins(5);

const REPORT: &str = "report.json";
const LOG: &str = "e2e.log";

/// An empty directory for what a run with `runtime` leaves: the report, the suite's log and those of the daemons.
pub fn report_directory(runtime: Runtime) -> Result<PathBuf> {
    let directory = tools::target_directory()?.join("conformance").join(runtime.name());
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    Ok(directory)
}

/// Imports the images and runs the suite. `focus` is a regular expression on the specs' names.
///
/// What was said is kept in `directory`. Specs that fail are no error here.
pub fn run(cluster: &Cluster, focus: Option<&str>, directory: &Path) -> Result<Report> {
    // Goes with the cluster.
    let scratch = cluster.layout.root.join("conformance");
    fs::create_dir_all(&scratch).with_context(|| format!("make {}", scratch.display()))?;
    cluster.import(&images::all(&scratch)?)?;

    let log = directory.join(LOG);
    println!("the suite's log grows in {}", log.display());
    let run = suite(cluster, focus, directory, &scratch)?;
    let ended = run.deadline(SUITE_DEADLINE).output();
    remove_files_of_specs();
    let code = ended?.code;
    let report = fs::read(directory.join(REPORT)).with_context(|| {
        format!("the suite ended with {code} and left no report; its log ends with\n{}", end_of(&log))
    })?;
    let reason = |name: &str| LEFT_OUT.iter().find(|(left_out, _)| name == *left_out).map(|(_, why)| *why);
    Ok(Report::parse(&report)?.settle(|name| if focus.is_none() { reason(name) } else { None }))
}

/// The command line of the suite, which runs in the node's namespaces: specs ask the node's addresses directly.
fn suite(cluster: &Cluster, focus: Option<&str>, directory: &Path, scratch: &Path) -> Result<Run> {
    let bin = cluster.layout.root.join("bin");
    let skip = literally(LEFT_OUT.iter().map(|(name, _)| *name));
    let mut run = cluster
        // A file and not a pipe: it can be read while the suite runs.
        .inside(&["/bin/sh", "-c", "exec \"$@\" >\"$0\" 2>&1"])
        .arg(directory.join(LOG))
        .arg(tools::kubernetes("ginkgo")?)
        .args(["run", "--no-color", "--silence-skips"])
        .arg(format!("--procs={}", procs()?))
        .arg(format!("--timeout={SUITE_TIMEOUT}"))
        .arg(format!("--output-dir={}", directory.display()))
        .arg(format!("--json-report={REPORT}"))
        .arg(format!("--label-filter={LABELS}"))
        .arg(format!("--skip={skip}"));
    if let Some(focus) = focus {
        run = run.arg(format!("--focus={focus}"));
    }
    Ok(run
        .arg(tools::kubernetes("e2e.test")?)
        .args(["--", "--provider=skeleton", "--num-nodes=1", "--allowed-not-ready-nodes=0", "--disable-log-dump"])
        .arg(format!("--kubeconfig={}", cluster.layout.kubeconfig.display()))
        .arg(format!("--kubectl-path={}", bin.join("kubectl").display()))
        .arg(format!("--kubelet-root-dir={}", cluster.layout.root.join("kubelet").display()))
        .arg(format!("--e2e-output-dir={}", scratch.display()))
        .env("HOME", scratch)
        .env("TMPDIR", scratch)
        .env("KUBECTL_KUBERC", "false"))
}

fn procs() -> Result<u8> {
    match std::env::var("BULKHEAD_CONFORMANCE_PROCS") {
        Ok(text) => text.parse().with_context(|| format!("BULKHEAD_CONFORMANCE_PROCS is no number: {text:?}")),
        Err(_) => Ok(PROCS),
    }
}

/// The specs of host paths write to the node's `/tmp`, which is the machine's, and leave that there.
fn remove_files_of_specs() {
    for file in ["/tmp/test-file", "/tmp/sub-path/test-file"] {
        // Without those specs there is nothing.
        let _ = fs::remove_file(file);
    }
    // Refused if it is somebody else's who has more in it.
    let _ = fs::remove_dir("/tmp/sub-path");
}

/// Waits until nothing is on the node of pods that the suite has deleted.
pub fn wait_until_clean(cluster: &Cluster) -> Result<()> {
    wait_for("the suite's pods to be gone without a trace", SETTLE, || {
        let left = leaks::of_lost_pods(cluster)?;
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok(())
    })
}

/// Copies the logs of the node's daemons to `directory`.
pub fn keep_logs(cluster: &Cluster, directory: &Path) -> Result<()> {
    let logs = cluster.layout.root.join("log");
    for entry in fs::read_dir(&logs).with_context(|| format!("list {}", logs.display()))?.flatten() {
        // The pods' logs beside them are in directories.
        if entry.file_type()?.is_file() {
            let path = entry.path();
            fs::copy(&path, directory.join(entry.file_name())).with_context(|| format!("copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// The last lines of a log; empty if there is none.
fn end_of(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
