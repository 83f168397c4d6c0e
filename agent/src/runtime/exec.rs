//! In a worker: runs a further process in a container, as runc's `exec` does.
//!
//! The order of the steps is the one that security asks for: cgroup, namespaces, session, directory, groups, filter (when it
//! is a privileged operation), user, capabilities, filter (when it is not), program.
//! OCI runtime: <https://github.com/opencontainers/runtime-spec/blob/main/config.md#process>

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libcontainer::capabilities::drop_privileges;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::linux::LinuxSyscall;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, execve, fchown, setgroups, setresgid, setresuid, setsid};
use rustix::fs::OFlags;

use super::{Exec, Line, isolate, lookup, rlimit, wire};
use crate::passwd;
use crate::sys::{self, Fork};

/// Namespaces a container may have of its own, in the order they are joined; the user namespace gives the right to the rest.
const NAMESPACES: [(&str, CloneFlags); 7] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Starts the process and tells its pid; the socket closes when the program runs, or tells why it does not.
pub fn exec(socket: &UnixStream, request: Exec, fds: Vec<OwnedFd>) -> Result<(), String> {
    let namespaces = foreign_namespaces(request.init_pid)?;
    fs::write(request.cgroup.join("cgroup.procs"), std::process::id().to_string())
        .map_err(|error| format!("join the container's cgroup: {}", lookup::text(&error)))?;
    let score = request.process.oom_score_adj().unwrap_or(0);
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .map_err(|error| format!("set oom_score_adj to {score}: {}", lookup::text(&error)))?;
    rlimit::allow(request.process.rlimits().as_deref().unwrap_or_default())?;
    for (name, kind, namespace) in &namespaces {
        if *kind == CloneFlags::CLONE_NEWUSER {
            isolate::enter(namespace)?;
            continue;
        }
        setns(namespace, *kind).map_err(|error| format!("join the container's {name} namespace: {error}"))?;
    }
    drop(namespaces);
    // A PID namespace is entered by children only.
    match sys::fork_sibling().map_err(|error| format!("fork: {error}"))? {
        Fork::Parent(pid) => wire::send_line(socket, &Line::Pid(pid), &[]).map_err(|error| error.to_string()),
        Fork::Child => {
            let Err(text) = become_process(socket, &request, fds);
            drop(wire::send_line(socket, &Line::Failed(text), &[]));
            std::process::exit(1);
        }
    }
}

/// Namespaces of `init_pid` that are not the caller's.
fn foreign_namespaces(init_pid: i32) -> Result<Vec<(&'static str, CloneFlags, fs::File)>, String> {
    let mut foreign = Vec::with_capacity(NAMESPACES.len());
    for (name, kind) in NAMESPACES {
        let path = format!("/proc/{init_pid}/ns/{name}");
        let theirs = fs::read_link(&path).map_err(|_| "container is not running".to_owned())?;
        if fs::read_link(format!("/proc/self/ns/{name}")).is_ok_and(|ours| ours == theirs) {
            continue;
        }
        let file = fs::File::open(&path).map_err(|_| "container is not running".to_owned())?;
        foreign.push((name, kind, file));
    }
    Ok(foreign)
}

