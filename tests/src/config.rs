//! Configuration files of a private node: containerd's, by version, and Bulkhead's.

use std::fmt::Write as _;
use std::path::Path;

use crate::containerd::Layout;
use crate::image::PAUSE;
use crate::tools::Version;

/// The handler whose Bulkhead configuration a test may break without harming the others.
pub const BAD_HANDLER: &str = "bulkhead-bad";
/// The handler that starts pods through containerd's sandbox API (2.x).
pub const SANDBOXER_HANDLER: &str = "bulkhead-sandbox";
/// [`BAD_HANDLER`] through the sandbox API.
pub const BAD_SANDBOXER_HANDLER: &str = "bulkhead-sandbox-bad";
/// [`SANDBOXER_HANDLER`] with containerd's streaming IO in the place of FIFOs.
pub const STREAMING_HANDLER: &str = "bulkhead-streaming";

/// The handler whose containers have their root file systems in image files (containerd 1.7 and later).
pub const BLOCK_HANDLER: &str = "bulkhead-block";

/// Handlers without options, as which containerd starts containers in user namespaces (2.4); their configuration is
/// that of the node's environment.
pub const BARE_HANDLER: &str = "bulkhead-bare";
/// [`BARE_HANDLER`] through the sandbox API.
pub const BARE_SANDBOXER_HANDLER: &str = "bulkhead-sandbox-bare";

/// Name in [`Layout::root`] of the empty file system that the blockfile snapshotter (containerd 1.7 and later) begins with.
pub const SCRATCH_FILE: &str = "scratch.ext4";

/// Handlers of Bulkhead in the order of the file, each with its own configuration file in [`Layout::root`].
pub const BULKHEAD_HANDLERS: [(&str, &str); 8] = [
    ("bulkhead", "bulkhead.toml"),
    (BAD_HANDLER, "bad.toml"),
    (SANDBOXER_HANDLER, "bulkhead.toml"),
    (BLOCK_HANDLER, "bulkhead.toml"),
    (BAD_SANDBOXER_HANDLER, "bad.toml"),
    (BARE_HANDLER, "bulkhead.toml"),
    (BARE_SANDBOXER_HANDLER, "bulkhead.toml"),
    (STREAMING_HANDLER, "bulkhead.toml"),
];

