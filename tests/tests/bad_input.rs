//! Whatever is wrong is told in one sentence that reaches `crictl`, and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bulkhead_tests::command::Run;
use bulkhead_tests::config::Bulkhead;
use bulkhead_tests::container::ContainerSpec;
use bulkhead_tests::floor;
use bulkhead_tests::mounts::{HostMount, propagation};
use bulkhead_tests::pod::{self, PodSpec, namespace_mode};
use bulkhead_tests::row::{BULKHEAD, Context, Row};
use bulkhead_tests::suite;
use bulkhead_tests::tools::Version;
use serde_json::json;

const ROWS: &[Row] = &[
    Row::alone("accel = kvm without hardware virtualisation", no_kvm),
    Row::alone("a kernel that does not exist", missing_kernel),
    Row::alone("a kernel that is not one", broken_kernel),
    Row::alone("an initramfs that does not exist", missing_initramfs),
    Row::alone("an initramfs that is not one", broken_initramfs),
    Row::alone("an initramfs without an agent is told with the guest's console", initramfs_without_agent),
    Row::alone("a QEMU that does not exist", missing_qemu),
    Row::alone("a QEMU that fails", broken_qemu),
    Row::alone("a virtiofsd that does not exist", missing_virtiofsd),
    Row::alone("a virtiofsd that fails", broken_virtiofsd),
    Row::alone("a vsock helper that does not exist", missing_vsock_helper),
    Row::alone("a vsock helper that fails", broken_vsock_helper),
    Row::alone("an unknown key in the configuration", unknown_key),
    Row::alone("a configuration that is not TOML", not_toml),
    Row::alone("a configuration that does not exist", missing_config),
    Row::alone("a value in the configuration out of bounds", value_out_of_bounds),
    Row::alone("an unknown annotation", unknown_annotation),
    Row::alone("an annotation with a bad value", bad_annotation),
    Row::alone("an annotation that the administrator did not allow", refused_annotation),
    Row::alone("a pod in the host's network", host_network),
    Row::alone("a pod in the host's IPC namespace", host_ipc),
    Row::in_pod("a mount source that has gone", missing_mount_source),
    Row::in_pod("a mount that is to carry mounts back to the host", bidirectional_mount),
    Row::alone("a spec that cannot be read", unreadable_spec),
    Row::alone("a command line that makes no sense", bad_command_line),
    Row::alone("after all that, a pod starts as ever", still_works),
];

fn main() -> ExitCode {
    suite::run(&[Version::V1_6, Version::V2_4], BULKHEAD, ROWS)
}

/// Fails unless `said` is one sentence that holds every one of `needles`.
fn check_sentence(said: &str, needles: &[&str]) -> Result<()> {
    let lower = said.to_lowercase();
    for needle in needles {
        ensure!(lower.contains(&needle.to_lowercase()), "{needle:?} is missing in {said:?}");
    }
    for noise in ["thread '", "backtrace", "RUST_", ".rs:"] {
        ensure!(!said.contains(noise), "{noise:?} is in {said:?}");
    }
    Ok(())
}

/// Starts a pod with a configuration that must not work.
fn refused(context: &Context, settings: &Bulkhead, needles: &[&str]) -> Result<()> {
    context.node.configure_bulkhead("bad.toml", settings)?;
    refused_as_configured(context, PodSpec::new(), needles)
}

fn refused_as_configured(context: &Context, spec: PodSpec, needles: &[&str]) -> Result<()> {
    let (pod, output) = pod::try_start(&context.node, context.runtime.bad_handler(), spec)?;
    if let Some(pod) = pod {
        pod.remove_by_force()?;
        bail!("the pod was started");
    }
    check_sentence(&output.failure()?, needles)
}

/// A file with nothing sensible in it.
fn nonsense(context: &Context, name: &str) -> Result<String> {
    let path = context.scratch.join(name);
    fs::write(&path, "this is not what it is taken for\n".repeat(1000))?;
    Ok(path.display().to_string())
}

fn no_kvm(context: &Context) -> Result<()> {
    let flags = fs::read_to_string("/proc/cpuinfo")?;
    if flags.contains(" vmx") || flags.contains(" svm") {
        print!("(skipped: this machine has hardware virtualisation) ");
        return Ok(());
    }
    refused(
        context,
        &Bulkhead { accel: Some("kvm".into()), ..Bulkhead::default() },
        &["qemu.accel = ", "kvm", "accepted here are"],
    )
}

