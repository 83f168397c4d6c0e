//! The administrator's configuration: what may be set, where it comes from, and where the files it names are found.
//!
//! One TOML document: the file that containerd's runtime options name (`ConfigPath`), else the table that containerd 1.7
//! and newer pass along (`config_body`), else `/etc/bulkhead/config.toml` if it exists, else nothing. Every key is optional;
//! a key that is not known is refused. What a single pod may change is in [`crate::annotations`].
//!
//! This module reads files and starts nothing: whether a virtiofsd is of the right kind is found out by who runs it.

use std::fmt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use serde::{Deserialize, Serialize};

use crate::annotations;
use crate::error::{Error, Kind, Result, WithKind};

/// Where the configuration is when nothing names another place.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";
/// Environment variable that names another file in its place, which must exist: shims inherit containerd's environment.
pub const DEFAULT_VARIABLE: &str = "BULKHEAD_CONFIG";

/// Where the run state of sandboxes lies when nothing names another place.
pub const DEFAULT_STATE_DIR: &str = "/run/bulkhead";

/// Memory of a VM, in MiB, that nothing limits: enough for a small service, and cheap since only touched pages cost.
pub const DEFAULT_MEMORY_MIB: u32 = 256;

/// The smallest VM, in MiB: below it a guest kernel and agent leave containers too little to start.
pub const MIN_MEMORY_MIB: u32 = 128;

/// The largest VM, in MiB (4 TiB).
pub const MAX_MEMORY_MIB: u32 = 4 << 20;

/// The most vCPUs that both machine types take.
pub const MAX_VCPUS: u32 = 255;

/// A configuration larger than this is a mistake, such as a device node or a log.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Everything that an administrator can set. See the module's documentation for its sources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the sandboxes' run state, absolute; one directory per sandbox below it.
    pub state_dir: PathBuf,
    /// Guest kernel, an uncompressed `vmlinux`. `None`: looked for beside the binary.
    pub kernel: Option<PathBuf>,
    /// Guest initramfs. `None`: looked for beside the binary.
    pub initramfs: Option<PathBuf>,
    /// virtiofsd, the Rust one. `None`: looked for.
    pub virtiofsd: Option<PathBuf>,
    /// bulkhead-vsock, used where the kernel has no vhost-vsock. `None`: looked for.
    pub vsock_helper: Option<PathBuf>,
    /// vCPUs of a VM whose pod has no CPU limit.
    pub vcpus: u32,
    /// Memory in MiB of a VM whose pod has no memory limit.
    pub memory_mib: u32,
    /// Machine type of the VMs.
    pub machine: Machine,
    /// Annotations that pods may use, by their full names. Empty: none.
    pub allowed_annotations: Vec<String>,
    /// How QEMU is run.
    pub qemu: Qemu,
    /// What is written to containerd's log; `-debug` of containerd raises it to `debug`.
    pub log_level: LogLevel,
}

/// Table `[qemu]` of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Qemu {
    /// `qemu-system-x86_64`. `None`: looked for.
    pub path: Option<PathBuf>,
    /// Accelerator.
    pub accel: Accel,
}

/// Machine type that a VM is asked to have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// `microvm`, unless the pod's devices do not fit.
    #[default]
    Auto,
    /// virtio-mmio, no firmware, no PCI.
    Microvm,
    /// PCI Express.
    Q35,
}

/// Accelerator that QEMU is asked to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where the CPU offers it and `/dev/kvm` opens, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Translation in software.
    Tcg,
}

/// Least severity that is logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// The request failed or the pod is lost.
    Error,
    /// Degraded, still working.
    Warn,
    /// One line per change of a life cycle.
    #[default]
    Info,
    /// What is said to QEMU and the agent.
    Debug,
    /// Everything.
    Trace,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: DEFAULT_STATE_DIR.into(),
            kernel: None,
            initramfs: None,
            virtiofsd: None,
            vsock_helper: None,
            vcpus: 1,
            memory_mib: DEFAULT_MEMORY_MIB,
            machine: Machine::default(),
            allowed_annotations: Vec::new(),
            qemu: Qemu::default(),
            log_level: LogLevel::default(),
        }
    }
}

