//! From a VM's configuration to QEMU's command line. Pure; golden files show the whole of it.
//!
//! What every VM has in common is here, devices render themselves. Machines:
//! <https://www.qemu.org/docs/master/system/i386/microvm.html>, <https://www.qemu.org/docs/master/system/i386/pc.html>

use serde::Serialize;

use crate::device::Device;
use crate::device::console::Console;
use crate::device::file::{FileRole, FileTable};
use crate::device::memory::Memory;
use crate::device::slots::{self, MachineType, SlotError};
use crate::qemu::args::{Args, Properties};
use crate::vm::accel::Accel;
use crate::vm::clock;
use crate::vm::config::VmConfig;

/// Bound of TCG's translation cache in MiB; QEMU's own would take up to an eighth of the host.
const TRANSLATION_CACHE_MIB: u32 = 256;

/// Features of the processor that TCG had better not offer: with them Linux and libc copy and clear by `rep movsb` and `rep
/// stosb`, which TCG does byte by byte. Without, they take eight or more at a time, and a stream is twice as fast.
const TCG_CPU: &str = "max,-erms,-fsrm";

/// What the guest's kernel need not do under TCG.
///
/// Defend itself against speculation: translated code does not keep to the branches and fences with which it would, and TCG
/// is no security boundary in the first place (<https://www.qemu.org/docs/master/system/security.html>). Take string
/// instructions for fast (`rep_good`, a flag of Linux's own that no CPU model could leave out): pages are cleared and copied
/// by unrolled loops instead, which saves a tenth of that, and a twentieth of the boot.
const TCG_KERNEL_PARAMS: [&str; 2] = ["mitigations=off", "clearcpuid=rep_good"];

/// A command line, and the files that it names by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// The arguments.
    pub args: Args,
    /// Files by number.
    pub files: FileTable,
    /// The machine type that was planned.
    pub machine: MachineType,
}

/// Renders `config`; fails only when its devices do not fit the machine.
pub fn render(config: &VmConfig) -> Result<CommandLine, SlotError> {
    let plan = slots::plan(config.machine, &config.devices)?;
    let (mut args, mut files) = (Args::default(), FileTable::default());
    args.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot").option("-display", "none");
    args.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    args.option("-name", Properties::of(&config.name).with("debug-threads", "on"));
    accelerator(config.accel, &mut args);
    args.option("-smp", config.vcpus);

    let memory = Memory { size_mib: config.memory_mib, shared: config.devices.iter().any(Device::needs_shared_memory) };
    let machine = memory.args(&mut args, machine(plan.machine));
    args.option("-machine", machine);

    let monitor = Properties::of("socket").with("id", "monitor").with("fd", files.number(FileRole::Monitor));
    args.option("-chardev", monitor).option("-mon", "chardev=monitor,mode=control");
    Console.args(&mut args, &mut files);
    // Opened again by number: the paths themselves may lie where QEMU's user cannot go.
    args.option("-kernel", format!("/proc/self/fd/{}", files.number(FileRole::Kernel)));
    args.option("-initrd", format!("/proc/self/fd/{}", files.number(FileRole::Initramfs)));
    args.option("-append", kernel_command_line(config));
    for (device, address) in config.devices.iter().zip(&plan.addresses) {
        device.args(*address, &mut args, &mut files);
    }
    Ok(CommandLine { args, files, machine: plan.machine })
}

/// What a running QEMU was started as, for people who look at it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// As QEMU calls it.
    pub machine: String,
    /// None for one that this program does not know.
    pub accel: Option<Accel>,
    /// vCPUs.
    pub vcpus: u32,
    /// In MiB.
    pub memory_mib: u32,
}

/// The shape of a VM whose command line has these `words`: the inverse of [`render`], for what it says of the size.
///
/// None if it is no command line that any version of [`render`] has made.
pub fn read_back<'a>(words: impl Iterator<Item = &'a str> + Clone) -> Option<Shape> {
    // The first property of an option's value, which is what the option is about.
    let value = |option: &str| {
        let value = words.clone().skip_while(|word| *word != option).nth(1)?;
        Some(value.split_once(',').map_or(value, |(first, _)| first))
    };
    let accel = match value("-accel")? {
        "kvm" => Some(Accel::Kvm),
        "tcg" => Some(Accel::Tcg),
        _ => None,
    };
    Some(Shape {
        machine: value("-machine")?.to_owned(),
        accel,
        vcpus: value("-smp")?.parse().ok()?,
        memory_mib: value("-m")?.strip_suffix('M')?.parse().ok()?,
    })
}

fn accelerator(accel: Accel, args: &mut Args) {
    match accel {
        Accel::Kvm => args.option("-accel", "kvm").option("-cpu", "host"),
        Accel::Tcg => {
            args.option("-accel", Properties::of("tcg").with("tb-size", TRANSLATION_CACHE_MIB)).option("-cpu", TCG_CPU)
        }
    };
}

fn machine(machine: MachineType) -> Properties {
    match machine {
        // With ACPI under TCG the guest hangs now and then in early boot: it has no timer to measure the clock with. The
        // legacy timers and interrupt controller stay for the same reason. QEMU itself adds the virtio-mmio devices to the
        // kernel's command line (`auto-kernel-cmdline`), and dump-guest-core keeps the guest's memory out of core dumps.
        MachineType::Microvm => Properties::of("microvm").with("acpi", "off").with("dump-guest-core", "off"),
        MachineType::Q35 => {
            let legacy_off = ["sata", "smbus", "usb", "vmport"];
            let machine = Properties::of("q35").with("dump-guest-core", "off");
            legacy_off.into_iter().fold(machine, |machine, part| machine.with(part, "off"))
        }
    }
}

