//! A system-call filter for a helper that brings none of its own: the vsock device.
//!
//! It is an allow-list: the calls of a small threaded server for Unix sockets. Everything else answers ENOSYS, which libc takes as
//! an old kernel (it falls back from `clone3`, whose flags no filter can see, to `clone`). `execve` has to stay, since the
//! filter is there before the program; whoever uses it afterwards has the same user, no rights and the same filter.
//!
//! QEMU (`-sandbox`) and virtiofsd (`--seccomp`) install filters of their own, which know those programs better.
//!
//! seccomp(2), <https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html>

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use anyhow::Context;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Calls that a socket server may make with any arguments.
const ANY_ARGUMENTS: &[i64] = &[
    // Start of a dynamically linked program.
    libc::SYS_execve,
    libc::SYS_brk,
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_readlink,
    libc::SYS_getcwd,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // Files and sockets that are open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    // Threads, signals, the end.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// A compiled filter; applying it allocates nothing.
#[derive(Debug, Clone)]
pub struct Filter(Arc<BpfProgram>);

impl Filter {
    /// The filter for a threaded server that talks through Unix sockets and shared memory only.
    pub fn unix_socket_server() -> anyhow::Result<Self> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ANY_ARGUMENTS.iter().map(|call| (*call, Vec::new())).collect();
        let equal = |argument: u8, value: u64| condition(argument, SeccompCmpOp::Eq, value);
        let thread = libc::CLONE_THREAD as u64;
        rules.insert(libc::SYS_clone, vec![rule(condition(0, SeccompCmpOp::MaskedEq(thread), thread)?)?]);
        rules.insert(libc::SYS_socket, vec![rule(equal(0, libc::AF_UNIX as u64)?)?]);
        rules.insert(libc::SYS_socketpair, vec![rule(equal(0, libc::AF_UNIX as u64)?)?]);
        rules.insert(libc::SYS_prctl, vec![rule(equal(0, libc::PR_SET_NAME as u64)?)?]);
        // Limits may be read: the new value is a null pointer.
        rules.insert(libc::SYS_prlimit64, vec![rule(condition64(2, 0)?)?]);
        let ioctls = [libc::FIONBIO, libc::FIONREAD, libc::TCGETS, libc::TIOCGWINSZ];
        let ioctls = ioctls.into_iter().map(|request| rule(equal(1, request)?)).collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_ioctl, ioctls);
        Self::compile(rules)
    }

    fn compile(rules: BTreeMap<i64, Vec<SeccompRule>>) -> anyhow::Result<Self> {
        let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
        let arch = std::env::consts::ARCH.try_into().context("a system-call filter for this architecture")?;
        let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch).context("system-call filter")?;
        Ok(Self(Arc::new(filter.try_into().context("compile the system-call filter")?)))
    }

    /// Filters the calling thread from now on. Makes system calls only, so it may be called after a fork.
    pub fn apply(&self) -> io::Result<()> {
        seccompiler::apply_filter(&self.0).map_err(|_| io::Error::last_os_error())
    }
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompCondition> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

fn condition64(argument: u8, value: u64) -> anyhow::Result<SeccompCondition> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)?)
}

fn rule(condition: SeccompCondition) -> anyhow::Result<SeccompRule> {
    Ok(SeccompRule::new(vec![condition])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    #[test]
    fn only_unix_sockets_and_harmless_calls_pass() {
        // On a thread of its own, which the filter ends with.
        let seen = std::thread::spawn(|| {
            Filter::unix_socket_server().expect("compiles").apply().expect("applies");
            let open = |family| socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map(drop);
            (
                open(AddressFamily::Unix),
                open(AddressFamily::Inet),
                nix::unistd::setsid(),
                rustix::thread::set_name(c"x"),
            )
        });
        let (unix, inet, session, name) = seen.join().expect("survives the filter");
        assert_eq!(unix, Ok(()));
        assert_eq!(inet, Err(nix::Error::ENOSYS));
        assert_eq!(session, Err(nix::Error::ENOSYS));
        assert_eq!(name, Ok(()));
    }
}
