//! `bulkhead inspect`: the journal, the processes it names, and what the shim says when it is asked.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use containerd_shim_protos::ttrpc::asynchronous::Client;
use containerd_shim_protos::ttrpc::{self, Code};
use prost::Message as _;
use serde::Serialize;

use super::sandbox::{Sandbox, Standing};
use super::table::{self, age, or_dash, plain};
use super::{Format, show};
use crate::control::{self, Report};
use crate::store::Entry;
use crate::{paths, timeouts};

/// Everything that is known of a sandbox.
#[derive(Debug, Serialize)]
struct Inspection {
    #[serde(flatten)]
    sandbox: Sandbox,
    /// The sandbox's bundle.
    bundle: Option<String>,
    /// The processes of the journal, the shim first.
    processes: Vec<Process>,
    /// What else the journal has, in the order in which it was made.
    entries: Vec<Entry>,
    /// What the shim knows; None if it did not say.
    shim: Option<Report>,
    /// Why it did not.
    shim_problem: Option<String>,
}

/// A process of the journal.
#[derive(Debug, Serialize)]
struct Process {
    role: String,
    pid: i32,
    lives: bool,
}

/// Shows what is known of `sandbox`.
pub fn run(sandbox: &Sandbox, format: Format) -> anyhow::Result<()> {
    show(format, &inspect(sandbox), text)
}

