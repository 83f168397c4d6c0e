//! How large a VM is: a pure function of the pod's limits, what the pod asks for by annotation, the configuration and the
//! host.
//!
//! Only limits count. Requests reach a runtime as CPU shares at most, and memory requests and a `RuntimeClass`' overhead
//! not at all. The size is that of the machine; what each container may use of it is the guest's cgroups' affair.
//!
//! An annotation goes before a limit, a limit before the configuration. A limit on one resource says nothing about the
//! other: a pod with only a CPU limit gets the memory of a pod without any.

use oci_spec::runtime::Spec;

use crate::annotations::Annotations;
use crate::config::{Config, DEFAULT_MEMORY_MIB, MIN_MEMORY_MIB};
use crate::error::{Error, Result};

/// What the guest's kernel, the agent and their caches take, in MiB: comes on top of a pod's memory limit.
pub const GUEST_OVERHEAD_MIB: u32 = 64;

/// Memory is a multiple of this, in MiB: the size of a huge page, so that the guest's RAM can be made of them.
const GRAIN_MIB: u32 = 2;

const MIB: u64 = 1 << 20;

/// What the pod may use at most; `None` for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// What the host has; nothing larger is given to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that the shim may run on.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// vCPUs, at least 1.
    pub vcpus: u32,
    /// Memory in MiB, even.
    pub memory_mib: u32,
}

/// Annotations of containerd's CRI on the spec of a sandbox: the pod's limits.
///
/// <https://github.com/containerd/containerd/blob/main/internal/cri/annotations/annotations.go>
mod cri {
    pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
    pub const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
    pub const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
    pub const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
}

/// The kernel's period of the CPU controller, in microseconds, where a spec gives a quota alone.
const DEFAULT_CPU_PERIOD: u64 = 100_000;

impl Limits {
    /// The limits in the spec of a sandbox.
    ///
    /// Under CRI they are annotations (the resources of such a spec are those of the pause container); without CRI the
    /// one container is the sandbox, and its own resources count. Malformed annotations are refused.
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        let annotations = spec.annotations().as_ref();
        let annotation = |name: &str| annotations.and_then(|all| all.get(name)).map(String::as_str);
        if annotation(cri::CONTAINER_TYPE).is_some() {
            let number = |name: &str| match annotation(name) {
                None => Ok(0),
                Some(value) => value.parse::<i64>().map_err(|_| {
                    Error::invalid(format!("annotation {name}={value:?} is malformed, accepted is a whole number"))
                }),
            };
            return Ok(Self::new(number(cri::CPU_QUOTA)?, number(cri::CPU_PERIOD)?, number(cri::MEMORY)?));
        }
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(oci_spec::runtime::LinuxCpu::quota).unwrap_or_default();
        let period = cpu.and_then(oci_spec::runtime::LinuxCpu::period).unwrap_or_default();
        let memory = resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(oci_spec::runtime::LinuxMemory::limit)
            .unwrap_or_default();
        Ok(Self::new(quota, i64::try_from(period).unwrap_or(i64::MAX), memory))
    }

    /// Limits in the units of cgroups and CRI: microseconds and bytes. Zero and less mean no limit, or the kernel's period.
    pub fn new(cpu_quota: i64, cpu_period: i64, memory_bytes: i64) -> Self {
        let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        let period = positive(cpu_period).unwrap_or(DEFAULT_CPU_PERIOD);
        Self {
            cpu_milli: positive(cpu_quota).map(|quota| quota.saturating_mul(1000).div_ceil(period)),
            memory_bytes: positive(memory_bytes),
        }
    }
}

/// What a running VM can give at most: it does not grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceiling {
    /// What it was made for. These are never refused, even where the host could not give as much.
    pub limits: Limits,
    /// What it has.
    pub size: VmSize,
}

impl Ceiling {
    /// Refuses new limits of `whose`, the pod or one of its containers, that the VM cannot give.
    ///
    /// No limit always fits: it promises nothing. Nor are those refused that `whose` was `made_with`: they are no growth.
    pub fn admit(&self, whose: &str, wanted: Limits, made_with: Limits) -> Result<()> {
        let refuse = |what: String, most: String| {
            Err(Error::failed_precondition(format!(
                "{what} of {whose} is more than its virtual machine has, which stays as it started; accepted is up to {most}"
            )))
        };
        let above = |wanted: Option<u64>, has: u64, exempt: [Option<u64>; 2]| {
            wanted.filter(|&wanted| wanted > has && exempt.iter().flatten().all(|&exempt| wanted > exempt))
        };
        let cpu_milli = u64::from(self.size.vcpus) * 1000;
        if let Some(milli) = above(wanted.cpu_milli, cpu_milli, [self.limits.cpu_milli, made_with.cpu_milli]) {
            return refuse(format!("CPU limit {milli}m"), format!("{cpu_milli}m"));
        }
        let memory_bytes = u64::from(self.size.memory_mib.saturating_sub(GUEST_OVERHEAD_MIB)) * MIB;
        if let Some(bytes) =
            above(wanted.memory_bytes, memory_bytes, [self.limits.memory_bytes, made_with.memory_bytes])
        {
            return refuse(format!("memory limit {bytes}"), format!("{memory_bytes} bytes"));
        }
        Ok(())
    }
}

