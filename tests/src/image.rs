//! Container images, made here: no registry is asked for anything.
//!
//! An image is one uncompressed layer with Debian's static busybox, written as an OCI image layout in a tar archive
//! (<https://github.com/opencontainers/image-spec/blob/main/image-layout.md>), which `ctr images import` reads.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::Run;

/// The image of nearly every container of the tests.
pub const BUSYBOX: &str = "localhost/bulkhead/busybox:test";
/// The image that containerd starts for a pod; its program only waits.
pub const PAUSE: &str = "localhost/bulkhead/pause:test";

const BUSYBOX_PATH: &str = "/bin/busybox";

/// Writes an archive with both images to `path`.
pub fn write_archive(path: &Path) -> Result<()> {
    let layer = layer()?;
    let mut blobs = vec![layer.clone()];
    let mut manifests = Vec::new();
    for (name, command) in [(BUSYBOX, vec!["/bin/sh"]), (PAUSE, vec!["/bin/sleep", "1000000000"])] {
        let config = blob(&json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/sbin"], "Cmd": command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
            "history": [{"created_by": "bulkhead-tests"}],
        }))?;
        let manifest = blob(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        }))?;
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "test"});
        manifests.push(entry);
        blobs.extend([config, manifest]);
    }
    let index = blob(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    }))?;

    let file = fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut archive = tar::Builder::new(file);
    add_file(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion": "1.0.0"}"#)?;
    add_file(&mut archive, "index.json", 0o644, &index)?;
    for content in &blobs {
        add_file(&mut archive, &format!("blobs/{}", digest(content).replace(':', "/")), 0o644, content)?;
    }
    archive.finish().with_context(|| format!("write {}", path.display()))
}

/// The root file system: busybox, a link for each of its programs, and the few files that programs expect.
fn layer() -> Result<Vec<u8>> {
    let busybox = fs::read(BUSYBOX_PATH)
        .with_context(|| format!("read {BUSYBOX_PATH} (Debian's package busybox-static has it)"))?;
    let applets = Run::new(BUSYBOX_PATH).arg("--list").success()?.text();
    let mut archive = tar::Builder::new(Vec::new());
    for (directory, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("sbin", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("var", 0o755),
        ("www", 0o755),
    ] {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        archive.append_data(&mut header, format!("{directory}/"), std::io::empty())?;
    }
    add_file(&mut archive, "bin/busybox", 0o755, &busybox)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        archive.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let users = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/tmp:/bin/sh\ntester:x:1000:1000::/tmp:/bin/sh\n";
    let groups = "root:x:0:\ndaemon:x:1:\naudio:x:29:tester\ntester:x:1000:\n";
    add_file(&mut archive, "etc/passwd", 0o644, users.as_bytes())?;
    add_file(&mut archive, "etc/group", 0o644, groups.as_bytes())?;
    add_file(&mut archive, "www/index.html", 0o644, b"a page from inside the pod\n")?;
    archive.into_inner().context("write the image's layer")
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    // A fixed time keeps the digests the same from run to run.
    header.set_mtime(1_700_000_000);
    header
}

fn add_file<W: std::io::Write>(archive: &mut tar::Builder<W>, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, content.len() as u64);
    archive.append_data(&mut header, path, content).with_context(|| format!("add {path} to an image"))
}

fn blob(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context("render JSON")
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(content), "size": content.len()})
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(content)))
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
