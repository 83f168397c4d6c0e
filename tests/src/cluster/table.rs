//! The table of what users do on the cluster: each row runs with every runtime, in a namespace of its own.
//!
//! `BULKHEAD_TEST_RUNTIMES=bulkhead` narrows the runtimes; the usual arguments of a Rust test (a filter, `--list`, `--exact`)
//! work on the names. What pods left on the node is looked for when all rows have run, and what the node left on the machine
//! when it is down.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use libtest_mimic::Arguments;

use crate::cluster::leaks;
use crate::cluster::user::{User, wait_for};
use crate::cluster::{self, Cluster, Settings};
use crate::row::Runtime;
use crate::suite::{self, on, trial};

/// One promise to users.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The promise, as a sentence.
    pub name: &'static str,
    /// Its test.
    pub test: fn(&User) -> Result<()>,
    /// The only runtimes it holds for; empty: all.
    pub only: &'static [Runtime],
}

impl Row {
    /// A row for every runtime.
    pub const fn new(name: &'static str, test: fn(&User) -> Result<()>) -> Self {
        Self { name, test, only: &[] }
    }

    /// Restricts the row to some runtimes.
    #[must_use]
    pub const fn only(mut self, runtimes: &'static [Runtime]) -> Self {
        self.only = runtimes;
        self
    }
}

/// The runtimes of the table.
const RUNTIMES: [Runtime; 2] = [Runtime::Runc, Runtime::Bulkhead];
/// How long pods that were deleted may take to be gone from the node.
const SETTLE: Duration = Duration::from_mins(2);

/// Starts a cluster, runs the rows in their order and ends it; the value for `main` to return.
pub fn run(rows: impl IntoIterator<Item = Row>) -> ExitCode {
    cluster::be_the_node_if_asked();
    let mut arguments = Arguments::from_args();
    // Rows measure what a node of two CPUs does.
    arguments.test_threads = Some(1);
    let stage = Arc::new(Mutex::new(Stage::default()));
    let runtimes = suite::wanted_runtimes(&RUNTIMES);
    let mut trials = Vec::new();
    for row in rows {
        for &runtime in runtimes.iter().filter(|runtime| row.only.is_empty() || row.only.contains(runtime)) {
            let stage = Arc::clone(&stage);
            let name = format!("{}: {}", runtime.name(), row.name);
            trials.push(trial(name, move || on(&stage, |stage| stage.run_row(&row, runtime))));
        }
    }
    let last = Arc::clone(&stage);
    trials.push(trial("nothing is left of the pods, nor of the node".into(), move || on(&last, Stage::close)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A filter may have left out the trial that closes the stage.
    if let Err(error) = on(&stage, Stage::close) {
        eprintln!("{error:#}");
        return ExitCode::from(101);
    }
    conclusion.exit_code()
}

#[derive(Debug, Default)]
struct Stage {
    cluster: Option<Arc<Cluster>>,
    /// Why there is no cluster: it is not tried again for each row.
    broken: Option<String>,
    rows: u32,
}

impl Stage {
    fn run_row(&mut self, row: &Row, runtime: Runtime) -> Result<()> {
        let cluster = self.cluster()?;
        self.rows += 1;
        let user = User::new(&cluster, &format!("row-{}", self.rows), runtime)?;
        let result = catch_unwind(AssertUnwindSafe(|| (row.test)(&user))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(anyhow!("panicked: {}", text.unwrap_or("without a text")))
        });
        let left = user.leave();
        result
            .map_err(|error| anyhow!("the end of containerd's log:\n{}\n\n{error:#}", cluster.log("containerd", 30)))?;
        left
    }

    fn cluster(&mut self) -> Result<Arc<Cluster>> {
        if let Some(cluster) = &self.cluster {
            return Ok(Arc::clone(cluster));
        }
        if let Some(reason) = &self.broken {
            bail!("the cluster did not start: {reason}");
        }
        match Cluster::up(&Settings::temporary()) {
            Ok(cluster) => Ok(Arc::clone(self.cluster.insert(Arc::new(cluster)))),
            Err(error) => {
                self.broken = Some(format!("{error:#}"));
                Err(error)
            }
        }
    }

    /// Waits for the pods of the rows to be gone, looks for what they left, ends the cluster and looks again.
    fn close(&mut self) -> Result<()> {
        let Some(cluster) = self.cluster.take() else { return Ok(()) };
        let settled = wait_for("the rows' pods to be gone without a trace", SETTLE, || {
            let left = leaks::of_lost_pods(&cluster)?;
            ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
            Ok(())
        });
        let down = cluster.down();
        settled?;
        down
    }
}
