//! The files that QEMU is given open: what each is for, and the number that QEMU knows it by.
//!
//! The command line is a pure function of the configuration, so it names files by number without any being open yet; whoever
//! starts QEMU puts the right one behind each number.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use crate::device::DeviceId;

/// What a file is to QEMU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileRole {
    /// Stream socket of the monitor.
    Monitor,
    /// Stream socket of the serial console.
    Console,
    /// Guest kernel, readable.
    Kernel,
    /// Guest initramfs, readable.
    Initramfs,
    /// Tap of a network device.
    Tap(DeviceId),
    /// `/dev/vhost-net` of a network device.
    VhostNet(DeviceId),
    /// `/dev/vhost-vsock`.
    VhostVsock(DeviceId),
    /// Stream socket, connected to the process that serves a vhost-user device.
    VhostUser(DeviceId),
}

/// Numbers of files, in the order in which the command line asked for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileTable(Vec<FileRole>);

impl FileTable {
    /// The first number; those below are for stdio.
    const FIRST: RawFd = 10;

    /// The number of the file for `role`; the same for the same role.
    pub fn number(&mut self, role: FileRole) -> RawFd {
        let index = self.0.iter().position(|known| *known == role).unwrap_or_else(|| {
            self.0.push(role);
            self.0.len() - 1
        });
        Self::FIRST + index as RawFd
    }

    /// Every role and its number.
    pub fn iter(&self) -> impl Iterator<Item = (&FileRole, RawFd)> {
        self.0.iter().zip(Self::FIRST..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_keeps_its_number() {
        let mut files = FileTable::default();
        assert_eq!(files.number(FileRole::Monitor), 10);
        assert_eq!(files.number(FileRole::Kernel), 11);
        assert_eq!(files.number(FileRole::Monitor), 10);
        assert_eq!(files.iter().collect::<Vec<_>>(), [(&FileRole::Monitor, 10), (&FileRole::Kernel, 11)]);
    }
}
