//! `start`: finds or makes the server of the pod that a container belongs to, and tells its address.
//!
//! Nothing is written to stderr unless `start` fails: containerd reads both streams as the answer. The server keeps neither
//! of them open, since containerd waits for their end.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use command_fds::{CommandFdExt, FdMapping};
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::protobuf::Message;
use nix::sys::stat::{Mode, umask};

use super::creator;
use super::flags::Flags;
use super::group::Group;
use super::input::{Environment, INPUT_PATIENCE, Input, read_to_end};
use super::serve::{CREATOR_FD, Handover, LISTENER_FD};
use super::socket::{self, Claim};
use crate::config::Config;
use crate::{paths, sys};

/// Version of the task service that a `BootstrapResult` promises.
const TASK_VERSION: i32 = 3;

/// Does what `start` is for and returns the bytes to print.
pub fn run(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    if flags.namespace.is_empty() {
        bail!("start needs -namespace");
    }
    paths::check_id("namespace", &flags.namespace)?;
    paths::check_id("container id", &flags.id)?;
    let bundle = match flags.bundle.as_os_str() {
        dir if dir.is_empty() => std::env::current_dir().context("find the bundle, the working directory")?,
        _ => flags.bundle.clone(),
    };
    let input = Input::parse(&read_to_end(std::io::stdin(), INPUT_PATIENCE)?, flags, Environment::read())?;
    // As early as can be: whoever listens there now is who has run this.
    let creator = creator::find(input.ttrpc_address.as_deref())?;
    let group = Group::of_bundle(&bundle)?;
    let socket_of =
        |sandbox_id: &str| socket::path(input.socket_dir.as_deref(), &input.grpc_address, &flags.namespace, sandbox_id);
    let socket_path = match group {
        Group::Member(sandbox_id) if sandbox_id != flags.id => {
            let path = socket_of(&sandbox_id)?;
            if !socket::answers(&path)? {
                // A server for this container alone would hide that its pod is gone.
                bail!(
                    "sandbox {sandbox_id} of container {} has no shim: nobody answers at {}",
                    flags.id,
                    path.display()
                );
            }
            path
        }
        _ => {
            let path = socket_of(&flags.id)?;
            make_server(flags, &input, &bundle, &path, creator)?;
            path
        }
    };
    let address = address_of(&socket_path);
    paths::write_address(&bundle, &address)?;
    encode(&input, address)
}

fn address_of(socket_path: &Path) -> String {
    format!("unix://{}", socket_path.display())
}

/// The answer: a message for who sent one, the bare address for everyone else.
///
/// Older containerds read the bare line alone; newer ones take it for version 2 of the task service, which is served too.
/// `capabilities` and the `MountCapabilities` extension of newer messages claim mounts, and stay unset while every rootfs
/// is mounted by containerd.
fn encode(input: &Input, address: String) -> anyhow::Result<Vec<u8>> {
    if !input.wants_message {
        return Ok(address.into_bytes());
    }
    let result =
        BootstrapResult { version: TASK_VERSION, address, protocol: "ttrpc".into(), ..BootstrapResult::default() };
    result.write_to_bytes().context("encode the bootstrap result")
}

/// Starts the server of a sandbox, unless there is one.
fn make_server(
    flags: &Flags,
    input: &Input,
    bundle: &Path,
    socket_path: &Path,
    creator: Option<OwnedFd>,
) -> anyhow::Result<()> {
    // Here and not in the server, so that a mistake is what `start` answers.
    let config = Config::load(&input.options.clone().unwrap_or_default())?;
    let inherited = umask(Mode::from_bits_truncate(0o077));
    let claim = socket::claim(socket_path);
    umask(inherited);
    let listener = match claim? {
        Claim::Taken => return Ok(()),
        Claim::Ours(listener) => listener,
    };
    let made = spawn(flags, input, bundle, socket_path, config, Inherited { listener, creator });
    if made.is_err() {
        // The error that made the socket useless is the one to tell.
        drop(socket::remove(socket_path));
    }
    made
}

/// Files that the server gets.
struct Inherited {
    listener: UnixListener,
    creator: Option<OwnedFd>,
}

impl Inherited {
    fn mappings(self) -> Vec<FdMapping> {
        let listener = FdMapping { parent_fd: self.listener.into(), child_fd: LISTENER_FD };
        let creator = self.creator.map(|pidfd| FdMapping { parent_fd: pidfd, child_fd: CREATOR_FD });
        std::iter::once(listener).chain(creator).collect()
    }
}