fn inspect(sandbox: &Sandbox) -> Inspection {
    let journal = sandbox.journal.as_ref();
    let of_this_boot = sandbox.state != Standing::BeforeReboot;
    let told = |role: &str, id: crate::store::ProcessId| Process {
        role: role.to_owned(),
        pid: id.pid,
        lives: of_this_boot && id.lives(),
    };
    let entries = journal.map(|state| state.entries.clone()).unwrap_or_default();
    let shim = journal.map(|state| told("shim", state.shim));
    let children = entries.iter().filter_map(|entry| match entry {
        Entry::Process { role, id } => Some(told(role, *id)),
        _ => None,
    });
    let (report, problem) = match ask(sandbox) {
        Ok(report) => (Some(report), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    Inspection {
        sandbox: sandbox.clone(),
        bundle: journal.map(|state| state.bundle.display().to_string()),
        processes: shim.into_iter().chain(children).collect(),
        entries: entries.into_iter().filter(|entry| !matches!(entry, Entry::Process { .. })).collect(),
        shim: report,
        shim_problem: problem,
    }
}

/// Asks the shim, which is given [`timeouts::REPORT`] to answer.
fn ask(sandbox: &Sandbox) -> anyhow::Result<Report> {
    if sandbox.shim_pid.is_none() {
        bail!("no shim of this sandbox lives");
    }
    let bundle = &sandbox.journal.as_ref().context("there is no journal")?.bundle;
    let socket = paths::read_address(bundle)?
        .with_context(|| format!("bundle {} has no file `address` that names the shim's socket", bundle.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let answer = runtime.block_on(async { tokio::time::timeout(timeouts::REPORT, report(&socket)).await });
    answer
        .unwrap_or_else(|_| Err(anyhow!("no answer within {:?}", timeouts::REPORT)))
        .with_context(|| format!("ask the shim (pid {}) at {}", sandbox.shim_pid.unwrap_or_default(), socket.display()))
}

async fn report(socket: &Path) -> anyhow::Result<Report> {
    let client = Client::connect(&format!("unix://{}", socket.display())).await?;
    let mut request = ttrpc::Request::new();
    request.set_service(control::SERVICE.to_owned());
    request.set_method(control::REPORT.to_owned());
    match client.request(request).await {
        Ok(response) => Ok(Report::decode(response.payload.as_slice())?),
        Err(ttrpc::Error::RpcStatus(status)) if is_unknown(&status) => {
            bail!("it is of an earlier version, which does not tell")
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a server says that it does not know the service or the method: ttrpc's Rust servers call it an invalid argument.
fn is_unknown(status: &ttrpc::Status) -> bool {
    let code = status.code.enum_value_or_default();
    code == Code::UNIMPLEMENTED || code == Code::INVALID_ARGUMENT
}

fn text(inspection: &Inspection) -> String {
    let sandbox = &inspection.sandbox;
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<14}{}", format!("{key}:"), plain(&value));
    };
    line("sandbox", sandbox.id.clone());
    line("namespace", or_dash(sandbox.namespace.as_deref()));
    line("state", sandbox.state.name().to_owned());
    line("age", or_dash(sandbox.age_seconds.map(age)));
    if let Some(vm) = &sandbox.vm {
        let accel = vm.accel.map_or("an unknown accelerator", |accel| accel.name());
        line("vm", format!("{} on {accel}, {} vCPUs, {} MiB", vm.machine, vm.vcpus, vm.memory_mib));
    }
    line("directory", sandbox.directory.display().to_string());
    line("bundle", or_dash(inspection.bundle.as_deref()));
    if let Some(problem) = &sandbox.problem {
        line("problem", problem.clone());
    }
    if let Some(problem) = &inspection.shim_problem {
        line("shim says", format!("nothing: {problem}"));
    }
    if let Some(report) = &inspection.shim {
        line("shim says", format!("{} (version {})", report.state, report.version));
    }
    let rows: Vec<_> = inspection.processes.iter().map(process_row).collect();
    section(&mut text, &rows, ["PROCESS", "PID", "STATE"]);
    let rows: Vec<_> = inspection.entries.iter().map(entry_row).collect();
    section(&mut text, &rows, ["ON THE HOST", "WHAT"]);
    let containers = inspection.shim.iter().flat_map(|report| &report.containers);
    let rows: Vec<_> = containers.flat_map(container_rows).collect();
    section(&mut text, &rows, ["CONTAINER", "EXEC", "ROLE", "STATE", "HOST PID", "EXIT"]);
    text
}

/// Adds a table, if it has rows.
fn section<const COLUMNS: usize>(text: &mut String, rows: &[[String; COLUMNS]], header: [&str; COLUMNS]) {
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table::render(header, rows));
    }
}

fn process_row(process: &Process) -> [String; 3] {
    let state = if process.lives { "lives" } else { "has ended" };
    [process.role.clone(), process.pid.to_string(), state.to_owned()]
}

fn entry_row(entry: &Entry) -> [String; 2] {
    let (kind, what) = match entry {
        Entry::Process { role, id } => ("process", format!("{} ({role})", id.pid)),
        Entry::Link(link) => ("redirect", format!("{} to {} in {}", link.ifname, link.tap, link.netns.display())),
        Entry::Cgroup { path } => ("cgroup", path.display().to_string()),
        Entry::CgroupParent { path } => ("cgroup above", path.display().to_string()),
        Entry::Directory { path } => ("directory", path.display().to_string()),
        Entry::Socket { path } => ("socket", path.display().to_string()),
        Entry::Container { id, bundle } => ("container", format!("{id} in {}", bundle.display())),
        Entry::Hooks { id, bundle } => ("hooks", format!("of {id} in {}", bundle.display())),
    };
    [kind.to_owned(), what]
}

fn container_rows(container: &control::Container) -> Vec<[String; 6]> {
    let row = |process: &control::Process| {
        let frozen = container.paused && process.phase == "running";
        [
            container.id.clone(),
            if process.exec_id.is_empty() { "-".to_owned() } else { process.exec_id.clone() },
            container.role.clone(),
            if frozen { "paused".to_owned() } else { process.phase.clone() },
            process.host_pid.to_string(),
            or_dash(process.exit_status),
        ]
    };
    container.init.iter().chain(&container.execs).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{ProcessId, State};

    fn sandbox() -> Sandbox {
        let mut state = State::new("web", "k8s.io", Path::new("/no/such/bundle"), None).expect("a state");
        let qemu = ProcessId { pid: 1, start_time: 0 };
        state.entries =
            vec![Entry::Process { role: "QEMU".into(), id: qemu }, Entry::Cgroup { path: "/sys/fs/cgroup/web".into() }];
        Sandbox {
            id: "web".into(),
            namespace: Some("k8s.io".into()),
            state: Standing::Stopping,
            age_seconds: Some(61),
            shim_pid: Some(state.shim.pid),
            qemu_pid: None,
            vm: None,
            problem: None,
            directory: "/run/bulkhead/web-123456".into(),
            journal: Some(state),
        }
    }

    #[test]
    fn what_the_journal_has_is_told_even_if_the_shim_says_nothing() {
        let inspection = inspect(&sandbox());
        let text = text(&inspection);
        let own = std::process::id();
        for part in [
            "state:        stopping\n".to_owned(),
            "shim says:    nothing: bundle /no/such/bundle has no file `address`".to_owned(),
            format!("shim     {own}"),
            "QEMU     1".to_owned(),
            "cgroup       /sys/fs/cgroup/web\n".to_owned(),
        ] {
            assert!(text.contains(&part), "{part:?} is missing:\n{text}");
        }
        let json = serde_json::to_value(&inspection).expect("is JSON");
        assert_eq!((&json["id"], &json["processes"][0]["lives"]), (&"web".into(), &true.into()));
        assert!(json["shim"].is_null() && json["shim_problem"].is_string());
    }

    #[test]
    fn a_shim_that_hangs_is_told_in_a_bounded_time() {
        let bundle = tempfile::tempdir().expect("a directory");
        let socket = bundle.path().join("s");
        // It listens and never accepts, as a stopped process.
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
        paths::write_address(bundle.path(), &format!("unix://{}", socket.display())).expect("writes");
        let mut sandbox = sandbox();
        sandbox.journal.as_mut().expect("is there").bundle = bundle.path().into();
        let begun = std::time::Instant::now();
        let said = inspect(&sandbox).shim_problem.expect("is told");
        assert!(begun.elapsed() < timeouts::REPORT * 3, "{:?}", begun.elapsed());
        assert!(said.contains(&format!("ask the shim (pid {})", std::process::id())), "{said}");
    }

    #[test]
    fn each_process_of_a_container_is_a_row() {
        let process = |exec_id: &str, phase: &str, exit_status| control::Process {
            exec_id: exec_id.into(),
            phase: phase.into(),
            host_pid: 9,
            exit_status,
        };
        let container = control::Container {
            id: "c1".into(),
            role: "container".into(),
            init: Some(process("", "running", None)),
            execs: vec![process("e1", "stopped", Some(137))],
            paused: true,
            bundle: String::new(),
        };
        let rows = container_rows(&container);
        assert_eq!(rows[0], ["c1", "-", "container", "paused", "9", "-"]);
        assert_eq!(rows[1], ["c1", "e1", "container", "stopped", "9", "137"]);
    }
}
