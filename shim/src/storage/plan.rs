//! The rootfs plan: from the mounts that containerd hands over to one way into the guest. Pure.
//!
//! What arrives depends on the snapshotter: an overlay or a bind (overlayfs, native), a file system on a block device
//! (devmapper, zfs, btrfs) or in an image file (blockfile), nothing at all (CRI-O, which mounts the rootfs itself and puts
//! its path into the spec). The effects are in [`super::disk`], for devices whose file system the guest can mount itself,
//! and in [`super::rootfs`], for all that is mounted on the host and shared by virtiofs.
//!
//! See <https://github.com/containerd/containerd/blob/main/docs/snapshotters/README.md> and mount(8).

use std::path::{Component, Path, PathBuf};

use rustix::mount::MountFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::idmap::IdMappings;

/// One mount of `CreateTaskRequest.rootfs`, in containerd's words.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mount {
    /// File system type, or `bind`.
    pub fstype: String,
    /// Device, directory, or a word without meaning.
    pub source: String,
    /// Path below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// As mount(8) spells them.
    pub options: Vec<String>,
}

/// How a rootfs comes about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootfsPlan {
    /// Layers put together by the host's overlayfs.
    Overlay(Overlay),
    /// A directory that is there already.
    Bind {
        /// The directory on the host.
        source: PathBuf,
        /// With the mounts below it.
        recursive: bool,
        /// Not even the guest may write.
        read_only: bool,
        /// The user namespace through which owners are seen; `None` shows them as they are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ids: Option<IdMappings>,
    },
    /// A file system on a block device of the host, or in an image file.
    Device(Device),
}

/// An overlay of directories.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Read-only layers, the topmost first, spelled as overlayfs reads them: a colon in a path stays escaped.
    pub lower: Vec<String>,
    /// Where writes go, with its work directory; `None` makes the rootfs read-only.
    pub upper: Option<Upper>,
    /// Options for overlayfs (`index=off`, `userxattr`).
    pub options: Vec<String>,
    /// The mount is read-only whatever `upper` says.
    pub read_only: bool,
    /// The user namespace through which the owners of the lower layers are seen; `None` shows them as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ids: Option<IdMappings>,
}

/// The writable part of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upper {
    /// `upperdir`, spelled as overlayfs reads it.
    pub upperdir: String,
    /// `workdir`, likewise.
    pub workdir: String,
}

/// A block device, or an image file, with a file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `ext4`, `xfs`, `btrfs`, `erofs`, `zfs`.
    pub fstype: String,
    /// Path of the device or file; for zfs the name of the dataset.
    pub source: String,
    /// Options for the file system (`nouuid`).
    pub options: Vec<String>,
    /// Mounted read-only.
    pub read_only: bool,
}

/// File systems on devices that are mounted as they come.
const DEVICE_TYPES: [&str; 5] = ["btrfs", "erofs", "ext4", "xfs", "zfs"];

/// The longest option string that mount(2) takes: one page, with the byte that ends it.
const MAX_DATA: usize = 4095;

/// Decides how `mounts` become a rootfs.
///
/// `premounted` is the spec's `root.path` and counts only when there are no mounts. Errors name what arrived and what would
/// be accepted.
pub fn plan_rootfs(mounts: &[Mount], premounted: Option<&Path>) -> Result<RootfsPlan> {
    let mount = match (mounts, premounted) {
        ([], Some(path)) if path.is_absolute() => {
            return Ok(RootfsPlan::Bind { source: path.to_owned(), recursive: true, read_only: false, ids: None });
        }
        ([], Some(path)) => {
            return Err(Error::invalid(format!(
                "rootfs: root.path \"{}\" is not absolute and no mounts are given",
                path.display()
            )));
        }
        ([], None) => return Err(Error::invalid("rootfs: neither mounts nor an absolute root.path are given")),
        ([mount], _) => mount,
        (several, _) => {
            let types: Vec<&str> = several.iter().map(|mount| mount.fstype.as_str()).collect();
            return Err(Error::invalid(format!(
                "rootfs: {} mounts ({}) were handed over and one is accepted: use a snapshotter that mounts its layers itself, such as overlayfs",
                several.len(),
                types.join(", ")
            )));
        }
    };
    if !mount.target.is_empty() && mount.target != "/" {
        return Err(Error::invalid(format!("rootfs: mount target {:?} is not the rootfs itself", mount.target)));
    }
    if let Some(option) = mount.options.iter().find(|option| option.starts_with("X-containerd.")) {
        // dm-verity is such an option; to leave it out would be to give up what was asked for.
        return Err(Error::invalid(format!("rootfs: mount option {option:?} is not supported")));
    }
    let options = Options::parse(&mount.options).map_err(|error| error.context("rootfs"))?;
    match mount.fstype.as_str() {
        "overlay" => plan_overlay(options).map(RootfsPlan::Overlay),
        "bind" | "rbind" => plan_bind(mount, &options),
        fstype if options.bind.is_some() && (fstype.is_empty() || fstype == "none") => plan_bind(mount, &options),
        fstype if DEVICE_TYPES.contains(&fstype) => plan_device(mount, options).map(RootfsPlan::Device),
        other => Err(Error::invalid(format!(
            "rootfs: mount type {other:?} is not supported; accepted are overlay, bind, {}",
            DEVICE_TYPES.join(", ")
        ))),
    }
}

