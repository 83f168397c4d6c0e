//! Volumes of every kind that a node without a storage provider has.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead_tests::cluster::NODE;
use bulkhead_tests::cluster::images::AGNHOST;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, container_status, wait_for};
use bulkhead_tests::loop_device::LoopDevice;
use serde_json::{Value, json};

use crate::life::{PAGE, ended, idle, script, with};
use crate::talk::{logs_of, sh_in, wait_event};

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("config maps, secrets, tokens and fields of the pod are files, and change with their source", refreshed),
    Row::new("an emptyDir is the group's, shared whole, in part or read-only, and outlives a container", empty_dir),
    Row::new("a pod over its limit of an emptyDir or of ephemeral storage is evicted", evicted),
    Row::new("a hostPath is of the kind asked for, shows changes and mounts, and is read-only where asked", host_path),
    Row::new("what is written to a claimed volume is there for the next pod", claims),
    Row::new("an image is a read-only volume, whole or in part", image),
    Row::new("an emptyDir in memory is shared, as large as asked, and counts for whoever fills it", in_memory),
    Row::new("a claimed block device is one in the pod, for all its containers, and read-only where asked", raw_block),
];

/// A directory of the node's for this row alone; the machine that runs the tests sees the same one.
pub fn host_directory(user: &User) -> Result<PathBuf> {
    let path = user.cluster.layout.root.join("rows").join(&user.namespace);
    fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    Ok(path)
}

fn object(kind: &str, name: &str, more: Value) -> Value {
    with(json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}), more)
}

/// The part of a container that mounts volumes.
pub fn mounts(mounts: Value) -> Value {
    json!({"volumeMounts": mounts})
}

fn refreshed(user: &User) -> Result<()> {
    let settings = |colour: &str| object("ConfigMap", "settings", json!({"data": {"colour": colour}}));
    let key = |word: &str| object("Secret", "key", json!({"stringData": {"word": word}}));
    user.apply(&settings("red"))?;
    user.apply(&key("one"))?;
    let shade = json!({"path": "shade", "fieldRef": {"fieldPath": "metadata.annotations['shade']"}});
    let memory = json!({"path": "memory", "resourceFieldRef": {"containerName": "main", "resource": "limits.memory"}});
    let item = json!({"key": "colour", "path": "deep/colour", "mode": 0o440});
    let token = json!({"serviceAccountToken": {"path": "token", "audience": "somebody", "expirationSeconds": 600}});
    let projected = json!({"defaultMode": 0o444, "sources": [
        {"configMap": {"name": "settings"}}, {"secret": {"name": "key"}}, {"downwardAPI": {"items": [memory]}}, token,
    ]});
    let main = json!({"resources": {"limits": {"memory": "64Mi"}}, "volumeMounts": [
        {"name": "settings", "mountPath": "/settings"}, {"name": "secret", "mountPath": "/secret"},
        {"name": "about", "mountPath": "/about"}, {"name": "all", "mountPath": "/all"},
        {"name": "settings", "mountPath": "/frozen", "subPath": "deep/colour"},
    ]});
    let spec = json!({
        "automountServiceAccountToken": false, "containers": [with(idle("main"), main)],
        "volumes": [
            {"name": "settings", "configMap": {"name": "settings", "items": [item]}},
            {"name": "secret", "secret": {"secretName": "key", "defaultMode": 0o400}},
            {"name": "about", "downwardAPI": {"items": [shade]}}, {"name": "all", "projected": projected},
        ],
    });
    let mut pod = user.manifest("reader", spec);
    pod["metadata"]["annotations"] = json!({"shade": "pale"});
    user.apply(&pod)?;
    user.ready("reader")?;
    let files = "/settings/deep/colour /secret/word /about/shade /all/colour /all/word /frozen";
    let read = || user.sh("reader", &format!("for file in {files}; do cat $file; echo; done"));
    let found = read()?;
    ensure!(found == "red\none\npale\nred\none\nred", "at first, {files} are {found:?}");
    let script =
        "stat -L -c %a /settings/deep/colour /secret/word /all/word; tr -cd . < /all/token; echo; cat /all/memory";
    let found = user.sh("reader", script)?;
    ensure!(found == "440\n400\n444\n..\n67108864", "modes, dots of the token and limit of memory are {found:?}");
    let found = user.sh("reader", "ls /var/run/secrets 2>/dev/null || echo none")?;
    ensure!(found == "none", "there is a token that nobody asked for: {found:?}");

    user.apply(&settings("blue"))?;
    user.apply(&key("two"))?;
    // The kubelet looks at a pod that has changed, and at every pod now and then.
    user.kubectl(&["annotate", "pod", "reader", "shade=dark", "--overwrite"]).success()?;
    wait_for("all files but the one mounted by itself to change", SOON, || {
        let found = read()?;
        ensure!(found == "blue\ntwo\ndark\nblue\ntwo\nred", "{files} are {found:?}");
        Ok(())
    })
}

