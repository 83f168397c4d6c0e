//! What the kernel offers: virtualisation, devices, the pod's network, cgroups, namespaces.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::Finding;
use crate::cgroup;
use crate::config::{Asset, Config};
use crate::error;
use crate::guest::transport::VHOST_VSOCK;
use crate::network::probe::{self, Offer};
use crate::network::tap::VHOST_NET;
use crate::paths;
use crate::vm::VmError;
use crate::vm::accel::{self, Accel, Choice};

/// Namespaces that the shim makes for a pod and its helpers, as `/proc/self/ns` calls them.
const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "pid"];

/// First kernel with id-mapped mounts on overlayfs (<https://docs.kernel.org/filesystems/idmappings.html>).
const IDMAPPED_OVERLAY: (u32, u32) = (5, 19);

/// Whether the run state has a place.
pub fn state_dir(path: &Path) -> Finding {
    const WHAT: &str = "state directory";
    // The longest id that CRI gives is 64 digits.
    if let Err(error) = paths::sandbox_dir(path, &"0".repeat(64), Path::new("/000000")) {
        return Finding::missing(WHAT, error.to_string(), "Set a shorter state_dir in the configuration.");
    }
    let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let writable = access(existing, Access::WRITE_OK | Access::EXEC_OK);
    match writable {
        Err(errno) => {
            let mend = "Name a directory on a writable file system as state_dir in the configuration.";
            Finding::missing(WHAT, format!("{}: {}", existing.display(), io::Error::from(errno)), mend)
        }
        Ok(()) if !existing.is_dir() => {
            let mend = "Name a directory as state_dir in the configuration.";
            Finding::missing(WHAT, format!("{} is not a directory", existing.display()), mend)
        }
        Ok(()) if existing == path => Finding::ok(WHAT, path.display().to_string()),
        Ok(()) => Finding::ok(WHAT, format!("{}, made with the first pod", path.display())),
    }
}

/// KVM, or why not.
pub fn accelerator(config: &Config) -> Finding {
    judge_accelerator(accel::detect(config.qemu.accel))
}

fn judge_accelerator(choice: Result<Choice, VmError>) -> Finding {
    const WHAT: &str = "virtualisation";
    const MEND: &str = "Switch on VT-x or AMD-V in the firmware, or nested virtualisation of the machine that this one is \
                        in, and load the module kvm_intel or kvm_amd; until then guests are several times slower.";
    match choice {
        Ok(Choice { accel: Accel::Kvm, .. }) => Finding::ok(WHAT, accel::KVM),
        Ok(Choice { no_kvm: Some(why), .. }) => Finding::warning(WHAT, format!("QEMU emulates: {why}"), MEND),
        Ok(Choice { no_kvm: None, .. }) => {
            Finding::ok(WHAT, "QEMU emulates: qemu.accel = \"tcg\" in the configuration")
        }
        Err(error) => Finding::missing(
            WHAT,
            error.to_string(),
            "Set qemu.accel = \"auto\" in the configuration, or give the machine KVM.",
        ),
    }
}

/// The rest of what a pod takes from the kernel. `exe` as in [`Config::find`].
pub async fn kernel(config: &Config, exe: &Path) -> Vec<Finding> {
    let mut findings =
        vec![judge_vsock(open(VHOST_VSOCK), config.find(Asset::VsockHelper, exe)), judge_vhost_net(open(VHOST_NET))];
    findings.extend(judge_network(probe::probe().await));
    findings.push(judge_cgroups(cgroup::in_use()));
    findings.push(judge_namespaces(|name| Path::new("/proc/self/ns").join(name).exists()));
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let most = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").ok();
    findings.push(judge_user_namespaces(&release, most.as_deref()));
    findings
}

fn open(device: &str) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(device).map(drop)
}

fn judge_vsock(device: io::Result<()>, helper: error::Result<PathBuf>) -> Finding {
    const WHAT: &str = "vsock";
    match (device, helper) {
        (Ok(()), _) => Finding::ok(WHAT, VHOST_VSOCK),
        (Err(error), Ok(helper)) => Finding::warning(
            WHAT,
            format!("{}, since {VHOST_VSOCK}: {error}", helper.display()),
            "Load the module vhost_vsock, which moves streams faster than the helper.",
        ),
        (Err(error), Err(no_helper)) => Finding::missing(
            WHAT,
            format!("{VHOST_VSOCK}: {error}; {no_helper}"),
            "Load the module vhost_vsock, or install bulkhead-vsock.",
        ),
    }
}

