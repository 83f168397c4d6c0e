//! The planner: which machine type a list of devices needs, where each device sits, and which LUN a disk gets. Pure.
//!
//! `microvm` without ACPI has eight virtio-mmio slots (QEMU: "No 'virtio-bus' bus found" at the ninth device). On `q35` every
//! device has a place of its own on the root complex.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::Machine;
use crate::device::Device;
use crate::qemu::args::Properties;

/// Slots for virtio-mmio devices on `microvm`.
pub const MMIO_SLOTS: usize = 8;
/// First device number on q35's root complex; 0 is the host bridge, and 1 is left to a display adapter, which firmware expects there.
const FIRST_PCI_SLOT: u8 = 2;
/// Last device number on q35's root complex; 31 is the chipset.
const LAST_PCI_SLOT: u8 = 30;

/// A machine type of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// virtio-mmio, no firmware to speak of.
    Microvm,
    /// PCI Express.
    Q35,
}

/// Where a device sits; stable for the life of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Address {
    /// Number of the virtio-mmio transport.
    Mmio(u8),
    /// Device number on the root complex.
    Pci(u8),
}

impl Address {
    /// The beginning of `-device` for the virtio device that QEMU calls `<stem>-device` or `<stem>-pci`.
    pub fn device(self, stem: &str) -> Properties {
        match self {
            Self::Mmio(number) => {
                Properties::of(&format!("{stem}-device")).with("bus", format!("virtio-mmio-bus.{number}"))
            }
            Self::Pci(slot) => {
                Properties::of(&format!("{stem}-pci")).with("bus", "pcie.0").with("addr", format!("{slot:#x}"))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mmio(number) => write!(f, "mmio.{number}"),
            Self::Pci(slot) => write!(f, "pcie.0:{slot:02x}.0"),
        }
    }
}

/// A machine and the address of each device, in the order of the list that was planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The machine type.
    pub machine: MachineType,
    /// One for each device.
    pub addresses: Vec<Address>,
}

/// Why devices do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Too many for the machine type.
    #[error("machine {machine} has {slots} device slots, this pod needs {devices}{hint}")]
    TooMany {
        /// The machine type's name.
        machine: &'static str,
        /// How many it has.
        slots: usize,
        /// How many are needed.
        devices: usize,
        /// What would do.
        hint: &'static str,
    },
    /// Two devices have one name.
    #[error("device id {0} is given twice")]
    Duplicate(String),
    /// All units of the SCSI controller are taken.
    #[error("all {} disks that a VM can have are attached", Luns::COUNT)]
    NoLun,
}

/// Chooses the machine type, if `wanted` leaves it open, and gives each device an address.
pub fn plan(wanted: Machine, devices: &[Device]) -> Result<Plan, SlotError> {
    let mut ids = BTreeSet::new();
    if let Some(twice) = devices.iter().find(|device| !ids.insert(device.id())) {
        return Err(SlotError::Duplicate(twice.id().to_string()));
    }
    let machine = match wanted {
        Machine::Microvm => MachineType::Microvm,
        Machine::Auto if devices.len() <= MMIO_SLOTS => MachineType::Microvm,
        Machine::Auto | Machine::Q35 => MachineType::Q35,
    };
    let (name, hint, all): (_, _, Vec<_>) = match machine {
        MachineType::Microvm => {
            ("microvm", "; accepted is machine auto or q35", (0..MMIO_SLOTS as u8).map(Address::Mmio).collect())
        }
        MachineType::Q35 => ("q35", "", (FIRST_PCI_SLOT..=LAST_PCI_SLOT).map(Address::Pci).collect()),
    };
    if devices.len() > all.len() {
        return Err(SlotError::TooMany { machine: name, slots: all.len(), devices: devices.len(), hint });
    }
    Ok(Plan { machine, addresses: all.into_iter().take(devices.len()).collect() })
}

/// The logical units of the SCSI controller's only target that disks take. See [`crate::device::block`] for why 0 is not one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Luns(BTreeSet<u8>);

impl Luns {
    /// Units 1 to 255.
    pub const COUNT: usize = 255;

    /// Takes the lowest free unit.
    pub fn take(&mut self) -> Result<u8, SlotError> {
        let lun = (1..=u8::MAX).find(|lun| !self.0.contains(lun)).ok_or(SlotError::NoLun)?;
        self.0.insert(lun);
        Ok(lun)
    }

    /// Gives a unit back; nothing happens if it is free.
    pub fn give_back(&mut self, lun: u8) {
        self.0.remove(&lun);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceId;
    use crate::device::rng::Rng;
    use rand::RngExt;

    fn devices(count: usize) -> Vec<Device> {
        let id = |index| DeviceId::new(format!("d{index}")).expect("legal");
        (0..count).map(|index| Device::Rng(Rng { id: id(index) })).collect()
    }

    #[test]
    fn whatever_fits_gets_distinct_addresses_on_one_bus_and_the_rest_is_refused() {
        for wanted in [Machine::Auto, Machine::Microvm, Machine::Q35] {
            for count in 0..40 {
                let capacity = if wanted == Machine::Microvm { 8 } else { 29 };
                match plan(wanted, &devices(count)) {
                    Ok(plan) => {
                        assert!(count <= capacity, "{wanted:?} {count}");
                        assert_eq!(plan.addresses.len(), count);
                        assert_eq!(plan.addresses.iter().collect::<BTreeSet<_>>().len(), count);
                        let mmio = plan.machine == MachineType::Microvm;
                        assert!(plan.addresses.iter().all(|address| matches!(address, Address::Mmio(_)) == mmio));
                        let small = wanted == Machine::Microvm || wanted == Machine::Auto && count <= MMIO_SLOTS;
                        assert_eq!(mmio, small, "{wanted:?} {count}");
                    }
                    Err(SlotError::TooMany { slots, devices, .. }) => {
                        assert_eq!((slots, devices), (capacity, count));
                        assert!(count > capacity);
                    }
                    Err(other) => panic!("{wanted:?} {count}: {other}"),
                }
            }
        }
    }

    #[test]
    fn a_longer_list_does_not_move_the_devices_before() {
        let few = plan(Machine::Q35, &devices(3)).expect("fits").addresses;
        let many = plan(Machine::Q35, &devices(20)).expect("fits").addresses;
        assert_eq!(few, many[..3]);
    }

    #[test]
    fn the_ninth_device_of_a_microvm_is_refused_with_the_way_out() {
        let error = plan(Machine::Microvm, &devices(9)).expect_err("does not fit");
        assert_eq!(
            error.to_string(),
            "machine microvm has 8 device slots, this pod needs 9; accepted is machine auto or q35"
        );
    }

    #[test]
    fn two_devices_of_one_name_are_refused() {
        let mut twice = devices(2);
        twice.extend(devices(1));
        assert_eq!(plan(Machine::Auto, &twice), Err(SlotError::Duplicate("d0".into())));
    }

    #[test]
    fn luns_are_never_given_twice_however_they_come_and_go() {
        let mut random = rand::rng();
        let mut luns = Luns::default();
        let mut held = BTreeSet::new();
        for _ in 0..5000 {
            if random.random_bool(0.6) {
                match luns.take() {
                    Ok(lun) => assert!(held.insert(lun), "{lun} is held already"),
                    Err(error) => {
                        assert_eq!(error, SlotError::NoLun);
                        assert_eq!(held.len(), Luns::COUNT);
                    }
                }
            } else if let Some(lun) = held.pop_first() {
                luns.give_back(lun);
                luns.give_back(lun);
            }
        }
        assert_eq!(luns.0, held);
    }
}