fn missing_kernel(context: &Context) -> Result<()> {
    let path = "/nowhere/vmlinux".to_owned();
    refused(context, &Bulkhead { kernel: Some(path.clone()), ..Bulkhead::default() }, &["kernel", &path])
}

fn broken_kernel(context: &Context) -> Result<()> {
    let path = nonsense(context, "vmlinux")?;
    refused(context, &Bulkhead { kernel: Some(path.clone()), ..Bulkhead::default() }, &["kernel", &path])
}

fn missing_initramfs(context: &Context) -> Result<()> {
    let path = "/nowhere/initramfs".to_owned();
    refused(context, &Bulkhead { initramfs: Some(path.clone()), ..Bulkhead::default() }, &["initramfs", &path])
}

fn broken_initramfs(context: &Context) -> Result<()> {
    let path = nonsense(context, "initramfs")?;
    refused(context, &Bulkhead { initramfs: Some(path.clone()), ..Bulkhead::default() }, &["initramfs", &path])
}

fn initramfs_without_agent(context: &Context) -> Result<()> {
    let path = context.scratch.join("initramfs");
    fs::write(&path, floor::archive(&[floor::Entry::directory("dev")])?)?;
    let settings = Bulkhead { initramfs: Some(path.display().to_string()), ..Bulkhead::default() };
    refused(context, &settings, &["Kernel panic"])
}

fn missing_qemu(context: &Context) -> Result<()> {
    let path = "/nowhere/qemu".to_owned();
    refused(context, &Bulkhead { qemu: Some(path.clone()), ..Bulkhead::default() }, &[&path])
}

fn broken_qemu(context: &Context) -> Result<()> {
    refused(context, &Bulkhead { qemu: Some("/bin/false".into()), ..Bulkhead::default() }, &["qemu"])
}

fn missing_virtiofsd(context: &Context) -> Result<()> {
    let path = "/nowhere/virtiofsd".to_owned();
    refused(context, &Bulkhead { virtiofsd: Some(path.clone()), ..Bulkhead::default() }, &[&path])
}

fn broken_virtiofsd(context: &Context) -> Result<()> {
    refused(context, &Bulkhead { virtiofsd: Some("/bin/false".into()), ..Bulkhead::default() }, &["virtiofsd"])
}

/// The helper is only used where the kernel has no vhost-vsock.
fn vsock_helper_refused(context: &Context, path: &str, needle: &str) -> Result<()> {
    if Path::new("/dev/vhost-vsock").exists() {
        print!("(skipped: this machine has vhost-vsock) ");
        return Ok(());
    }
    refused(context, &Bulkhead { vsock_helper: Some(path.into()), ..Bulkhead::default() }, &[needle])
}

fn missing_vsock_helper(context: &Context) -> Result<()> {
    vsock_helper_refused(context, "/nowhere/bulkhead-vsock", "/nowhere/bulkhead-vsock")
}

fn broken_vsock_helper(context: &Context) -> Result<()> {
    vsock_helper_refused(context, "/bin/false", "vsock")
}

fn unknown_key(context: &Context) -> Result<()> {
    let settings = Bulkhead { extra: "colour = \"teal\"".into(), ..Bulkhead::default() };
    refused(context, &settings, &["bad.toml", "colour"])
}

fn not_toml(context: &Context) -> Result<()> {
    refused(context, &Bulkhead { extra: "this is = = not".into(), ..Bulkhead::default() }, &["bad.toml", "line 1"])
}

fn missing_config(context: &Context) -> Result<()> {
    fs::remove_file(context.node.layout.root.join("bad.toml"))?;
    let result = refused_as_configured(context, PodSpec::new(), &["bad.toml", "does not exist"]);
    context.node.configure_bulkhead("bad.toml", &Bulkhead::default())?;
    result
}

fn value_out_of_bounds(context: &Context) -> Result<()> {
    refused(context, &Bulkhead { extra: "vcpus = 0".into(), ..Bulkhead::default() }, &["vcpus", "0", "1 to"])
}

fn annotation(context: &Context, key: &str, value: &str, allowed: Option<Vec<String>>, needles: &[&str]) -> Result<()> {
    context.node.configure_bulkhead("bad.toml", &Bulkhead { allowed_annotations: allowed, ..Bulkhead::default() })?;
    refused_as_configured(context, PodSpec::new().set(&format!("/annotations/bulkhead.io~1{key}"), value), needles)
}