fn empty_dir(user: &User) -> Result<()> {
    let writer = script("writer", "until test -e /tmp/end; do sleep 0.2; done; exit 1");
    let writer = with(writer, mounts(json!([{"name": "work", "mountPath": "/scratch"}])));
    let reader = json!({
        "env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "volumeMounts": [
            {"name": "work", "mountPath": "/part", "subPath": "parts/one"},
            {"name": "work", "mountPath": "/mine", "subPathExpr": "$(POD)/log"},
            {"name": "work", "mountPath": "/fixed", "readOnly": true},
        ],
    });
    let spec = json!({
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2345},
        "volumes": [{"name": "work", "emptyDir": {}}], "containers": [writer, with(idle("reader"), reader)],
    });
    user.ready_pod("sharing", spec)?;
    let said = sh_in(
        user,
        "sharing",
        "writer",
        "touch /scratch/new; stat -c '%u %g %a' /scratch; stat -c '%u %g' /scratch/new",
    )?;
    ensure!(said == "0 2345 2777\n1000 2345", "owners and modes are {said:?}");
    sh_in(user, "sharing", "reader", "echo part > /part/file; echo mine > /mine/file")?;
    let said = sh_in(user, "sharing", "writer", "cat /scratch/parts/one/file /scratch/sharing/log/file")?;
    ensure!(said == "part\nmine", "by the other container's paths, the files are {said:?}");
    let said = sh_in(user, "sharing", "reader", "cat /fixed/parts/one/file; touch /fixed/new 2>&1 || true")?;
    ensure!(said == "part\ntouch: /fixed/new: Read-only file system", "where it is read-only: {said:?}");
    // The container may end before the exec does, and takes it along.
    user.kubectl(&["exec", "sharing", "-c", "writer", "--", "touch", "/tmp/end"]).output()?;
    user.wait_pod("sharing", "to have its writer restarted", SOON, |pod| {
        let status = container_status(pod, "writer")?;
        ensure!(status["restartCount"] == 1 && status["ready"] == true, "its status is {status}");
        Ok(())
    })?;
    let said = sh_in(user, "sharing", "writer", "cat /scratch/parts/one/file; ls /tmp")?;
    ensure!(said == "part", "after a restart, the volume's file and /tmp are {said:?}");
    Ok(())
}

fn evicted(user: &User) -> Result<()> {
    let fill = |path: &str| script("main", &format!("dd if=/dev/zero of={path} bs=1M count=8; exec sleep 1000000"));
    let scratch = json!([{"name": "scratch", "emptyDir": {"sizeLimit": "4Mi"}}]);
    let filling = with(fill("/scratch/file"), mounts(json!([{"name": "scratch", "mountPath": "/scratch"}])));
    user.pod("full", json!({"volumes": scratch, "containers": [filling]}))?;
    let limits = json!({"resources": {"limits": {"ephemeral-storage": "4Mi"}}});
    user.pod("large", json!({"containers": [with(fill("/file"), limits)]}))?;
    for (name, reason) in [
        ("full", "Usage of EmptyDir volume \"scratch\" exceeds the limit \"4Mi\"."),
        ("large", "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi."),
    ] {
        // The kubelet measures volumes once a minute or two, unless it is told otherwise.
        let status = user.wait_pod(name, "to be evicted", Duration::from_mins(5), |pod| {
            ensure!(pod["status"]["phase"] == "Failed", "its status is {}", pod["status"]);
            Ok(pod["status"].clone())
        })?;
        let message = status["message"].as_str().unwrap_or_default().trim();
        ensure!(status["reason"] == "Evicted" && message == reason, "{name}: the status is {status}");
    }
    Ok(())
}

