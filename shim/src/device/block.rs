//! Disks: LUNs on one virtio-scsi controller (virtio 1.3 §5.6), which come and go while the VM runs, on either machine type.
//!
//! The controller is given at start. A disk is a file or block device that the shim has opened; QEMU gets it through the monitor
//! as a set of open files. Each disk is a LUN of target 0 and is known in the guest by its serial.
//!
//! LUN 0 stays free: Linux answers the hot-plug of a LUN 0 by scanning its target, which `scsi_mod.scan=manual` forbids, and of
//! any other by adding that one device, which is less work too (`virtscsi_handle_transport_reset` in the kernel).

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast;

use crate::device::DeviceId;
use crate::device::slots::Address;
use crate::qemu::args::Args;
use crate::qemu::commands::{AddFd, BlockdevAdd, BlockdevDel, Command, DeviceAdd, DeviceDel, RemoveFd};
use crate::qemu::event::Event;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::timeouts;

/// The controller that disks are attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScsiController {
    /// Name of the device.
    pub id: DeviceId,
}

impl ScsiController {
    /// All disks come while the guest runs, so it need not look for any at 256 targets when it boots (60 ms under TCG).
    pub const KERNEL_PARAMS: &[&str] = &["scsi_mod.scan=manual"];

    /// Adds the controller to the command line.
    pub fn args(&self, address: Address, args: &mut Args) {
        args.option("-device", address.device("virtio-scsi").with("id", &self.id));
    }
}

/// A disk of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name of the device and of its block node; at most 31 bytes.
    pub id: DeviceId,
    /// What the guest finds it by; at most 36 bytes.
    pub serial: String,
    /// What the open file is.
    pub source: DiskSource,
    /// Whether the guest may write; the file must be open accordingly.
    pub read_only: bool,
}

/// What a disk's content lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskSource {
    /// A regular file.
    File,
    /// A block device that nothing else uses.
    HostDevice,
    /// A block device that others, VMs among them, may have open too. Who shares it coordinates the writes, as without a VM.
    ///
    /// So QEMU neither locks it nor has the host cache it: what the guest writes past its own cache is on the device, and what
    /// it reads is from there.
    SharedDevice {
        /// Bytes of a block that the device is addressed by. The guest's must be as large, or what is laid out in there does
        /// not fit the host any more.
        logical_block: u32,
        /// Bytes of a block that the device writes at once.
        physical_block: u32,
    },
}

/// The largest block that QEMU takes for a disk's.
const LARGEST_BLOCK: u32 = 2 << 20;

impl Disk {
    /// Attaches the disk to `controller` as `lun`; `file` is its content.
    ///
    /// Sends `add-fd`, `blockdev-add`, `device_add`; on error nothing of them is left behind. Not cancel safe: run it as a job.
    pub async fn plug(
        &self,
        qmp: &Qmp,
        controller: &DeviceId,
        lun: u8,
        file: OwnedFd,
    ) -> Result<PluggedDisk, QmpError> {
        let set = qmp.execute_with_file(AddFd { opaque: self.id.to_string() }, file).await?;
        let plugged = PluggedDisk { id: self.id.clone(), lun, fdset_id: set.fdset_id };
        let attach = async {
            qmp.execute(BlockdevAdd { options: self.node(set.fdset_id) }).await?;
            qmp.execute(self.device(controller, lun)).await
        };
        match attach.await {
            Ok(_) => Ok(plugged),
            Err(error) => {
                if let Err(left) = plugged.unplug(qmp).await {
                    tracing::warn!(device_id = %self.id, error = %left, "a disk that failed to attach is left in QEMU");
                }
                Err(error)
            }
        }
    }

    fn node(&self, fdset_id: i64) -> Value {
        let driver = match self.source {
            DiskSource::File => "file",
            DiskSource::HostDevice | DiskSource::SharedDevice { .. } => "host_device",
        };
        let mut file = json!({
            "driver": driver,
            "filename": format!("/dev/fdset/{fdset_id}"),
            "read-only": self.read_only,
            "discard": "unmap",
        });
        let mut node = json!({
            "driver": "raw",
            "node-name": self.id,
            "read-only": self.read_only,
            "discard": "unmap",
        });
        if let DiskSource::SharedDevice { .. } = self.source {
            file["locking"] = json!("off");
            for layer in [&mut file, &mut node] {
                layer["cache"] = json!({"direct": true});
            }
        }
        node["file"] = file;
        node
    }

