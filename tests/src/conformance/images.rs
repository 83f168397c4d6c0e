//! The images that the suite's specs name, under the names of its source, from what Debian's packages have and the
//! programs that are built with the suite.
//!
//! The names: <https://github.com/kubernetes/kubernetes/blob/v1.36.3/test/utils/image/manifest.go>; what is in each of
//! them: `test/images` in the same place.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::cluster::images::program;
use crate::command::Run;
use crate::ginkgo::image::{accounts, compiled, nginx};
use crate::image::{self, Image, Layer};
use crate::tools;

/// Programs of the machine that specs call in containers of `agnhost`: where they are here, and there.
///
/// busybox has its own of most names. They come later in PATH, but its shell would take them nevertheless: hence bash.
const TOOLS: [(&str, &str); 8] = [
    ("/bin/bash", "bin/bash"),
    ("/usr/bin/curl", "usr/bin/curl"),
    ("/usr/bin/dig", "usr/bin/dig"),
    ("/usr/bin/nslookup", "usr/bin/nslookup"),
    ("/bin/nc.openbsd", "usr/bin/nc"),
    ("/bin/ip", "usr/bin/ip"),
    ("/usr/bin/getent", "usr/bin/getent"),
    ("/bin/hostname", "usr/bin/hostname"),
];

/// Waits for the end of its pod, takes in what becomes its child meanwhile, and goes when it is asked to.
const PAUSE_PROGRAM: &str = "#include <signal.h>\n#include <unistd.h>\n\
    static void leave(int number) { (void)number; _exit(0); }\n\
    int main(void) {\n  signal(SIGTERM, leave);\n  signal(SIGINT, leave);\n  signal(SIGCHLD, SIG_IGN);\n\
    for (;;) pause();\n}\n";

/// A finished layer.
type Blob = Arc<Vec<u8>>;

/// Everything that the specs which are run name. `scratch` holds what is made on the way.
pub fn all(scratch: &Path) -> Result<Vec<Image>> {
    let base = finished(image::busybox()?)?;
    let users = finished(users()?)?;
    let on_base = |layer: Layer| -> Result<[Blob; 2]> { Ok([Arc::clone(&base), finished(layer)?]) };
    let with_program = |name: &str| -> Result<[Blob; 2]> { Ok([Arc::clone(&base), Arc::new(program(name)?)]) };
    let tools = finished(tools()?)?;
    let agnhost = [Arc::clone(&base), Arc::clone(&users), Arc::clone(&tools), finished(agnhost(scratch)?)?];
    let nginx = [Arc::clone(&base), users, finished(nginx(80)?)?];

    let mut images = vec![
        e2e("busybox:1.37.0-1", &["sh"], &on_base(shell()?)?),
        e2e("agnhost:2.63.0", &["pause"], &agnhost).entrypoint("/agnhost"),
        e2e("agnhost:2.55", &["pause"], &agnhost).entrypoint("/agnhost"),
        e2e("nginx:1.15-4", &["/usr/sbin/nginx"], &nginx),
        e2e("nginx:1.27-0", &["/usr/sbin/nginx"], &nginx),
        e2e("nonroot:1.5", &["sh"], std::slice::from_ref(&base)).user("1234"),
        e2e("nonewprivs:1.4", &["nnp"], &on_base(set_user_id()?)?),
        e2e("ipc-utils:1.4", &["sh"], &on_base(ipc_utilities()?)?),
        e2e("glibc-dns-testing:2.0.0", &["sh"], &[Arc::clone(&base), tools]),
        e2e("regression-issue-74839:1.4", &[], &with_program("regression-issue-74839")?)
            .entrypoint("/regression-issue-74839"),
        e2e("sample-apiserver:1.29.2", &[], &with_program("sample-apiserver")?).entrypoint("/sample-apiserver"),
        Image::new("registry.k8s.io/etcd:3.6.8-0", &["etcd"], &on_base(etcd()?)?),
        Image::new("registry.k8s.io/pause:3.10.2", &[], &[finished(pause(scratch)?)?])
            .entrypoint("/pause")
            .user("65535:65535"),
    ];
    for name in ["kitten", "nautilus"] {
        let mut layers = agnhost.to_vec();
        layers.push(finished(page(name)?)?);
        images.push(e2e(&format!("{name}:1.8"), &["test-webserver"], &layers).entrypoint("/agnhost"));
    }
    Ok(images)
}

