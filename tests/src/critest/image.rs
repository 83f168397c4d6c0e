//! The images that critest asks for, under the names of its source (`pkg/validate`), from what Debian's packages have.
//!
//! One spec fails with these whatever the runtime: that of masked paths masks `/bin/ls` and has the shell call `ls`, which
//! Debian's busybox does not look for in the file system, as it is an `ls` itself.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use crate::ginkgo::image::{accounts, compiled, nginx};
use crate::image::{self, Image, Layer};

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
    // Apache's log has the name of its program in it; busybox's says nothing by itself.
    let httpd = ["sh", "-c", "echo starting httpd; exec httpd -f -p 80 -h /www"];
    let program = ["/usr/sbin/nginx"];
    let predefined = "gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest";
    Ok(vec![
        Image::new("registry.k8s.io/e2e-test-images/busybox:1.29-2", &["sh"], &base),
        Image::new("registry.k8s.io/e2e-test-images/httpd:2.4.39-4", &httpd, &base),
        Image::new("registry.k8s.io/e2e-test-images/nginx:1.14-2", &program, &with(nginx(80)?)?),
        Image::new("registry.k8s.io/e2e-test-images/nonewprivs:1.3", &["/bin/effective-uid"], &with(setuid(scratch)?)?),
        Image::new("gcr.io/k8s-staging-cri-tools/hostnet-nginx-amd64:latest", &program, &with(nginx(12003)?)?),
        Image::new(predefined, &["sh"], &base).user("1000"),
    ])
}

/// The users that specs name, and programs that Debian's busybox has not.
fn users() -> Result<Layer> {
    let mut layer = Layer::default();
    accounts(&mut layer)?;
    for program in ["usr/bin/ipcs", "usr/bin/pgrep"] {
        layer.program(&Path::new("/").join(program), program)?;
    }
    Ok(layer)
}

fn setuid(scratch: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("bin/effective-uid", 0o4755, &compiled(scratch, "effective-uid", SETUID_PROGRAM)?)?;
    Ok(layer)
}