fn become_process(socket: &UnixStream, request: &Exec, fds: Vec<OwnedFd>) -> Result<std::convert::Infallible, String> {
    let process = &request.process;
    let user = process.user();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);

    setsid().map_err(|error| format!("start a session: {error}"))?;
    if process.terminal().unwrap_or(false) {
        open_terminal(socket, uid, request.size)?;
    } else {
        let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| "expected three descriptors")?;
        set_stdio(&stdin, &stdout, &stderr)?;
    }
    let system = LinuxSyscall;
    for limit in process.rlimits().iter().flatten() {
        system.set_rlimit(limit).map_err(|error| format!("set limit {:?}: {error}", limit.typ()))?;
    }
    if let Some(mask) = user.umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    // As root first, because the user may not be allowed to look into the path; where root is not (NFS), as the user.
    let entered = chdir(process.cwd());
    let groups: Vec<_> = user.additional_gids().iter().flatten().map(|&gid| Gid::from_raw(gid)).collect();
    setgroups(&groups).map_err(|error| format!("set additional groups: {error}"))?;
    if let Some(seccomp) = &request.seccomp
        && !no_new_privileges
    {
        // Without no_new_privs this takes CAP_SYS_ADMIN.
        load_filter(seccomp)?;
    }
    prctl::set_keepcaps(true)
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .and_then(|()| prctl::set_keepcaps(false))
        .map_err(|error| format!("become user {uid}, group {gid}: {error}"))?;
    if let Some(capabilities) = process.capabilities() {
        libcontainer::capabilities::reset_effective(&system)
            .map_err(|error| format!("regain capabilities: {error}"))?;
        drop_privileges(capabilities, &system).map_err(|error| format!("set capabilities: {error}"))?;
    }
    if no_new_privileges {
        prctl::set_no_new_privs().map_err(|error| format!("set no_new_privs: {error}"))?;
    }
    if entered.is_err() {
        chdir(process.cwd()).map_err(|error| {
            let reason = lookup::text(&io::Error::from(error));
            format!("chdir to cwd ({:?}) set in config.json failed: {reason}", process.cwd())
        })?;
    }

    let args = process.args().as_deref().unwrap_or_default();
    let name = args.first().ok_or("process.args must not be empty")?;
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={}", passwd::home(&fs::read("/etc/passwd").unwrap_or_default(), user.uid())));
    }
    let path = lookup::find(name, &env)?;
    if let Some(seccomp) = &request.seccomp
        && no_new_privileges
    {
        load_filter(seccomp)?;
    }
    Err(replace(&path, args, &env))
}

fn load_filter(seccomp: &oci_spec::runtime::LinuxSeccomp) -> Result<(), String> {
    libcontainer::seccomp::initialize_seccomp(seccomp)
        .map(drop)
        .map_err(|error| format!("set the seccomp filter: {error}"))
}

/// Opens a pty in the container's /dev/pts, makes it the controlling terminal and sends its master to PID 1.
fn open_terminal(socket: &UnixStream, uid: Uid, size: Option<(u16, u16)>) -> Result<(), String> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/ptmx", flags, rustix::fs::Mode::empty())
        .map_err(|error| format!("open /dev/ptmx: {error}"))?;
    rustix::pty::unlockpt(&master).map_err(|error| format!("unlock the pty: {error}"))?;
    let slave = sys::open_pty_slave(master.as_fd()).map_err(|error| format!("open the pty's slave: {error}"))?;
    if let Some((rows, columns)) = size {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&slave, size).map_err(|error| format!("size the pty: {error}"))?;
    }
    // The user owns its terminal, or it could not open /dev/tty's paths again.
    fchown(&slave, Some(uid), None).map_err(|error| format!("give the pty to the user: {error}"))?;
    rustix::process::ioctl_tiocsctty(&slave).map_err(|error| format!("take the controlling terminal: {error}"))?;
    set_stdio(&slave, &slave, &slave)?;
    wire::send_line(socket, &Line::Terminal, &[master.as_fd()]).map_err(|error| error.to_string())
}

fn set_stdio(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> Result<(), String> {
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .map_err(|error| format!("set up stdio: {error}"))
}

/// Becomes the program; returns why it did not.
pub fn replace(path: &Path, args: &[String], env: &[String]) -> String {
    let strings = |list: &[String]| list.iter().map(|text| CString::new(text.as_str())).collect::<Result<Vec<_>, _>>();
    let (Ok(args), Ok(env), Ok(file)) =
        (strings(args), strings(env), CString::new(path.as_os_str().as_encoded_bytes()))
    else {
        return format!("exec {}: a NUL byte in arguments or environment", path.display());
    };
    let Err(error) = execve(&file, &args, &env);
    format!("exec {}: {}", path.display(), lookup::text(&io::Error::from(error)))
}
