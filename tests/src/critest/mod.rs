//! The CRI's own conformance suite, `critest` of <https://github.com/kubernetes-sigs/cri-tools>, on one of our nodes.
//!
//! Nothing is pulled: the images that the suite names are made here under those names ([`image`]). What comes out is
//! told as that of every suite of its kind ([`crate::ginkgo`]).

pub mod image;
pub mod sample;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::command::Run;
use crate::containerd::{CRI_NAMESPACE, Node};
use crate::ginkgo::report::Report;
use crate::ginkgo::verdict::Inherent;
use crate::row::Runtime;
use crate::tools;

/// Specs that no microVM passes.
pub const INHERENT: [Inherent; 4] = [
    ("runtime should support HostIpc is true", "a VM has no place in the host's IPC namespace"),
    ("runtime should support HostNetwork is true", "a VM has no place in the host's network namespace"),
    ("runtime should support portforward in host network", "a VM has no place in the host's network namespace"),
    (
        "mount with 'rshared' should support propagation from host to container and vice versa",
        "mounts that a guest makes do not reach the host",
    ),
];

/// Containers of specs that pull images, as the suite names them.
const PULLING: &str = "Image Manager|Image Consistency|Image Identifier Consistency";
/// Why they are left out.
const PULLING_REASON: &str = "left out: it pulls images, and this suite does without a network";
/// A whole run takes about ten minutes under TCG.
const SUITE_DEADLINE: Duration = Duration::from_mins(45);
/// Size in bytes of the shared memory segments that specs of the host's IPC namespace make and forget.
const SEGMENT_SIZE: &str = "1048576";

/// Runs the suite with `runtime` as its handler. `focus` is a regular expression on the specs' names.
///
/// What was said is kept in `directory`, as `<runtime>.json` and `<runtime>.log`. Specs that fail are no error here.
pub fn run(node: &Node, runtime: Runtime, focus: Option<&str>, directory: &Path) -> Result<Report> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let file = |extension: &str| directory.join(format!("{}.{extension}", runtime.name()));
    let json = file("json");
    if json.exists() {
        fs::remove_file(&json).with_context(|| format!("remove {}", json.display()))?;
    }
    let endpoint = format!("unix://{}", node.layout.socket.display());
    // The suite leaves files of its own behind.
    let scratch = node.scratch()?;
    let segments = segments()?;
    let mut run = Run::new(tools::critest()?)
        .args(["--config", "/dev/null", "--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint])
        .args(["--runtime-handler", runtime.handler(), "--ginkgo.no-color", "--ginkgo.timeout=40m"])
        .args(["--ginkgo.skip", PULLING])
        .arg(format!("--ginkgo.json-report={}", json.display()))
        .env("TMPDIR", scratch.to_string_lossy().as_ref())
        .deadline(SUITE_DEADLINE);
    if let Some(focus) = focus {
        run = run.args(["--ginkgo.focus", focus]);
    }
    let output = run.output()?;
    fs::write(file("log"), &output.stdout).context("keep critest's output")?;
    remove_pods(node)?;
    unmount_below(&scratch);
    remove_segments(&segments);
    let report = fs::read(&json).with_context(|| format!("critest left no report\n{}", output.describe()))?;
    let pulls = |name: &str| focus.is_none() && PULLING.split('|').any(|container| name.contains(container));
    Ok(Report::parse(&report)?.settle(|name| pulls(name).then_some(PULLING_REASON)))
}

/// Removes what failed specs left, and has the leak check look for everything of it.
fn remove_pods(node: &Node) -> Result<()> {
    for kind in [["pods", "-q"], ["ps", "-aq"]] {
        for id in node.crictl(&kind).arg("--no-trunc").success()?.text().lines() {
            node.remember(CRI_NAMESPACE, id);
        }
    }
    // What cannot be removed shows in the leak check.
    node.crictl(&["rmp", "-f", "-a"]).output()?;
    Ok(())
}

/// Undoes mounts of the suite's own, which specs leave behind that fail half-way.
fn unmount_below(directory: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(directory)) {
        // What stays shows in the leak check.
        let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Ids of the machine's shared memory segments that look like the suite's.
fn segments() -> Result<BTreeSet<String>> {
    let table = fs::read_to_string("/proc/sysvipc/shm").context("read /proc/sysvipc/shm")?;
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    Ok(rows.filter(|row| row.get(3) == Some(&SEGMENT_SIZE)).filter_map(|row| Some((*row.get(1)?).to_owned())).collect())
}

fn remove_segments(before: &BTreeSet<String>) {
    for id in segments().unwrap_or_default().difference(before) {
        // A segment of somebody else's that is in use stays until they have done with it.
        let _ = Run::new("/usr/bin/ipcrm").args(["-m", id]).output();
    }
}

/// Where reports are kept.
pub fn report_directory() -> Result<PathBuf> {
    Ok(tools::target_directory()?.join("critest"))
}
