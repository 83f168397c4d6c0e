//! `make bench`: what a pod costs with Bulkhead, beside runc in the same run and the bare boot of the same machine.
//!
//! Prints a table and writes `bench.json` into Cargo's target directory. `BULKHEAD_BENCH_ROUNDS` sets how often each time
//! is taken (7 unless given); medians are shown.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::command::{pause, wait_for};
use bulkhead_tests::container::{Container, ContainerSpec};
use bulkhead_tests::containerd::Node;
use bulkhead_tests::faults::{self, Part};
use bulkhead_tests::figure::{Figures, Samples, Verdict, parse_stages};
use bulkhead_tests::floor::BareBoot;
use bulkhead_tests::leaks;
use bulkhead_tests::overhead;
use bulkhead_tests::pod::{Pod, PodSpec};
use bulkhead_tests::process::Process;
use bulkhead_tests::row::Runtime;
use bulkhead_tests::tools::{BulkheadTools, ContainerdTools, Version, target_directory};
use serde_json::json;

/// Names of the figures, in the order of the table.
const RUNP: &str = "cold runp (ms)";
const FIRST_LINE: &str = "create+start to first log line (ms)";
const EXEC: &str = "exec round trip (ms)";
const STOP: &str = "stop+remove (ms)";
const LOG: &str = "log stream (MB/s)";
const EXEC_OUT: &str = "exec stream out (MB/s)";
const EXEC_IN: &str = "exec stream in (MB/s)";
const ORDER: [&str; 7] = [RUNP, FIRST_LINE, EXEC, STOP, LOG, EXEC_OUT, EXEC_IN];

/// What the shim tells the stages of, by the message of its log.
const STAGED: [(&str, &str); 4] = [
    ("sandbox started", "a cold start"),
    ("container made", "a container's creation"),
    ("container deleted", "a container's removal"),
    ("sandbox torn down", "a pod's end"),
];

/// Of a log, and of an exec: long enough that the start of the program does not count.
const LOG_BYTES: usize = 50_000_000;
const STREAM_BYTES: usize = 150_000_000;
const BLOCK_BYTES: usize = 10_000_000;
/// The end of the input: it arrives at its place only if every byte before it does.
const MARK: &[u8] = b"the end\n";
const SOON: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What one run of the bench found.
#[derive(Debug, Default)]
struct Report {
    runtimes: BTreeMap<&'static str, Figures>,
    memory: BTreeMap<&'static str, Vec<(String, u64)>>,
    guest_ram_kib: u64,
    bare_boot: Samples,
    /// By the message of the log line that tells them.
    stages: BTreeMap<&'static str, Vec<(String, Samples)>>,
}

fn bench() -> Result<()> {
    let rounds = match std::env::var("BULKHEAD_BENCH_ROUNDS") {
        Ok(text) => {
            text.parse().with_context(|| format!("BULKHEAD_BENCH_ROUNDS is {text:?}, a number was expected"))?
        }
        Err(_) => 7,
    };
    ensure!(rounds > 0, "BULKHEAD_BENCH_ROUNDS is 0, at least 1 is needed");
    let tools = BulkheadTools::find()?;
    let version = Version::ALL.into_iter().rev().find(|version| ContainerdTools::find(*version).is_ok());
    let node = Arc::new(Node::start(version.context("no containerd: run make setup")?, Some(&tools))?);
    let result = measure_all(&node, &tools, rounds);
    if result.is_err() {
        eprintln!("containerd's log ends with\n{}", node.log_since(0, 30));
    }
    let stopped = node.stop();
    leaks::clean_up(&node);
    let report = result?;
    stopped?;
    let verdicts = judge(&report);
    print_report(&report, &verdicts);
    write_json(&report, &verdicts)
}

fn measure_all(node: &Arc<Node>, tools: &BulkheadTools, rounds: usize) -> Result<Report> {
    let mut report = Report::default();
    let runtimes = [Runtime::Runc, Runtime::Bulkhead];
    // Both runtimes take turns, so that whatever else the machine does hits them alike. The first pods warm caches.
    for runtime in runtimes {
        life(node, runtime, &mut Figures::new()).with_context(|| format!("warm up {}", runtime.name()))?;
    }
    let log_position = node.log_position();
    for round in 0..rounds {
        for runtime in runtimes {
            eprintln!("round {} of {rounds}: {}", round + 1, runtime.name());
            life(node, runtime, report.runtimes.entry(runtime.name()).or_default())?;
        }
    }
    let log = node.log_since(log_position, usize::MAX);
    report.stages = STAGED.iter().map(|(message, _)| (*message, stages(&log, message))).collect();
    all_streams(node, &runtimes, rounds, &mut report)?;
    for runtime in runtimes {
        let pod = Pod::start(node, runtime.handler(), PodSpec::new())?;
        // What was needed only to start is given back a moment later.
        pause(Duration::from_secs(5));
        report.memory.insert(runtime.name(), overhead::host_memory(&pod)?);
        if runtime == Runtime::Bulkhead {
            let qemu = faults::find(node, &pod.id, Part::Qemu)?;
            report.guest_ram_kib = guest_ram_kib(&qemu)?;
            let bare = BareBoot::like(&qemu, tools, &node.scratch()?)?;
            pod.remove()?;
            bare.run()?;
            for _ in 0..rounds {
                report.bare_boot.add_time(bare.run()?);
            }
        } else {
            pod.remove()?;
        }
    }
    Ok(report)
}