    fn device(&self, controller: &DeviceId, lun: u8) -> DeviceAdd {
        let mut properties = vec![
            ("bus", json!(format!("{controller}.0"))),
            ("drive", json!(self.id)),
            ("channel", json!(0)),
            ("scsi-id", json!(0)),
            ("lun", json!(lun)),
            ("serial", json!(self.serial)),
            // Not a spinning disk.
            ("rotation_rate", json!(1)),
            // Whoever writes to a full disk is told: to stop the machine is QEMU's way, and nobody would let it go on.
            ("werror", json!("report")),
            ("rerror", json!("report")),
        ];
        if let DiskSource::SharedDevice { logical_block, physical_block } = self.source {
            let physical_block = physical_block.min(LARGEST_BLOCK).max(logical_block);
            properties.push(("logical_block_size", json!(logical_block)));
            properties.push(("physical_block_size", json!(physical_block)));
        }
        let properties = properties.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>();
        DeviceAdd { driver: "scsi-hd".into(), id: self.id.to_string(), properties }
    }
}

/// A disk that is attached: what is needed to detach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluggedDisk {
    /// Name of the device and of its block node.
    pub id: DeviceId,
    /// Its number on the controller.
    pub lun: u8,
    /// QEMU's set of open files with its content.
    pub fdset_id: i64,
}

impl PluggedDisk {
    /// Detaches the disk and has QEMU close its file. The guest must have let go of it. What is gone already is no error.
    pub async fn unplug(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let mut events = qmp.events();
        if absent_is_done(qmp.execute(DeviceDel { id: self.id.to_string() }).await)? {
            let deadline = timeouts::QMP_COMMAND;
            let gone = tokio::time::timeout(deadline, deleted(&mut events, self.id.as_str())).await;
            let command = DeviceDel::NAME;
            gone.map_err(|_| QmpError::Deadline { command, deadline })?.map_err(|()| QmpError::Closed { command })?;
        }
        absent_is_done(qmp.execute(BlockdevDel { node_name: self.id.to_string() }).await)?;
        absent_is_done(qmp.execute(RemoveFd { fdset_id: self.fdset_id }).await)?;
        Ok(())
    }
}