/// A tmpfs of the node's, unmounted with this value.
struct NodeMount<'a>(&'a User, String);

impl<'a> NodeMount<'a> {
    fn new(user: &'a User, path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        let path = path.display().to_string();
        user.cluster.inside(&["mount", "-t", "tmpfs", "none", &path]).success()?;
        Ok(Self(user, path))
    }
}

impl Drop for NodeMount<'_> {
    fn drop(&mut self) {
        // What stays is gone with the node.
        let _ = self.0.cluster.inside(&["umount", "--lazy", &self.1]).output();
    }
}

fn host_path(user: &User) -> Result<()> {
    let base = host_directory(user)?;
    let data = base.join("data");
    let _below = NodeMount::new(user, &data.join("below"))?;
    fs::create_dir(data.join("later"))?;
    fs::write(data.join("before"), "old\n")?;
    fs::write(base.join("file"), "one\n")?;
    let volume = |name: &str, kind: &str, path: &Path| json!({"name": name, "hostPath": {"path": path, "type": kind}});
    let absent = volume("absent", "Directory", &base.join("absent"));
    let wrong = with(idle("main"), mounts(json!([{"name": "absent", "mountPath": "/absent"}])));
    user.pod("wrong", json!({"volumes": [absent], "containers": [wrong]}))?;
    let main = mounts(json!([
        {"name": "data", "mountPath": "/data", "mountPropagation": "HostToContainer"},
        {"name": "data", "mountPath": "/top", "readOnly": true},
        {"name": "data", "mountPath": "/all", "readOnly": true, "recursiveReadOnly": "Enabled"},
        {"name": "file", "mountPath": "/etc/shown.conf"}, {"name": "made", "mountPath": "/made"},
    ]));
    let volumes = [
        volume("data", "Directory", &data),
        volume("file", "File", &base.join("file")),
        volume("made", "DirectoryOrCreate", &base.join("made/deep")),
    ];
    user.ready_pod("host", json!({"volumes": volumes, "containers": [with(idle("main"), main)]}))?;
    fs::write(data.join("new"), "new\n")?;
    let said = user.sh("host", "cat /data/before /data/new /etc/shown.conf")?;
    ensure!(said == "old\nnew\none", "the node's files are {said:?}");
    user.sh("host", "mkdir /data/sub; echo in > /data/sub/file; echo two > /etc/shown.conf; echo x > /made/file")?;
    for (path, text) in [("data/sub/file", "in\n"), ("file", "two\n"), ("made/deep/file", "x\n")] {
        let found = fs::read_to_string(base.join(path)).with_context(|| format!("read {path}"))?;
        ensure!(found == text, "{path} on the node is {found:?}");
    }
    let touching = "for file in /top/a /top/below/b /all/c /all/below/d; do touch $file 2>/dev/null && echo $file; \
                    done; true";
    let said = user.sh("host", touching)?;
    ensure!(said == "/top/below/b", "of the read-only mounts, these could be written to: {said:?}");

    let later = NodeMount::new(user, &data.join("later"))?;
    user.cluster.inside(&["touch", &data.join("later/flag").display().to_string()]).success()?;
    let said = user.sh("host", "ls /data/later")?;
    ensure!(said == "flag", "in the node's new mount, the pod sees {said:?}");
    let said = user.sh("host", "ls /top/later")?;
    ensure!(said.is_empty(), "the node's new mount is also where it was not asked for: {said:?}");
    drop(later);
    wait_for("the node's mount to be gone from the pod", SOON, || {
        let said = user.sh("host", "ls /data/later")?;
        ensure!(said.is_empty(), "there still is {said:?}");
        Ok(())
    })?;
    wait_event(user, "wrong", "FailedMount", "absent is not a directory")
}

/// A volume of the cluster, and a claim of the row's that it is bound to; the volume is deleted with this value.
pub struct Claimed<'a>(&'a User, String);