/// containerd's configuration.
pub fn containerd(version: Version, layout: &Layout, runc: &Path) -> String {
    let root = layout.root.display();
    let (runtime, images, server) = if version.is_v2() {
        ("io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri")
    } else {
        ("io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri")
    };
    let mut text = format!(
        r#"version = {version_number}
root = "{root}/root"
state = "{root}/state"
temp = "{root}/temp"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs"]

[grpc]
address = "{socket}"

[debug]
level = "info"

[plugins."io.containerd.internal.v1.opt"]
path = "{root}/opt"

[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.snapshotter.v1.blockfile"]
scratch_file = "{root}/{SCRATCH_FILE}"
fs_type = "ext4"
mount_options = []

"#,
        version_number = if version.is_v2() { 3 } else { 2 },
        socket = layout.socket.display(),
    );
    let mut runtime_keys = String::from("restrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n");
    let server_keys = "stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n";
    let image_keys = format!("sandbox_image = \"{PAUSE}\"\n");
    let cni = layout.root.join("cni/conf");
    let cni_keys = |list: &str| {
        let directory = if version.is_v2() { "bin_dirs = [\"/usr/lib/cni\"]" } else { "bin_dir = \"/usr/lib/cni\"" };
        format!("[plugins.\"{list}\".cni]\n{directory}\nconf_dir = \"{}\"\nmax_conf_num = 1\n\n", cni.display())
    };
    // Writing to a String cannot fail.
    if version.is_v2() {
        let _ = write!(text, "[plugins.\"{server}\"]\n{server_keys}\n");
        let _ = write!(text, "[plugins.\"{images}\".pinned_images]\nsandbox = \"{PAUSE}\"\n\n");
    } else {
        runtime_keys.push_str(server_keys);
        runtime_keys.push_str(&image_keys);
    }
    let _ = write!(text, "[plugins.\"{runtime}\"]\n{runtime_keys}\n");
    text.push_str(&cni_keys(runtime));
    let _ = write!(
        text,
        "[plugins.\"{runtime}\".containerd]\ndefault_runtime_name = \"runc\"\n\n\
         [plugins.\"{runtime}\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\n\
         [plugins.\"{runtime}\".containerd.runtimes.runc.options]\nBinaryName = \"{}\"\n\n",
        runc.display()
    );
    for (handler, file) in BULKHEAD_HANDLERS {
        let by_sandbox_api =
            [SANDBOXER_HANDLER, BAD_SANDBOXER_HANDLER, BARE_SANDBOXER_HANDLER, STREAMING_HANDLER].contains(&handler);
        if by_sandbox_api && !version.is_v2() {
            continue;
        }
        let table = format!("plugins.\"{runtime}\".containerd.runtimes.{handler}");
        let special = match handler {
            STREAMING_HANDLER => "sandboxer = \"shim\"\nio_type = \"streaming\"\n",
            _ if by_sandbox_api => "sandboxer = \"shim\"\n",
            BLOCK_HANDLER if version != Version::V1_6 => "snapshotter = \"blockfile\"\n",
            _ => "",
        };
        let _ = write!(
            text,
            "[{table}]\nruntime_type = \"io.containerd.bulkhead.v2\"\npod_annotations = [\"bulkhead.io/*\"]\n\
             container_annotations = [\"bulkhead.io/*\"]\nprivileged_without_host_devices = true\n{special}\n"
        );
        if ![BARE_HANDLER, BARE_SANDBOXER_HANDLER].contains(&handler) {
            let _ = write!(
                text,
                "[{table}.options]\nTypeUrl = \"runtimeoptions.v1.Options\"\nConfigPath = \"{root}/{file}\"\n\n"
            );
        }
    }
    text
}

/// What a test may set differently in Bulkhead's configuration. Paths are those of [`Layout`] unless given.
#[derive(Debug, Default, Clone)]
pub struct Bulkhead {
    /// `accel`; automatic unless given.
    pub accel: Option<String>,
    /// Path of QEMU.
    pub qemu: Option<String>,
    /// Path of the guest's kernel.
    pub kernel: Option<String>,
    /// Path of the guest's initramfs.
    pub initramfs: Option<String>,
    /// Path of virtiofsd.
    pub virtiofsd: Option<String>,
    /// Path of the vsock helper.
    pub vsock_helper: Option<String>,
    /// A line put at the top as it is.
    pub extra: String,
    /// Annotations that pods may use; all unless given.
    pub allowed_annotations: Option<Vec<String>>,
}

impl Bulkhead {
    /// The file's text.
    pub fn render(&self, layout: &Layout) -> String {
        let program = |name: &str| layout.program(name).display().to_string();
        let all = ["vcpus", "memory-mib", "machine"].map(|key| format!("bulkhead.io/{key}"));
        let or = |given: &Option<String>, name: &str| given.clone().unwrap_or_else(|| program(name));
        format!(
            "{extra}\nallowed_annotations = {annotations:?}\nstate_dir = \"{state}\"\nkernel = \"{kernel}\"\ninitramfs = \"{initramfs}\"\n\
             virtiofsd = \"{virtiofsd}\"\nvsock_helper = \"{vsock}\"\n\n\
             [qemu]\npath = \"{qemu}\"\naccel = \"{accel}\"\n",
            extra = self.extra,
            annotations = self.allowed_annotations.as_deref().unwrap_or(&all),
            state = layout.bulkhead_state.display(),
            kernel = or(&self.kernel, "vmlinux"),
            initramfs = or(&self.initramfs, "initramfs"),
            virtiofsd = or(&self.virtiofsd, "virtiofsd"),
            vsock = or(&self.vsock_helper, "bulkhead-vsock"),
            qemu = or(&self.qemu, "qemu-system-x86_64"),
            accel = self.accel.as_deref().unwrap_or("auto"),
        )
    }
}