impl Config {
    /// Reads the configuration that `options` point at, or the default one. Blocks on the file system.
    ///
    /// A file that is named must exist; the default one need not.
    pub fn load(options: &RuntimeOptions) -> Result<Self> {
        if !options.config_path.is_empty() {
            return Self::named(Path::new(&options.config_path), "the runtime options");
        }
        if !options.config_body.is_empty() {
            return Self::parse(&own_keys(&options.config_body)?, BODY_ORIGIN);
        }
        if let Some(path) = std::env::var_os(DEFAULT_VARIABLE).filter(|path| !path.is_empty()) {
            return Self::named(Path::new(&path), DEFAULT_VARIABLE);
        }
        match read(Path::new(DEFAULT_PATH))? {
            Some(text) => Self::parse(&text, DEFAULT_PATH),
            None => Ok(Self::default()),
        }
    }

    fn named(path: &Path, by: &str) -> Result<Self> {
        let text = read(path)?.ok_or_else(|| {
            Error::invalid(format!("configuration {}, named by {by}, does not exist", path.display()))
        })?;
        Self::parse(&text, path.display())
    }

    /// The configuration that the runtime options of a Create name, under CRI-O the first to come: a protobuf `Any` by its
    /// fields, empty for none. The place of the run state stays, which `delete` must find. Blocks on the file system.
    pub fn adopt(&self, type_url: &str, value: &[u8]) -> Result<Self> {
        if type_url.is_empty() {
            return Ok(self.clone());
        }
        let options = RuntimeOptions::decode(type_url, value)?;
        if options.config_path.is_empty() && options.config_body.is_empty() {
            return Ok(self.clone());
        }
        let adopted = Self::load(&options)?;
        Ok(Self { state_dir: self.state_dir.clone(), ..adopted })
    }

    /// Parses a TOML document; `origin` says in errors where it came from.
    pub fn parse(text: &str, origin: impl fmt::Display) -> Result<Self> {
        let config: Self = toml::from_str(text)
            .map_err(|error| Error::invalid(format!("configuration {origin}{}", describe(&error, text))))?;
        config.check().map_err(|reason| Error::invalid(format!("configuration {origin}: {reason}")))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(format!("vcpus is {}, accepted are 1 to {MAX_VCPUS}", self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(format!(
                "memory_mib is {}, accepted are {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                self.memory_mib
            ));
        }
        let paths = [
            ("state_dir", Some(&self.state_dir)),
            ("kernel", self.kernel.as_ref()),
            ("initramfs", self.initramfs.as_ref()),
            ("virtiofsd", self.virtiofsd.as_ref()),
            ("vsock_helper", self.vsock_helper.as_ref()),
            ("qemu.path", self.qemu.path.as_ref()),
        ];
        for (key, path) in paths {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return Err(format!("{key} is {:?}, accepted is an absolute path", path.display().to_string()));
            }
        }
        for name in &self.allowed_annotations {
            if !annotations::is_known(name) {
                return Err(format!("allowed_annotations has {name:?}, accepted are {}", annotations::known()));
            }
        }
        Ok(())
    }

    /// Finds the file that plays the part of `asset`: the configured one, else the first of the usual places.
    ///
    /// `exe` is the running binary, beside which an installation has its files. Blocks on the file system.
    pub fn find(&self, asset: Asset, exe: &Path) -> Result<PathBuf> {
        let search_path = std::env::var_os("PATH").unwrap_or_default();
        self.find_in(asset, exe, std::env::split_paths(&search_path))
    }

