//! The floor under a cold start: the same QEMU, accelerator, machine type, memory and kernel as a pod's, with an init that
//! only says that it is up.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command::Run;
use crate::process::Process;
use crate::tools::BulkheadTools;

/// What the init writes to the console.
const GREETING: &str = "bare boot is up";

/// Options of a pod's QEMU that the bare one is given too; everything else belongs to devices and to the shim.
const KEPT: [&str; 8] = ["-M", "-machine", "-accel", "-cpu", "-smp", "-m", "-object", "-global"];

/// A virtual machine that boots and ends.
#[derive(Debug)]
pub struct BareBoot {
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    options: Vec<String>,
    kernel_arguments: String,
}

impl BareBoot {
    /// A bare boot with the options of `pod_qemu`, a QEMU of a running pod. Files go to `directory`.
    pub fn like(pod_qemu: &Process, tools: &BulkheadTools, directory: &Path) -> Result<Self> {
        let path = format!("/proc/{}/cmdline", pod_qemu.pid);
        let words = fs::read(&path).with_context(|| format!("read {path}"))?;
        let words: Vec<_> = words.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let mut options = Vec::new();
        let mut kernel_arguments = String::new();
        for pair in words.windows(2) {
            let [option, value] = pair else { continue };
            if KEPT.contains(&option.as_str()) && (option != "-object" || value.starts_with("memory-backend")) {
                options.extend([option.clone(), value.clone()]);
            } else if option == "-append" {
                let ours =
                    value.split(' ').filter(|word| !word.starts_with("bulkhead.") && !word.starts_with("virtio_mmio."));
                kernel_arguments = ours.collect::<Vec<_>>().join(" ");
            }
        }
        ensure!(
            options.iter().any(|option| option == "-m") && !kernel_arguments.is_empty(),
            "the command line of QEMU {} has no -m or no -append: {words:?}",
            pod_qemu.pid
        );
        let initramfs = directory.join("bare-initramfs");
        write_initramfs(directory, &initramfs)?;
        Ok(Self { qemu: tools.qemu.clone(), kernel: tools.kernel.clone(), initramfs, options, kernel_arguments })
    }

    /// Boots once; the time from the start of QEMU until it has ended, right after the greeting.
    pub fn run(&self) -> Result<Duration> {
        let output = Run::new(&self.qemu)
            .args(&self.options)
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", &self.kernel_arguments])
            .success()?;
        ensure!(output.text().contains(GREETING), "the bare guest did not come up: {}", output.describe());
        Ok(output.elapsed)
    }
}

/// An initramfs with a static init and a console.
fn write_initramfs(directory: &Path, path: &Path) -> Result<()> {
    let source = directory.join("init.c");
    let program = directory.join("init");
    // No C library: the floor is the kernel's, not that of a program's start.
    let code = format!(
        r#"static long call(long n, long a, long b, long c) {{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}}
static const char text[] = "{GREETING}\n";
void _start(void) {{
    call(1, 1, (long)text, sizeof text - 1);
    call(169, 0xfee1dead, 672274793, 0x1234567);
    for (;;) call(34, 0, 0, 0);
}}
"#
    );
    fs::write(&source, code)?;
    Run::new("/usr/bin/gcc")
        .args(["-static", "-nostdlib", "-O2", "-fno-stack-protector", "-o"])
        .arg(&program)
        .arg(&source)
        .success()
        .context("compile the bare init")?;
    let init = fs::read(&program)?;
    let console = Entry { name: "dev/console", mode: 0o020_600, device: (5, 1), content: &[] };
    let init = Entry { name: "init", mode: 0o100_755, device: (0, 0), content: &init };
    let archive = archive(&[Entry::directory("dev"), console, init])?;
    fs::write(path, archive).with_context(|| format!("write {}", path.display()))
}

/// One file of an initramfs.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Path without a slash at the front.
    pub name: &'a str,
    /// Type and permissions, as in stat(2).
    pub mode: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Content of a regular file.
    pub content: &'a [u8],
}

impl<'a> Entry<'a> {
    /// A directory.
    pub fn directory(name: &'a str) -> Self {
        Self { name, mode: 0o040_755, device: (0, 0), content: &[] }
    }
}

/// A cpio archive of `entries`, as the kernel takes it for an initramfs.
pub fn archive(entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    let trailer = Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), content: &[] };
    for entry in entries.iter().chain([&trailer]) {
        add_entry(&mut archive, entry)?;
    }
    Ok(archive)
}

/// One entry of a cpio archive in the "new ASCII" format (cpio(5)).
fn add_entry(archive: &mut Vec<u8>, entry: &Entry<'_>) -> Result<()> {
    let Entry { name, mode, device, content } = *entry;
    let (size, name_size) = (u32::try_from(content.len())?, u32::try_from(name.len() + 1)?);
    let inode = u32::try_from(archive.len())?;
    write!(archive, "070701")?;
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        write!(archive, "{field:08X}")?;
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
    Ok(())
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
