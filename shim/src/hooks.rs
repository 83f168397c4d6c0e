//! OCI hooks: programs of the host's that whoever made a container wants run at points of its life.
//!
//! Those of the runtime's namespaces are served, for a container without a pod: `prestart` and `createRuntime` before its
//! network is read, as they may be what sets it up (nerdctl's calls CNI), `poststart`, and `poststop` when nothing of it is
//! left. Those that run inside the container's namespaces cannot be: these are in a virtual machine. A pod's network and its
//! containers are set up by CRI; hooks in their specs (of devices, mostly) act on processes and mounts that the host does not
//! have, and are dropped with the rest that concerns it (`container::spec`).
//!
//! As under runc they run with the shim's rights, and a failing one fails the creation. See
//! <https://github.com/opencontainers/runtime-spec/blob/main/config.md#posix-platform-hooks>.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{ContainerState, Hook, StateBuilder};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::error::{Error, Kind, Result, WithKind};
use crate::process::ChildExit;
use crate::timeouts;

/// Most that is read of what a hook says on stderr; the rest is dropped.
const MAX_SAID: u64 = 4096;

/// By this annotation of the state nerdctl's hook finds the network namespace of a container, also where that has no pid any more:
/// <https://github.com/containerd/nerdctl/blob/main/pkg/ocihook/ocihook.go>.
const NERDCTL_NETNS: &str = "nerdctl/network-namespace";

/// Lists of the spec that run in the container's namespaces.
const INSIDE: [&str; 2] = ["createContainer", "startContainer"];

/// When hooks are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the container's network is read: `prestart`, then `createRuntime`.
    Create,
    /// After its program has started: `poststart`.
    Start,
    /// When nothing of it is left: `poststop`.
    Stop,
}

/// The hooks of one container, and what they are told of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Hooks {
    create: Vec<Hook>,
    start: Vec<Hook>,
    stop: Vec<Hook>,
    oci_version: String,
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

/// Without arguments and environments, which nobody is to find in a log.
impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = |hooks: &[Hook]| hooks.iter().map(|hook| hook.path().clone()).collect::<Vec<_>>();
        f.debug_struct("Hooks")
            .field("create", &paths(&self.create))
            .field("start", &paths(&self.start))
            .field("stop", &paths(&self.stop))
            .finish_non_exhaustive()
    }
}

impl Hooks {
    /// The hooks of container `id`, whose spec is `spec`. None if it has none.
    ///
    /// Errors: [`Kind::InvalidArgument`] for a list that is no list of hooks, and for hooks that cannot be run.
    pub fn of_spec(spec: &Value, id: &str, bundle: &Path) -> Result<Option<Self>> {
        let Some(hooks) = spec.get("hooks").filter(|hooks| !hooks.is_null()) else { return Ok(None) };
        let list = |name: &str| -> Result<Vec<Hook>> {
            let Some(list) = hooks.get(name).filter(|list| !list.is_null()) else { return Ok(Vec::new()) };
            let hooks: Vec<Hook> =
                serde_json::from_value(list.clone()).or_kind(Kind::InvalidArgument, format!("spec: hooks.{name}"))?;
            for hook in &hooks {
                let path = hook.path().display();
                if !hook.path().is_absolute() {
                    return Err(Error::invalid(format!("spec: path {path} in hooks.{name} is not absolute")));
                }
                if let Some(seconds) = hook.timeout().filter(|seconds| *seconds <= 0) {
                    return Err(Error::invalid(format!(
                        "spec: timeout {seconds} of {path} in hooks.{name} is not greater than zero"
                    )));
                }
            }
            Ok(hooks)
        };
        for name in INSIDE {
            if !list(name)?.is_empty() {
                return Err(Error::invalid(format!(
                    "hooks.{name} run inside the container's namespaces, which are in a virtual machine: prestart, \
                     createRuntime, poststart and poststop are accepted"
                )));
            }
        }
        let (mut create, start, stop) = (list("prestart")?, list("poststart")?, list("poststop")?);
        create.extend(list("createRuntime")?);
        if create.is_empty() && start.is_empty() && stop.is_empty() {
            return Ok(None);
        }
        let oci_version = crate::container::spec::string(spec, "/ociVersion");
        let annotations = crate::container::spec::annotations(spec).into_iter().collect();
        Ok(Some(Self { create, start, stop, oci_version, id: id.into(), bundle: bundle.into(), annotations }))
    }