    fn find_in(&self, asset: Asset, exe: &Path, search_path: impl Iterator<Item = PathBuf>) -> Result<PathBuf> {
        let key = asset.key();
        if let Some(path) = asset.configured(self) {
            return match asset.usable(path) {
                Ok(()) => Ok(path.clone()),
                Err(reason) => {
                    Err(Error::failed_precondition(format!("{key} = {:?}: {reason}", path.display().to_string())))
                }
            };
        }
        let candidates = asset.candidates(exe, search_path);
        if let Some(path) = candidates.iter().find(|path| asset.usable(path).is_ok()) {
            return Ok(path.clone());
        }
        let places: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        Err(Error::failed_precondition(format!(
            "no {} found; looked for {}; set {key} in the configuration",
            asset.noun(),
            places.join(", ")
        )))
    }
}

const BODY_ORIGIN: &str = "in containerd's runtime options";

/// Keys of containerd's own in the options table, which it passes on along with ours.
const CONTAINERD_KEYS: [&str; 3] = ["TypeUrl", "ConfigPath", "ConfigBody"];

/// The options table without what containerd itself reads from it.
fn own_keys(body: &str) -> Result<String> {
    let mut table: toml::Table = toml::from_str(body)
        .map_err(|error| Error::invalid(format!("configuration {BODY_ORIGIN}{}", describe(&error, body))))?;
    for key in CONTAINERD_KEYS {
        table.remove(key);
    }
    toml::to_string(&table).or_kind(Kind::InvalidArgument, format!("configuration {BODY_ORIGIN}"))
}

fn read(path: &Path) -> Result<Option<String>> {
    let context = || format!("read configuration {}", path.display());
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).or_kind(Kind::InvalidArgument, context()),
    };
    if !metadata.is_file() || metadata.len() > MAX_CONFIG_BYTES {
        return Err(
            Error::invalid(format!("not a regular file of at most {MAX_CONFIG_BYTES} bytes")).context(context())
        );
    }
    std::fs::read_to_string(path).map(Some).or_kind(Kind::InvalidArgument, context())
}

/// toml's own rendering has several lines and a drawing; an error that reaches a pod's events has one.
fn describe(error: &toml::de::Error, text: &str) -> String {
    let reason = error.message().replace('\n', ", ");
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return format!(": {reason}");
    };
    let line = before.matches('\n').count();
    let key = text.lines().nth(line).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
    match key {
        Some(key) => format!(", line {}, {key}: {reason}", line + 1),
        None => format!(", line {}: {reason}", line + 1),
    }
}

/// A file that Bulkhead needs and an installation brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asset {
    /// Guest kernel.
    Kernel,
    /// Guest initramfs.
    Initramfs,
    /// QEMU.
    Qemu,
    /// virtiofsd.
    Virtiofsd,
    /// bulkhead-vsock.
    VsockHelper,
}