impl<'a> Claimed<'a> {
    fn new(user: &'a User, name: &str, mode: &str, source: Value) -> Result<Self> {
        let volume = format!("{}-{name}", user.namespace);
        let size = json!({"storage": "8Mi"});
        let common = json!({"storageClassName": "", "volumeMode": mode, "accessModes": ["ReadWriteOnce"]});
        let here = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]});
        let spec = json!({
            "capacity": size, "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": user.namespace, "name": name},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        });
        let spec = with(with(spec, common.clone()), source);
        user.apply(&object("PersistentVolume", &volume, json!({"spec": spec})))?;
        let claimed = Self(user, volume);
        let spec = with(json!({"volumeName": claimed.1, "resources": {"requests": size}}), common);
        user.apply(&object("PersistentVolumeClaim", name, json!({"spec": spec})))?;
        Ok(claimed)
    }

    /// The volume of that name, with whatever claims it.
    pub fn of(user: &'a User, volume: &str) -> Self {
        Self(user, volume.to_owned())
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        // It goes when its claim has, which goes with the namespace.
        let _ = self.0.kubectl(&["delete", "persistentvolume", &self.1, "--wait=false"]).output();
    }
}

fn claim(name: &str) -> Value {
    json!({"name": name, "persistentVolumeClaim": {"claimName": name}})
}

fn claims(user: &User) -> Result<()> {
    let base = host_directory(user)?;
    let (plain, local) = (base.join("plain"), base.join("local"));
    fs::create_dir(&plain).and_then(|()| fs::create_dir(&local))?;
    let _plain = Claimed::new(user, "plain", "Filesystem", json!({"hostPath": {"path": plain}}))?;
    let _local = Claimed::new(user, "local", "Filesystem", json!({"local": {"path": local}}))?;
    let spec = |text: &str| {
        let both = json!([{"name": "plain", "mountPath": "/plain"}, {"name": "local", "mountPath": "/local"}]);
        let main = with(script("main", text), mounts(both));
        json!({"restartPolicy": "Never", "volumes": [claim("plain"), claim("local")], "containers": [main]})
    };
    let pod = user.finished_pod("first", spec("echo kept > /plain/file && echo kept too > /local/file"))?;
    ensure!(pod["status"]["phase"] == "Succeeded", "the status is {}", pod["status"]);
    user.delete("pod", "first")?;
    user.finished_pod("second", spec("cat /plain/file /local/file"))?;
    let said = user.logs("second")?;
    ensure!(said == "kept\nkept too", "the next pod finds {said:?}");
    Ok(())
}

fn image(user: &User) -> Result<()> {
    let text = "ls -d /image/agnhost; cat /page/index.html; touch /image/new 2>&1 || true";
    let both = json!([
        {"name": "other", "mountPath": "/image"}, {"name": "other", "mountPath": "/page", "subPath": "www"},
    ]);
    let volumes = json!([{"name": "other", "image": {"reference": AGNHOST}}]);
    let main = with(script("main", text), mounts(both));
    user.finished_pod("looker", json!({"restartPolicy": "Never", "volumes": volumes, "containers": [main]}))?;
    let said = logs_of(user, "looker", "main")?;
    let lines: Vec<_> = said.lines().collect();
    let refused = "touch: /image/new: Read-only file system";
    ensure!(lines == ["/image/agnhost", PAGE, refused], "in the image there is {said:?}");
    Ok(())
}

/// A block device of the node's for this row alone.
pub fn loop_device(user: &User) -> Result<LoopDevice<'_>> {
    let file = host_directory(user)?.join("disk");
    LoopDevice::new(&file, move |args| user.cluster.inside(&[&["losetup"][..], args].concat()))
}