fn spawn(
    flags: &Flags,
    input: &Input,
    bundle: &Path,
    socket_path: &Path,
    config: Config,
    inherited: Inherited,
) -> anyhow::Result<()> {
    let shim_cgroup = input.options.as_ref().map(|options| options.shim_cgroup.clone()).unwrap_or_default();
    let sandbox_dir = paths::sandbox_dir(&config.state_dir, &flags.id, socket_path)?;
    // Before there is a server: if containerd dies now, the next one finds it by these, or has `delete` end it.
    paths::link_bundle(bundle, &sandbox_dir)?;
    paths::write_address(bundle, &address_of(socket_path))?;
    let exe = std::env::current_exe().context("find the binary that is running")?;
    let handover = Handover {
        sandbox_id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        bundle: bundle.to_owned(),
        socket_path: socket_path.to_owned(),
        sandbox_dir,
        exe: exe.clone(),
        grpc_address: input.grpc_address.clone(),
        ttrpc_address: input.ttrpc_address.clone(),
        containerd_binary: input.containerd_binary.clone(),
        containerd_version: input.containerd_version.clone(),
        log_level: config.log_level.max(input.log_level),
        options_given: input.options.is_some(),
        has_creator: inherited.creator.is_some(),
        config,
    };
    let handover = serde_json::to_vec(&handover).context("encode what the server is told")?;

    follow_oom_score();
    // Whatever this process inherited open beyond stderr is not for a server that may live for months.
    sys::close_on_exec_from(3).context("keep open files from the server")?;
    let mut command = Command::new(&exe);
    command
        // For people who look at the process list; the server reads its standard input.
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &input.grpc_address, "serve"])
        .current_dir(bundle)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        // glibc gives each thread a heap of its own, which costs more than two threads gain.
        .envs([("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "65536")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(inherited.mappings())?;
    let mut child = command.spawn().with_context(|| format!("run {}", exe.display()))?;
    let told = tell(&mut child, &handover).and_then(|()| join_cgroup(child.id(), &shim_cgroup));
    if told.is_err() {
        // It may have ended by itself, which is as good.
        drop(child.kill());
        drop(child.wait());
    }
    told
}

fn tell(child: &mut Child, handover: &[u8]) -> anyhow::Result<()> {
    let mut stdin = child.stdin.take().context("the server has no standard input")?;
    stdin.write_all(handover).context("tell the server what to serve")
}

/// Makes this process, and so the server, a little likelier a victim than containerd, as runc's shim does.
///
/// Where that is not allowed the score stays as inherited.
fn follow_oom_score() {
    let parent = format!("/proc/{}/oom_score_adj", std::os::unix::process::parent_id());
    let score = fs::read_to_string(parent).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        // Not worth failing a pod, and there is no log yet.
        drop(fs::write("/proc/self/oom_score_adj", (score + 1).min(1000).to_string()));
    }
}

/// Moves the server into `cgroup` (empty: leaves it), in every hierarchy that has it; one must.
fn join_cgroup(pid: u32, cgroup: &str) -> anyhow::Result<()> {
    if cgroup.is_empty() {
        return Ok(());
    }
    let relative = Path::new(cgroup.trim_start_matches('/'));
    if relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        bail!("shim cgroup {cgroup:?} is not accepted: it is a path below the cgroup root without '..'");
    }
    let root = Path::new("/sys/fs/cgroup");
    let mut candidates = vec![root.join(relative)];
    for hierarchy in fs::read_dir(root).context("list cgroup hierarchies")? {
        candidates.push(hierarchy.context("list cgroup hierarchies")?.path().join(relative));
    }
    let mut joined = 0;
    for procs in candidates.iter().map(|dir| dir.join("cgroup.procs")).filter(|procs| procs.exists()) {
        fs::write(&procs, pid.to_string()).with_context(|| format!("move the shim into {}", procs.display()))?;
        joined += 1;
    }
    if joined == 0 {
        bail!("shim cgroup {cgroup:?} does not exist below {}", root.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogLevel;

    fn input(wants_message: bool) -> Input {
        Input {
            wants_message,
            options: None,
            grpc_address: String::new(),
            ttrpc_address: None,
            containerd_binary: String::new(),
            containerd_version: None,
            log_level: LogLevel::Info,
            socket_dir: None,
        }
    }

    #[test]
    fn an_old_caller_gets_the_bare_address_and_not_a_byte_more() {
        assert_eq!(encode(&input(false), "unix:///run/s/x".into()).expect("encodes"), b"unix:///run/s/x");
    }

    #[test]
    fn a_new_caller_gets_a_message_of_version_3() {
        let bytes = encode(&input(true), "unix:///run/s/x".into()).expect("encodes");
        let result = BootstrapResult::parse_from_bytes(&bytes).expect("decodes");
        assert_eq!((result.version, &*result.address, &*result.protocol), (3, "unix:///run/s/x", "ttrpc"));
    }

    #[test]
    fn a_cgroup_that_leaves_the_root_or_is_missing_is_refused() {
        assert!(join_cgroup(1, "../../etc").is_err());
        let said = join_cgroup(1, "/no/such/cgroup/of/ours").expect_err("is refused").to_string();
        assert!(said.contains("does not exist"), "{said}");
        join_cgroup(1, "").expect("nothing asked, nothing done");
    }

    #[test]
    fn the_address_is_replaced_whole() {
        let dir = tempfile::tempdir().expect("makes a directory");
        for address in ["unix:///a", "unix:///b"] {
            paths::write_address(dir.path(), address).expect("writes");
            assert_eq!(fs::read_to_string(dir.path().join("address")).expect("reads"), address);
        }
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 1);
    }
}