/// Options of a mount, sorted by who reads them.
struct Options {
    bind: Option<Recursive>,
    read_only: bool,
    ids: Option<IdMappings>,
    /// What remains for the file system.
    data: Vec<String>,
}

type Recursive = bool;

impl Options {
    fn parse(options: &[String]) -> Result<Self> {
        let mut parsed = Self { bind: None, read_only: false, ids: None, data: Vec::new() };
        let map = |key| options.iter().rev().find_map(|option| option.strip_prefix(key));
        parsed.ids = IdMappings::of_mount_options(map("uidmap="), map("gidmap="))?;
        for option in options {
            match option.as_str() {
                "ro" => parsed.read_only = true,
                "rw" => parsed.read_only = false,
                "bind" => parsed.bind = parsed.bind.or(Some(false)),
                "rbind" => parsed.bind = Some(true),
                // Of the mount, not of the file system: what the guest may do with its files its own kernel decides, and
                // the share's mounts are always nosuid, nodev and noexec on the host.
                "defaults" | "suid" | "nosuid" | "dev" | "nodev" | "exec" | "noexec" | "atime" | "noatime"
                | "diratime" | "nodiratime" | "relatime" | "norelatime" | "strictatime" | "private" | "rprivate"
                | "slave" | "rslave" | "shared" | "rshared" => {}
                mapping if mapping.starts_with("uidmap=") || mapping.starts_with("gidmap=") => {}
                _ => parsed.data.push(option.clone()),
            }
        }
        Ok(parsed)
    }
}

fn plan_bind(mount: &Mount, options: &Options) -> Result<RootfsPlan> {
    let source = PathBuf::from(&mount.source);
    if !source.is_absolute() {
        return Err(Error::invalid(format!("rootfs: bind source {:?} is not an absolute path", mount.source)));
    }
    if let Some(option) = options.data.first() {
        return Err(Error::invalid(format!("rootfs: option {option:?} has no meaning for a bind mount")));
    }
    let recursive = options.bind == Some(true) || mount.fstype == "rbind";
    Ok(RootfsPlan::Bind { source, recursive, read_only: options.read_only, ids: options.ids.clone() })
}

fn plan_overlay(options: Options) -> Result<Overlay> {
    let (mut lower, mut upperdir, mut workdir, mut rest) = (Vec::new(), None, None, Vec::new());
    for option in options.data {
        match option.split_once('=') {
            Some(("lowerdir", value)) => lower = split_layers(value),
            Some(("upperdir", value)) => upperdir = Some(value.to_owned()),
            Some(("workdir", value)) => workdir = Some(value.to_owned()),
            _ => rest.push(option),
        }
    }
    let paths = lower.iter().chain(&upperdir).chain(&workdir);
    if let Some(path) = paths.into_iter().find(|path| !path.starts_with('/')) {
        return Err(Error::invalid(format!("rootfs: overlay directory {path:?} is not an absolute path")));
    }
    let upper = match (upperdir, workdir) {
        (Some(upperdir), Some(workdir)) => Some(Upper { upperdir, workdir }),
        (None, None) => None,
        _ => return Err(Error::invalid("rootfs: an overlay needs upperdir and workdir, or neither")),
    };
    if lower.is_empty() {
        return Err(Error::invalid("rootfs: an overlay needs a lowerdir"));
    }
    let read_only = options.read_only || upper.is_none();
    Ok(Overlay { lower, upper, options: rest, read_only, ids: options.ids })
}