fn judge_vhost_net(device: io::Result<()>) -> Finding {
    const WHAT: &str = "vhost-net";
    match device {
        Ok(()) => Finding::ok(WHAT, VHOST_NET),
        Err(error) => Finding::warning(
            WHAT,
            format!("QEMU moves packets, since {VHOST_NET}: {error}"),
            "Load the module vhost_net, which moves them faster.",
        ),
    }
}

fn judge_network(offer: error::Result<Offer>) -> Vec<Finding> {
    const WHAT: &str = "pod network";
    const FORWARD: &str = "port-forward";
    let offer = match offer {
        Ok(offer) => offer,
        Err(error) => {
            return vec![Finding::missing(
                WHAT,
                error.to_string(),
                "Use a kernel with network namespaces (CONFIG_NET_NS).",
            )];
        }
    };
    let redirect = match offer.redirect {
        Ok(()) => Finding::ok(WHAT, "tap and tc redirect"),
        Err(error) => Finding::missing(
            WHAT,
            error.to_string(),
            "Load the modules tun, sch_ingress, cls_u32 and act_mirred, or use a kernel that has them.",
        ),
    };
    let forward = match (offer.lookup, offer.nftables) {
        (Ok(()), _) => Finding::ok(FORWARD, "socket lookup by BPF"),
        (Err(_), Ok(())) => Finding::ok(FORWARD, "redirect by nftables"),
        (Err(lookup), Err(nftables)) => Finding::warning(
            FORWARD,
            format!("{lookup}; {nftables}"),
            "Allow BPF (Linux 5.9 or newer) or install nft; without either kubectl port-forward does not work.",
        ),
    };
    vec![redirect, forward]
}

fn judge_cgroups(in_use: error::Result<(Vec<PathBuf>, bool)>) -> Finding {
    const WHAT: &str = "cgroups";
    const MEND: &str =
        "Mount cgroup2 on /sys/fs/cgroup; without it limits of pods do not hold for their virtual machines.";
    match in_use {
        Ok((places, _)) if places.is_empty() => Finding::warning(WHAT, "no hierarchy is mounted", MEND),
        Ok((places, true)) => Finding::ok(WHAT, format!("v2 on {}", places[0].display())),
        Ok((places, false)) => Finding::ok(WHAT, format!("v1, {} hierarchies", places.len())),
        Err(error) => Finding::warning(WHAT, error.to_string(), MEND),
    }
}

fn judge_namespaces(has: impl Fn(&str) -> bool) -> Finding {
    const WHAT: &str = "namespaces";
    let lacking: Vec<_> = NAMESPACES.into_iter().filter(|name| !has(name)).collect();
    if lacking.is_empty() {
        return Finding::ok(WHAT, NAMESPACES.join(", "));
    }
    Finding::missing(WHAT, format!("none of kind {}", lacking.join(", ")), "Use a kernel with these namespaces.")
}

fn judge_user_namespaces(release: &str, most: Option<&str>) -> Finding {
    const WHAT: &str = "user namespaces";
    const CONSEQUENCE: &str = "pods with hostUsers: false do not start without";
    match (version_of(release), most.map(str::trim)) {
        (_, None) => {
            Finding::warning(WHAT, "the kernel has none", format!("Use a kernel with CONFIG_USER_NS: {CONSEQUENCE}."))
        }
        (_, Some("0")) => Finding::warning(
            WHAT,
            "user.max_user_namespaces is 0",
            format!("Raise the sysctl user.max_user_namespaces: {CONSEQUENCE}."),
        ),
        (Some(version), Some(_)) if version < IDMAPPED_OVERLAY => Finding::warning(
            WHAT,
            format!("Linux {release} has no id-mapped mounts of overlayfs"),
            format!("Use Linux 5.19 or newer: {CONSEQUENCE}."),
        ),
        _ => Finding::ok(WHAT, format!("with id-mapped mounts, Linux {release}")),
    }
}

