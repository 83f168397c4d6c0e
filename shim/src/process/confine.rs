//! What a child does to itself between fork and exec. Only system calls: the fork has one thread and may not allocate.
//!
//! See capabilities(7), credentials(7), prctl(2) `PR_SET_PDEATHSIG`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Gid, Mode, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::config::{ChildConfig, DeviceNode};
use crate::seccomp::Filter;
use crate::sys;

/// All that it takes, made before the fork.
pub(super) struct Confine {
    parent: Option<Pid>,
    cgroup: Vec<OwnedFd>,
    namespaces: nix::sched::CloneFlags,
    devices: Option<Vec<DeviceNode>>,
    rlimits: Vec<(Resource, u64)>,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    capabilities: CapabilitySet,
    keep_for_others: bool,
    seccomp: Option<Filter>,
}

impl Confine {
    pub(super) fn new(config: ChildConfig) -> anyhow::Result<Self> {
        use nix::sched::CloneFlags;
        let wanted = config.namespaces;
        let mut namespaces = CloneFlags::empty();
        namespaces.set(CloneFlags::CLONE_NEWNET, wanted.net);
        namespaces.set(CloneFlags::CLONE_NEWIPC, wanted.ipc);
        namespaces.set(CloneFlags::CLONE_NEWUTS, wanted.uts);
        namespaces.set(CloneFlags::CLONE_NEWNS, wanted.mount);
        let devices = match config.devices {
            None => None,
            Some(_) if !wanted.mount => anyhow::bail!("{}: devices need a mount namespace", config.role),
            Some(mut devices) => {
                devices.push(DeviceNode::like(Path::new("/dev/null"))?);
                devices.push(DeviceNode::like(Path::new("/dev/urandom"))?);
                Some(devices)
            }
        };
        Ok(Self {
            parent: Some(rustix::process::getpid()),
            cgroup: config.cgroup,
            namespaces,
            devices,
            rlimits: config.rlimits,
            uid: Uid::from_raw(config.credentials.uid),
            gid: Gid::from_raw(config.credentials.gid),
            groups: config.credentials.groups.into_iter().map(Gid::from_raw).collect(),
            capabilities: config.credentials.capabilities,
            keep_for_others: config.credentials.keep_for_others,
            seccomp: config.seccomp,
        })
    }

    /// Runs in the child, still with all the shim's rights and open files.
    pub(super) fn with_rights(&self) -> Result<(), Failure> {
        for procs in &self.cgroup {
            // 0 is the writer itself, in v1 and v2: so it is inside before it runs anything, whatever its pid.
            rustix::io::write(procs, b"0").at(Step::Cgroup)?;
        }
        rustix::process::setsid().at(Step::Session)?;
        rustix::process::umask(Mode::RWXG | Mode::RWXO);
        if !self.namespaces.is_empty() {
            nix::sched::unshare(self.namespaces).map_err(|errno| Failure(Step::Namespaces, errno.into()))?;
        }
        if self.namespaces.contains(nix::sched::CloneFlags::CLONE_NEWNS) {
            let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
            rustix::mount::mount_change(c"/", slave).at(Step::Namespaces)?;
        }
        if let Some(devices) = &self.devices {
            let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
            rustix::mount::mount(c"tmpfs", c"/dev", c"tmpfs", flags, c"mode=755,size=64k").at(Step::Devices)?;
            for node in devices {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(CWD, &*node.path, FileType::CharacterDevice, mode, node.device)
                    .at(Step::Devices)?;
                rustix::fs::chownat(CWD, &*node.path, Some(self.uid), Some(self.gid), rustix::fs::AtFlags::empty())
                    .at(Step::Devices)?;
            }
        }
        for (resource, limit) in self.rlimits.iter().copied().chain([(Resource::Core, 0)]) {
            let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
            rustix::process::setrlimit(resource, limit).at(Step::Limits)?;
        }
        sys::close_on_exec_from(3).map_err(|error| Failure(Step::Files, error))
    }

    /// Runs in the child after its files are in place; afterwards it can do nothing that the program may not do.
    pub(super) fn without_rights(&self) -> Result<(), Failure> {
        for number in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.capabilities.contains(capability) {
                continue;
            }
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // Beyond the last that this kernel knows.
                Err(rustix::io::Errno::INVAL) => break,
                Err(errno) => return Err(Failure(Step::Capabilities, errno.into())),
            }
        }
        let ambient = !self.uid.is_root() && !self.capabilities.is_empty();
        rustix::thread::set_keep_capabilities(ambient).at(Step::Capabilities)?;
        rustix::thread::set_thread_groups(&self.groups).at(Step::User)?;
        rustix::thread::set_thread_res_gid(self.gid, self.gid, self.gid).at(Step::User)?;
        rustix::thread::set_thread_res_uid(self.uid, self.uid, self.uid).at(Step::User)?;
        let inheritable = if ambient { self.capabilities } else { CapabilitySet::empty() };
        let sets = CapabilitySets { effective: self.capabilities, permitted: self.capabilities, inheritable };
        rustix::thread::set_capabilities(None, sets).at(Step::Capabilities)?;
        rustix::thread::clear_ambient_capability_set().at(Step::Capabilities)?;
        if ambient {
            for capability in self.capabilities.iter() {
                rustix::thread::configure_capability_in_ambient_set(capability, true).at(Step::Capabilities)?;
            }
        }
        if self.keep_for_others {
            let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED;
            rustix::thread::set_capabilities_secure_bits(bits).at(Step::Capabilities)?;
        }
        rustix::thread::set_no_new_privs(true).at(Step::Capabilities)?;
        // A change of user forgets this setting, so it comes after. If the shim has died before, nobody would tell us.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).at(Step::DeathSignal)?;
        if rustix::process::getppid() != self.parent {
            return Err(Failure(Step::DeathSignal, io::ErrorKind::BrokenPipe.into()));
        }
        self.seccomp.as_ref().map_or(Ok(()), Filter::apply).map_err(|error| Failure(Step::Seccomp, error))
    }
}