fn plan_device(mount: &Mount, options: Options) -> Result<Device> {
    if options.ids.is_some() {
        return Err(Error::invalid(format!(
            "rootfs: options uidmap and gidmap are not supported for {} on {:?}; accepted are a device whose files have \
             the user namespace's owners, overlay and bind",
            mount.fstype, mount.source
        )));
    }
    if let Some(option) = options.data.iter().find(|option| option.starts_with("device=")) {
        return Err(Error::invalid(format!(
            "rootfs: option {option:?} of {} on {:?} is not supported; accepted is one device, or a snapshotter that mounts its layers itself, such as overlayfs",
            mount.fstype, mount.source
        )));
    }
    if mount.fstype != "zfs" && !mount.source.starts_with('/') {
        return Err(Error::invalid(format!("rootfs: device {:?} is not an absolute path", mount.source)));
    }
    Ok(Device {
        fstype: mount.fstype.clone(),
        source: mount.source.clone(),
        read_only: options.read_only || mount.fstype == "erofs",
        // An image file needs no loop device to become a disk.
        options: options.data.into_iter().filter(|option| option != "loop").collect(),
    })
}

/// Splits a `lowerdir` at the colons that are not escaped (`\:`).
fn split_layers(value: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut escaped = false;
    for character in value.chars() {
        match character {
            ':' if !escaped => layers.push(String::new()),
            _ => layers.last_mut().expect("there is always a layer to append to").push(character),
        }
        escaped = character == '\\' && !escaped;
    }
    layers.retain(|layer| !layer.is_empty());
    layers
}

impl Overlay {
    /// Option string for mount(2), and the directory that relative layers in it begin at (`None`: all are absolute).
    ///
    /// The string must fit into a page. Images of many layers fit only when what their paths have in common is left out,
    /// which is how containerd mounts them too.
    pub fn data(&self) -> Result<(String, Option<PathBuf>)> {
        let absolute = self.render(&self.lower);
        if absolute.len() <= MAX_DATA {
            return Ok((absolute, None));
        }
        let tail = |layer: &str, prefix: &Path| {
            Path::new(layer).strip_prefix(prefix).ok().and_then(Path::to_str).map(str::to_owned)
        };
        let compact = common_directory(&self.lower).and_then(|prefix| {
            let layers: Option<Vec<String>> = self.lower.iter().map(|layer| tail(layer, &prefix)).collect();
            layers.map(|layers| (self.render(&layers), prefix))
        });
        match compact {
            Some((data, prefix)) if data.len() <= MAX_DATA => Ok((data, Some(prefix))),
            _ => Err(Error::invalid(format!(
                "rootfs: the paths of {} overlay layers take more than the {MAX_DATA} bytes that mount(2) accepts",
                self.lower.len()
            ))),
        }
    }

    /// Flags for mount(2).
    pub fn flags(&self) -> MountFlags {
        if self.read_only { MountFlags::RDONLY } else { MountFlags::empty() }
    }

    fn render(&self, lower: &[String]) -> String {
        let mut options = self.options.clone();
        options.push(format!("lowerdir={}", lower.join(":")));
        if let Some(Upper { upperdir, workdir }) = &self.upper {
            options.push(format!("upperdir={upperdir}"));
            options.push(format!("workdir={workdir}"));
        }
        options.join(",")
    }
}

