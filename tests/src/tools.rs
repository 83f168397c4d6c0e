//! Where the programs and guest files under test lie.
//!
//! Each has an environment variable that names it outright; otherwise the build directory and the cache of `make setup`
//! are looked through.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// A release line of containerd that the tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// The distribution's own, which is 1.6 on Debian 12.
    V1_6,
    /// The last 1.x line.
    V1_7,
    /// The current line.
    V2_4,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2_4];

    /// Whether its configuration is of version 3 (2.x) rather than 2.
    pub fn is_v2(self) -> bool {
        self == Self::V2_4
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_4 => "2.4",
        })
    }
}

/// Programs of one containerd release.
#[derive(Debug, Clone)]
pub struct ContainerdTools {
    /// Directory with `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub directory: PathBuf,
}

impl ContainerdTools {
    /// Finds the programs of `version`.
    pub fn find(version: Version) -> Result<Self> {
        let mut candidates = Vec::new();
        if version == Version::V1_6 {
            candidates.push(PathBuf::from("/usr/bin"));
        }
        for directory in tool_directories() {
            candidates.push(directory.join(format!("containerd-{version}/bin")));
            candidates.push(directory.join(format!("containerd-{version}")));
        }
        let complete = |directory: &PathBuf| {
            ["containerd", "ctr", "containerd-shim-runc-v2"].iter().all(|name| directory.join(name).is_file())
        };
        let directory = candidates.iter().find(|directory| complete(directory)).cloned();
        let directory =
            directory.with_context(|| format!("no containerd {version} in {candidates:?}: run make setup"))?;
        Ok(Self { directory })
    }
}

/// Finds `crictl`.
pub fn crictl() -> Result<PathBuf> {
    find("BULKHEAD_CRICTL", tool_directories().into_iter().flat_map(|d| [d.join("crictl"), d.join("bin/crictl")]))
        .context("crictl: run make setup")
}

/// Finds `critest`.
pub fn critest() -> Result<PathBuf> {
    find("BULKHEAD_CRITEST", tool_directories().into_iter().flat_map(|d| [d.join("critest"), d.join("bin/critest")]))
        .context("critest: run make setup")
}

/// Finds `nerdctl`.
pub fn nerdctl() -> Result<PathBuf> {
    find("BULKHEAD_NERDCTL", tool_directories().into_iter().map(|directory| directory.join("bin/nerdctl")))
        .context("nerdctl: run make setup")
}

/// Finds the directory into which Debian's package of nginx was unpacked.
pub fn nginx() -> Result<PathBuf> {
    let candidates: Vec<_> = tool_directories().into_iter().map(|directory| directory.join("nginx")).collect();
    let found = candidates.iter().find(|directory| directory.join("usr/sbin/nginx").is_file()).cloned();
    found.with_context(|| format!("no nginx in {candidates:?}: run make setup"))
}

/// Finds a program of Kubernetes, or of what its node runs beside it (`etcd`, `coredns`, `agnhost`, `e2e.test`, ...).
pub fn kubernetes(program: &str) -> Result<PathBuf> {
    let candidates: Vec<_> =
        tool_directories().into_iter().map(|directory| directory.join("kubernetes/bin").join(program)).collect();
    let found = candidates.iter().find(|path| path.is_file()).cloned();
    found.with_context(|| format!("none of {candidates:?} exists: run make setup-kubernetes"))
}

/// Finds `runc`.
pub fn runc() -> Result<PathBuf> {
    find("BULKHEAD_RUNC", ["/usr/sbin/runc", "/usr/bin/runc"].map(PathBuf::from)).context("runc: run make setup")
}

/// Files of Bulkhead and of what it runs.
#[derive(Debug, Clone)]
pub struct BulkheadTools {
    /// `containerd-shim-bulkhead-v2`.
    pub shim: PathBuf,
    /// `bulkhead`, the node CLI.
    pub cli: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// virtiofsd.
    pub virtiofsd: PathBuf,
    /// The vsock helper for hosts without vhost-vsock.
    pub vsock_helper: PathBuf,
}