    /// Whether any run before the network is read, which may set it up.
    pub fn prepare_network(&self) -> bool {
        !self.create.is_empty()
    }

    /// Runs those of `moment`, one after the other; `netns` is the container's network namespace, while there is one,
    /// and `pid` what stands for the container on the host, in that namespace: hooks look for it by either.
    ///
    /// The first that fails ends the creation; at other moments all are run, and the first error is returned. Its kind is
    /// [`Kind::FailedPrecondition`], and it has what the hook said. A hook that takes longer than its `timeout`, or
    /// [`timeouts::HOOK`] without one, is killed. Cancel safe: the hook that runs is killed.
    pub async fn run(&self, moment: Moment, netns: Option<&Path>, pid: Option<u32>) -> Result<()> {
        let (hooks, status) = match moment {
            Moment::Create => (&self.create, ContainerState::Creating),
            Moment::Start => (&self.start, ContainerState::Running),
            Moment::Stop => (&self.stop, ContainerState::Stopped),
        };
        let state = self.state(status, netns, pid)?;
        let mut outcome = Ok(());
        for hook in hooks {
            let done = run_one(hook, &self.bundle, &state).await;
            let done = done.map_err(|error| error.context(format!("hook {}", hook.path().display())));
            match done {
                Err(error) if moment == Moment::Create => return Err(error),
                done => outcome = outcome.and(done),
            }
        }
        outcome
    }

    /// What hooks read: <https://github.com/opencontainers/runtime-spec/blob/main/runtime.md#state>.
    fn state(&self, status: ContainerState, netns: Option<&Path>, pid: Option<u32>) -> Result<Vec<u8>> {
        let mut annotations = self.annotations.clone();
        if let Some(netns) = netns {
            annotations.insert(NERDCTL_NETNS.into(), netns.display().to_string());
        }
        let mut state = StateBuilder::default()
            .version(self.oci_version.clone())
            .id(self.id.clone())
            .status(status)
            .bundle(self.bundle.clone())
            .annotations(annotations);
        if let Some(pid) = pid {
            state = state.pid(pid.cast_signed());
        }
        let state = state.build().or_kind(Kind::Internal, "make the state for hooks")?;
        serde_json::to_vec(&state).or_kind(Kind::Internal, "write the state for hooks")
    }
}

async fn run_one(hook: &Hook, bundle: &Path, state: &[u8]) -> Result<()> {
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_deref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    let environment = hook.env().iter().flatten().filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(environment).current_dir(bundle);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().or_kind(Kind::FailedPrecondition, "start")?;
    let limit = hook.timeout().map_or(timeouts::HOOK, |seconds| Duration::from_secs(seconds.unsigned_abs()));
    match timeout(limit, finish(child, state)).await {
        Ok(finished) => finished,
        Err(_elapsed) => Err(Error::deadline(format!("did not end within {limit:?}"))),
    }
}

