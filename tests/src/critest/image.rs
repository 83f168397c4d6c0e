//! The images that critest asks for, under the names of its source (`pkg/validate`), from what Debian's packages have.
//!
//! One spec fails with these whatever the runtime: that of masked paths masks `/bin/ls` and has the shell call `ls`, which
//! Debian's busybox does not look for in the file system, as it is an `ls` itself.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::command::Run;
use crate::image::{self, Image, Layer};
use crate::tools;

const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\n\
    default-user:x:1000:1000::/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUPS: &str = "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\n\
    group-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n";

/// What nginx runs with; `PORT` is replaced. It stays in the foreground and leaves its pid where the suite looks for it.
const NGINX_CONFIGURATION: &str = "user www-data;\nworker_processes 1;\npid /run/nginx.pid;\ndaemon off;\nerror_log stderr;\n\
    events { worker_connections 64; }\n\
    http {\n  access_log /dev/stdout;\n  types { text/html html; }\n\
    server { listen PORT; listen [::]:PORT; root /usr/share/nginx/html; }\n}\n";

/// Says who it is in effect, which its set-user-id bit has a say in.
const SETUID_PROGRAM: &str = "#include <stdio.h>\n#include <unistd.h>\n\
    int main(void) { printf(\"Effective uid: %d\\n\", (int)geteuid()); return 0; }\n";

/// Everything that the specs which are run name. `scratch` holds what is compiled on the way.
pub fn all(scratch: &Path) -> Result<Vec<Image>> {
    let base = vec![Arc::new(image::busybox()?.finish()?), Arc::new(users()?.finish()?)];
    let with = |layer: Layer| -> Result<Vec<Arc<Vec<u8>>>> {
        let mut layers = base.clone();
        layers.push(Arc::new(layer.finish()?));
        Ok(layers)
    };
    let image = |name: &str, command: &[&str], user: &str, layers: &[Arc<Vec<u8>>]| Image {
        name: name.to_owned(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        user: user.to_owned(),
        layers: layers.to_vec(),
    };
    // Apache's log has the name of its program in it; busybox's says nothing by itself.
    let httpd = ["sh", "-c", "echo starting httpd; exec httpd -f -p 80 -h /www"];
    let nginx = ["/usr/sbin/nginx"];
    Ok(vec![
        image("registry.k8s.io/e2e-test-images/busybox:1.29-2", &["sh"], "", &base),
        image("registry.k8s.io/e2e-test-images/httpd:2.4.39-4", &httpd, "", &base),
        image("registry.k8s.io/e2e-test-images/nginx:1.14-2", &nginx, "", &with(self::nginx(80)?)?),
        image("registry.k8s.io/e2e-test-images/nonewprivs:1.3", &["/bin/effective-uid"], "", &with(setuid(scratch)?)?),
        image("gcr.io/k8s-staging-cri-tools/hostnet-nginx-amd64:latest", &nginx, "", &with(self::nginx(12003)?)?),
        image("gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest", &["sh"], "1000", &base),
    ])
}

/// The users that specs name, and programs that Debian's busybox has not.
fn users() -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("etc/passwd", 0o644, USERS.as_bytes())?;
    layer.file("etc/group", 0o644, GROUPS.as_bytes())?;
    for program in ["usr/bin/ipcs", "usr/bin/pgrep"] {
        layer.program(&Path::new("/").join(program), program)?;
    }
    Ok(layer)
}

fn nginx(port: u16) -> Result<Layer> {
    let package = tools::nginx()?;
    let mut layer = Layer::default();
    layer.program(&package.join("usr/sbin/nginx"), "usr/sbin/nginx")?;
    let page = package.join("usr/share/nginx/html/index.html");
    let page = fs::read(&page).with_context(|| format!("read {}", page.display()))?;
    layer.file("usr/share/nginx/html/index.html", 0o644, &page)?;
    let configuration = NGINX_CONFIGURATION.replace("PORT", &port.to_string());
    layer.file("etc/nginx/nginx.conf", 0o644, configuration.as_bytes())?;
    for directory in ["var/lib", "var/lib/nginx", "var/log", "var/log/nginx"] {
        layer.directory(directory, 0o755)?;
    }
    layer.link("var/run", "/run")?;
    Ok(layer)
}

fn setuid(scratch: &Path) -> Result<Layer> {
    let (source, program) = (scratch.join("effective-uid.c"), scratch.join("effective-uid"));
    fs::write(&source, SETUID_PROGRAM).with_context(|| format!("write {}", source.display()))?;
    Run::new("/usr/bin/gcc").args(["-static", "-O2", "-o"]).arg(&program).arg(&source).success()?;
    let mut layer = Layer::default();
    layer.file("bin/effective-uid", 0o4755, &fs::read(&program).context("read the compiled program")?)?;
    Ok(layer)
}