/// A step between fork and exec that can fail; its number travels to the parent through an eventfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Step {
    Cgroup = 1,
    Session,
    Namespaces,
    Devices,
    Limits,
    Files,
    User,
    Capabilities,
    DeathSignal,
    Seccomp,
}

impl Step {
    const ALL: [Self; 10] = [
        Self::Cgroup,
        Self::Session,
        Self::Namespaces,
        Self::Devices,
        Self::Limits,
        Self::Files,
        Self::User,
        Self::Capabilities,
        Self::DeathSignal,
        Self::Seccomp,
    ];

    pub(super) fn told(self) -> &'static str {
        match self {
            Self::Cgroup => "enter its cgroup",
            Self::Session => "start a session",
            Self::Namespaces => "enter namespaces of its own",
            Self::Devices => "make its /dev",
            Self::Limits => "set its resource limits",
            Self::Files => "close the shim's files",
            Self::User => "become its own user",
            Self::Capabilities => "drop capabilities",
            Self::DeathSignal => "tie it to the life of the shim",
            Self::Seccomp => "install its system-call filter",
        }
    }

    /// The step that the child reported, if it came so far.
    pub(super) fn failed(eventfd: &OwnedFd) -> Option<Self> {
        // Never blocks a reader: without a report there is nothing to read.
        rustix::fs::fcntl_setfl(eventfd, rustix::fs::OFlags::NONBLOCK).ok()?;
        let mut number = [0; 8];
        rustix::io::read(eventfd, &mut number).ok()?;
        Self::ALL.into_iter().find(|step| *step as u64 == u64::from_ne_bytes(number))
    }
}

pub(super) struct Failure(Step, io::Error);

impl Failure {
    /// Tells the parent which step it was; the error itself goes the way of `std::process`.
    pub(super) fn report(self, eventfd: &OwnedFd) -> io::Error {
        // If this is lost, only the step's name is.
        let _told = rustix::io::write(eventfd, &(self.0 as u64).to_ne_bytes());
        self.1
    }
}

trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T> At<T> for rustix::io::Result<T> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|errno| Failure(step, errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::tests::{host, run, shell};
    use crate::process::{Child, ChildExit, Namespaces};

    #[tokio::test]
    async fn a_child_has_no_root_no_capabilities_and_no_way_back() {
        let script = "grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/self/status >&2; ulimit -c >&2; umask >&2";
        let (_, said) = run(shell(script)).await;
        let fields: Vec<_> = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let none = "0000000000000000";
        assert_eq!(
            fields,
            [
                "Uid: 61234 61234 61234 61234".to_owned(),
                "Gid: 61235 61235 61235 61235".to_owned(),
                "Groups:".to_owned(),
                format!("CapInh: {none}"),
                format!("CapPrm: {none}"),
                format!("CapEff: {none}"),
                format!("CapBnd: {none}"),
                format!("CapAmb: {none}"),
                "NoNewPrivs: 1".to_owned(),
                "0".to_owned(),
                "0077".to_owned(),
            ]
        );
    }

    #[tokio::test]
    async fn capabilities_that_are_kept_are_the_only_ones() {
        for uid in [0, 61_234] {
            let mut config = shell("grep -E '^Cap(Eff|Bnd)' /proc/self/status >&2");
            config.credentials.uid = uid;
            config.credentials.capabilities = CapabilitySet::CHOWN | CapabilitySet::FOWNER;
            let (_, said) = run(config).await;
            assert_eq!(said.matches("0000000000000009").count(), 2, "uid {uid}: {said}");
        }
    }

    /// The links of every new network namespace: `lo`, and one for each kind of tunnel that this kernel has loaded.
    fn links_of_a_new_namespace() -> Vec<String> {
        let look = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("makes a namespace");
            std::fs::read_to_string("/proc/thread-self/net/dev").expect("lists")
        };
        let table = std::thread::spawn(look).join().expect("does not panic");
        table.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim().to_owned()).collect()
    }

    #[tokio::test]
    async fn namespaces_and_devices_are_its_own() {
        let mut config =
            shell("ls /dev >&2; cat /proc/net/dev | tail -n +3 | cut -d: -f1 >&2; echo x >/dev/null || exit 9");
        config.namespaces = Namespaces { net: true, ipc: true, uts: true, mount: true };
        config.devices = Some(vec![DeviceNode::like(Path::new("/dev/zero")).expect("is there")]);
        let (exit, said) = run(config).await;
        assert_eq!(exit, ChildExit::Exited(0), "{said}");
        let links = links_of_a_new_namespace();
        let mut expected = vec!["null", "urandom", "zero"];
        expected.extend(links.iter().map(String::as_str));
        assert_eq!(said.split_whitespace().collect::<Vec<_>>(), expected);
    }

    #[tokio::test]
    async fn the_step_that_failed_is_named() {
        let mut config = shell("true");
        let (reader, _writer) = rustix::pipe::pipe().expect("pipe");
        // The reading end of a pipe cannot be written, so it is no cgroup.
        config.cgroup = vec![reader];
        let error = Child::spawn(&host(), config).await.expect_err("fails");
        assert_eq!(format!("{error:#}"), "start shell /bin/sh: enter its cgroup: Bad file descriptor (os error 9)");
    }
}