async fn finish(mut child: Child, state: &[u8]) -> Result<()> {
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // A hook need not read it.
            drop(stdin.write_all(state).await);
        }
    };
    let listen = async {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            // What it said only illustrates how it ended.
            drop((&mut stderr).take(MAX_SAID).read_to_end(&mut said).await);
            drop(tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await);
        }
        String::from_utf8_lossy(&said).trim().to_owned()
    };
    let ((), said) = tokio::join!(tell, listen);
    let status = child.wait().await.or_kind(Kind::Internal, "wait for its end")?;
    if status.success() {
        return Ok(());
    }
    let end = ChildExit::from(status);
    let text = if said.is_empty() { end.to_string() } else { format!("{end}: {said}") };
    Err(Error::failed_precondition(text))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use serde_json::json;

    use super::*;

    fn shell(script: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["GREETING=hello"]})
    }

    fn hooks(hooks: &Value, bundle: &Path) -> Result<Option<Hooks>> {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {"a": "b"}, "hooks": hooks});
        Hooks::of_spec(&spec, "web", bundle)
    }

    #[test]
    fn a_spec_without_hooks_has_none() {
        assert_eq!(Hooks::of_spec(&json!({}), "web", Path::new("/b")).expect("reads"), None);
        assert_eq!(hooks(&json!({"prestart": [], "poststop": null}), Path::new("/b")).expect("reads"), None);
    }

    #[test]
    fn hooks_that_cannot_be_run_are_refused_by_name() {
        let said = |list: Value| hooks(&list, Path::new("/b")).expect_err("is refused").to_string();
        assert!(said(json!({"startContainer": [shell("true")]})).starts_with("hooks.startContainer run inside"));
        assert_eq!(said(json!({"poststop": [{"path": "sh"}]})), "spec: path sh in hooks.poststop is not absolute");
        assert!(said(json!({"prestart": [{"path": 5}]})).starts_with("spec: hooks.prestart"));
    }

    #[test]
    fn a_timeout_that_leaves_a_hook_no_time_is_refused_by_its_value() {
        for seconds in [0, -1] {
            let list = json!({"poststart": [{"path": "/bin/true", "timeout": seconds}]});
            let error = hooks(&list, Path::new("/b")).expect_err("is refused");
            assert_eq!(error.kind(), Kind::InvalidArgument);
            let sentence = format!("spec: timeout {seconds} of /bin/true in hooks.poststart is not greater than zero");
            assert_eq!(error.to_string(), sentence);
        }
    }

    #[tokio::test]
    async fn hooks_run_in_order_with_their_environment_and_read_the_state() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let list = json!({
            "createRuntime": [shell("echo second >> order; echo $GREETING${HOME-} >> order")],
            "prestart": [shell("echo first > order; cat > state")],
        });
        let hooks = hooks(&list, dir.path()).expect("reads").expect("has some");
        assert!(hooks.prepare_network());
        hooks.run(Moment::Create, Some(Path::new("/proc/7/fd/8")), Some(7)).await.expect("run");
        assert_eq!(fs::read_to_string(dir.path().join("order")).expect("is there"), "first\nsecond\nhello\n");
        let state: Value =
            serde_json::from_slice(&fs::read(dir.path().join("state")).expect("is there")).expect("is JSON");
        let expected = json!({
            "ociVersion": "1.2.0", "id": "web", "status": "creating", "pid": 7,
            "bundle": dir.path(), "annotations": {"a": "b", "nerdctl/network-namespace": "/proc/7/fd/8"},
        });
        assert_eq!(state, expected);
    }

    #[tokio::test]
    async fn a_hook_that_fails_is_told_with_what_it_said() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let failing = shell("echo no such network >&2; exit 3");
        let list = json!({"createRuntime": [failing, shell("touch reached")]});
        let made = hooks(&list, dir.path()).expect("reads").expect("has some");
        let error = made.run(Moment::Create, None, None).await.expect_err("fails");
        assert_eq!(error.to_string(), "hook /bin/sh: exited with status 3: no such network");
        assert!(!dir.path().join("reached").exists());
        let list = json!({"poststop": [failing, shell("touch reached")]});
        let made = hooks(&list, dir.path()).expect("reads").expect("has some");
        made.run(Moment::Stop, None, None).await.expect_err("fails");
        assert!(dir.path().join("reached").exists());
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_after_its_time() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let mut hook = shell("exec sleep 1000");
        hook["timeout"] = json!(1);
        let made = hooks(&json!({"poststart": [hook]}), dir.path()).expect("reads").expect("has some");
        let begun = Instant::now();
        let error = made.run(Moment::Start, None, None).await.expect_err("fails");
        assert_eq!(error.kind(), Kind::DeadlineExceeded);
        assert!(begun.elapsed() >= Duration::from_secs(1));
    }
}
