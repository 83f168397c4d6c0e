//! The files of `/etc` and the `/dev/shm` that a pod's containers share, where containerd makes neither.
//!
//! Through the sandbox API containerd leaves `hostname`, `hosts`, `resolv.conf` and the shared memory to the runtime, and its
//! specs do not mention them. [`EtcFiles::write`] makes the files beside the pod's run state, which goes with the pod;
//! [`EtcFiles::add_to`] puts them into a container's spec as containerd would have done, and storage shares them from there
//! like every other volume.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use crate::idmap::IdMappings;

/// Name of their directory in the run state.
const DIRECTORY: &str = "etc";

const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLV_CONF: &str = "resolv.conf";

/// Where the shared memory is, in a container and as the source that storage takes for the pod's.
const SHM: &str = "/dev/shm";

/// What is written into the files of `/etc` that a pod's containers share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Etc {
    /// Line of `hostname`.
    pub hostname: String,
    /// Makes `resolv.conf`; None for the host's.
    pub dns: Option<Dns>,
}

/// Contents of a `resolv.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of the servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options, such as `ndots:5`.
    pub options: Vec<String>,
}

/// The files of one pod.
#[derive(Debug, Clone)]
pub struct EtcFiles {
    directory: PathBuf,
}

impl EtcFiles {
    /// Writes the files below `run_state`; `hosts`, and `resolv.conf` if `etc` has no DNS, are copies of the host's. Blocks.
    pub fn write(run_state: &Path, etc: &Etc) -> anyhow::Result<Self> {
        let directory = run_state.join(DIRECTORY);
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let resolv_conf = match &etc.dns {
            Some(dns) => resolv_conf(dns),
            None => of_host(RESOLV_CONF)?,
        };
        let files = [(HOSTNAME, format!("{}\n", etc.hostname)), (HOSTS, of_host(HOSTS)?), (RESOLV_CONF, resolv_conf)];
        for (name, text) in files {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            // Whatever the shim's umask is: programs of any user read these.
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            fs::set_permissions(&path, mode).with_context(|| format!("change the mode of {}", path.display()))?;
        }
        Ok(Self { directory })
    }

    /// Mounts them in a container's OCI `spec`, each unless the pod's author mounts something in its place.
    ///
    /// Writable unless the root is read-only, as containerd does. A tmpfs at `/dev/shm` is what its default spec has, and
    /// gives way to the pod's. The files belong to the root of the pod's user namespace, if it has one.
    pub fn add_to(&self, spec: &mut Value, user_namespace: Option<&IdMappings>) {
        let read_only = spec.pointer("/root/readonly").and_then(Value::as_bool).unwrap_or_default();
        let access = if read_only { "ro" } else { "rw" };
        let Some(object) = spec.as_object_mut() else { return };
        let mounts = object.entry("mounts").or_insert_with(|| json!([]));
        if mounts.is_null() {
            *mounts = json!([]);
        }
        // Anything but a list is refused where mounts are planned.
        let Some(mounts) = mounts.as_array_mut() else { return };
        mounts.retain(|mount| !(is_at(mount, SHM) && mount.get("type").and_then(Value::as_str) == Some("tmpfs")));
        let files = [HOSTNAME, HOSTS, RESOLV_CONF].map(|name| {
            let source = self.directory.join(name).display().to_string();
            (format!("/etc/{name}"), source, vec!["rbind", "rprivate", access])
        });
        let shm = (SHM.to_owned(), SHM.to_owned(), vec!["rbind", "nosuid", "nodev", "noexec"]);
        for (destination, source, options) in files.into_iter().chain([shm]) {
            if mounts.iter().any(|mount| is_at(mount, &destination)) {
                continue;
            }
            let mut mount = json!({"destination": destination, "type": "bind", "source": source, "options": options});
            if let Some(mappings) = user_namespace.filter(|_| destination != SHM) {
                mount["uidMappings"] = json!(mappings.uids);
                mount["gidMappings"] = json!(mappings.gids);
            }
            // What lies below it must be mounted after it.
            let below = mounts.iter().position(|mount| path_of(mount).starts_with(&destination));
            mounts.insert(below.unwrap_or(mounts.len()), mount);
        }
    }
}

fn path_of(mount: &Value) -> &Path {
    Path::new(mount.get("destination").and_then(Value::as_str).unwrap_or_default())
}

/// Compares paths by their parts, so that a slash at the end does not count.
fn is_at(mount: &Value, path: &str) -> bool {
    path_of(mount) == Path::new(path)
}