impl Host {
    /// Asks the kernel.
    pub fn measure() -> anyhow::Result<Self> {
        let cpus = std::thread::available_parallelism()?.get();
        let info = nix::sys::sysinfo::sysinfo()?;
        Ok(Self { cpus: u32::try_from(cpus)?, memory_mib: u32::try_from(info.ram_total() / MIB)? })
    }
}

/// The size of the VM of a pod.
///
/// - vCPUs: the CPU limit rounded up, so that exactly one CPU is one vCPU; at least 1, at most the host's.
/// - Memory: the limit and [`GUEST_OVERHEAD_MIB`], in steps of 2 MiB; at most the host's. A small limit does not make a VM
///   smaller than the default one: kubelet sums the limits of those containers that have one, so it may well be that
///   others without a limit live in the same pod, and memory that nobody touches costs next to nothing.
pub fn size(limits: Limits, annotations: &Annotations, config: &Config, host: Host) -> VmSize {
    let limit_vcpus = limits.cpu_milli.map(|milli| saturate(milli.div_ceil(1000)));
    let vcpus = annotations.vcpus.or(limit_vcpus).unwrap_or(config.vcpus);

    let least = config.memory_mib.min(DEFAULT_MEMORY_MIB);
    let limit_mib =
        limits.memory_bytes.map(|bytes| saturate(bytes.div_ceil(MIB)).saturating_add(GUEST_OVERHEAD_MIB).max(least));
    let memory_mib = annotations.memory_mib.or(limit_mib).unwrap_or(config.memory_mib);

    VmSize {
        vcpus: vcpus.min(host.cpus).max(1),
        memory_mib: round_up(memory_mib.min(host.memory_mib).max(MIN_MEMORY_MIB)),
    }
}

