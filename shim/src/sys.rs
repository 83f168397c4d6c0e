//! The only place of the shim with `unsafe`: system calls that no crate wraps.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has `hook` run in the child of `command`, between fork and exec, after the hooks that were given before.
///
/// The child is a copy of one thread of a threaded process: `hook` must make system calls only (no allocation, no lock, no log).
#[expect(unsafe_code, reason = "std has no safe way to run code between fork and exec")]
pub fn before_exec(command: &mut Command, hook: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: every caller in this crate keeps to the rule above; `process` and `container::stdio` are all that there are.
    unsafe { command.pre_exec(hook) };
}

/// Marks every open file from number `first` on to be closed by exec (`close_range(2)`, Linux 5.11).
#[expect(unsafe_code, reason = "no crate wraps close_range with this flag")]
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: takes no pointers, and closes nothing before an exec.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes over the listening socket with number `fd`, which whoever ran this process left open for it.
///
/// An error says that there is none. Once per process and number: a second owner would close a stranger's file.
#[expect(unsafe_code, reason = "a number alone says nothing about who owns the file")]
pub fn inherited_listener(fd: RawFd) -> io::Result<UnixListener> {
    // SAFETY: borrowed for these calls only; on a number that is not open they fail and touch nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    if !rustix::net::sockopt::socket_acceptconn(borrowed)? {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by this function's contract nothing else in this process owns it.
    Ok(UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Takes over the file with number `fd`, on the terms of [`inherited_listener`].
#[expect(unsafe_code, reason = "a number alone says nothing about who owns the file")]
pub fn inherited_file(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed for this call only; on a number that is not open it fails and touches nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by this function's contract nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the runtime tell when `fd` becomes readable.
#[expect(unsafe_code, reason = "tokio cannot know that a descriptor stays the same while it is registered")]
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one descriptor from its making to its drop, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// The processor's time stamp counter.
pub fn time_stamp_counter() -> u64 {
    // SAFETY: reads a counter; Linux lets every process.
    #[expect(unsafe_code, reason = "an instruction that std does not wrap")]
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

/// Gives the guest behind an open `/dev/vhost-vsock` its address; `AddrInUse` when another guest has it.
pub fn set_guest_cid(vhost_vsock: &impl AsFd, guest_cid: u32) -> io::Result<()> {
    /// `VHOST_VSOCK_SET_GUEST_CID` of linux/vhost.h: `_IOW(0xAF, 0x60, __u64)`.
    const SET_GUEST_CID: libc::Ioctl = 0x4008_AF60;
    let guest_cid = u64::from(guest_cid);
    let file = vhost_vsock.as_fd().as_raw_fd();
    // SAFETY: the call reads 64 bits at the address and keeps no pointer to them; on any other file it fails.
    #[expect(unsafe_code, reason = "no crate wraps VHOST_VSOCK_SET_GUEST_CID")]
    let result = unsafe { libc::ioctl(file, SET_GUEST_CID, std::ptr::from_ref(&guest_cid)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the tap device `name` in the calling thread's network namespace; it lasts as long as the file.
///
/// With virtio-net headers and one queue. Fails if the name is taken.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    /// `struct ifreq` of linux/if.h, with its union reduced to the flags.
    #[repr(C)]
    struct IfReq {
        name: [u8; libc::IFNAMSIZ],
        flags: i16,
        rest: [u8; 22],
    }
    let mut request = IfReq { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    if name.is_empty() || name.len() >= request.name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as i16;
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose layout and size `IfReq` has, and keeps no pointer to it.
    #[expect(unsafe_code, reason = "no crate wraps TUNSETIFF")]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, std::ptr::from_mut(&mut request)) };
    if result == 0 { Ok(file.into()) } else { Err(io::Error::last_os_error()) }
}

/// A command of bpf(2) whose answer is a new file; `attr` is the part of `union bpf_attr` that the command reads.
///
/// Pointers in `attr` must be valid through the call; the callers below are all that there are.
#[expect(unsafe_code, reason = "no crate wraps bpf(2) without a compiler or an object file")]
fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes at the address, takes what is missing of the union for zero, and
    // keeps no pointer to it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[expect(unsafe_code, reason = "bpf(2) returns numbers")]
fn bpf_file<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    let number = bpf(command, attr)?;
    // SAFETY: the callers' commands return a file that was opened for this call, close-on-exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

/// Makes a BPF map of sockets (`BPF_MAP_TYPE_SOCKMAP`) with one place, and puts `socket` there.
///
/// The map does not keep the socket open.
pub fn bpf_socket_map(socket: &impl AsFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    #[repr(C)]
    struct Update {
        map_fd: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    const MAP_CREATE: libc::c_int = 0;
    const MAP_UPDATE_ELEM: libc::c_int = 2;
    const SOCKMAP: u32 = 15;
    let map = bpf_file(MAP_CREATE, &Create { map_type: SOCKMAP, key_size: 4, value_size: 4, max_entries: 1 })?;
    let (key, value) = (0_u32, socket.as_fd().as_raw_fd() as u32);
    let update = Update {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &update)?;
    Ok(map)
}

/// Loads a program that decides which socket takes a connection (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9).
///
/// The kernel verifies it; a refusal is `EINVAL` or `EACCES`.
pub fn bpf_socket_lookup(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
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
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    const PROG_LOAD: libc::c_int = 5;
    const SK_LOOKUP: u32 = 30;
    let license = c"Apache-2.0";
    let load = Load {
        prog_type: SK_LOOKUP,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"bulkhead_fwd\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // The verifier gives up when a signal waits for the thread, the end of a child for instance.
    const ATTEMPTS: usize = 5;
    let mut loaded = bpf_file(PROG_LOAD, &load);
    for _ in 1..ATTEMPTS {
        match loaded {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => loaded = bpf_file(PROG_LOAD, &load),
            _ => break,
        }
    }
    loaded
}

/// Attach type of socket lookups.
const BPF_SK_LOOKUP: u32 = 36;

/// Attaches a program of [`bpf_socket_lookup`] to a network namespace, for as long as the returned file is open.
///
/// It keeps neither the namespace nor a socket in it alive.
pub fn bpf_link(program: &impl AsFd, netns: &impl AsFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
    }
    const LINK_CREATE: libc::c_int = 28;
    let (program, netns) = (program.as_fd().as_raw_fd() as u32, netns.as_fd().as_raw_fd() as u32);
    bpf_file(LINK_CREATE, &Create { prog_fd: program, target_fd: netns, attach_type: BPF_SK_LOOKUP, flags: 0 })
}

/// Takes the program of a [`bpf_link`] out of its network namespace, whoever else holds the file (Linux 5.9).
pub fn bpf_detach(link: &impl AsFd) -> io::Result<()> {
    const LINK_DETACH: libc::c_int = 34;
    bpf(LINK_DETACH, &(link.as_fd().as_raw_fd() as u32)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_runs_in_the_child_and_its_error_reaches_the_parent() {
        let mut command = Command::new("/bin/true");
        before_exec(&mut command, || Err(io::Error::from_raw_os_error(libc::EDOM)));
        assert_eq!(command.spawn().expect_err("fails").raw_os_error(), Some(libc::EDOM));
    }

    #[test]
    fn only_a_listening_socket_is_taken_over() {
        use std::os::fd::{AsRawFd, IntoRawFd};
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("sock");
        let number = UnixListener::bind(&path).expect("binds").into_raw_fd();
        let listener = inherited_listener(number).expect("is a listener");
        std::os::unix::net::UnixStream::connect(&path).expect("is served");
        drop(listener);
        let file = std::fs::File::open("/dev/null").expect("opens");
        assert!(inherited_listener(file.as_raw_fd()).is_err());
        assert!(inherited_listener(99_999).is_err());
    }

    #[test]
    fn only_a_vhost_vsock_takes_a_guest_cid() {
        let null = std::fs::File::open("/dev/null").expect("opens");
        assert_eq!(set_guest_cid(&null, 3).expect_err("is another file").raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn the_verifier_s_refusal_is_an_error() {
        // exit, without a result.
        let error = bpf_socket_lookup(&[0x95]).expect_err("is refused");
        assert!(matches!(error.raw_os_error(), Some(libc::EACCES | libc::EINVAL | libc::EPERM)), "{error}");
    }

    #[test]
    fn only_a_socket_goes_into_a_map_of_sockets() {
        let file = std::fs::File::open("/dev/null").expect("opens");
        assert!(bpf_socket_map(&file).is_err());
    }

    #[test]
    fn files_that_were_inheritable_are_closed_by_exec() {
        let (reader, _writer) = rustix::pipe::pipe().expect("pipe without close-on-exec");
        let number = std::os::fd::AsRawFd::as_raw_fd(&reader);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("test ! -e /proc/self/fd/{number}")]);
        before_exec(&mut command, || close_on_exec_from(3));
        assert!(command.status().expect("runs").success());
    }
}

/// What [`mount_setattr`] changes.
#[derive(Debug, Clone, Copy)]
pub struct MountAttributes {
    /// Flags that are set; the others stay. Of them `RDONLY`, `NOSUID`, `NODEV` and `NOEXEC` can be.
    pub set: MountFlags,
    /// `None` leaves it.
    pub propagation: Option<MountPropagationFlags>,
}

/// Starts a process that does nothing, in a new user namespace without maps; returns its pid and pidfd.
///
/// It has none of the caller's open files and ends with the calling thread at the latest; the caller kills and waits for it.
#[expect(unsafe_code, reason = "no wrapper makes a process without executing a program")]
pub fn idle_in_user_namespace() -> io::Result<(libc::pid_t, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let flags = libc::CLONE_NEWUSER | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child runs on a copy of this very stack, as after fork(2), and makes system calls only;
    // the kernel writes one int through the pointer, in the parent, before the call returns.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: neither call takes a pointer; nothing in this copy of the process uses a file any more.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            }
            loop {
                // SAFETY: no memory is involved.
                unsafe { libc::pause() };
            }
        }
        pid => {
            // SAFETY: the kernel opened it for this call, close-on-exec, and nobody else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok((libc::pid_t::try_from(pid).map_err(io::Error::other)?, pidfd))
        }
    }
}

/// Has the detached mount `tree`, and the mounts below it if `recursive`, show owners through the maps of `user_namespace`.
///
/// Once for each mount; `InvalidInput` when a file system cannot do it. See `mount_setattr(2)`, `MOUNT_ATTR_IDMAP`.
pub fn map_mount_ids(tree: impl AsFd, recursive: bool, user_namespace: impl AsFd) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: user_namespace.as_fd().as_raw_fd() as u64,
        ..MountAttr::default()
    };
    set_mount_attr(tree, Path::new(""), recursive, &attr)
}

/// `struct mount_attr` of linux/mount.h.
#[derive(Default)]
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes attributes of the mount at `path` below `dir` (`path` empty: of `dir` itself), of its whole tree if `recursive`.
///
/// See `mount_setattr(2)`; Linux 5.12.
pub fn mount_setattr(dir: impl AsFd, path: &Path, recursive: bool, attributes: MountAttributes) -> io::Result<()> {
    // The MOUNT_ATTR_* of these four have the values of the MS_* flags.
    let settable = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let attr = MountAttr {
        attr_set: u64::from((attributes.set & settable).bits()),
        propagation: attributes.propagation.map_or(0, |flag| u64::from(flag.bits())),
        ..MountAttr::default()
    };
    set_mount_attr(dir, path, recursive, &attr)
}

fn set_mount_attr(dir: impl AsFd, path: &Path, recursive: bool, attr: &MountAttr) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut flags = libc::AT_SYMLINK_NOFOLLOW;
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string and `attr` has the layout and the size that are passed; both live through the call,
    // which keeps neither.
    #[expect(unsafe_code, reason = "no crate wraps mount_setattr(2)")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
