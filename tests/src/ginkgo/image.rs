//! Layers that images of both suites have, from what Debian's packages have and a C compiler makes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::command::Run;
use crate::image::Layer;
use crate::tools;

const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\n\
    default-user:x:1000:1000::/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUPS: &str = "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\n\
    group-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n";

/// What nginx runs with; `PORT` is replaced. It stays in the foreground and leaves its pid where a suite looks for it.
const NGINX_CONFIGURATION: &str = "user www-data;\nworker_processes 1;\npid /run/nginx.pid;\ndaemon off;\nerror_log stderr;\n\
    events { worker_connections 64; }\n\
    http {\n  access_log /dev/stdout;\n  types { text/html html; }\n\
    server { listen PORT; listen [::]:PORT; root /usr/share/nginx/html; }\n}\n";

/// Adds the users and groups that specs name.
pub fn accounts(layer: &mut Layer) -> Result<()> {
    layer.file("etc/passwd", 0o644, USERS.as_bytes())?;
    layer.file("etc/group", 0o644, GROUPS.as_bytes())
}

/// Debian's nginx, which wants [`accounts`] below, with a page of its own on `port`.
pub fn nginx(port: u16) -> Result<Layer> {
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

/// A static program of C `source`; `scratch` holds what is made on the way, under `name`.
pub fn compiled(scratch: &Path, name: &str, source: &str) -> Result<Vec<u8>> {
    let (file, program) = (scratch.join(format!("{name}.c")), scratch.join(name));
    fs::write(&file, source).with_context(|| format!("write {}", file.display()))?;
    Run::new("/usr/bin/gcc").args(["-static", "-O2", "-o"]).arg(&program).arg(&file).success()?;
    fs::read(&program).with_context(|| format!("read {}", program.display()))
}