fn e2e(name: &str, command: &[&str], layers: &[Blob]) -> Image {
    Image::new(&format!("registry.k8s.io/e2e-test-images/{name}"), command, layers)
}

fn finished(layer: Layer) -> Result<Blob> {
    Ok(Arc::new(layer.finish()?))
}

fn users() -> Result<Layer> {
    let mut layer = Layer::default();
    accounts(&mut layer)?;
    Ok(layer)
}

/// What busybox is to have besides itself.
///
/// `sh` is bash for those who look it up in PATH: busybox's shell drops variables of the environment whose names have
/// dashes. `/bin/sh` stays busybox's, whose very words for a file that cannot be written a spec expects.
fn shell() -> Result<Layer> {
    let mut layer = Layer::default();
    add_program(&mut layer, "/bin/bash", "bin/bash")?;
    layer.link("usr/bin/sh", "/bin/bash")?;
    add_program(&mut layer, "/usr/bin/wget", "usr/bin/wget")?;
    Ok(layer)
}

fn tools() -> Result<Layer> {
    let mut layer = Layer::default();
    for (host_path, path) in TOOLS {
        add_program(&mut layer, host_path, path)?;
    }
    layer.link("bin/sh", "bash")?;
    Ok(layer)
}

fn add_program(layer: &mut Layer, host_path: &str, path: &str) -> Result<()> {
    layer.program(Path::new(host_path), path).with_context(|| format!("{host_path}: run make setup-kubernetes"))
}

/// Kubernetes' test program under its two names, and the certificate that it serves with.
fn agnhost(scratch: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("agnhost", 0o755, &kubernetes("agnhost")?)?;
    layer.link("agnhost-2", "agnhost")?;
    layer.directory("uploads", 0o755)?;
    let (key, certificate) = (scratch.join("localhost.key"), scratch.join("localhost.crt"));
    Run::new("/usr/bin/openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "365", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .success()?;
    for (name, path) in [("localhost.key", &key), ("localhost.crt", &certificate)] {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        // Specs have users of all kinds.
        layer.file(name, 0o644, &content)?;
    }
    Ok(layer)
}

/// What tells an image from its sibling to those who ask its web server.
fn page(name: &str) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("data.json", 0o644, format!("{{\"image\": \"{name}.jpg\"}}\n").as_bytes())?;
    Ok(layer)
}

fn set_user_id() -> Result<Layer> {
    let mut layer = local_programs()?;
    layer.file("usr/local/bin/nnp", 0o6755, &kubernetes("nonewprivs")?)?;
    Ok(layer)
}

fn etcd() -> Result<Layer> {
    let mut layer = local_programs()?;
    layer.file("usr/local/bin/etcd", 0o755, &kubernetes("etcd")?)?;
    Ok(layer)
}

/// A layer in which `/usr/local/bin` is there to be filled.
fn local_programs() -> Result<Layer> {
    let mut layer = Layer::default();
    layer.directory("usr/local", 0o755)?;
    layer.directory("usr/local/bin", 0o755)?;
    Ok(layer)
}

fn ipc_utilities() -> Result<Layer> {
    let mut layer = Layer::default();
    add_program(&mut layer, "/usr/bin/ipcs", "usr/bin/ipcs")?;
    Ok(layer)
}

fn pause(scratch: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("pause", 0o755, &compiled(scratch, "pause", PAUSE_PROGRAM)?)?;
    Ok(layer)
}

fn kubernetes(name: &str) -> Result<Vec<u8>> {
    let path = tools::kubernetes(name)?;
    fs::read(&path).with_context(|| format!("read {}", path.display()))
}
