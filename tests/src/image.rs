//! Container images, made here: no registry is asked for anything.
//!
//! An image is a few uncompressed layers, the lowest of them with Debian's static busybox, written as an OCI image layout in
//! a tar archive (<https://github.com/opencontainers/image-spec/blob/main/image-layout.md>), which `ctr images import` reads.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::Run;

/// The image of nearly every container of the tests.
pub const BUSYBOX: &str = "localhost/bulkhead/busybox:test";
/// The image that containerd starts for a pod; its program only waits.
pub const PAUSE: &str = "localhost/bulkhead/pause:test";

const BUSYBOX_PATH: &str = "/bin/busybox";

/// An image to be written.
#[derive(Debug, Clone)]
pub struct Image {
    /// The whole reference, with its tag.
    pub name: String,
    /// `ENTRYPOINT`: what a container's arguments are appended to; empty for none.
    pub entrypoint: Vec<String>,
    /// `CMD`: what runs, or the entrypoint's arguments if there is one, unless a container says otherwise.
    pub command: Vec<String>,
    /// `USER` of the image; empty for root.
    pub user: String,
    /// Finished layers, the lowest first.
    pub layers: Vec<Arc<Vec<u8>>>,
}

impl Image {
    /// An image without an entrypoint, for root.
    pub fn new(name: &str, command: &[&str], layers: &[Arc<Vec<u8>>]) -> Self {
        Self {
            name: name.to_owned(),
            entrypoint: Vec::new(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            user: String::new(),
            layers: layers.to_vec(),
        }
    }

    /// Sets the entrypoint to one program.
    #[must_use]
    pub fn entrypoint(mut self, program: &str) -> Self {
        self.entrypoint = vec![program.to_owned()];
        self
    }

    /// Sets the user.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }
}

/// The images of nearly every test: [`BUSYBOX`] and [`PAUSE`].
pub fn common() -> Result<Vec<Image>> {
    let layers = [Arc::new(busybox()?.finish()?)];
    Ok(vec![Image::new(BUSYBOX, &["/bin/sh"], &layers), Image::new(PAUSE, &["/bin/tail", "-f", "/dev/null"], &layers)])
}

/// Writes an archive with `images` to `path`.
pub fn write_archive(path: &Path, images: &[Image]) -> Result<()> {
    let file = fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut archive = Archive { archive: tar::Builder::new(file), blobs: BTreeSet::new() };
    let mut manifests = Vec::new();
    for image in images {
        let layers: Vec<_> = image.layers.iter().map(|layer| digest(layer)).collect();
        let config = blob(&json!({
            "architecture": "amd64", "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/sbin"], "Entrypoint": image.entrypoint,
                "Cmd": image.command, "WorkingDir": "/", "User": image.user,
            },
            "rootfs": {"type": "layers", "diff_ids": layers},
            "history": layers.iter().map(|_| json!({"created_by": "bulkhead-tests"})).collect::<Vec<_>>(),
        }))?;
        let layer_type = "application/vnd.oci.image.layer.v1.tar";
        let manifest = blob(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": image.layers.iter().map(|layer| descriptor(layer_type, layer)).collect::<Vec<_>>(),
        }))?;
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        let tag = image.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        entry["annotations"] =
            json!({"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag});
        manifests.push(entry);
        for content in image.layers.iter().map(|layer| layer.as_slice()).chain([&*config, &*manifest]) {
            archive.add_blob(content)?;
        }
    }
    let index = blob(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    }))?;
    let mut archive = archive.archive;
    add_file(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion": "1.0.0"}"#)?;
    add_file(&mut archive, "index.json", 0o644, &index)?;
    archive.finish().with_context(|| format!("write {}", path.display()))
}

/// An archive in which each blob is written once, however many images share it.
struct Archive {
    archive: tar::Builder<fs::File>,
    blobs: BTreeSet<String>,
}

impl Archive {
    fn add_blob(&mut self, content: &[u8]) -> Result<()> {
        let digest = digest(content);
        if self.blobs.insert(digest.clone()) {
            add_file(&mut self.archive, &format!("blobs/{}", digest.replace(':', "/")), 0o644, content)?;
        }
        Ok(())
    }
}

/// A layer in the making: paths are relative, and parents have to come first.
pub struct Layer {
    archive: tar::Builder<Vec<u8>>,
    added: BTreeSet<String>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("added", &self.added).finish_non_exhaustive()
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self { archive: tar::Builder::new(Vec::new()), added: BTreeSet::new() }
    }
}

impl Layer {
    /// Adds a directory of root's.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        if self.added.insert(path.to_owned()) {
            let mut header = header(tar::EntryType::Directory, mode, 0);
            self.archive.append_data(&mut header, format!("{path}/"), std::io::empty())?;
        }
        Ok(())
    }

    /// Adds a file of root's; a path that is there already stays as it is.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        if self.added.insert(path.to_owned()) {
            add_file(&mut self.archive, path, mode, content)?;
        }
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        if self.added.insert(path.to_owned()) {
            let mut header = header(tar::EntryType::Symlink, 0o777, 0);
            self.archive.append_link(&mut header, path, target)?;
        }
        Ok(())
    }

    /// Adds another name of a file of this layer.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        if self.added.insert(path.to_owned()) {
            let mut header = header(tar::EntryType::Link, 0o755, 0);
            self.archive.append_link(&mut header, path, target)?;
        }
        Ok(())
    }

    /// Adds a program of this machine as `path`, with the shared libraries that it names.
    pub fn program(&mut self, host_path: &Path, path: &str) -> Result<()> {
        let content = fs::read(host_path).with_context(|| format!("read {}", host_path.display()))?;
        self.file(path, 0o755, &content)?;
        let list = Run::new("/usr/bin/ldd").arg(host_path).success()?.text();
        // `name => /path (address)`, or `/path (address)` for the loader; the kernel's own object has no path.
        for library in list.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
            let content = fs::read(library).with_context(|| format!("read {library}"))?;
            self.file(library.trim_start_matches('/'), 0o755, &content)?;
        }
        Ok(())
    }

    /// The layer's bytes.
    pub fn finish(self) -> Result<Vec<u8>> {
        self.archive.into_inner().context("write an image's layer")
    }
}

/// A root file system: busybox, a name for each of its programs, and the few files that programs expect.
///
/// The names are hard links, as in the image that everybody knows: to mask one of them does not mask the others.
pub fn busybox() -> Result<Layer> {
    let busybox = fs::read(BUSYBOX_PATH)
        .with_context(|| format!("read {BUSYBOX_PATH} (Debian's package busybox-static has it)"))?;
    let applets = Run::new(BUSYBOX_PATH).arg("--list").success()?.text();
    let mut layer = Layer::default();
    for (path, mode) in [
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
        layer.directory(path, mode)?;
    }
    layer.file("bin/busybox", 0o755, &busybox)?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    let users = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/tmp:/bin/sh\ntester:x:1000:1000::/tmp:/bin/sh\n";
    let groups = "root:x:0:\ndaemon:x:1:\naudio:x:29:tester\ntester:x:1000:\n";
    layer.file("etc/passwd", 0o644, users.as_bytes())?;
    layer.file("etc/group", 0o644, groups.as_bytes())?;
    layer.file("www/index.html", 0o644, b"a page from inside the pod\n")?;
    Ok(layer)
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