fn unknown_annotation(context: &Context) -> Result<()> {
    annotation(context, "kernel-params", "quiet", None, &["bulkhead.io/kernel-params", "bulkhead.io/vcpus"])
}

fn bad_annotation(context: &Context) -> Result<()> {
    annotation(context, "vcpus", "many", None, &["bulkhead.io/vcpus", "many", "1 to 255"])
}

fn refused_annotation(context: &Context) -> Result<()> {
    annotation(context, "vcpus", "2", Some(Vec::new()), &["bulkhead.io/vcpus", "not allowed"])
}

fn host_network(context: &Context) -> Result<()> {
    context.node.configure_bulkhead("bad.toml", &Bulkhead::default())?;
    let spec = PodSpec::new()
        .set("/linux/security_context/namespace_options/network", namespace_mode::NODE)
        .set("/hostname", "");
    refused_as_configured(context, spec, &["host", "network"])
}

fn host_ipc(context: &Context) -> Result<()> {
    context.node.configure_bulkhead("bad.toml", &Bulkhead::default())?;
    let spec = PodSpec::new().set("/linux/security_context/namespace_options/ipc", namespace_mode::NODE);
    refused_as_configured(context, spec, &["host", "hostIPC"])
}

fn missing_mount_source(context: &Context, pod: &pod::Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    fs::create_dir(&directory)?;
    let container = pod.create(ContainerSpec::idle().mount(&directory, "/data", false))?;
    fs::remove_dir(&directory)?;
    let said = container.try_start()?.failure()?;
    check_sentence(&said, &[&directory.display().to_string()])?;
    container.remove()
}

fn bidirectional_mount(context: &Context, pod: &pod::Pod) -> Result<()> {
    let directory = context.scratch.join("data");
    let _base = HostMount::shared_tmpfs(&directory)?;
    let mount = json!({"host_path": directory, "container_path": "/data", "propagation": propagation::BIDIRECTIONAL});
    let container = pod.create(ContainerSpec::idle().push("mounts", mount))?;
    let said = container.try_start()?.failure()?;
    check_sentence(&said, &["mount at", "/data", "propagation rshared", "Bidirectional", "accepted are", "rslave"])?;
    container.remove()
}

/// Runs the shim by hand, as containerd would, in `bundle`.
fn shim(context: &Context, bundle: &Path, args: &[&str]) -> Run {
    let program = context.node.layout.program("containerd-shim-bulkhead-v2");
    let script = "cd \"$1\" && shift && exec \"$@\"";
    Run::new("/bin/sh").args(["-c", script, "sh"]).arg(bundle).arg(program).args(args).deadline(Duration::from_secs(20))
}

fn unreadable_spec(context: &Context) -> Result<()> {
    let id = "unreadable";
    context.node.remember(&context.node.name, id);
    let socket = context.node.layout.socket.display().to_string();
    let args =
        ["-namespace", &context.node.name, "-id", id, "-address", &socket, "-publish-binary", "/bin/true", "start"];
    fs::write(context.scratch.join("config.json"), "{\"ociVersion\": ")?;
    let output = shim(context, &context.scratch, &args).output()?;
    // containerd shows whatever came on either stream.
    let said = format!("{}{}", output.text(), output.stderr);
    ensure!(output.code != 0, "the shim started and said {said}");
    check_sentence(&said, &["config.json"])?;
    ensure!(said.trim().lines().count() == 1, "more than a line: {said}");
    Ok(())
}

fn bad_command_line(context: &Context) -> Result<()> {
    for (args, needle) in [(&["-colour", "teal", "start"][..], "colour"), (&["dance"][..], "dance")] {
        let output = shim(context, &context.scratch, args).output()?;
        let said = format!("{}{}", output.text(), output.stderr);
        ensure!(output.code != 0, "the shim took {args:?} and said {said}");
        check_sentence(&said, &[needle])?;
    }
    Ok(())
}

fn still_works(context: &Context) -> Result<()> {
    context.node.configure_bulkhead("bad.toml", &Bulkhead::default())?;
    let pod = pod::Pod::start(&context.node, context.runtime.bad_handler(), PodSpec::new())?;
    let (exit, _) = pod.run(ContainerSpec::new(&["true"]))?.finish(Duration::from_secs(20))?;
    ensure!(exit.code == 0, "exit {exit:?}");
    pod.remove()
}