/// A file of the host's `/etc`; one that does not exist is empty.
fn of_host(name: &str) -> anyhow::Result<String> {
    let path = Path::new("/etc").join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// resolv.conf(5), in containerd's order.
fn resolv_conf(dns: &Dns) -> String {
    let list =
        |keyword: &str, words: &[String]| (!words.is_empty()).then(|| format!("{keyword} {}\n", words.join(" ")));
    let servers = dns.servers.iter().map(|server| format!("nameserver {server}\n"));
    list("search", &dns.searches).into_iter().chain(servers).chain(list("options", &dns.options)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> EtcFiles {
        EtcFiles { directory: "/run/pod/etc".into() }
    }

    fn destinations(spec: &Value) -> Vec<&str> {
        let mounts = spec["mounts"].as_array().expect("a list").iter();
        mounts.map(|mount| mount["destination"].as_str().expect("text")).collect()
    }

    #[test]
    fn a_bare_spec_gets_everything() {
        let mut spec = json!({"root": {"readonly": true}, "mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]}]});
        files().add_to(&mut spec, None);
        let expected = ["/proc", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/shm"];
        assert_eq!(destinations(&spec), expected);
        let hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": "/run/pod/etc/hosts",
            "options": ["rbind", "rprivate", "ro"]});
        assert_eq!(spec["mounts"][2], hosts);
        assert_eq!((&spec["mounts"][4]["type"], &spec["mounts"][4]["source"]), (&json!("bind"), &json!("/dev/shm")));
    }

    #[test]
    fn what_the_pod_mounts_itself_stays() {
        let volume = json!({"destination": "/etc/hosts/", "type": "bind", "source": "/var/lib/kubelet/hosts"});
        let own_shm = json!({"destination": "/dev/shm", "type": "bind", "source": "/var/lib/kubelet/memory"});
        let mut spec = json!({"mounts": [volume, own_shm]});
        files().add_to(&mut spec, None);
        assert_eq!(destinations(&spec), ["/etc/hosts/", "/dev/shm", "/etc/hostname", "/etc/resolv.conf"]);
        assert_eq!((&spec["mounts"][0], &spec["mounts"][1]), (&volume, &own_shm));
    }

    #[test]
    fn a_volume_below_comes_after() {
        let mut spec = json!({"mounts": [{"destination": "/dev/shm/data", "type": "bind", "source": "/data"}]});
        files().add_to(&mut spec, None);
        let order = destinations(&spec);
        let at = |path| order.iter().position(|found| *found == path).expect(path);
        assert!(at("/dev/shm") < at("/dev/shm/data"), "{order:?}");
    }

    #[test]
    fn the_files_belong_to_the_root_of_a_user_namespace() {
        let mappings = IdMappings::of_mount_options(Some("0:100000:65536"), Some("0:100000:65536")).expect("reads");
        let mut spec = json!({});
        files().add_to(&mut spec, mappings.as_ref());
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        for mount in spec["mounts"].as_array().expect("a list") {
            let expected = (mount["destination"] != SHM).then_some(&map);
            assert_eq!((mount.get("uidMappings"), mount.get("gidMappings")), (expected, expected), "{mount}");
        }
    }

    #[test]
    fn a_spec_without_mounts_is_no_obstacle() {
        for mut spec in [json!({}), json!({"mounts": null})] {
            files().add_to(&mut spec, None);
            assert_eq!(destinations(&spec).len(), 4);
        }
        let mut broken = json!({"mounts": "many"});
        files().add_to(&mut broken, None);
        assert_eq!(broken, json!({"mounts": "many"}));
    }

    #[test]
    fn files_are_written_for_every_reader() {
        let run_state = tempfile::tempdir().expect("makes a directory");
        let dns = Dns {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.local".into(), "b.local".into()],
            options: vec!["ndots:2".into()],
        };
        let etc = Etc { hostname: "compartment".into(), dns: Some(dns) };
        let made = EtcFiles::write(run_state.path(), &etc).expect("writes");
        let read = |name: &str| fs::read_to_string(made.directory.join(name)).expect(name);
        assert_eq!(read(HOSTNAME), "compartment\n");
        assert_eq!(
            read(RESOLV_CONF),
            "search a.local b.local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:2\n"
        );
        assert_eq!(read(HOSTS), of_host(HOSTS).expect("reads"));
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(made.directory.join(HOSTS)).expect("is there").permissions(),
        );
        assert_eq!(mode & 0o777, 0o644);
    }
}