/// The deepest directory that all `layers` lie strictly below; `None` if that is only the root, or if a path is escaped
/// (a directory to change to is spelled without escapes).
fn common_directory(layers: &[String]) -> Option<PathBuf> {
    if layers.iter().any(|layer| layer.contains('\\')) {
        return None;
    }
    let mut common: Vec<Component<'_>> = Path::new(layers.first()?).parent()?.components().collect();
    for layer in layers {
        let parent = Path::new(layer).parent()?.components();
        let same = common.iter().zip(parent).take_while(|(left, right)| **left == *right).count();
        common.truncate(same);
    }
    (common.len() > 1).then(|| common.iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fstype: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            fstype: fstype.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    fn refusal(mounts: &[Mount]) -> String {
        plan_rootfs(mounts, None).expect_err("is refused").to_string()
    }

    #[test]
    fn each_snapshotter_s_mounts_become_the_plan_in_the_golden_file() {
        let cases = [
            (
                "overlayfs",
                mount(
                    "overlay",
                    "overlay",
                    &["index=off", "workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/s/8/fs:/s/7/fs"],
                ),
            ),
            (
                "overlayfs in a user namespace",
                mount("overlay", "overlay", &["uidmap=0:1000:10", "gidmap=0:2000:10", "lowerdir=/s/8/fs", "userxattr"]),
            ),
            ("overlayfs view", mount("overlay", "overlay", &["lowerdir=/s/8/fs:/s/7/fs"])),
            ("overlayfs single layer", mount("bind", "/s/1/fs", &["rw", "rbind"])),
            ("native", mount("bind", "/native/3", &["rbind", "ro"])),
            ("bind without a type", mount("none", "/native/3", &["bind"])),
            ("devmapper ext4", mount("ext4", "/dev/mapper/pool-snap-1", &[])),
            ("devmapper xfs", mount("xfs", "/dev/mapper/pool-snap-1", &["nouuid"])),
            ("blockfile", mount("ext4", "/blockfile/snapshots/3", &["loop"])),
            ("btrfs", mount("btrfs", "/dev/vdb", &["subvol=/active/3", "ro"])),
            ("zfs", mount("zfs", "tank/containerd/3", &[])),
        ];
        let mut plans = serde_json::Map::new();
        for (name, mount) in cases {
            let plan = plan_rootfs(&[mount], None).expect(name);
            plans.insert(name.into(), serde_json::to_value(plan).expect("a plan is JSON"));
        }
        let plans = serde_json::to_string_pretty(&plans).expect("a plan is JSON") + "\n";
        assert_eq!(
            plans,
            include_str!("testdata/rootfs-plans.json"),
            "the plans differ from testdata/rootfs-plans.json"
        );
    }

    #[test]
    fn a_rootfs_that_cri_o_has_mounted_is_bound() {
        let plan = plan_rootfs(&[], Some(Path::new("/run/containers/1/merged"))).expect("is planned");
        let expected = RootfsPlan::Bind {
            source: "/run/containers/1/merged".into(),
            recursive: true,
            read_only: false,
            ids: None,
        };
        assert_eq!(plan, expected);
        assert!(plan_rootfs(&[], Some(Path::new("rootfs"))).is_err());
        assert!(plan_rootfs(&[], None).is_err());
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_by_name() {
        assert!(refusal(&[mount("fuse3.fuse-overlayfs", "overlay", &[])]).contains("\"fuse3.fuse-overlayfs\""));
        assert!(refusal(&[mount("erofs", "/l.erofs", &["device=/b.erofs"])]).contains("device=/b.erofs"));
        assert!(refusal(&[mount("erofs", "/l.erofs", &["X-containerd.dmverity=/x"])]).contains("dmverity"));
        assert!(refusal(&[mount("overlay", "overlay", &["lowerdir=a"])]).contains("\"a\""));
        assert!(refusal(&[mount("overlay", "overlay", &["lowerdir=/a", "upperdir=/b"])]).contains("workdir"));
        assert!(refusal(&[mount("overlay", "overlay", &[])]).contains("lowerdir"));
        assert!(refusal(&[mount("bind", "rel", &["rbind"])]).contains("\"rel\""));
        assert!(refusal(&[mount("bind", "/a", &["size=3"])]).contains("size=3"));
        let mapped = mount("ext4", "/dev/vdb", &["uidmap=0:1000:10", "gidmap=0:1000:10"]);
        assert!(refusal(&[mapped]).contains("uidmap and gidmap are not supported for ext4"));
        assert!(refusal(&[mount("bind", "/a", &["uidmap=0:1000:10"])]).contains("gidmap has 0 ranges"));
        let chain = [mount("erofs", "/1", &[]), mount("format/mkdir/overlay", "overlay", &[])];
        assert!(refusal(&chain).contains("2 mounts (erofs, format/mkdir/overlay)"));
    }

    #[test]
    fn escaped_colons_do_not_split_layers() {
        assert_eq!(split_layers(r"/a\:b:/c\\:/d"), [r"/a\:b", r"/c\\", "/d"]);
    }

    #[test]
    fn many_layers_fit_because_their_common_directory_is_left_out() {
        let root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<String> = (0..120).map(|n| format!("{root}/{n}/fs")).collect();
        let overlay = Overlay { lower, upper: None, options: vec![], read_only: true, ids: None };
        let (data, directory) = overlay.data().expect("fits");
        assert_eq!(directory.as_deref(), Some(Path::new(root)));
        assert!(data.starts_with("lowerdir=0/fs:1/fs:2/fs:"), "{data}");
        assert!(data.len() <= MAX_DATA);
    }

    #[test]
    fn few_layers_stay_absolute_and_too_many_are_refused() {
        let few =
            Overlay { lower: vec!["/a".into(), "/b".into()], upper: None, options: vec![], read_only: true, ids: None };
        assert_eq!(few.data().expect("fits"), ("lowerdir=/a:/b".into(), None));
        let lower = (0..500).map(|n| format!("/{n}/{}", "x".repeat(40))).collect();
        let many = Overlay { lower, upper: None, options: vec![], read_only: true, ids: None };
        assert!(many.data().expect_err("is refused").to_string().contains("500 overlay layers"));
    }
}
