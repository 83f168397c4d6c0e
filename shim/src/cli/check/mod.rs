//! `bulkhead check`: what this node has and lacks for a pod to start.
//!
//! Each finding is tried as the shim would do it, by the shim's own functions, and ends in a verdict; what is not as it should
//! be comes with the sentence that mends it. Nothing is left of what is tried.

mod containerd;
mod host;
mod programs;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::table::{self, plain};
use super::{Format, load_config, show};
use crate::config::{Config, DEFAULT_PATH, DEFAULT_VARIABLE};

/// What `check` may be told.
#[derive(Debug, Args)]
pub struct Options {
    /// containerd's configuration.
    #[arg(long, value_name = "FILE", default_value = containerd::DEFAULT_PATH)]
    containerd_config: PathBuf,
}

/// What a finding means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Pods start; something is slower, or does not work in them.
    Warning,
    /// No pod starts.
    Missing,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    what: &'static str,
    found: String,
    verdict: Verdict,
    /// How it becomes `ok`, in a sentence; None if it is.
    mend: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, found: found.into(), verdict: Verdict::Ok, mend: None }
    }

    fn warning(what: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, found: found.into(), verdict: Verdict::Warning, mend: Some(mend.into()) }
    }

    fn missing(what: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, found: found.into(), verdict: Verdict::Missing, mend: Some(mend.into()) }
    }
}

/// All of them.
#[derive(Debug, Serialize)]
struct Findings {
    /// A pod could start.
    ready: bool,
    findings: Vec<Finding>,
}

impl Findings {
    fn new(findings: Vec<Finding>) -> Self {
        Self { ready: findings.iter().all(|finding| finding.verdict != Verdict::Missing), findings }
    }
}

/// Looks at the node. The exit status is 1 if no pod could start. `config` as for the other commands.
pub fn run(config: Option<&Path>, options: &Options, format: Format) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let findings = runtime.block_on(look(config, options))?;
    show(format, &findings, text)?;
    Ok(if findings.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn look(path: Option<&Path>, options: &Options) -> anyhow::Result<Findings> {
    // What follows is judged by the defaults then, which is better than not at all.
    let loaded = load_config(path);
    let config = loaded.as_ref().cloned().unwrap_or_default();
    let origin = origin(path);
    let exe = std::env::current_exe().context("find the binary that is running")?;
    let mut findings =
        vec![configuration(origin.as_deref(), &loaded), host::state_dir(&config.state_dir), host::accelerator(&config)];
    findings.extend(programs::look(&config, &exe).await);
    findings.extend(host::kernel(&config, &exe).await);
    findings.extend(containerd::look(&options.containerd_config, origin.as_deref()).await);
    Ok(Findings::new(findings))
}

/// Where the configuration comes from; None for the defaults.
fn origin(path: Option<&Path>) -> Option<PathBuf> {
    let named = std::env::var_os(DEFAULT_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let default = || Some(PathBuf::from(DEFAULT_PATH)).filter(|path| path.exists());
    path.map(Path::to_owned).or(named).or_else(default)
}

fn configuration(origin: Option<&Path>, loaded: &anyhow::Result<Config>) -> Finding {
    const WHAT: &str = "configuration";
    match (loaded, origin) {
        (Ok(_), Some(path)) => Finding::ok(WHAT, path.display().to_string()),
        (Ok(_), None) => Finding::ok(WHAT, format!("the defaults, there is no {DEFAULT_PATH}")),
        (Err(error), _) => Finding::missing(
            WHAT,
            format!("{error:#}"),
            "Correct what is named; what follows is judged by the defaults.",
        ),
    }
}

fn text(findings: &Findings) -> String {
    let row = |finding: &Finding| [finding.what.to_owned(), finding.verdict.name().to_owned(), finding.found.clone()];
    let rows: Vec<_> = findings.findings.iter().map(row).collect();
    let mut text = table::render(["WHAT", "VERDICT", "FOUND"], &rows);
    for verdict in [Verdict::Missing, Verdict::Warning] {
        let mends = findings.findings.iter().filter(|finding| finding.verdict == verdict);
        let lines: Vec<String> = mends
            .filter_map(|finding| Some(format!("  {}: {}\n", finding.what, plain(finding.mend.as_deref()?))))
            .collect();
        if !lines.is_empty() {
            let title = if verdict == Verdict::Missing { "No pod starts until this is done" } else { "Better" };
            // Writing to a String cannot fail.
            let _ = write!(text, "\n{title}:\n{}", lines.concat());
        }
    }
    text.push_str(if findings.ready { "\nA pod can start.\n" } else { "\nNo pod can start.\n" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_leaves_a_node_ready_and_something_missing_does_not() {
        let ready = Findings::new(vec![Finding::ok("a", "1"), Finding::warning("b", "2", "Do it.")]);
        assert!(ready.ready);
        assert_eq!(
            text(&ready),
            "WHAT  VERDICT  FOUND\na     ok       1\nb     warning  2\n\nBetter:\n  b: Do it.\n\nA pod can start.\n"
        );
        let lacking = Findings::new(vec![Finding::missing("c", "3", "Get it.")]);
        assert!(!lacking.ready);
        assert!(text(&lacking).ends_with("No pod starts until this is done:\n  c: Get it.\n\nNo pod can start.\n"));
        let json = serde_json::to_value(&lacking).expect("is JSON");
        assert_eq!((&json["ready"], &json["findings"][0]["verdict"]), (&false.into(), &"missing".into()));
    }

    #[test]
    fn a_configuration_is_named_with_what_is_wrong_in_it() {
        let origin = Some(Path::new("/etc/b.toml"));
        let good = configuration(origin, &Ok(Config::default()));
        assert_eq!(good, Finding::ok("configuration", "/etc/b.toml"));
        let parsed = Config::parse("vcpus = 0", "/etc/b.toml").map_err(anyhow::Error::from);
        let bad = configuration(origin, &parsed);
        assert_eq!(
            (bad.verdict, &*bad.found),
            (Verdict::Missing, "configuration /etc/b.toml: vcpus is 0, accepted are 1 to 255")
        );
    }
}