fn raw_block(user: &User) -> Result<()> {
    let device = loop_device(user)?;
    let _claimed = Claimed::new(user, "disk", "Block", json!({"local": {"path": device.path}}))?;
    let devices = json!({"volumeDevices": [{"name": "disk", "devicePath": "/dev/data"}]});
    let on = |container: Value| with(container, devices.clone());
    // Has it open all the time, so that what was read of it is remembered.
    let peer = script("peer", "exec 3</dev/data; head -c 6 <&3; exec sleep 1000000");
    user.ready_pod("disk", json!({"volumes": [claim("disk")], "containers": [on(idle("main")), on(peer)]}))?;
    let said = user.sh("disk", "test -b /dev/data && head -c 6 /dev/data; echo; blockdev --getsize64 /dev/data")?;
    ensure!(said == "before\n8388608", "of the device, the pod sees {said:?}");
    user.sh("disk", "echo after | dd of=/dev/data bs=512 seek=1 conv=sync,fsync,notrunc 2>/dev/null")?;
    device.written("after\n")?;
    let read = "dd if=/dev/data bs=512 skip=1 count=1 2>/dev/null | head -n 1";
    let said = sh_in(user, "disk", "peer", read)?;
    ensure!(said == "after", "where one container has written, the other sees {said:?}");

    let fixed = json!([{"name": "disk", "persistentVolumeClaim": {"claimName": "disk", "readOnly": true}}]);
    user.ready_pod("reader", json!({"volumes": fixed, "containers": [on(idle("main"))]}))?;
    let write = "echo never | dd of=/dev/data bs=512 seek=1 conv=sync,notrunc 2>&1; true";
    let said = user.sh("reader", &format!("{read}; {write}"))?;
    ensure!(said.starts_with("after\n") && said.contains("Operation not permitted"), "who may only read says {said:?}");
    device.written("after\n")?;
    user.delete("pod", "reader")?;
    user.delete("pod", "disk")
}

fn in_memory(user: &User) -> Result<()> {
    let volume = |name: &str, limit: &str| json!({"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": limit}});
    let part = |container: Value, memory: &str| {
        let both = json!([{"name": "small", "mountPath": "/small"}, {"name": "large", "mountPath": "/large"}]);
        with(with(container, mounts(both)), json!({"resources": {"limits": {"memory": memory}}}))
    };
    let fill = "until test -e /small/go; do sleep 0.2; done; exec dd if=/dev/zero of=/large/file bs=1M count=64";
    let mut peer = part(idle("peer"), "32Mi");
    let below = json!([{"name": "small", "mountPath": "/below", "subPath": "a/b", "readOnly": true}]);
    peer["volumeMounts"].as_array_mut().context("it has mounts")?.extend(below.as_array().cloned().unwrap_or_default());
    let containers = [part(idle("main"), "96Mi"), peer, part(script("greedy", fill), "32Mi")];
    let volumes = [volume("small", "16Mi"), volume("large", "100Mi")];
    let context = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2345});
    let pod = json!({
        "restartPolicy": "Never", "securityContext": context, "volumes": volumes, "containers": containers,
    });
    user.ready_pod("swift", pod)?;
    let said = user.sh("swift", "stat -f -c %T /small /large; df -k /small /large | awk '/large|small/ {print $2}'")?;
    ensure!(said == "tmpfs\ntmpfs\n16384\n102400", "kinds and sizes are {said:?}");
    let said = user.sh("swift", "stat -c '%u %g %a' /small /small/a /small/a/b; echo deep > /small/a/b/file")?;
    ensure!(said == "0 2345 3777\n0 2345 3777\n0 2345 3777", "owners and modes are {said:?}");
    let said = sh_in(user, "swift", "peer", "cat /below/file; touch /below/new 2>&1 || true")?;
    ensure!(said == "deep\ntouch: /below/new: Read-only file system", "in a part of it there is {said:?}");
    let said =
        user.sh("swift", "dd if=/dev/zero of=/small/fill bs=1M count=20 2>&1; wc -c < /small/fill; rm /small/fill")?;
    ensure!(said.contains("No space left on device") && said.ends_with("\n16773120"), "filling it, dd said {said:?}");
    user.sh("swift", "echo note > /small/note")?;
    let said = sh_in(user, "swift", "peer", "cat /small/note; touch /small/go")?;
    ensure!(said == "note", "the other container finds {said:?}");
    let end = user.wait_pod("swift", "to have lost who filled its memory", SOON, |pod| ended(pod, "greedy"))?;
    ensure!(end == (137, "OOMKilled".into()), "who wrote more than its own memory ended with {end:?}");
    let main = container_status(&user.get(&["pod", "swift"])?, "main")?;
    ensure!(main["ready"] == true, "the others are the worse for it: {main}");
    Ok(())
}
