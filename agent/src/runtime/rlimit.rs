//! Limits of processes (getrlimit(2)) for those that will live in a user namespace.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the caller's hard limits to those of `limits` that are higher: inside a user namespace nobody may. The soft ones,
/// and lower limits, are set there.
pub fn allow(limits: &[PosixRlimit]) -> Result<(), String> {
    for limit in limits {
        let resource = resource(limit.typ());
        let now = getrlimit(resource);
        let hard = (limit.hard() != u64::MAX).then_some(limit.hard());
        if now.maximum.is_none_or(|most| hard.is_some_and(|hard| hard <= most)) {
            continue;
        }
        setrlimit(resource, Rlimit { current: now.current, maximum: hard })
            .map_err(|error| format!("raise limit {:?} to {}: {error}", limit.typ(), limit.hard()))?;
    }
    Ok(())
}

fn resource(typ: PosixRlimitType) -> Resource {
    match typ {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}
