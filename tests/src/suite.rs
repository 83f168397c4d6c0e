//! A list of rows, run against each containerd and each runtime, one after the other.
//!
//! The environment chooses the containerds, also those that a suite leaves out to save time
//! (`BULKHEAD_TEST_CONTAINERDS=1.6,1.7,2.4`), and narrows the runtimes (`BULKHEAD_TEST_RUNTIMES=runc`); the usual arguments
//! of a Rust test (a filter, `--list`, `--exact`) work on the names.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::containerd::Node;
use crate::leaks::{self, Snapshot};
use crate::pod::{Pod, PodSpec};
use crate::row::{Context, Row, Runtime, Test};
use crate::tools::{BulkheadTools, Version};

/// Runs `rows` on every combination of `versions`, unless the environment names others, and `runtimes`; the value for `main`
/// to return.
pub fn run(versions: &[Version], runtimes: &[Runtime], rows: &'static [Row]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Rows share a containerd and the machine's two or so CPUs, and they measure what is left behind.
    arguments.test_threads = Some(1);
    let stage = Arc::new(Mutex::new(Stage::default()));
    let mut trials = Vec::new();
    let releases = named("BULKHEAD_TEST_CONTAINERDS");
    let versions = if releases.is_some() { &Version::ALL } else { versions };
    let runtimes = wanted_runtimes(runtimes);
    for &version in versions.iter().filter(|version| wanted(releases.as_deref(), &version.to_string())) {
        for &runtime in &runtimes {
            if runtime.by_sandbox_api() && !version.is_v2() {
                continue;
            }
            let holds = |row: &&Row| {
                (row.only.is_empty() || row.only.contains(&runtime))
                    && (row.releases.is_empty() || row.releases.contains(&version))
            };
            for row in rows.iter().filter(holds) {
                let stage = Arc::clone(&stage);
                let name = format!("{version} {}: {}", runtime.name(), row.name);
                trials.push(trial(name, move || on(&stage, |stage| stage.run_row(version, runtime, row))));
            }
        }
        let stage = Arc::clone(&stage);
        let name = format!("{version}: nothing is left when containerd has ended");
        trials.push(trial(name, move || on(&stage, Stage::close)));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A filter may have left out the trial that closes the stage.
    if let Err(error) = on(&stage, Stage::close) {
        eprintln!("{error:#}");
        return ExitCode::from(101);
    }
    conclusion.exit_code()
}

/// Those of `runtimes` that the environment asks for: `BULKHEAD_TEST_RUNTIMES`, or all.
pub fn wanted_runtimes(runtimes: &[Runtime]) -> Vec<Runtime> {
    let named = named("BULKHEAD_TEST_RUNTIMES");
    runtimes.iter().copied().filter(|runtime| wanted(named.as_deref(), runtime.name())).collect()
}

/// The list in `variable`. None: it is not set.
fn named(variable: &str) -> Option<Vec<String>> {
    let list = std::env::var(variable).ok()?;
    Some(list.split(',').map(|entry| entry.trim().to_owned()).collect())
}

fn wanted(named: Option<&[String]>, name: &str) -> bool {
    named.is_none_or(|named| named.iter().any(|entry| entry == name))
}

/// A trial that tells how long it took.
pub(crate) fn trial(name: String, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let started = Instant::now();
        let result = test();
        print!("{:.1} s ", started.elapsed().as_secs_f32());
        result.map_err(|error| Failed::from(format!("{error:#}")))
    })
}

