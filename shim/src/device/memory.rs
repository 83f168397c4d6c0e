//! The guest's memory: private to QEMU, or, when another process serves a device, a memfd that both map.
//!
//! Its size is fixed at start.

use crate::qemu::args::{Args, Properties};

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Size in MiB.
    pub size_mib: u32,
    /// Whether vhost-user processes map it.
    pub shared: bool,
}

impl Memory {
    /// Adds the memory to the command line; the properties that this returns belong to `-machine`.
    pub fn args(self, args: &mut Args, machine: Properties) -> Properties {
        let size = format!("{}M", self.size_mib);
        args.option("-m", &size);
        if !self.shared {
            return machine;
        }
        let memfd = Properties::of("memory-backend-memfd").with("id", "ram").with("size", size).with("share", "on");
        args.option("-object", memfd);
        machine.with("memory-backend", "ram")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_memory_is_a_file() {
        let render = |shared| {
            let mut args = Args::default();
            let machine = Memory { size_mib: 256, shared }.args(&mut args, Properties::of("q35"));
            (args.lines(), machine.to_string())
        };
        assert_eq!(render(false), ("-m 256M\n".into(), "q35".into()));
        let shared = "-m 256M\n-object memory-backend-memfd,id=ram,size=256M,share=on\n".to_owned();
        assert_eq!(render(true), (shared, "q35,memory-backend=ram".into()));
    }
}
