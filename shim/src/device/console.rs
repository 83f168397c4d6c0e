//! The serial console: an ISA UART on both machine types, so it works from the kernel's first line and takes no virtio slot.
//!
//! Its other end is a socket of the shim's. A guest may write for ever; the shim keeps the tail. Given at start only.

use crate::device::file::{FileRole, FileTable};
use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, Copy)]
pub struct Console;

impl Console {
    /// What the guest's kernel calls it.
    pub const KERNEL_PARAM: &str = "console=ttyS0";

    /// Adds the device to the command line.
    pub fn args(self, args: &mut Args, files: &mut FileTable) {
        let socket = Properties::of("socket").with("id", "console").with("fd", files.number(FileRole::Console));
        args.option("-chardev", socket).option("-serial", "chardev:console");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_a_socket_of_the_shims() {
        let (mut args, mut files) = (Args::default(), FileTable::default());
        Console.args(&mut args, &mut files);
        assert_eq!(args.lines(), "-chardev socket,id=console,fd=10\n-serial chardev:console\n");
    }
}