impl Asset {
    /// Key of the configuration that names it.
    fn key(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Qemu => "qemu.path",
            Self::Virtiofsd => "virtiofsd",
            Self::VsockHelper => "vsock_helper",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Kernel => "guest kernel",
            Self::Initramfs => "guest initramfs",
            Self::Qemu => "QEMU",
            Self::Virtiofsd => "virtiofsd",
            Self::VsockHelper => "bulkhead-vsock",
        }
    }

    fn configured(self, config: &Config) -> Option<&PathBuf> {
        match self {
            Self::Kernel => config.kernel.as_ref(),
            Self::Initramfs => config.initramfs.as_ref(),
            Self::Qemu => config.qemu.path.as_ref(),
            Self::Virtiofsd => config.virtiofsd.as_ref(),
            Self::VsockHelper => config.vsock_helper.as_ref(),
        }
    }

    /// File names of a program, and the directories besides `PATH` where distributions put it.
    ///
    /// `/usr/lib/qemu/virtiofsd` is missing on purpose: it is the C one of QEMU before 8.0, with other options.
    fn program(self) -> Option<(&'static str, &'static [&'static str])> {
        match self {
            Self::Kernel | Self::Initramfs => None,
            Self::Qemu => Some(("qemu-system-x86_64", &["/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"])),
            Self::Virtiofsd => Some(("virtiofsd", &["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"])),
            Self::VsockHelper => Some(("bulkhead-vsock", &["/usr/bin/bulkhead-vsock"])),
        }
    }

    fn candidates(self, exe: &Path, search_path: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
        let prefix = exe.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let share = prefix.join("share/bulkhead");
        let Some((name, elsewhere)) = self.program() else {
            let name = if self == Self::Kernel { "vmlinux" } else { "initramfs" };
            let system = Path::new("/usr/share/bulkhead").join(name);
            return unique([share.join(name), system]);
        };
        // A relative entry of PATH would mean the bundle, which is the current directory.
        let on_path = search_path.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
        unique(
            std::iter::once(prefix.join("libexec/bulkhead").join(name))
                .chain(on_path)
                .chain(elsewhere.iter().map(PathBuf::from)),
        )
    }

    fn usable(self, path: &Path) -> Result<(), String> {
        let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
        if !metadata.is_file() {
            return Err("not a regular file".into());
        }
        if metadata.len() == 0 {
            return Err("the file is empty".into());
        }
        if self.program().is_some() {
            access(path, AccessFlags::X_OK).map_err(|_| "not executable".to_owned())?;
        }
        Ok(())
    }
}

fn unique(paths: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut seen = Vec::new();
    for path in paths {
        if !seen.contains(&path) {
            seen.push(path);
        }
    }
    seen
}

/// What containerd's configuration of the runtime says, as far as Bulkhead reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// Path of the configuration; empty for none.
    pub config_path: String,
    /// The configuration itself, TOML; empty for none. Ignored if `config_path` is set.
    pub config_body: String,
    /// Cgroup that the shim shall join; empty for none.
    pub shim_cgroup: String,
}

