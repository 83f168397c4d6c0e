//! The only unsafe code of the agent: system calls that no safe wrapper offers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches an open file for readiness; `AsyncFd` never lets go of it nor hands it out mutably here.
#[expect(unsafe_code, reason = "the compiler cannot see that a file keeps its descriptor")]
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` refers to one open descriptor until it is dropped, which `AsyncFd` does after it deregistered.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// Which side of [`fork_sibling`] this is.
pub enum Fork {
    /// The new process.
    Child,
    /// The caller, with the new process's id.
    Parent(i32),
}

/// Forks a process whose parent is the caller's parent: PID 1 can wait for it.
///
/// The caller must have one thread only, because a copy of a locked allocator would stay locked for ever.
#[expect(unsafe_code, reason = "no wrapper passes CLONE_PARENT without a child stack")]
pub fn fork_sibling() -> io::Result<Fork> {
    // SAFETY: without CLONE_VM the child runs on a copy of this very stack, as after fork(2); no pointer is passed.
    match unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(i32::try_from(pid).map_err(io::Error::other)?)),
    }
}

/// `kill(2)` with a number that has no name in `nix`: the real-time signals.
#[expect(unsafe_code, reason = "nix knows named signals only")]
pub fn kill(pid: i32, number: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::kill(pid, number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives SIGPIPE its default action again, which Rust's runtime takes away and an executed program would not get back.
#[expect(unsafe_code, reason = "signal(2) can install a handler; every wrapper is unsafe for that")]
pub fn default_sigpipe() -> io::Result<()> {
    // SAFETY: no handler is installed.
    match unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Has the calling thread scheduled as a batch job (sched(7)); what it forks is not.
#[expect(unsafe_code, reason = "no wrapper sets a scheduling policy")]
pub fn become_batch() -> io::Result<()> {
    let policy = libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the structure is plain numbers, all of them zero as this policy asks, and outlives the call.
    match unsafe { libc::sched_setscheduler(0, policy, &std::mem::zeroed()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One instruction of classic BPF, as in `linux/filter.h`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jt: u8,
    /// Instructions to skip when it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Installs a compiled seccomp filter for this thread: `seccomp(SECCOMP_SET_MODE_FILTER)`.
#[expect(unsafe_code, reason = "no wrapper takes a compiled filter")]
pub fn install_seccomp(program: &[SockFilter], flags: u64) -> io::Result<()> {
    #[repr(C)]
    struct Program {
        len: u16,
        filter: *const SockFilter,
    }
    let header = Program {
        len: u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        filter: program.as_ptr(),
    };
    // SAFETY: `header` describes `program`, which outlives the call; the kernel copies and verifies it.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One eBPF instruction, as `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct BpfInstruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source in the high four.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Immediate operand.
    pub immediate: i32,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Loads `program` as the device filter of the cgroup behind `cgroup`.
#[expect(unsafe_code, reason = "bpf(2) has no wrapper")]
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, program: &[BpfInstruction]) -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
    }
    let license = c"Apache-2.0";
    let load = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: the attribute block is as long as said, and its pointers outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us alone.
    let loaded = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: loaded.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
    };
    // SAFETY: as above; the cgroup keeps its own reference to the program.
    match unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens the slave of the pty `master` without a path: `TIOCGPTPEER`.
#[expect(unsafe_code, reason = "the ioctl returns a descriptor")]
pub fn open_pty_slave(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl takes its argument by value and returns a new descriptor that is ours alone.
    unsafe {
        match libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<SockFilter>(), 8);
        assert_eq!(size_of::<BpfInstruction>(), 8);
    }
}
