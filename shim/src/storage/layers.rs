//! The layers of an overlay for a container in a user namespace: each is cloned, id-mapped, and then put together.
//!
//! An overlay itself cannot be id-mapped, its layers can (Linux 5.19). The upper directory is not: who made it gave it to the
//! namespace's root, and what the container writes has the host's ids there, as with runc.
//! <https://docs.kernel.org/filesystems/overlayfs.html#permission-model>

use std::fs;
use std::path::{Path, PathBuf};

use super::plan::Overlay;
use crate::error::{Error, Kind, Result, WithKind};
use crate::idmap::IdMappings;
use crate::namespace::{self, Access, Propagation, ShareRoot, Tree};

/// Id-mapped clones of an overlay's lower layers, the topmost first.
#[derive(Debug)]
pub struct Layers {
    trees: Vec<Tree>,
}

impl Layers {
    /// Clones the lower layers of `overlay` in the host's namespace. Blocks; not for the host thread.
    pub fn open(overlay: &Overlay, ids: &IdMappings) -> Result<Self> {
        let namespace = ids.namespace()?;
        let open = |layer: &String| {
            let path = unescape(layer);
            let tree = Tree::open(&path, false)?;
            tree.map_ids(&namespace, false).map_err(|error| error.context(format!("layer {}", path.display())))?;
            Ok(tree)
        };
        Ok(Self { trees: overlay.lower.iter().map(open).collect::<Result<_>>()? })
    }

    /// Mounts `overlay` with these layers at `target`; for the host thread. On an error nothing is left.
    ///
    /// The layers have names for as long as the mount takes, which keeps them; `container_id` tells their directory.
    pub fn mount(self, overlay: &Overlay, share: &ShareRoot, container_id: &str, target: &Path) -> Result<()> {
        let directory = share.layers().join(container_id);
        let mut named = Vec::with_capacity(self.trees.len());
        let mount = || {
            for (index, tree) in self.trees.into_iter().enumerate() {
                let path = directory.join(index.to_string());
                fs::create_dir_all(&path).or_kind(Kind::Internal, format!("make {}", path.display()))?;
                tree.attach(&path, Access::ReadOnly, Propagation::Private)?;
                named.push(index.to_string());
            }
            // Relative to their directory, so that many fit into a page.
            let (data, _) = Overlay { lower: named.clone(), ..overlay.clone() }.data()?;
            namespace::mount("overlay", Path::new("overlay"), target, overlay.flags(), &data, Some(&directory))
        };
        let mounted = mount();
        let mut failed = Vec::new();
        for name in &named {
            failed.extend(namespace::unmount(&directory.join(name)).err().map(|error| error.to_string()));
        }
        if directory.exists()
            && let Err(error) = fs::remove_dir_all(&directory)
        {
            failed.push(format!("remove {}: {error}", directory.display()));
        }
        match (mounted, failed.as_slice()) {
            (Ok(()), []) => Ok(()),
            (Ok(()), failed) => {
                namespace::unmount(target)?;
                Err(Error::internal(format!("layers are left over: {}", failed.join("; "))))
            }
            (Err(error), _) => Err(error),
        }
    }
}

/// A layer's path without the escapes that overlayfs reads.
fn unescape(layer: &str) -> PathBuf {
    let mut path = String::with_capacity(layer.len());
    let mut characters = layer.chars();
    while let Some(character) = characters.next() {
        path.push(if character == '\\' { characters.next().unwrap_or(character) } else { character });
    }
    path.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;
    use crate::host::HostThread;
    use crate::namespace::prepare;
    use crate::storage::plan::{self, Mount};
    use crate::storage::rootfs;

    #[test]
    fn paths_lose_their_escapes() {
        assert_eq!(unescape(r"/a\:b/c\\d"), Path::new(r"/a:b/c\d"));
    }

    #[tokio::test]
    async fn an_image_belongs_to_the_namespace_and_what_is_written_to_the_host() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounts need root");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["low:er", "base", "upper", "work"] {
            fs::create_dir(directory.path().join(name)).expect("mkdir");
        }
        let path = |name: &str| directory.path().join(name).display().to_string();
        fs::write(path("low:er/of-root"), "x").expect("write");
        fs::write(path("base/of-user"), "x").expect("write");
        chown(path("base/of-user"), Some(1000), Some(1000)).expect("chown");
        chown(path("upper"), Some(100_000), Some(100_000)).expect("chown");

        let mount = Mount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                "uidmap=0:100000:65536".into(),
                "gidmap=0:100000:65536".into(),
                format!("lowerdir={}:{}", path("low:er").replace(':', r"\:"), path("base")),
                format!("upperdir={}", path("upper")),
                format!("workdir={}", path("work")),
            ],
        };
        let plan = plan::plan_rootfs(&[mount], None).expect("is planned");
        let root = directory.path().join("share");
        let host = HostThread::start(prepare(root.clone())).expect("the namespace is prepared");
        let share = ShareRoot::new(root);
        rootfs::attach(&host, &share, "web", &plan).await.expect("attaches");
        let (exported, layers) = (share.exported().join("web/rootfs"), share.layers().join("web"));
        let seen = host.run(move || {
            fs::write(exported.join("written"), "x")?;
            chown(exported.join("written"), Some(100_033), Some(100_033))?;
            anyhow::ensure!(!layers.exists(), "the layers still have names");
            let owner = |name: &str| Ok::<_, anyhow::Error>(fs::metadata(exported.join(name))?.uid());
            Ok((owner("of-root")?, owner("of-user")?, owner("written")?, owner(".")?))
        });
        assert_eq!(seen.await.expect("reads"), (100_000, 101_000, 100_033, 100_000));
        rootfs::detach(&host, &share, "web").await.expect("detaches");
        let owner = |name: &str| fs::metadata(directory.path().join(name)).expect("is there").uid();
        assert_eq!((owner("low:er/of-root"), owner("base/of-user"), owner("upper/written")), (0, 1000, 100_033));
    }
}