/// Whether there was something to remove; other refusals stay errors.
fn absent_is_done<T>(result: Result<T, QmpError>) -> Result<bool, QmpError> {
    match result {
        Ok(_) => Ok(true),
        Err(QmpError::Refused { class, text, .. })
            // QEMU has a class of its own for devices only.
            if class == "DeviceNotFound" || text.starts_with("Failed to find node") || text.contains("not found") =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

async fn deleted(events: &mut broadcast::Receiver<Event>, id: &str) -> Result<(), ()> {
    loop {
        match events.recv().await {
            Ok(Event::DeviceDeleted { device }) if device == id => return Ok(()),
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixStream;

    fn disk(read_only: bool) -> Disk {
        let id = DeviceId::new("disk-7").expect("legal");
        Disk { id, serial: "rootfs".into(), source: DiskSource::File, read_only }
    }

    /// Plays QEMU: answers each command by `answer` and returns what it was sent.
    async fn peer(stream: UnixStream, answer: impl Fn(&str) -> Value) -> Vec<Value> {
        let (read, mut write) = stream.into_split();
        write.write_all(b"{\"QMP\": {}}\n").await.expect("writes");
        let mut lines = BufReader::new(read).lines();
        let mut seen = Vec::new();
        while let Ok(Some(line)) = lines.next_line().await {
            let mut message: Value = serde_json::from_str(&line).expect("json");
            let command = message["execute"].as_str().expect("a command").to_owned();
            let mut reply = answer(&command);
            reply["id"] = message["id"].clone();
            write.write_all(format!("{reply}\n").as_bytes()).await.expect("writes");
            if command == "device_del" && reply.get("return").is_some() {
                let event = json!({"event": "DEVICE_DELETED", "data": {"device": message["arguments"]["id"]}});
                write.write_all(format!("{event}\n").as_bytes()).await.expect("writes");
            }
            seen.push(json!([command, message["arguments"].take()]));
        }
        seen.split_off(1)
    }

    fn obedient(command: &str) -> Value {
        if command == "add-fd" { json!({"return": {"fdset-id": 3, "fd": 20}}) } else { json!({"return": {}}) }
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("opens").into()
    }

    #[tokio::test]
    async fn a_disk_comes_and_goes_in_the_right_order() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let client = async {
            let qmp = Qmp::connect(ours).await.expect("connects");
            let scsi = DeviceId::new("scsi").expect("legal");
            let plugged = disk(true).plug(&qmp, &scsi, 5, null()).await.expect("plugs");
            plugged.unplug(&qmp).await.expect("unplugs");
        };
        let ((), seen) = tokio::join!(client, peer(theirs, obedient));
        let file = json!({"driver": "file", "filename": "/dev/fdset/3", "read-only": true, "discard": "unmap"});
        assert_eq!(
            seen,
            [
                json!(["add-fd", {"opaque": "disk-7"}]),
                json!(["blockdev-add", {
                    "driver": "raw", "node-name": "disk-7", "read-only": true, "discard": "unmap", "file": file,
                }]),
                json!(["device_add", {
                    "driver": "scsi-hd", "id": "disk-7", "bus": "scsi.0", "drive": "disk-7", "channel": 0, "scsi-id": 0,
                    "lun": 5, "serial": "rootfs", "rotation_rate": 1, "werror": "report", "rerror": "report",
                }]),
                json!(["device_del", {"id": "disk-7"}]),
                json!(["blockdev-del", {"node-name": "disk-7"}]),
                json!(["remove-fd", {"fdset-id": 3}]),
            ]
        );
    }

    #[test]
    fn a_device_that_others_have_too_is_neither_locked_nor_cached_and_keeps_its_blocks() {
        let source = DiskSource::SharedDevice { logical_block: 4096, physical_block: 4 << 20 };
        let disk = Disk { source, ..disk(false) };
        assert_eq!(
            disk.node(3),
            json!({
                "driver": "raw", "node-name": "disk-7", "read-only": false, "discard": "unmap", "cache": {"direct": true},
                "file": {
                    "driver": "host_device", "filename": "/dev/fdset/3", "read-only": false, "discard": "unmap",
                    "locking": "off", "cache": {"direct": true},
                },
            })
        );
        let device = disk.device(&DeviceId::new("scsi").expect("legal"), 5);
        let sizes = ["logical_block_size", "physical_block_size"].map(|key| &device.properties[key]);
        assert_eq!(sizes, [&json!(4096), &json!(2 << 20)]);
    }

    #[tokio::test]
    async fn a_refused_device_leaves_neither_node_nor_file() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let client = async {
            let qmp = Qmp::connect(ours).await.expect("connects");
            disk(false).plug(&qmp, &DeviceId::new("scsi").expect("legal"), 5, null()).await.expect_err("refused")
        };
        let answer = |command: &str| match command {
            "device_add" => json!({"error": {"class": "GenericError", "desc": "lun already used"}}),
            "device_del" => json!({"error": {"class": "DeviceNotFound", "desc": "Device 'disk-7' not found"}}),
            other => obedient(other),
        };
        let (error, seen) = tokio::join!(client, peer(theirs, answer));
        assert_eq!(error.to_string(), "qmp device_add: lun already used");
        let commands: Vec<_> = seen.iter().map(|sent| sent[0].as_str().expect("name")).collect();
        assert_eq!(commands, ["add-fd", "blockdev-add", "device_add", "device_del", "blockdev-del", "remove-fd"]);
    }

    #[test]
    fn the_controller_is_a_virtio_device() {
        let mut args = Args::default();
        ScsiController { id: DeviceId::new("scsi").expect("legal") }.args(Address::Mmio(4), &mut args);
        assert_eq!(args.lines(), "-device virtio-scsi-device,bus=virtio-mmio-bus.4,id=scsi\n");
    }
}
