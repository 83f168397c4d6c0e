//! The guest's kernel and initramfs: opened and looked at before QEMU starts, since QEMU's own words for a broken one are few.
//!
//! QEMU gets them open, and opens them again by number under its own user, so they must be readable for everybody.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A kernel or initramfs that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("guest {role} {}: {reason}", path.display())]
pub struct AssetError {
    role: &'static str,
    path: PathBuf,
    reason: String,
}

/// What a file is taken for by its first bytes.
type Check = fn(&[u8]) -> Result<(), &'static str>;

/// Opens both and checks that they are what they should be.
pub async fn open(kernel: &Path, initramfs: &Path) -> Result<(OwnedFd, OwnedFd), AssetError> {
    let (kernel, initramfs) = (kernel.to_owned(), initramfs.to_owned());
    let open = move || Ok((open_kernel(&kernel)?, open_initramfs(&initramfs)?));
    tokio::task::spawn_blocking(open).await.unwrap_or_else(|error| {
        Err(AssetError { role: "files", path: PathBuf::new(), reason: format!("not read: {error}") })
    })
}

/// Opens the kernel and checks that it is one. Blocks.
pub fn open_kernel(path: &Path) -> Result<OwnedFd, AssetError> {
    open_one("kernel", path, is_kernel)
}

/// Opens the initramfs and checks that it is one. Blocks.
pub fn open_initramfs(path: &Path) -> Result<OwnedFd, AssetError> {
    open_one("initramfs", path, is_initramfs)
}

fn open_one(role: &'static str, path: &Path, check: Check) -> Result<OwnedFd, AssetError> {
    let failed = |reason: String| AssetError { role, path: path.to_owned(), reason };
    let mut file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if !metadata.is_file() {
        return Err(failed("is not a regular file".into()));
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o004 == 0 {
        return Err(failed(format!(
            "has mode {mode:04o}, accepted is one that lets everybody read: QEMU has a user of its own"
        )));
    }
    let mut head = Vec::new();
    file.by_ref().take(1024).read_to_end(&mut head).map_err(|error| failed(error.to_string()))?;
    check(&head).map_err(|reason| failed(reason.to_owned()))?;
    Ok(file.into())
}

/// An ELF file for `x86_64`, or a Linux boot image (<https://www.kernel.org/doc/html/latest/arch/x86/boot.html>).
fn is_kernel(head: &[u8]) -> Result<(), &'static str> {
    const ELF_64_LITTLE: &[u8] = b"\x7fELF\x02\x01";
    const EM_X86_64: &[u8] = &[62, 0];
    let elf = head.starts_with(ELF_64_LITTLE) && head.get(18..20) == Some(EM_X86_64);
    let boot_image = head.get(0x202..0x206) == Some(b"HdrS");
    if elf || boot_image {
        Ok(())
    } else {
        Err("is no x86-64 kernel; accepted are an uncompressed vmlinux and a bzImage")
    }
}

/// A cpio archive in the "newc" format, plain or in a compression that kernels know.
fn is_initramfs(head: &[u8]) -> Result<(), &'static str> {
    const MAGICS: [&[u8]; 8] = [
        b"070701",
        b"070702",
        b"\x1f\x8b",
        b"\x28\xb5\x2f\xfd",
        b"\xfd7zXZ\0",
        b"\x02\x21\x4c\x18",
        b"BZh",
        b"\x89LZO",
    ];
    let known = MAGICS.iter().any(|magic| head.starts_with(magic));
    if known { Ok(()) } else { Err("is no initramfs; accepted is a newc cpio archive, plain or compressed") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const KERNEL: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";

    async fn told(kernel: &[u8], initramfs: &[u8]) -> Result<(), String> {
        let directory = tempfile::tempdir().expect("directory");
        let path = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            fs::write(&path, content).expect("writes");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("sets the mode");
            path
        };
        let (kernel, initramfs) = (path("vmlinux", kernel), path("initramfs", initramfs));
        let result = open(&kernel, &initramfs).await.map(drop);
        result.map_err(|error| error.to_string().replace(&format!("{}/", directory.path().display()), ""))
    }

    #[tokio::test]
    async fn good_files_are_opened_and_bad_ones_named() {
        assert_eq!(told(KERNEL, b"070701...").await, Ok(()));
        let mut boot_image = vec![0; 1024];
        boot_image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(told(&boot_image, b"\x1f\x8b").await, Ok(()));
        let kernel = "guest kernel vmlinux: is no x86-64 kernel; accepted are an uncompressed vmlinux and a bzImage";
        assert_eq!(told(b"", b"070701").await, Err(kernel.into()));
        assert_eq!(told(b"#!/bin/sh", b"070701").await, Err(kernel.into()));
        let initramfs =
            "guest initramfs initramfs: is no initramfs; accepted is a newc cpio archive, plain or compressed";
        assert_eq!(told(KERNEL, b"hello").await, Err(initramfs.into()));
    }

    #[tokio::test]
    async fn a_missing_or_private_file_is_named() {
        let directory = tempfile::tempdir().expect("directory");
        let missing = directory.path().join("vmlinux");
        let error = open(&missing, &missing).await.expect_err("is not there").to_string();
        assert_eq!(error, format!("guest kernel {}: No such file or directory (os error 2)", missing.display()));
        fs::write(&missing, KERNEL).expect("writes");
        fs::set_permissions(&missing, fs::Permissions::from_mode(0o600)).expect("sets the mode");
        let error = open(&missing, &missing).await.expect_err("is private").to_string();
        assert!(error.contains("has mode 0600, accepted is one that lets everybody read"), "{error}");
    }
}
