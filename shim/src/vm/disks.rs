//! The disks of a running VM. A handle of its own, so that who attaches one needs no hold on the VM.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::DeviceId;
use crate::device::block::{Disk, DiskSource, PluggedDisk};
use crate::device::slots::Luns;
use crate::qemu::qmp::Qmp;
use crate::vm::VmError;

/// Attaches disks to one VM, and detaches them; clones are for the same one. Disks end with the VM.
#[derive(Debug, Clone)]
pub struct Disks {
    qmp: Qmp,
    controller: DeviceId,
    luns: Arc<Mutex<Luns>>,
    named: Arc<AtomicU32>,
}

impl Disks {
    pub(super) fn new(qmp: Qmp, controller: DeviceId) -> Self {
        Self { qmp, controller, luns: Arc::default(), named: Arc::default() }
    }

    /// A disk of a name and serial that no other of this VM has or had: the guest may not have forgotten yet one that was
    /// detached a moment ago.
    pub fn name(&self, source: DiskSource, read_only: bool) -> Result<Disk, VmError> {
        let serial = format!("disk-{}", self.named.fetch_add(1, Ordering::Relaxed));
        let id = DeviceId::new(serial.clone()).map_err(|error| VmError::Start(error.into()))?;
        Ok(Disk { id, serial, source, read_only })
    }

    /// Attaches `disk`, whose content `file` is; the guest finds it by its serial. Not cancel safe: run it as a job.
    pub async fn plug(&self, disk: &Disk, file: OwnedFd) -> Result<PluggedDisk, VmError> {
        let lun = self.luns().take()?;
        disk.plug(&self.qmp, &self.controller, lun, file).await.map_err(|source| {
            self.luns().give_back(lun);
            VmError::Qmp { what: format!("plug disk {}", disk.id), source }
        })
    }

    /// Detaches a disk that the guest has let go of. Safe to repeat. Not cancel safe: run it as a job.
    pub async fn unplug(&self, disk: &PluggedDisk) -> Result<(), VmError> {
        let unplugged = disk.unplug(&self.qmp).await;
        unplugged.map_err(|source| VmError::Qmp { what: format!("unplug disk {}", disk.id), source })?;
        self.luns().give_back(disk.lun);
        Ok(())
    }

    fn luns(&self) -> MutexGuard<'_, Luns> {
        self.luns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