/// `runtimeoptions.v1.Options`: what containerd sends to runtimes whose options it has no type for.
///
/// <https://github.com/containerd/containerd/blob/main/api/types/runtimeoptions/v1/api.proto>
#[derive(Clone, PartialEq, prost::Message)]
struct GenericOptions {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

/// The one field of `containerd.runc.v1.Options` that is not about runc.
#[derive(Clone, PartialEq, prost::Message)]
struct RuncOptions {
    #[prost(string, tag = "3")]
    shim_cgroup: String,
}

impl RuntimeOptions {
    /// Decodes the fields of a protobuf `Any`. An empty type means no options; another type is refused.
    pub fn decode(type_url: &str, value: &[u8]) -> Result<Self> {
        let name = type_url.rsplit('/').next().unwrap_or_default();
        let context = || format!("runtime options of type {name}");
        match name {
            "" => Ok(Self::default()),
            // The second is the name in the containerd releases before 1.5, which newer ones still accept.
            "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => {
                let options: GenericOptions =
                    prost::Message::decode(value).or_kind(Kind::InvalidArgument, context())?;
                let config_body = String::from_utf8(options.config_body).or_kind(Kind::InvalidArgument, context())?;
                Ok(Self { config_path: options.config_path, config_body, shim_cgroup: String::new() })
            }
            "containerd.runc.v1.Options" => {
                let options: RuncOptions = prost::Message::decode(value).or_kind(Kind::InvalidArgument, context())?;
                Ok(Self { shim_cgroup: options.shim_cgroup, ..Self::default() })
            }
            other => Err(Error::invalid(format!(
                "runtime options have type {other}, accepted are runtimeoptions.v1.Options and containerd.runc.v1.Options"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn refused(text: &str) -> String {
        let error = Config::parse(text, "/etc/x.toml").expect_err("is refused");
        assert_eq!(error.kind(), Kind::InvalidArgument);
        error.to_string()
    }

    #[test]
    fn an_empty_document_means_the_defaults() {
        assert_eq!(Config::parse("", "x").expect("parses"), Config::default());
    }

    #[test]
    fn every_key_is_read() {
        let text = r#"
            state_dir = "/run/b"
            kernel = "/k"
            initramfs = "/i"
            virtiofsd = "/v"
            vsock_helper = "/s"
            vcpus = 3
            memory_mib = 512
            machine = "q35"
            allowed_annotations = ["bulkhead.io/vcpus"]
            log_level = "debug"
            [qemu]
            path = "/q"
            accel = "tcg"
        "#;
        let expected = Config {
            state_dir: "/run/b".into(),
            kernel: Some("/k".into()),
            initramfs: Some("/i".into()),
            virtiofsd: Some("/v".into()),
            vsock_helper: Some("/s".into()),
            vcpus: 3,
            memory_mib: 512,
            machine: Machine::Q35,
            allowed_annotations: vec!["bulkhead.io/vcpus".into()],
            qemu: Qemu { path: Some("/q".into()), accel: Accel::Tcg },
            log_level: LogLevel::Debug,
        };
        assert_eq!(Config::parse(text, "x").expect("parses"), expected);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_known_ones() {
        let said = refused("vcpus = 1\nmemory = 5\n");
        assert!(
            said.starts_with("configuration /etc/x.toml, line 2, memory: unknown field `memory`, expected"),
            "{said}"
        );
        assert!(said.contains("`memory_mib`"), "{said}");
        assert!(!said.contains('\n'), "{said}");
        let said = refused("[qemu]\nargs = \"-s\"\n");
        assert!(said.contains("line 2, args: unknown field `args`, expected `path` or `accel`"), "{said}");
    }

    #[test]
    fn a_wrong_value_is_refused_with_key_value_and_what_is_accepted() {
        for (text, words) in [
            ("machine = \"pc\"", ["machine", "`pc`", "`q35`"]),
            ("vcpus = \"two\"", ["vcpus", "\"two\"", "u32"]),
            ("vcpus = 0", ["vcpus", "0", "1 to 255"]),
            ("vcpus = -1", ["vcpus", "-1", "u32"]),
            ("memory_mib = 64", ["memory_mib", "64", "128"]),
            ("kernel = \"vmlinux\"", ["kernel", "vmlinux", "absolute path"]),
            ("allowed_annotations = [\"x\"]", ["allowed_annotations", "\"x\"", "bulkhead.io/machine"]),
            ("[qemu]\naccel = \"hvf\"", ["accel", "`hvf`", "`tcg`"]),
        ] {
            let said = refused(text);
            for word in words {
                assert!(said.contains(word), "{word} is not in: {said}");
            }
        }
    }

    #[test]
    fn a_document_that_is_not_toml_is_refused_in_one_line() {
        let said = refused("vcpus = \n");
        assert!(said.starts_with("configuration /etc/x.toml, line 1"), "{said}");
        assert!(!said.contains('\n'), "{said}");
    }

    #[test]
    fn a_named_file_must_exist() {
        let options = RuntimeOptions { config_path: "/nonexistent/b.toml".into(), ..RuntimeOptions::default() };
        let error = Config::load(&options).expect_err("is refused");
        assert_eq!(
            error.to_string(),
            "configuration /nonexistent/b.toml, named by the runtime options, does not exist"
        );
    }

    #[test]
    fn a_named_file_goes_before_the_table_in_the_options() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "vcpus = 7").expect("writes");
        let mut options = RuntimeOptions {
            config_path: path.display().to_string(),
            config_body: "vcpus = 2\nTypeUrl = \"x\"".into(),
            ..RuntimeOptions::default()
        };
        assert_eq!(Config::load(&options).expect("loads").vcpus, 7);
        options.config_path.clear();
        assert_eq!(Config::load(&options).expect("loads").vcpus, 2, "containerd's own keys are skipped");
        options.config_body = "cpus = 2".into();
        let said = Config::load(&options).expect_err("is refused").to_string();
        assert!(
            said.starts_with("configuration in containerd's runtime options, line 1, cpus: unknown field"),
            "{said}"
        );
    }

    #[test]
    fn a_directory_is_not_a_configuration() {
        let options = RuntimeOptions { config_path: "/".into(), ..RuntimeOptions::default() };
        let said = Config::load(&options).expect_err("is refused").to_string();
        assert!(said.starts_with("read configuration /: not a regular file"), "{said}");
    }

    #[test]
    fn options_are_decoded_by_type() {
        let generic =
            GenericOptions { type_url: "t".into(), config_path: "/c".into(), config_body: b"vcpus = 1".to_vec() };
        let bytes = prost::Message::encode_to_vec(&generic);
        for type_url in ["runtimeoptions.v1.Options", "types.containerd.io/runtimeoptions.v1.Options"] {
            let options = RuntimeOptions::decode(type_url, &bytes).expect("decodes");
            assert_eq!((&*options.config_path, &*options.config_body), ("/c", "vcpus = 1"));
        }
        // Fields 3 and 4, `shim_cgroup` and `io_uid`, as containerd sends them for a container with a user namespace.
        let runc = b"\x1a\x06/shims\x20\xa0\x8d\x06";
        let options = RuntimeOptions::decode("containerd.runc.v1.Options", runc).expect("decodes");
        assert_eq!(options.shim_cgroup, "/shims");
        assert_eq!(RuntimeOptions::decode("", &[]).expect("decodes"), RuntimeOptions::default());
        let said = RuntimeOptions::decode("a.b.C", &[]).expect_err("is refused").to_string();
        assert!(said.contains("a.b.C"), "{said}");
    }

    #[test]
    fn assets_are_found_beside_the_binary_first() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let prefix = dir.path();
        let exe = prefix.join("bin/shim");
        for sub in ["share/bulkhead", "libexec/bulkhead", "path"] {
            std::fs::create_dir_all(prefix.join(sub)).expect("makes a directory");
        }
        let program = |path: &str| {
            let path = prefix.join(path);
            std::fs::write(&path, "x").expect("writes");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("sets the mode");
            path
        };
        let config = Config::default();
        let find = |asset| config.find_in(asset, &exe, [PathBuf::from("relative"), prefix.join("path")].into_iter());

        std::fs::write(prefix.join("share/bulkhead/vmlinux"), "x").expect("writes");
        assert_eq!(find(Asset::Kernel).expect("found"), prefix.join("share/bulkhead/vmlinux"));
        let on_path = program("path/bulkhead-vsock");
        assert_eq!(find(Asset::VsockHelper).expect("found"), on_path);
        let beside = program("libexec/bulkhead/bulkhead-vsock");
        assert_eq!(find(Asset::VsockHelper).expect("found"), beside);
    }

    #[test]
    fn a_missing_asset_is_told_with_every_place_that_was_tried() {
        let said = Config::default()
            .find_in(Asset::Initramfs, Path::new("/opt/b/bin/shim"), std::iter::empty())
            .expect_err("is missing")
            .to_string();
        assert_eq!(
            said,
            "no guest initramfs found; looked for /opt/b/share/bulkhead/initramfs, /usr/share/bulkhead/initramfs; set \
             initramfs in the configuration"
        );
    }

    #[test]
    fn a_configured_asset_is_never_replaced_by_another() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let path = dir.path().join("qemu");
        let config = Config { qemu: Qemu { path: Some(path.clone()), accel: Accel::Auto }, ..Config::default() };
        let said = config.find(Asset::Qemu, Path::new("/usr/bin/shim")).expect_err("is missing").to_string();
        assert!(said.starts_with("qemu.path = ") && said.contains("No such file"), "{said}");
        std::fs::write(&path, "x").expect("writes");
        let said = config.find(Asset::Qemu, Path::new("/usr/bin/shim")).expect_err("cannot run").to_string();
        assert!(said.ends_with("not executable"), "{said}");
    }
}
