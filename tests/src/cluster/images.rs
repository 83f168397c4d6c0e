//! Images that the cluster itself needs, Kubernetes' own test program, and a Perl.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::image::{self, Image, Layer};
use crate::tools;

/// Kubernetes' `agnhost`, with busybox beside it
/// (<https://github.com/kubernetes/kubernetes/tree/master/test/images/agnhost>).
pub const AGNHOST: &str = "localhost/bulkhead/agnhost:test";
/// Perl beside busybox, for system calls that none of busybox's programs makes: without modules, as any Debian has it.
pub const PERL: &str = "localhost/bulkhead/perl:test";
/// The cluster's DNS server.
pub const COREDNS: &str = "localhost/bulkhead/coredns:test";

/// Everything that is there when the cluster is.
pub fn all() -> Result<Vec<Image>> {
    let mut images = image::common()?;
    let base = Arc::clone(images.first().and_then(|image| image.layers.first()).context("no layer of busybox")?);
    images.push(Image {
        name: AGNHOST.into(),
        entrypoint: vec!["/agnhost".into()],
        command: vec!["pause".into()],
        user: String::new(),
        layers: vec![Arc::clone(&base), Arc::new(program("agnhost")?)],
    });
    images.push(Image::new(PERL, &["/bin/sh"], &[base, Arc::new(perl()?)]));
    images.push(Image {
        name: COREDNS.into(),
        entrypoint: vec!["/coredns".into()],
        command: Vec::new(),
        user: String::new(),
        layers: vec![Arc::new(program("coredns")?)],
    });
    Ok(images)
}

fn perl() -> Result<Vec<u8>> {
    let mut layer = Layer::default();
    layer.program(Path::new("/usr/bin/perl"), "usr/bin/perl")?;
    layer.finish()
}

/// A layer with one of Kubernetes' programs at the top.
pub fn program(name: &str) -> Result<Vec<u8>> {
    let path = tools::kubernetes(name)?;
    let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let mut layer = Layer::default();
    layer.file(name, 0o755, &content)?;
    layer.finish()
}
