//! Runs critest, the CRI's conformance suite, with runc and with Bulkhead through either door as the handler, and compares.
//!
//! An argument is a regular expression on the names of specs; without one every spec runs that needs no network:
//! `cargo run -p bulkhead-tests --bin critest -- 'SeccompProfilePath'`, or `make critest FOCUS=SeccompProfilePath`.
//! `--sample` in its place stands for those that are run with every change.
//! `BULKHEAD_TEST_RUNTIMES=bulkhead,bulkhead-sandbox` leaves runc out; without that measure, every failure but the inherent
//! ones counts.
//! Reports and logs are kept under `target/critest`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use bulkhead_tests::containerd::{CRI_NAMESPACE, Node};
use bulkhead_tests::critest::{self, sample};
use bulkhead_tests::ginkgo::{report::Report, tell};
use bulkhead_tests::leaks;
use bulkhead_tests::row::{ALL, Runtime};
use bulkhead_tests::suite;
use bulkhead_tests::tools::{BulkheadTools, Version};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.is_empty()).collect();
    let is_sample = arguments == ["--sample"];
    let runtimes = suite::wanted_runtimes(ALL);
    let focus = if is_sample { sample::focus() } else { arguments.join("|") };
    let focus = (!focus.is_empty()).then_some(focus);
    let good = run_suites(&runtimes, focus.as_deref())
        .map(|reports| tell("critest", &reports, &critest::INHERENT) && (!is_sample || is_whole(&reports)));
    match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("critest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the suite with each of `runtimes`, on one containerd.
fn run_suites(runtimes: &[Runtime], focus: Option<&str>) -> Result<Vec<(Runtime, Report)>> {
    ensure!(
        !runtimes.is_empty(),
        "BULKHEAD_TEST_RUNTIMES names none of {}",
        ALL.iter().map(|runtime| runtime.name()).collect::<Vec<_>>().join(", ")
    );
    let directory = critest::report_directory()?;
    let node = Node::start(Version::V2_4, Some(&BulkheadTools::find()?))?;
    let result = run_on(&node, runtimes, focus, &directory);
    let kept = std::fs::write(directory.join("containerd.log"), node.log_since(0, usize::MAX));
    let stopped = node.stop();
    let left = leaks::after_stop(&node);
    leaks::clean_up(&node);
    let reports = result?;
    stopped?;
    kept?;
    let left = left?;
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(reports)
}

fn run_on(node: &Node, runtimes: &[Runtime], focus: Option<&str>, directory: &Path) -> Result<Vec<(Runtime, Report)>> {
    node.import(&critest::image::all(&node.scratch()?)?, &[CRI_NAMESPACE])?;
    let mut reports = Vec::new();
    for &runtime in runtimes {
        println!("critest with {} ...", runtime.name());
        let report = critest::run(node, runtime, focus, directory)?;
        println!("critest with {}: {}", runtime.name(), report.summary());
        reports.push((runtime, report));
    }
    Ok(reports)
}

/// Whether each report of the sample has all of it.
fn is_whole(reports: &[(Runtime, Report)]) -> bool {
    let whole = reports.iter().all(|(_, report)| sample::is_whole(report));
    if !whole {
        println!("the sample names specs that this critest does not have");
    }
    whole
}
