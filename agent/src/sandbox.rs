//! The pod as a whole: host name, share, /dev/shm, network, sysctls. Made once per boot.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_proto::agent::{CreateSandboxRequest, CreateSandboxResponse, Stage};
use nix::mount::MsFlags;

use crate::error::{During, Error, Result};
use crate::idmap::Owner;
use crate::pod::Services;
use crate::spec::{SHARE, SHM};
use crate::{mount, network};

/// Longest host name the kernel takes.
const HOSTNAME_AT_MOST: usize = 64;

/// Carries out the request, step by step.
pub async fn create(services: &Arc<Services>, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
    let network = network::plan(&request.interfaces, &request.routes, &request.neighbours)?;
    let mut stages = Stages::start();

    if !request.share_tag.is_empty() {
        let tag = request.share_tag.clone();
        tokio::task::spawn_blocking(move || mount_share(&tag)).await.during(|| "mount the share")??;
        stages.done("share");
    }
    let namespaces = match &request.user_namespace {
        None => None,
        Some(user) => Some(services.isolate(user).await?),
    };
    let hostname = request.hostname;
    match &namespaces {
        None => set_hostname(&hostname)?,
        Some(namespaces) => namespaces.run(move || set_hostname(&hostname)).await??,
    }
    mount_shm(request.shm_size_bytes, namespaces.as_ref().map(|namespaces| namespaces.ids.root()))?;
    stages.done("base");
    match &namespaces {
        None => network::configure(&network).await?,
        Some(namespaces) => network::configure_inside(network, namespaces).await?,
    }
    stages.done("network");
    services.set_sysctls(request.sysctls.into_iter().collect()).await?;
    stages.done("sysctls");
    Ok(CreateSandboxResponse { stages: stages.stages })
}

fn mount_share(tag: &str) -> Result<()> {
    fs::create_dir_all(SHARE).during(|| "create the share's mount point")?;
    // Without nosuid or nodev: images hold setuid programs, and containers' device rules are their cgroup's.
    mount::attach(Path::new(tag), Path::new(SHARE), "virtiofs", MsFlags::empty(), "")
}

fn set_hostname(hostname: &str) -> Result<()> {
    if hostname.is_empty() {
        return Ok(());
    }
    if hostname.len() > HOSTNAME_AT_MOST {
        let length = hostname.len();
        return Err(Error::invalid(format!("host name has {length} bytes, at most {HOSTNAME_AT_MOST} are accepted")));
    }
    nix::unistd::sethostname(hostname).during(|| format!("set the host name to {hostname:?}"))
}

fn mount_shm(size_bytes: u64, owner: Option<Owner>) -> Result<()> {
    fs::create_dir_all(SHM).during(|| "create /dev/shm")?;
    let size = if size_bytes == 0 { String::new() } else { format!(",size={size_bytes}") };
    let owner = owner.map_or(String::new(), |Owner { uid, gid }| format!(",uid={uid},gid={gid}"));
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount::attach(Path::new("shm"), Path::new(SHM), "tmpfs", flags, &format!("mode=1777{size}{owner}"))
}

/// Sets a sysctl by its dotted or slashed name.
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = sysctl_path(name)?;
    match fs::write(&path, value) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::invalid(format!("sysctl {name:?} does not exist in the guest's kernel")))
        }
        Err(error) => Err(Error::invalid(format!("set sysctl {name:?} to {value:?}: {error}"))),
    }
}

/// The file of a sysctl. The first separator tells which one the name uses: `net.ipv4.conf.eth0/1.mtu` has a dot in `eth0.1`.
fn sysctl_path(name: &str) -> Result<String> {
    let slashed = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('/') => name.to_owned(),
        _ => name
            .chars()
            .map(|letter| {
                if letter == '.' {
                    '/'
                } else if letter == '/' {
                    '.'
                } else {
                    letter
                }
            })
            .collect(),
    };
    if slashed.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::invalid(format!("{name:?} is not a sysctl name")));
    }
    Ok(format!("/proc/sys/{slashed}"))
}

/// Measures the steps of a request.
pub struct Stages {
    last: Instant,
    /// The steps so far.
    pub stages: Vec<Stage>,
}

impl Stages {
    /// The clock runs from here.
    pub fn start() -> Self {
        Self { last: Instant::now(), stages: Vec::new() }
    }

    /// A step has ended.
    pub fn done(&mut self, name: &str) {
        let now = Instant::now();
        let elapsed_us = now.duration_since(self.last).as_micros() as u64;
        self.stages.push(Stage { name: name.to_owned(), elapsed_us });
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_are_dotted_or_slashed() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").expect("path"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/mtu").expect("path"), "/proc/sys/net/ipv4/conf/eth0.1/mtu");
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.mtu").expect("path"), "/proc/sys/net/ipv4/conf/eth0.1/mtu");
    }

    #[test]
    fn sysctl_names_do_not_leave_their_directory() {
        for name in ["", "net..x", "../../etc/passwd", "net/../x", "/net"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }

    #[test]
    fn an_unknown_sysctl_is_named() {
        let error = set_sysctl("net.no_such_thing", "1").expect_err("unknown");
        assert_eq!(error.to_string(), "sysctl \"net.no_such_thing\" does not exist in the guest's kernel");
    }
}
