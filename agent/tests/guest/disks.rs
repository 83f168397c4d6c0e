//! Root file systems on disks.

use bulkhead_proto::agent as api;

use crate::machine::{Disk, Machine};
use crate::requests::{busybox_at, create, delete, kill, process, run, sandbox, spec, start};

/// Makes an ext4 image that holds what is below `content`.
fn ext4(image: &std::path::Path, content: &std::path::Path) {
    std::fs::File::create(image).and_then(|file| file.set_len(64 << 20)).expect("image");
    let made = std::process::Command::new("/sbin/mkfs.ext4").args(["-q", "-d"]).arg(content).arg(image).status();
    assert!(made.expect("mkfs.ext4, of e2fsprogs").success());
}

fn disk_mount(serial: &str, target: &str) -> api::GuestMount {
    api::GuestMount {
        source: Some(api::guest_mount::Source::DeviceSerial(serial.into())),
        target: target.into(),
        fstype: "ext4".into(),
        ..api::GuestMount::default()
    }
}

#[tokio::test]
async fn a_rootfs_lies_on_a_disk_or_is_an_overlay_of_disks() {
    let images = tempfile::tempdir().expect("tempdir");
    let path = |name: &str| images.path().join(name);
    busybox_at(&path("content"));
    ext4(&path("whole"), &path("content"));
    ext4(&path("lower"), &path("content"));
    std::fs::create_dir_all(path("second/etc")).expect("mkdir");
    std::fs::write(path("second/etc/layer"), "second\n").expect("write");
    ext4(&path("middle"), &path("second"));
    std::fs::create_dir(path("empty")).expect("mkdir");
    ext4(&path("upper"), &path("empty"));
    let names = ["whole", "lower", "middle", "upper"];
    let files = names.map(&path);
    let disks: Vec<_> =
        names.iter().zip(&files).map(|(serial, image)| Disk { serial, image: image.as_path() }).collect();
    let Some(mut machine) = Machine::boot_with_disks(256, &disks).await else { return };
    sandbox(&mut machine).await;

    let mut on_disk = create("disk", &spec(process(&["sleep", "1000"])), api::Stdio::default());
    on_disk.rootfs = vec![disk_mount("whole", "/")];
    let mut on_layers = create("layers", &spec(process(&["sleep", "1000"])), api::Stdio::default());
    on_layers.rootfs = vec![
        api::GuestMount { options: vec!["ro".into()], ..disk_mount("lower", "/l0") },
        api::GuestMount { options: vec!["ro".into()], ..disk_mount("middle", "/l1") },
        disk_mount("upper", "/rw"),
        api::GuestMount {
            source: Some(api::guest_mount::Source::None(true)),
            target: "/".into(),
            fstype: "overlay".into(),
            options: ["lowerdir=/l1:/l0", "upperdir=/rw/upper", "workdir=/rw/work"].map(str::to_owned).to_vec(),
        },
    ];
    for (id, request, fstype) in [("disk", on_disk, "ext4"), ("layers", on_layers, "overlay")] {
        machine.client.create_container(request).await.expect("create");
        machine.client.start_process(start(id, "")).await.expect("start");
        let script = "grep ' / ' /proc/mounts; echo kept >/written; cat /written; grep -s . /etc/layer; true";
        let (status, said) = run(&mut machine, id, "look", process(&["sh", "-c", script])).await;
        assert_eq!(status, 0, "{said}");
        assert!(said.split_whitespace().nth(2) == Some(fstype), "{said}");
        assert_eq!(said.ends_with("kept\nsecond\n"), id == "layers", "{said}");
        kill(&mut machine, id, 9).await.expect("kill");
        assert_eq!(machine.exit(|_| ()).await.container_id, id);
        machine.client.delete(delete(id, "")).await.expect("delete");
    }
    machine.client.shutdown(api::ShutdownRequest {}).await.expect("shutdown");
    assert!(machine.powered_off().await);
    let kept = |image: &str, request: &str| {
        let output = std::process::Command::new("/sbin/debugfs").args(["-R", request]).arg(path(image)).output();
        String::from_utf8_lossy(&output.expect("debugfs, of e2fsprogs").stdout).into_owned()
    };
    assert_eq!(kept("whole", "cat /written"), "kept\n", "what was written lies on the disk");
    assert_eq!(kept("upper", "cat /upper/written"), "kept\n", "what was written lies on the upper disk");
}