impl BulkheadTools {
    /// Finds everything, or names what is missing and the target that makes it.
    pub fn find() -> Result<Self> {
        let built = build_directories()?;
        let guest = guest_directories()?;
        let tools = tool_directories();
        let helper = |name: &str| {
            let mut all: Vec<_> = tools.iter().flat_map(|d| [d.join(name), d.join("bin").join(name)]).collect();
            all.extend(["/usr/libexec", "/usr/bin", "/usr/local/bin"].map(|d| Path::new(d).join(name)));
            all
        };
        Ok(Self {
            shim: find("BULKHEAD_SHIM", built.iter().map(|d| d.join("containerd-shim-bulkhead-v2")))
                .context("the shim: run make build")?,
            cli: find("BULKHEAD_CLI", built.iter().map(|d| d.join("bulkhead")))
                .context("the node CLI: run make build")?,
            kernel: find("BULKHEAD_KERNEL", guest.iter().map(|d| d.join("vmlinux")))
                .context("the guest's kernel: run make guest")?,
            initramfs: find("BULKHEAD_INITRAMFS", guest.iter().map(|d| d.join("initramfs")))
                .context("the guest's initramfs: run make guest")?,
            qemu: find("BULKHEAD_QEMU", [PathBuf::from("/usr/bin/qemu-system-x86_64")])
                .context("QEMU: run make setup")?,
            virtiofsd: find("BULKHEAD_VIRTIOFSD", helper("virtiofsd")).context("virtiofsd: run make setup")?,
            vsock_helper: find("BULKHEAD_VSOCK", built.iter().map(|d| d.join("bulkhead-vsock")))
                .context("the vsock helper: run make build")?,
        })
    }

    /// Names everything in `directory`, as a node's own installation would have it.
    pub fn link_into(&self, directory: &Path) -> Result<()> {
        for (name, target) in [
            ("containerd-shim-bulkhead-v2", &self.shim),
            ("bulkhead", &self.cli),
            ("vmlinux", &self.kernel),
            ("initramfs", &self.initramfs),
            ("qemu-system-x86_64", &self.qemu),
            ("virtiofsd", &self.virtiofsd),
            ("bulkhead-vsock", &self.vsock_helper),
        ] {
            let path = directory.join(name);
            if ["virtiofsd", "bulkhead-vsock"].contains(&name) {
                // Pods run these as other users, who cannot reach into the home of root's where they were built.
                fs::copy(target, &path).with_context(|| format!("copy {}", target.display()))?;
            } else {
                symlink(target, &path).with_context(|| format!("link {}", path.display()))?;
            }
        }
        Ok(())
    }
}

fn find(variable: &str, candidates: impl IntoIterator<Item = PathBuf>) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).map(PathBuf::from) {
        ensure!(path.is_file(), "{variable} names {}, which is not a file", path.display());
        return Ok(path);
    }
    let candidates: Vec<_> = candidates.into_iter().collect();
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!("none of {candidates:?} exists, and {variable} is not set"),
    }
}

/// Where `make setup` puts what it builds.
fn tool_directories() -> Vec<PathBuf> {
    let cache = std::env::var_os("BULKHEAD_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".cache/bulkhead"))
    });
    cache.into_iter().map(|cache| cache.join("tools")).collect()
}

/// Cargo's output directories, the one of optimised builds first.
fn build_directories() -> Result<Vec<PathBuf>> {
    let target = target_directory()?;
    Ok(vec![target.join("release"), target.join("debug")])
}

fn guest_directories() -> Result<Vec<PathBuf>> {
    Ok(vec![target_directory()?.join("guest")])
}

/// Cargo's target directory, found from the program that runs.
pub fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find the running program")?;
    let target = program.ancestors().find(|directory| directory.join("CACHEDIR.TAG").is_file());
    Ok(target.with_context(|| format!("{} does not lie in a target directory", program.display()))?.to_owned())
}