fn saturate(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn round_up(mib: u32) -> u32 {
    mib.div_ceil(GRAIN_MIB).saturating_mul(GRAIN_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { cpus: 8, memory_mib: 32768 };
    const MI: i64 = 1 << 20;

    fn sized(quota: i64, period: i64, memory: i64) -> (u32, u32) {
        let size = size(Limits::new(quota, period, memory), &Annotations::default(), &Config::default(), HOST);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn vcpus_are_the_limit_rounded_up() {
        for (quota, period, vcpus) in [
            (0, 0, 1),
            (-1, 100_000, 1),
            (1, 100_000, 1),
            (50_000, 100_000, 1),
            (100_000, 100_000, 1),
            (100_001, 100_000, 2),
            (150_000, 100_000, 2),
            (200_000, 100_000, 2),
            (400_000, 0, 4),
            (25_000, 10_000, 3),
            (100_000_000, 100_000, 8),
            (i64::MAX, 1, 8),
        ] {
            assert_eq!(sized(quota, period, 0).0, vcpus, "quota {quota} of {period}");
        }
    }

    #[test]
    fn memory_is_the_limit_with_the_guests_own_need() {
        for (limit, mib) in [
            (0, 256),
            (-1, 256),
            (1, 256),
            (64 * MI, 256),
            (192 * MI, 256),
            (193 * MI, 258),
            (512 * MI, 576),
            (512 * MI + 1, 578),
            (4096 * MI, 4160),
            (1 << 50, 32768),
            (i64::MAX, 32768),
        ] {
            assert_eq!(sized(0, 0, limit).1, mib, "limit {limit}");
        }
    }

    #[test]
    fn a_limit_on_one_resource_leaves_the_other_at_its_default() {
        assert_eq!(sized(300_000, 100_000, 0), (3, 256));
        assert_eq!(sized(0, 0, 1024 * MI), (1, 1088));
    }

    #[test]
    fn the_configuration_decides_where_nothing_is_limited() {
        let config = Config { vcpus: 2, memory_mib: 1025, ..Config::default() };
        let unlimited = size(Limits::default(), &Annotations::default(), &config, HOST);
        assert_eq!(unlimited, VmSize { vcpus: 2, memory_mib: 1026 });
        let limited = size(Limits::new(100_000, 100_000, 300 * MI), &Annotations::default(), &config, HOST);
        assert_eq!(limited, VmSize { vcpus: 1, memory_mib: 364 });
    }

    #[test]
    fn a_configuration_with_a_small_default_allows_small_machines() {
        let config = Config { memory_mib: 128, ..Config::default() };
        let size = size(Limits::new(0, 0, 80 * MI), &Annotations::default(), &config, HOST);
        assert_eq!(size.memory_mib, 144);
    }

    #[test]
    fn annotations_go_before_limits_and_are_bound_by_the_host() {
        let annotations = Annotations { vcpus: Some(6), memory_mib: Some(129), machine: None };
        let limits = Limits::new(100_000, 100_000, 4096 * MI);
        let sized = size(limits, &annotations, &Config::default(), HOST);
        assert_eq!(sized, VmSize { vcpus: 6, memory_mib: 130 });
        let small = Host { cpus: 2, memory_mib: 1024 };
        let annotations = Annotations { vcpus: Some(6), memory_mib: Some(4096), machine: None };
        assert_eq!(size(limits, &annotations, &Config::default(), small), VmSize { vcpus: 2, memory_mib: 1024 });
    }

    #[test]
    fn a_running_vm_takes_limits_that_it_can_give() {
        let ceiling = |limits: Limits, vcpus, memory_mib| Ceiling { limits, size: VmSize { vcpus, memory_mib } };
        let admit = |vm: &Ceiling, wanted| vm.admit("the pod", wanted, Limits::default());
        let vm = ceiling(Limits::new(150_000, 100_000, 512 * MI), 2, 576);
        for (quota, memory) in [(150_000, 512 * MI), (200_000, 512 * MI), (1000, MI), (0, 0), (-1, -1)] {
            admit(&vm, Limits::new(quota, 100_000, memory)).expect("fits");
        }
        let said = admit(&vm, Limits::new(200_001, 100_000, 0)).expect_err("is refused");
        assert_eq!(said.kind(), crate::error::Kind::FailedPrecondition);
        assert!(said.to_string().contains("2001m") && said.to_string().contains("up to 2000m"), "{said}");
        let said = admit(&vm, Limits::new(0, 0, 512 * MI + 1)).expect_err("is refused").to_string();
        assert!(said.contains("536870913") && said.contains("up to 536870912"), "{said}");
        // The host had less than the pod was allowed: going back to that is no growth.
        let capped = ceiling(Limits::new(400_000, 100_000, 4096 * MI), 2, 1024);
        admit(&capped, Limits::new(400_000, 100_000, 4096 * MI)).expect("is what it was made for");
        admit(&capped, Limits::new(500_000, 100_000, 0)).expect_err("is more");
    }

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).expect("is a spec")
    }

    #[test]
    fn a_cri_sandbox_is_sized_by_its_annotations_alone() {
        let spec = spec(
            r#"{"ociVersion": "1.1.0",
                "annotations": {
                    "io.kubernetes.cri.container-type": "sandbox",
                    "io.kubernetes.cri.sandbox-cpu-quota": "150000",
                    "io.kubernetes.cri.sandbox-cpu-period": "100000",
                    "io.kubernetes.cri.sandbox-cpu-shares": "1024",
                    "io.kubernetes.cri.sandbox-memory": "134217728"},
                "linux": {"resources": {"cpu": {"quota": 9, "period": 9}, "memory": {"limit": 9}}}}"#,
        );
        let expected = Limits { cpu_milli: Some(1500), memory_bytes: Some(128 << 20) };
        assert_eq!(Limits::from_spec(&spec).expect("reads"), expected);
    }

    #[test]
    fn a_cri_sandbox_without_annotations_has_no_limits() {
        let spec = spec(
            r#"{"ociVersion": "1.1.0", "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
                "linux": {"resources": {"memory": {"limit": 9}}}}"#,
        );
        assert_eq!(Limits::from_spec(&spec).expect("reads"), Limits::default());
    }

    #[test]
    fn a_lone_container_is_sized_by_its_own_resources() {
        let limited = spec(
            r#"{"ociVersion": "1.1.0",
                "linux": {"resources": {"cpu": {"quota": 200000, "period": 100000}, "memory": {"limit": 1048576}}}}"#,
        );
        let expected = Limits { cpu_milli: Some(2000), memory_bytes: Some(1 << 20) };
        assert_eq!(Limits::from_spec(&limited).expect("reads"), expected);
        let bare = spec(r#"{"ociVersion": "1.1.0"}"#);
        assert_eq!(Limits::from_spec(&bare).expect("reads"), Limits::default());
    }

    #[test]
    fn a_malformed_annotation_is_refused_by_name() {
        let spec = spec(
            r#"{"ociVersion": "1.1.0", "annotations": {
                "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-memory": "1Gi"}}"#,
        );
        let said = Limits::from_spec(&spec).expect_err("is refused").to_string();
        assert_eq!(
            said,
            "annotation io.kubernetes.cri.sandbox-memory=\"1Gi\" is malformed, accepted is a whole number"
        );
    }
}