/// Major and minor number of a kernel release such as `6.1.0-56-amd64`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::error::Error;

    fn denied() -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn emulation_is_a_warning_unless_it_is_wanted_and_an_insisting_configuration_is_not_met() {
        let choice = |accel, no_kvm: Option<&str>| Ok(Choice { accel, no_kvm: no_kvm.map(str::to_owned) });
        assert_eq!(judge_accelerator(choice(Accel::Kvm, None)).verdict, Verdict::Ok);
        assert_eq!(judge_accelerator(choice(Accel::Tcg, None)).verdict, Verdict::Ok);
        let fallen = judge_accelerator(choice(Accel::Tcg, Some("no vmx")));
        assert_eq!((fallen.verdict, &*fallen.found), (Verdict::Warning, "QEMU emulates: no vmx"));
        assert_eq!(judge_accelerator(Err(VmError::NoKvm("no vmx".into()))).verdict, Verdict::Missing);
    }

    #[test]
    fn vsock_takes_the_kernel_or_a_helper() {
        let helper = || Ok(PathBuf::from("/h"));
        let no_helper = || Err(Error::failed_precondition("no bulkhead-vsock found"));
        assert_eq!(judge_vsock(Ok(()), no_helper()), Finding::ok("vsock", VHOST_VSOCK));
        let by_helper = judge_vsock(denied(), helper());
        assert_eq!(by_helper.verdict, Verdict::Warning);
        assert!(by_helper.found.starts_with("/h, since /dev/vhost-vsock: permission denied"), "{}", by_helper.found);
        let neither = judge_vsock(denied(), no_helper());
        assert!(neither.verdict == Verdict::Missing && neither.found.ends_with("no bulkhead-vsock found"));
        assert_eq!(judge_vhost_net(denied()).verdict, Verdict::Warning);
    }

    #[test]
    fn a_pod_starts_without_port_forward_and_not_without_a_redirect() {
        let refused = || Err(Error::internal("refused"));
        let verdicts = |offer| judge_network(Ok(offer)).iter().map(|finding| finding.verdict).collect::<Vec<_>>();
        let all = Offer { redirect: Ok(()), lookup: Ok(()), nftables: Ok(()) };
        assert_eq!(verdicts(all), [Verdict::Ok, Verdict::Ok]);
        let old = Offer { redirect: Ok(()), lookup: refused(), nftables: Ok(()) };
        assert_eq!(verdicts(old), [Verdict::Ok, Verdict::Ok]);
        let nothing = Offer { redirect: refused(), lookup: refused(), nftables: refused() };
        assert_eq!(verdicts(nothing), [Verdict::Missing, Verdict::Warning]);
        assert_eq!(judge_network(Err(Error::internal("no namespaces")))[0].verdict, Verdict::Missing);
    }

    #[test]
    fn cgroups_and_namespaces_are_told_by_kind() {
        let v1 = judge_cgroups(Ok((vec!["/sys/fs/cgroup/cpu".into(), "/sys/fs/cgroup/memory".into()], false)));
        assert_eq!(v1, Finding::ok("cgroups", "v1, 2 hierarchies"));
        assert_eq!(judge_cgroups(Ok((Vec::new(), false))).verdict, Verdict::Warning);
        assert_eq!(judge_namespaces(|_| true).verdict, Verdict::Ok);
        let lacking = judge_namespaces(|name| name != "pid");
        assert_eq!((lacking.verdict, &*lacking.found), (Verdict::Missing, "none of kind pid"));
    }

    #[test]
    fn user_namespaces_take_a_kernel_that_maps_overlays() {
        for (release, most, verdict) in [
            ("6.1.0-56-amd64", Some("31337\n"), Verdict::Ok),
            ("5.19", Some("1"), Verdict::Ok),
            ("5.18.19", Some("1"), Verdict::Warning),
            ("6.1.0", Some("0\n"), Verdict::Warning),
            ("6.1.0", None, Verdict::Warning),
        ] {
            assert_eq!(judge_user_namespaces(release, most).verdict, verdict, "{release} {most:?}");
        }
    }

    #[test]
    fn a_state_directory_need_not_exist_and_must_be_short_and_writable() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(state_dir(dir.path()).verdict, Verdict::Ok);
        assert!(state_dir(&dir.path().join("new")).found.ends_with("made with the first pod"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("writes");
        assert_eq!(state_dir(&file).verdict, Verdict::Missing);
        assert_eq!(state_dir(&dir.path().join("x".repeat(60))).verdict, Verdict::Missing);
    }
}
