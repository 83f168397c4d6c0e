//! What kernels let either side set of the connections between guest and host, and no crate has words for (vsock(7)).

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::setsockopt;

mod option {
    use nix::{setsockopt_impl, sockopt_impl};

    // Of linux/vm_sockets.h.
    const SO_VM_SOCKETS_BUFFER_SIZE: i32 = 0;
    const SO_VM_SOCKETS_BUFFER_MAX_SIZE: i32 = 2;

    sockopt_impl!(BufferSize, SetOnly, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, u64);
    sockopt_impl!(BufferMaxSize, SetOnly, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_MAX_SIZE, u64);
}

/// Sets how many bytes a vsock socket holds for its reader: so much the peer may send ahead, and Linux sends no more itself.
pub fn set_buffer(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    // No size is taken above the greatest.
    setsockopt(&socket, option::BufferMaxSize, &bytes)?;
    setsockopt(&socket, option::BufferSize, &bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_vsock_socket_has_such_a_buffer() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().expect("makes a pair");
        let error = set_buffer(&socket, 1 << 20).expect_err("is another family");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        let file = std::fs::File::open("/dev/null").expect("opens");
        assert_eq!(set_buffer(&file, 1 << 20).expect_err("is no socket").raw_os_error(), Some(libc::ENOTSOCK));
    }
}