/// One pod from start to end, timed.
fn life(node: &Arc<Node>, runtime: Runtime, figures: &mut Figures) -> Result<()> {
    let mut time = |name: &str, time: Duration| figures.entry(name.to_owned()).or_default().add_time(time);
    let started = Instant::now();
    let pod = Pod::start(node, runtime.handler(), PodSpec::new())?;
    time(RUNP, started.elapsed());
    let started = Instant::now();
    let script = "echo ready; trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done";
    let container = pod.run(ContainerSpec::script(script))?;
    container.wait_for_log("ready", SOON)?;
    time(FIRST_LINE, started.elapsed());
    for _ in 0..3 {
        time(EXEC, container.exec(&["true"])?.success()?.elapsed);
    }
    let started = Instant::now();
    pod.remove()?;
    time(STOP, started.elapsed());
    Ok(())
}

fn rate(bytes: usize, time: Duration) -> f64 {
    // Bytes per microsecond are megabytes per second.
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    f64::from(bytes) / (time.as_secs_f64() * 1e6)
}

/// Streams of a pod of each of `runtimes`, which take turns.
fn all_streams(node: &Arc<Node>, runtimes: &[Runtime], rounds: usize, report: &mut Report) -> Result<()> {
    let pods = runtimes.iter().map(|runtime| Pod::start(node, runtime.handler(), PodSpec::new()));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    // Lines of a hundred bytes, in memory; they are read again and again.
    let line = "x".repeat(99);
    let script = format!("yes {line} | head -c {BLOCK_BYTES} > /dev/shm/block; echo ready; sleep 1000000");
    let container = |pod| {
        let container = Pod::run(pod, ContainerSpec::script(&script))?;
        container.wait_for_log("ready", SOON)?;
        Ok(container)
    };
    let containers = pods.iter().map(container).collect::<Result<Vec<_>>>()?;
    let mut input = vec![b'x'; STREAM_BYTES - MARK.len()];
    input.extend(MARK);
    for round in 0..rounds {
        for ((runtime, pod), container) in runtimes.iter().zip(&pods).zip(&containers) {
            eprintln!("streams, round {} of {rounds}: {}", round + 1, runtime.name());
            streams(pod, container, &input, report.runtimes.entry(runtime.name()).or_default())?;
        }
    }
    pods.into_iter().try_for_each(Pod::remove_by_force)
}

/// One stream each way to a container that holds a block in memory: the file system is not what is measured.
fn streams(pod: &Pod, container: &Container<'_>, input: &[u8], figures: &mut Figures) -> Result<()> {
    let mut add = |name: &str, value: f64| figures.entry(name.to_owned()).or_default().add(value);
    add(LOG, log_rate(pod)?);
    let output = container.exec_streamed(&["sh", "-c", &repeat_block(STREAM_BYTES)], "")?.success()?;
    ensure!(output.stdout.len() == STREAM_BYTES, "{} bytes came out", output.stdout.len());
    add(EXEC_OUT, rate(STREAM_BYTES, output.elapsed));
    // A program that looks at each byte, as wc does, would be what is measured. tail skips all but the mark, by count.
    let sink = format!("tail -c +{}", STREAM_BYTES - MARK.len() + 1);
    let output = container.exec_streamed(&["sh", "-c", &sink], input)?.success()?;
    ensure!(output.stdout == MARK, "{:?} is what came in at the end", output.text());
    add(EXEC_IN, rate(STREAM_BYTES, output.elapsed));
    Ok(())
}

/// Rate at which a container's log is written, in MB/s. The block is the pod's, whose containers share the memory.
fn log_rate(pod: &Pod) -> Result<f64> {
    let output = repeat_block(LOG_BYTES);
    let script = format!("mkfifo /tmp/go; echo ready; read go < /tmp/go; {output}; echo done; sleep 1000");
    let container = pod.run(ContainerSpec::script(&script))?;
    container.wait_for_log("ready", SOON)?;
    let started = Instant::now();
    container.shell("echo go > /tmp/go")?;
    let path = container.log_path();
    wait_for("the end of the log", Duration::from_mins(2), || {
        let log = fs::File::open(path)?;
        let size = log.metadata()?.len();
        let mut tail = vec![0; 100];
        std::os::unix::fs::FileExt::read_at(&log, &mut tail, size.saturating_sub(100))?;
        ensure!(String::from_utf8_lossy(&tail).contains(" F done"), "{size} bytes so far");
        Ok(())
    })?;
    let rate = rate(LOG_BYTES, started.elapsed());
    container.remove_by_force()?;
    Ok(rate)
}

