//! `bulkhead gc`: removes what a shim has left that died without a `delete` after it, as when containerd is lost or the node
//! was restarted.
//!
//! Whether a shim lives is all that is asked: of a sandbox whose shim lives nothing is touched, wherever containerd is. The
//! work is the teardown of `delete`, by the journal ([`teardown`]); it waits for one that is under way.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use super::sandbox::{self, Sandbox, Standing};
use super::table::plain;
use super::{Format, show};
use crate::bootstrap::socket;
use crate::store::teardown;
use crate::{paths, timeouts};

/// What became of one sandbox.
#[derive(Debug, Serialize)]
struct Outcome {
    id: String,
    state: Standing,
    directory: PathBuf,
    /// In the order in which it goes.
    removed: Vec<String>,
    /// Why something is left.
    error: Option<String>,
}

/// Everything that was done; with `dry_run`, that would be.
#[derive(Debug, Serialize)]
struct Cleared {
    dry_run: bool,
    sandboxes: Vec<Outcome>,
    /// Sandboxes that were left alone, since their shims live.
    living: usize,
}

/// Clears below `state_dir`. The exit status is 1 if something is left that should not be.
pub fn run(state_dir: &Path, dry_run: bool, format: Format) -> anyhow::Result<ExitCode> {
    let cleared = clear(state_dir, dry_run)?;
    show(format, &cleared, text)?;
    let failed = cleared.sandboxes.iter().any(|outcome| outcome.error.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn clear(state_dir: &Path, dry_run: bool) -> anyhow::Result<Cleared> {
    let mut cleared = Cleared { dry_run, sandboxes: Vec::new(), living: 0 };
    for sandbox in sandbox::all(state_dir)? {
        match clear_one(&sandbox, dry_run) {
            Ok(Some(removed)) => cleared.sandboxes.push(outcome(sandbox, removed, None)),
            Ok(None) => cleared.living += 1,
            Err(error) => cleared.sandboxes.push(outcome(sandbox, Vec::new(), Some(format!("{error:#}")))),
        }
    }
    Ok(cleared)
}

fn outcome(sandbox: Sandbox, removed: Vec<String>, error: Option<String>) -> Outcome {
    Outcome { id: sandbox.id, state: sandbox.state, directory: sandbox.directory, removed, error }
}

/// What was removed, or would be; None if the sandbox is to be left alone.
fn clear_one(sandbox: &Sandbox, dry_run: bool) -> anyhow::Result<Option<Vec<String>>> {
    if sandbox.state == Standing::NoJournal && is_fresh(&sandbox.directory)? {
        return Ok(None);
    }
    let steps = if dry_run {
        let steps = teardown::plan_abandoned(&sandbox.directory)?;
        steps.map(|steps| steps.into_iter().filter(teardown::Step::has_work).collect())
    } else {
        teardown::run_abandoned(&sandbox.directory)?
    };
    let Some(steps) = steps else { return Ok(None) };
    let mut removed: Vec<String> = steps.iter().map(ToString::to_string).collect();
    removed.push(format!("directory {}", sandbox.directory.display()));
    // The shim's own socket is containerd's to know, and so in no journal but in the bundle.
    if let Some(path) = dead_socket(sandbox)? {
        if !dry_run {
            socket::remove(&path)?;
        }
        removed.push(format!("socket {}", path.display()));
    }
    Ok(Some(removed))
}

/// Whether a shim may be about to write a journal in `directory`, or has just removed it.
fn is_fresh(directory: &Path) -> anyhow::Result<bool> {
    let modified = match directory.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        metadata => metadata.and_then(|metadata| metadata.modified()),
    };
    let modified = modified.with_context(|| format!("look at {}", directory.display()))?;
    // A time in the future is one of a clock that was set back: no sign of anything.
    Ok(modified.elapsed().is_ok_and(|age| age < timeouts::JOURNAL_BEGINS))
}

/// The socket of the sandbox's shim, if it is there and nobody answers: a new shim of the same sandbox has the same.
fn dead_socket(sandbox: &Sandbox) -> anyhow::Result<Option<PathBuf>> {
    let Some(state) = &sandbox.journal else { return Ok(None) };
    let Some(path) = paths::read_address(&state.bundle)? else { return Ok(None) };
    let there = path.symlink_metadata().is_ok();
    Ok((there && !socket::answers(&path)?).then_some(path))
}

fn text(cleared: &Cleared) -> String {
    let (done, failed) =
        if cleared.dry_run { ("would remove", "would fail at") } else { ("removed", "could not remove") };
    let mut lines = Vec::new();
    for outcome in &cleared.sandboxes {
        let id = &outcome.id;
        lines.extend(outcome.removed.iter().map(|what| format!("{id}: {done} {what}")));
        lines.extend(
            outcome.error.iter().map(|error| format!("{id}: {failed} {}: {error}", outcome.directory.display())),
        );
    }
    if cleared.sandboxes.is_empty() {
        lines.push("nothing is left of any sandbox whose shim is dead".to_owned());
    }
    if cleared.living > 0 {
        lines.push(format!("left alone: {} whose shim lives", cleared.living));
    }
    lines.iter().map(|line| plain(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::store::{Journal, ProcessId, State};

    /// A sandbox of which `shim` is the shim, with a bundle whose shim's socket is named.
    fn sandbox(root: &Path, id: &str, shim: Option<ProcessId>) -> (PathBuf, PathBuf) {
        let (dir, bundle) = (root.join(format!("state/{id}-123456")), root.join(id));
        fs::create_dir_all(&bundle).expect("mkdir");
        let socket = root.join(format!("{id}.sock"));
        socket::bind_dead(&socket);
        paths::write_address(&bundle, &format!("unix://{}", socket.display())).expect("writes");
        let state = State::new(id, "k8s.io", &bundle, None).expect("a state");
        let shim = shim.unwrap_or(state.shim);
        Journal::create(&dir, State { shim, ..state }).expect("a journal");
        (dir, socket)
    }

    const DEAD: ProcessId = ProcessId { pid: 1, start_time: u64::MAX };

    #[test]
    fn what_a_dead_shim_left_goes_and_what_lives_stays() {
        let root = tempfile::tempdir().expect("a directory");
        let (dead, dead_socket) = sandbox(root.path(), "dead", Some(DEAD));
        let (living, living_socket) = sandbox(root.path(), "living", None);
        let state_dir = root.path().join("state");

        let planned = text(&clear(&state_dir, true).expect("plans"));
        assert!(dead.exists() && dead_socket.exists(), "a dry run changes nothing");
        assert!(planned.contains(&format!("dead: would remove directory {}", dead.display())), "{planned}");

        let cleared = clear(&state_dir, false).expect("clears");
        assert!(!dead.exists() && !dead_socket.exists());
        assert!(living.exists() && living_socket.exists());
        assert_eq!(text(&cleared), planned.replace("would remove", "removed"));
        assert!(planned.ends_with("left alone: 1 whose shim lives\n"), "{planned}");

        let again = text(&clear(&state_dir, false).expect("again"));
        assert!(again.starts_with("nothing is left"), "{again}");
    }

    #[test]
    fn a_socket_that_a_new_shim_answers_at_stays() {
        let root = tempfile::tempdir().expect("a directory");
        let (dir, socket) = sandbox(root.path(), "web", Some(DEAD));
        fs::remove_file(&socket).expect("removes");
        let _new_shim = UnixListener::bind(&socket).expect("binds");
        clear(&root.path().join("state"), false).expect("clears");
        assert!(!dir.exists() && socket.exists());
    }

    #[test]
    fn a_directory_that_may_get_its_journal_any_moment_stays_and_an_old_one_goes() {
        let state_dir = tempfile::tempdir().expect("a directory");
        let (fresh, old) = (state_dir.path().join("new-123456"), state_dir.path().join("old-123456"));
        for dir in [&fresh, &old] {
            fs::create_dir(dir).expect("mkdir");
        }
        let then = std::time::SystemTime::now() - 2 * timeouts::JOURNAL_BEGINS;
        fs::File::open(&old).and_then(|dir| dir.set_modified(then)).expect("ages");
        clear(state_dir.path(), false).expect("clears");
        assert!(fresh.exists() && !old.exists());
    }

    #[test]
    fn a_journal_of_another_version_is_told_and_left() {
        let state_dir = tempfile::tempdir().expect("a directory");
        let dir = state_dir.path().join("web-123456");
        fs::create_dir(&dir).expect("mkdir");
        fs::write(dir.join("state.json"), r#"{"version": 7}"#).expect("writes");
        let cleared = clear(state_dir.path(), false).expect("goes on");
        let told = text(&cleared);
        assert!(told.starts_with("web: could not remove") && told.contains("has version 7"), "{told}");
        assert!(dir.exists());
    }
}