/// The guest reports on the console, and reboots when it panics, which ends QEMU (`-no-reboot`). The way to reboot is a triple
/// fault: the others are not there on microvm.
fn kernel_command_line(config: &VmConfig) -> String {
    let mut params = vec![Console::KERNEL_PARAM, "quiet", "panic=-1", "reboot=t"];
    if config.accel == Accel::Tcg {
        params.extend(clock::TCG_PARAMS);
        params.extend(TCG_KERNEL_PARAMS);
    }
    for param in config.devices.iter().flat_map(Device::kernel_params) {
        if !params.contains(param) {
            params.push(param);
        }
    }
    params.extend(config.kernel_params.iter().map(String::as_str));
    params.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Machine;
    use crate::device::DeviceId;
    use crate::device::balloon::Balloon;
    use crate::device::block::ScsiController;
    use crate::device::fs::Fs;
    use crate::device::net::{MacAddress, Net};
    use crate::device::rng::Rng;
    use crate::device::vsock::{Backend, Vsock};
    use std::path::Path;

    fn id(id: &str) -> DeviceId {
        DeviceId::new(id).expect("legal")
    }

    fn config(accel: Accel, machine: Machine, devices: Vec<Device>) -> VmConfig {
        VmConfig {
            name: "pod,1".into(),
            machine,
            accel,
            vcpus: 2,
            memory_mib: 256,
            kernel: "/assets/vmlinux".into(),
            initramfs: "/assets/initramfs".into(),
            kernel_params: vec!["bulkhead.port=1024".into()],
            devices,
        }
    }

    /// Net, vsock, disks, entropy and balloon, all served by QEMU and the kernel.
    fn in_kernel() -> Vec<Device> {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        vec![
            Device::Net(Net { id: id("net0"), mac, vhost: true }),
            Device::Vsock(Vsock { id: id("vsock"), backend: Backend::Vhost { guest_cid: 4242 } }),
            Device::Scsi(ScsiController { id: id("scsi") }),
            Device::Rng(Rng { id: id("rng") }),
            Device::Balloon(Balloon { id: id("balloon") }),
        ]
    }

    /// The same with a shared directory, and with vsock and network in processes.
    fn in_processes() -> Vec<Device> {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let mut devices = in_kernel();
        devices[0] = Device::Net(Net { id: id("net0"), mac, vhost: false });
        devices[1] = Device::Vsock(Vsock { id: id("vsock"), backend: Backend::VhostUser });
        devices.push(Device::Fs(Fs { id: id("share"), tag: "share".into() }));
        devices
    }

    /// Compares with `testdata/<name>.txt`; `UPDATE_GOLDEN=1` writes it.
    fn golden(name: &str, config: &VmConfig) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/cmdline").join(format!("{name}.txt"));
        let rendered = render(config).expect("fits").args.lines();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &rendered).expect("writes");
        }
        let expected = std::fs::read_to_string(&path).expect("golden file");
        assert_eq!(rendered, expected, "{}", path.display());
    }

    #[test]
    fn a_microvm_on_kvm_without_a_share() {
        golden("microvm-kvm", &config(Accel::Kvm, Machine::Auto, in_kernel()));
    }

    #[test]
    fn a_microvm_on_tcg_with_a_share() {
        golden("microvm-tcg-share", &config(Accel::Tcg, Machine::Auto, in_processes()));
    }

    #[test]
    fn a_q35_on_kvm_with_a_share() {
        golden("q35-kvm-share", &config(Accel::Kvm, Machine::Q35, in_processes()));
    }

    #[test]
    fn a_q35_on_tcg_without_a_share() {
        golden("q35-tcg", &config(Accel::Tcg, Machine::Q35, in_kernel()));
    }

    #[test]
    fn too_many_devices_make_it_a_q35() {
        let mut devices = in_processes();
        for index in 1..4 {
            let mac = MacAddress([2, 0, 0, 0, 0, 1 + index]);
            devices.push(Device::Net(Net { id: id(&format!("net{index}")), mac, vhost: false }));
        }
        assert_eq!(render(&config(Accel::Tcg, Machine::Auto, devices)).expect("fits").machine, MachineType::Q35);
    }

    #[test]
    fn what_was_rendered_is_read_back() {
        for (accel, machine, name) in [(Accel::Kvm, Machine::Auto, "microvm"), (Accel::Tcg, Machine::Q35, "q35")] {
            let words: Vec<std::ffi::OsString> =
                render(&config(accel, machine, in_processes())).expect("fits").args.into();
            let words: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
            let shape = read_back(words.iter().copied()).expect("is ours");
            assert_eq!(shape, Shape { machine: name.into(), accel: Some(accel), vcpus: 2, memory_mib: 256 });
        }
        assert_eq!(read_back(["qemu", "-m", "1G"].into_iter()), None);
    }

    #[test]
    fn a_configuration_survives_storage() {
        let before = config(Accel::Kvm, Machine::Q35, in_processes());
        let stored = serde_json::to_string(&before).expect("writes");
        assert_eq!(serde_json::from_str::<VmConfig>(&stored).expect("reads"), before);
    }
}