fn repeat_block(bytes: usize) -> String {
    format!("cat {}", vec!["/dev/shm/block"; bytes / BLOCK_BYTES].join(" "))
}

/// Pages of the guest's memory that exist: the blocks of QEMU's memfd.
fn guest_ram_kib(qemu: &Process) -> Result<u64> {
    let directory = format!("/proc/{}/fd", qemu.pid);
    let mut largest = 0;
    for entry in fs::read_dir(&directory).with_context(|| format!("read {directory}"))?.flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:") {
            largest = largest.max(fs::metadata(entry.path())?.blocks() / 2);
        }
    }
    Ok(largest)
}

/// Stage timings of every line with `message` in the log, by stage, in the order in which stages come.
fn stages(log: &str, message: &str) -> Vec<(String, Samples)> {
    let mut found: Vec<(String, Samples)> = Vec::new();
    let message = format!("msg=\"{message}\"");
    for line in log.lines().filter(|line| line.contains(&message)) {
        let Some((_, rest)) = line.split_once("stages=\"") else { continue };
        let text = rest.split('"').next().unwrap_or_default();
        for (name, value) in parse_stages(text) {
            match found.iter_mut().find(|(known, _)| *known == name) {
                Some((_, samples)) => samples.add(value),
                None => found.push((name, Samples { values: vec![value] })),
            }
        }
    }
    found
}

fn median(report: &Report, runtime: Runtime, name: &str) -> f64 {
    let samples = report.runtimes.get(runtime.name()).and_then(|figures| figures.get(name));
    samples.and_then(Samples::median).unwrap_or(f64::NAN)
}

fn judge(report: &Report) -> Vec<Verdict> {
    let ours = |name| median(report, Runtime::Bulkhead, name);
    let ratio = |name| ours(name) / median(report, Runtime::Runc, name);
    let shim = report
        .memory
        .get("bulkhead")
        .and_then(|list| list.first())
        .map_or(f64::NAN, |(_, kib)| f64::from(u32::try_from(*kib).unwrap_or(u32::MAX)) * 1024.0 / 1e6);
    vec![
        Verdict::at_most("cold runp / bare boot", ours(RUNP) / report.bare_boot.median().unwrap_or(f64::NAN), 1.7),
        Verdict::at_most("exec / runc's", ratio(EXEC), 2.0),
        Verdict::at_most("stop+remove / runc's", ratio(STOP), 1.3),
        Verdict::at_least("log stream / runc's", ratio(LOG), 0.5),
        Verdict::at_least("exec stream out / runc's", ratio(EXEC_OUT), 0.5),
        Verdict::at_least("exec stream in / runc's", ratio(EXEC_IN), 0.5),
        Verdict::at_most("PSS of the shim (MB)", shim, 10.0),
    ]
}

fn print_report(report: &Report, verdicts: &[Verdict]) {
    println!("\n{:<38} {:>10} {:>10} {:>8}", "median", "runc", "bulkhead", "ratio");
    for name in ORDER {
        let (runc, ours) = (median(report, Runtime::Runc, name), median(report, Runtime::Bulkhead, name));
        println!("{name:<38} {runc:>10.1} {ours:>10.1} {:>7.2}x", ours / runc);
    }
    let bare = report.bare_boot.median().unwrap_or(f64::NAN);
    println!("{:<38} {:>10} {bare:>10.1}", "bare boot (ms)", "");
    println!("\nPSS of an idle pod's processes on the host, without the guest's RAM");
    for (runtime, processes) in &report.memory {
        for (name, kib) in processes {
            println!("  {runtime:<10} {name:<18} {kib:>8} KiB");
        }
    }
    println!("  {:<10} {:<18} {:>8} KiB", "bulkhead", "guest RAM touched", report.guest_ram_kib);
    for (message, what) in STAGED {
        println!("\nstages of {what} inside the shim (ms, median)");
        for (name, samples) in report.stages.get(message).into_iter().flatten() {
            println!("  {name:<28} {:>8.1}", samples.median().unwrap_or(f64::NAN));
        }
    }
    println!("\npromises");
    for verdict in verdicts {
        let word = if verdict.holds { "holds" } else { "MISSED" };
        println!("  {:<28} {:>8.2}  bound {:>5.2}  {word}", verdict.promise, verdict.found, verdict.bound);
    }
}

fn write_json(report: &Report, verdicts: &[Verdict]) -> Result<()> {
    let path = target_directory()?.join("bench.json");
    let document = json!({
        "runtimes": report.runtimes,
        "bare_boot_ms": report.bare_boot,
        "memory_kib": report.memory,
        "guest_ram_kib": report.guest_ram_kib,
        "stages_ms": report.stages,
        "promises": verdicts,
    });
    write(&path, &serde_json::to_vec_pretty(&document)?)?;
    println!("\nall samples: {}", path.display());
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("write {}", path.display()))
}
