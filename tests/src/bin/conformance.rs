//! Runs Kubernetes' own conformance specs with Bulkhead and with runc as what runs all pods, and compares.
//!
//! An argument is a regular expression on the names of specs; without one all of them run:
//! `cargo run -p bulkhead-tests --bin conformance -- 'EmptyDir'`, or `make conformance FOCUS=EmptyDir`.
//! `--sample` in its place stands for those that take a few minutes.
//! `BULKHEAD_TEST_RUNTIMES=bulkhead` leaves runc out; without that measure, every failure but the inherent ones counts.
//! `BULKHEAD_CONFORMANCE_PROCS` says how many specs run at a time.
//! Reports and logs are kept under `target/conformance`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Error, Result, anyhow};
use bulkhead_tests::cluster::{self, Cluster, Settings};
use bulkhead_tests::conformance::{self, inherent::INHERENT, sample};
use bulkhead_tests::ginkgo::{report::Report, tell};
use bulkhead_tests::row::Runtime;
use bulkhead_tests::suite;

/// In the order in which they run.
const RUNTIMES: [Runtime; 2] = [Runtime::Bulkhead, Runtime::Runc];

fn main() -> ExitCode {
    cluster::be_the_node_if_asked();
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.is_empty()).collect();
    let is_sample = arguments == ["--sample"];
    let focus = if is_sample { sample::focus() } else { arguments.join("|") };
    let focus = (!focus.is_empty()).then_some(focus);
    let (reports, troubles) = run_suites(&suite::wanted_runtimes(&RUNTIMES), focus.as_deref());
    let mut good = troubles.is_empty();
    if !reports.is_empty() {
        good &= tell("conformance", &reports, &INHERENT);
    }
    if is_sample {
        good &= is_whole(&reports);
    }
    for trouble in troubles {
        eprintln!("conformance: {trouble:#}");
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the suite with each of `runtimes`, on a cluster of its own; what came out, and what went wrong besides specs.
///
/// What goes wrong with one does not keep the others from being run: each of them takes long.
fn run_suites(runtimes: &[Runtime], focus: Option<&str>) -> (Vec<(Runtime, Report)>, Vec<Error>) {
    let (mut reports, mut troubles) = (Vec::new(), Vec::new());
    if runtimes.is_empty() {
        let names = RUNTIMES.map(Runtime::name).join(", ");
        troubles.push(anyhow!("BULKHEAD_TEST_RUNTIMES names none of {names}"));
    }
    for &runtime in runtimes {
        match run_suite(runtime, focus, &mut troubles) {
            Ok(report) => reports.push((runtime, report)),
            Err(error) => troubles.push(error.context(format!("with {}", runtime.name()))),
        }
    }
    (reports, troubles)
}

/// Runs the suite with one runtime. The cluster is gone afterwards in any case; what it left is among the `troubles`.
fn run_suite(runtime: Runtime, focus: Option<&str>, troubles: &mut Vec<Error>) -> Result<Report> {
    let begin = Instant::now();
    println!("conformance with {} ...", runtime.name());
    let directory = conformance::report_directory(runtime)?;
    let cluster = Cluster::up(&Settings { default_runtime: runtime, ..Settings::temporary() })?;
    let report = conformance::run(&cluster, focus, &directory);
    let ends = [conformance::wait_until_clean(&cluster), conformance::keep_logs(&cluster, &directory), cluster.down()];
    for error in ends.into_iter().filter_map(Result::err) {
        troubles.push(error.context(format!("after the suite with {}", runtime.name())));
    }
    let report = report?;
    let minutes = begin.elapsed().as_secs().div_ceil(60);
    println!("conformance with {}: {} in {minutes} min", runtime.name(), report.summary());
    Ok(report)
}

/// Whether each report of the sample has all of it; tells what is missing.
fn is_whole(reports: &[(Runtime, Report)]) -> bool {
    let mut whole = true;
    for (runtime, report) in reports {
        for name in sample::missing(report) {
            println!("this e2e.test did not run with {}, though it is of the sample: {name}", runtime.name());
            whole = false;
        }
    }
    whole
}