/// Does something with what trials share, also after one that panicked.
pub(crate) fn on<T>(stage: &Mutex<T>, action: impl FnOnce(&mut T) -> Result<()>) -> Result<()> {
    action(&mut stage.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What rows share: the containerd of the current version and a pod of the current runtime.
#[derive(Debug, Default)]
struct Stage {
    // Dropped before the node.
    pod: Option<(Runtime, Pod)>,
    node: Option<Arc<Node>>,
    /// A version whose containerd did not start, and why: it is not tried again for each row.
    broken: Option<(Version, String)>,
}

impl Stage {
    fn run_row(&mut self, version: Version, runtime: Runtime, row: &Row) -> Result<()> {
        let node = self.node(version)?;
        if runtime.is_bulkhead() {
            BulkheadTools::find()?;
        }
        node.check_daemon()?;
        let log_position = node.log_position();
        if let Test::InPod(_) = row.test {
            self.prepare_pod(&node, runtime).map_err(|error| with_log(&error, &node, log_position))?;
        }
        let context = Context { node: Arc::clone(&node), runtime, scratch: node.scratch()? };
        let before = Snapshot::take(&node)?;
        let pod = self.pod.as_ref().map(|(_, pod)| pod);
        let result = catch_unwind(AssertUnwindSafe(|| match (row.test, pod) {
            (Test::Alone(test), _) => test(&context),
            (Test::InPod(test), Some(pod)) => test(&context, pod),
            (Test::InPod(_), None) => bail!("no pod was prepared"),
        }));
        let mut result = result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(anyhow!("panicked: {}", text.unwrap_or("without a text")))
        });
        if result.is_err() && matches!(row.test, Test::InPod(_)) {
            // Whatever the row left in the pod must not meet the next one.
            self.pod = None;
        }
        let left = before.leaks(&node)?;
        if !left.is_empty() {
            let mut text = String::from("left behind:");
            for thing in left {
                // Writing to a String cannot fail.
                let _ = write!(text, "\n  {thing}");
            }
            result = match result {
                Ok(()) => Err(anyhow!(text)),
                Err(error) => Err(anyhow!("{error:#}\n{text}")),
            };
        }
        result.map_err(|error| with_log(&error, &node, log_position))
    }

    fn node(&mut self, version: Version) -> Result<Arc<Node>> {
        if let Some(node) = self.node.as_ref().filter(|node| node.version == version) {
            return Ok(Arc::clone(node));
        }
        self.close()?;
        if let Some((_, reason)) = self.broken.as_ref().filter(|(broken, _)| *broken == version) {
            bail!("containerd {version} did not start: {reason}");
        }
        match Node::start(version, BulkheadTools::find().ok().as_ref()) {
            Ok(node) => Ok(Arc::clone(self.node.insert(Arc::new(node)))),
            Err(error) => {
                self.broken = Some((version, format!("{error:#}")));
                Err(error)
            }
        }
    }

    /// Makes sure that there is a pod of `runtime` that works.
    fn prepare_pod(&mut self, node: &Arc<Node>, runtime: Runtime) -> Result<()> {
        if let Some((other, pod)) = &self.pod {
            if *other == runtime && pod.is_ready().unwrap_or(false) {
                return Ok(());
            }
            if let Some((other, pod)) = self.pod.take() {
                pod.remove_by_force().with_context(|| format!("remove the shared pod of {}", other.name()))?;
            }
        }
        let pod = Pod::start(node, runtime.handler(), PodSpec::new()).context("start the pod that rows share")?;
        self.pod = Some((runtime, pod));
        Ok(())
    }

    /// Ends the current containerd and tells what is left of it.
    fn close(&mut self) -> Result<()> {
        let removed = self.pod.take().map_or(Ok(()), |(_, pod)| pod.remove());
        let Some(node) = self.node.take() else { return removed };
        let stopped = node.stop();
        let left = leaks::after_stop(&node)?;
        leaks::clean_up(&node);
        removed?;
        stopped?;
        if !left.is_empty() {
            bail!("left behind:\n  {}", left.join("\n  "));
        }
        Ok(())
    }
}

fn with_log(error: &anyhow::Error, node: &Node, position: u64) -> anyhow::Error {
    // The error comes last: what keeps only the end of a run's output still tells it.
    anyhow!("containerd's log meanwhile:\n{}\n\n{error:#}", node.log_since(position, 40))
}
