//! The command line end to end: this test runs itself as the shim, with a server that only describes itself.
//!
//! It has a `main` of its own, since the program under test re-executes itself by its path.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use bulkhead_shim::bootstrap::{self, ServeConfig};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use serde_json::{Value, json};

/// Set for the tests' own runs of this binary, so that the words of a test runner are not taken for flags.
const AS_SHIM: &str = "-namespace";

/// Name and body of a test.
type Test = (&'static str, fn(&Bed));

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == AS_SHIM || word == "-info" || word == "-v") {
        return bootstrap::main(describe_and_wait, tear_down);
    }
    let tests: [Test; 16] = [
        ("an_old_caller_gets_the_bare_address_of_a_server_that_answers", an_old_caller),
        ("a_new_caller_gets_a_message", a_new_caller),
        ("the_server_keeps_nothing_of_its_caller", the_server_keeps_nothing_of_its_caller),
        ("start_of_a_sandbox_twice_names_one_server", start_twice),
        ("many_starts_at_once_make_one_server", many_starts_at_once),
        ("a_container_of_a_pod_gets_the_address_of_its_sandbox", a_container_of_a_pod),
        ("a_container_whose_sandbox_is_gone_is_refused", a_container_whose_sandbox_is_gone),
        ("a_dead_socket_is_replaced", a_dead_socket_is_replaced),
        ("mistakes_are_one_line_and_leave_no_socket", mistakes),
        ("stdin_that_stays_open_is_an_error", stdin_that_stays_open),
        ("delete_of_a_member_leaves_the_server_alone", delete_of_a_member),
        ("delete_of_a_sandbox_removes_the_pod", delete_of_a_sandbox),
        ("a_sandbox_without_a_spec_groups_its_containers_and_is_deleted", sandbox_without_a_spec),
        ("delete_of_a_member_of_a_dead_pod_removes_the_pod", delete_of_a_member_of_a_dead_pod),
        ("delete_may_be_repeated_and_unmounts_the_rootfs", delete_is_idempotent),
        ("info_and_version_need_nothing", info_and_version),
    ];
    // As the standard harness does it: any word that is no flag selects by name.
    if words.iter().any(|word| word == "--list") {
        for (name, _) in &tests {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let chosen = |name: &str| {
        let mut filters = words.iter().filter(|word| !word.starts_with('-')).peekable();
        filters.peek().is_none() || filters.any(|filter| name.contains(filter.as_str()))
    };
    for (name, test) in tests.into_iter().filter(|(name, _)| chosen(name)) {
        let bed = Bed::new();
        test(&bed);
        println!("test {name} ... ok");
    }
    ExitCode::SUCCESS
}

/// The server under test: tells each caller what it is, and ends when a caller sends `quit`.
async fn describe_and_wait(config: ServeConfig) -> anyhow::Result<()> {
    let open_files: Vec<String> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    let environment: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
    let about = json!({
        "pid": std::process::id(),
        "session": nix::unistd::getsid(None)?.as_raw(),
        "cwd": std::env::current_dir()?,
        "files": open_files,
        "environment": environment,
        "sandbox_dir": config.sandbox_dir,
        "sandbox_id": config.sandbox_id,
        "namespace": config.namespace,
        "bundle": config.bundle,
        "ttrpc_address": config.ttrpc_address,
        "vcpus": config.config.vcpus,
        "options_given": config.options_given,
        "oom_score_adj": fs::read_to_string("/proc/self/oom_score_adj")?.trim(),
    });
    tracing::info!(sandbox_id = config.sandbox_id, "serving");
    fs::create_dir_all(&config.sandbox_dir)?;
    fs::write(config.sandbox_dir.join("pid"), std::process::id().to_string())?;
    let about = about.to_string();
    tokio::task::spawn_blocking(move || {
        loop {
            let (mut stream, _) = config.listener.accept()?;
            // Who only looks whether somebody answers is gone by now.
            let mut word = String::new();
            let talk = stream
                .write_all(about.as_bytes())
                .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
                .and_then(|()| stream.read_to_string(&mut word));
            drop(talk);
            if word == "quit" {
                return Ok(());
            }
        }
    })
    .await?
}

/// Stands for the removal of a pod: kills the server by its journal, then removes the directory.
fn tear_down(sandbox_dir: &Path) -> anyhow::Result<()> {
    let pid: i32 = fs::read_to_string(sandbox_dir.join("pid"))?.parse()?;
    let pid = nix::unistd::Pid::from_raw(pid);
    let deadline = Instant::now() + Duration::from_secs(5);
    while nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok() && !is_zombie(pid.as_raw()) {
        anyhow::ensure!(Instant::now() < deadline, "the server does not die");
    }
    Ok(fs::remove_dir_all(sandbox_dir)?)
}

/// Killed, and not yet reaped by whoever inherited it.
fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Directories of one test, and the servers it started.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("makes a directory") }
    }

    /// A bundle as containerd makes it; `annotations` are those of its spec, `None` for no spec.
    fn bundle(&self, id: &str, annotations: Option<Value>) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).expect("makes a bundle");
        if let Some(annotations) = annotations {
            let spec = json!({"ociVersion": "1.1.0", "annotations": annotations});
            fs::write(bundle.join("config.json"), spec.to_string()).expect("writes a spec");
        }
        bundle
    }

    /// Unlike containerd's, so that the socket is one of this test alone.
    fn grpc_address(&self) -> String {
        self.dir.path().join("containerd.sock").display().to_string()
    }

    fn shim(&self, id: &str, bundle: &Path) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("has a path"));
        command
            .args([
                AS_SHIM,
                "ns",
                "-address",
                &self.grpc_address(),
                "-publish-binary",
                "/usr/bin/containerd",
                "-id",
                id,
            ])
            .env("TTRPC_ADDRESS", format!("{}.ttrpc", self.grpc_address()))
            .stdin(Stdio::null())
            .current_dir(bundle);
        command
    }

    fn start(&self, id: &str, bundle: &Path, stdin: &[u8]) -> Output {
        let mut child = self
            .shim(id, bundle)
            .arg("start")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("runs");
        child.stdin.take().expect("is a pipe").write_all(stdin).expect("takes its input");
        // Comes back only when the last holder of both pipes has closed them, as in containerd.
        child.wait_with_output().expect("ends")
    }

    /// Starts a sandbox in the old way and returns its address.
    fn sandbox(&self, id: &str) -> (PathBuf, String) {
        let bundle = self.bundle(id, Some(json!({})));
        let output = self.start(id, &bundle, b"");
        (bundle, address_of(&output))
    }

    /// A container of a pod, as far as the service would have brought it: its bundle links to the run state.
    fn member(&self, id: &str, sandbox_id: &str) -> PathBuf {
        let bundle = self.bundle(id, Some(member(sandbox_id)));
        address_of(&self.start(id, &bundle, b""));
        let sandbox_dir = fs::read_link(self.dir.path().join(sandbox_id).join("bulkhead")).expect("is linked");
        bulkhead_shim::paths::link_bundle(&bundle, &sandbox_dir).expect("links");
        bundle
    }

    fn delete(&self, id: &str, bundle: &Path) -> DeleteResponse {
        let output = self.shim(id, bundle).arg("-bundle").arg(bundle).arg("delete").output().expect("runs");
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout).expect("decodes")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let bundles = fs::read_dir(self.dir.path()).into_iter().flatten().flatten();
        for address in bundles.filter_map(|bundle| fs::read_to_string(bundle.path().join("address")).ok()) {
            if let Ok(mut stream) = UnixStream::connect(socket(&address)) {
                stream.write_all(b"quit").expect("is told");
                stream.shutdown(std::net::Shutdown::Write).expect("is told");
                stream.read_to_end(&mut Vec::new()).expect("answers");
            }
            drop(fs::remove_file(socket(&address)));
        }
        // What a pod's end or `delete` removes in earnest; a test that ends with a living server has it left.
        for bundle in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if let Ok(sandbox_dir) = fs::read_link(bundle.path().join("bulkhead")) {
                drop(fs::remove_dir_all(sandbox_dir));
            }
        }
    }
}

fn socket(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").expect("is a Unix socket"))
}

fn address_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("is text")
}

fn ask(address: &str) -> Value {
    let mut stream = UnixStream::connect(socket(address)).expect("answers");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("has a deadline");
    stream.shutdown(std::net::Shutdown::Write).expect("half closes");
    let mut about = String::new();
    stream.read_to_string(&mut about).expect("describes itself");
    serde_json::from_str(&about).expect("is JSON")
}

fn said(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).expect("is text");
    assert_eq!(text.matches('\n').count(), 1, "one line: {text}");
    text.trim_end().to_owned()
}

fn options(body: &str) -> Any {
    let mut value = vec![0x1a, u8::try_from(body.len()).expect("is short")];
    value.extend_from_slice(body.as_bytes());
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
}

fn an_old_caller(bed: &Bed) {
    let bundle = bed.bundle("a", Some(json!({})));
    let stdin = options("vcpus = 7\nTypeUrl = \"x\"").write_to_bytes().expect("encodes");
    let begun = Instant::now();
    let address = address_of(&bed.start("a", &bundle, &stdin));
    println!("start took {:?}", begun.elapsed());
    assert!(address.starts_with("unix:///run/containerd/s/") && !address.ends_with('\n'), "{address}");
    assert_eq!(fs::read_to_string(bundle.join("address")).expect("is there"), address);
    assert_eq!(fs::metadata(socket(&address)).expect("is there").permissions().mode() & 0o777, 0o600);
    let about = ask(&address);
    assert_eq!((&about["sandbox_id"], &about["namespace"], &about["vcpus"]), (&json!("a"), &json!("ns"), &json!(7)));
    assert_eq!(about["ttrpc_address"], json!(format!("{}.ttrpc", bed.grpc_address())));
    assert_eq!(about["options_given"], json!(true));
}

fn a_new_caller(bed: &Bed) {
    let bundle = bed.bundle("a", None);
    let params = BootstrapParams {
        instance_id: "a".into(),
        namespace: "ns".into(),
        containerd_version: "v2.4.2".into(),
        containerd_grpc_address: bed.grpc_address(),
        containerd_ttrpc_address: "/run/x.ttrpc".into(),
        extensions: vec![Extension { value: MessageField::some(options("vcpus = 5")), ..Extension::default() }],
        socket_dir: Some(bed.dir.path().join("s").display().to_string()),
        ..BootstrapParams::default()
    };
    let output = bed.start("a", &bundle, &params.write_to_bytes().expect("encodes"));
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let result = BootstrapResult::parse_from_bytes(&output.stdout).expect("decodes");
    assert_eq!((result.version, &*result.protocol), (3, "ttrpc"));
    assert!(socket(&result.address).starts_with(bed.dir.path().join("s")));
    let about = ask(&result.address);
    assert_eq!((&about["vcpus"], &about["ttrpc_address"]), (&json!(5), &json!("/run/x.ttrpc")));
}

fn the_server_keeps_nothing_of_its_caller(bed: &Bed) {
    let (bundle, address) = bed.sandbox("a");
    let about = ask(&address);
    assert_eq!(about["session"], about["pid"], "it leads a session of its own");
    assert_eq!(about["cwd"], json!(bundle));
    let files: Vec<&str> = about["files"].as_array().expect("is a list").iter().filter_map(Value::as_str).collect();
    assert!(files.iter().all(|file| !file.starts_with("pipe:")), "{files:?}");
    assert_eq!(files.iter().filter(|file| **file == "/dev/null").count(), 3, "{files:?}");
    let mut environment: Vec<_> = about["environment"].as_array().expect("is a list").clone();
    environment.retain(|name| !["PATH", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"].map(Value::from).contains(name));
    assert!(environment.is_empty(), "{environment:?}");
    let own: i32 = fs::read_to_string("/proc/self/oom_score_adj").expect("reads").trim().parse().expect("is a number");
    assert_eq!(about["oom_score_adj"], json!((own + 1).min(1000).to_string()));
    let target = fs::read_link(bundle.join("bulkhead")).expect("is linked");
    assert_eq!(about["sandbox_dir"], json!(target));
    let (place, digits) = target.to_str().expect("is text").rsplit_once('-').expect("has digits");
    assert_eq!((place, digits), ("/run/bulkhead/a", &address.rsplit_once('/').expect("is a path").1[..6]));
}

fn start_twice(bed: &Bed) {
    let (bundle, address) = bed.sandbox("a");
    let pid = ask(&address)["pid"].clone();
    assert_eq!(address_of(&bed.start("a", &bundle, b"")), address);
    assert_eq!(ask(&address)["pid"], pid);
}

fn many_starts_at_once(bed: &Bed) {
    let bundle = bed.bundle("a", Some(json!({})));
    let addresses: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(|| address_of(&bed.start("a", &bundle, b"")))).collect();
        threads.into_iter().map(|thread| thread.join().expect("does not panic")).collect()
    });
    assert!(addresses.iter().all(|address| *address == addresses[0]), "{addresses:?}");
    assert_eq!(ask(&addresses[0])["sandbox_id"], json!("a"));
}

fn member(sandbox_id: &str) -> Value {
    json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox_id})
}

fn a_container_of_a_pod(bed: &Bed) {
    let (_, address) = bed.sandbox("pod");
    let bundle = bed.bundle("c1", Some(member("pod")));
    assert_eq!(address_of(&bed.start("c1", &bundle, b"")), address);
    assert_eq!(fs::read_to_string(bundle.join("address")).expect("is there"), address);
}

fn a_container_whose_sandbox_is_gone(bed: &Bed) {
    let bundle = bed.bundle("c1", Some(member("gone")));
    let said = said(&bed.start("c1", &bundle, b""));
    assert!(
        said.starts_with("sandbox gone of container c1 has no shim: nobody answers at /run/containerd/s/"),
        "{said}"
    );
    assert!(!bundle.join("address").exists());
}

fn a_dead_socket_is_replaced(bed: &Bed) {
    let (bundle, address) = bed.sandbox("a");
    let first = ask(&address)["pid"].as_i64().expect("is a number");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(first).expect("fits"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("is killed");
    wait_for_silence(&address);
    assert_eq!(address_of(&bed.start("a", &bundle, b"")), address);
    assert_ne!(ask(&address)["pid"].as_i64(), Some(first));
}

fn mistakes(bed: &Bed) {
    let bundle = bed.bundle("a", Some(json!({})));
    let socket_dir = bed.dir.path().join("s");
    let with_body = |body: &str| {
        let params = BootstrapParams {
            instance_id: "a".into(),
            namespace: "ns".into(),
            extensions: vec![Extension { value: MessageField::some(options(body)), ..Extension::default() }],
            socket_dir: Some(socket_dir.display().to_string()),
            ..BootstrapParams::default()
        };
        said(&bed.start("a", &bundle, &params.write_to_bytes().expect("encodes")))
    };
    let text = with_body("cpus = 2");
    assert!(text.contains("cpus: unknown field `cpus`, expected one of `state_dir`"), "{text}");
    let text = with_body("vcpus = ");
    assert!(text.starts_with("configuration in containerd's runtime options, line 1, vcpus: "), "{text}");
    assert!(!socket_dir.exists() && !bundle.join("address").exists());

    fs::write(bundle.join("config.json"), "{\"annotations\": 1}").expect("writes");
    let text = said(&bed.start("a", &bundle, b""));
    assert!(text.starts_with("read spec ") && text.contains("invalid type"), "{text}");
    let text = said(&bed.start("../a", &bundle, b""));
    assert!(text.starts_with("container id \"../a\" is not accepted"), "{text}");
    let text = said(&bed.shim("a", &bundle).arg("restart").output().expect("runs"));
    assert!(text.starts_with("action \"restart\" is not known"), "{text}");
    let text = said(&bed.shim("a", &bundle).arg("serve").output().expect("runs"));
    assert!(text.starts_with("only start runs serve"), "{text}");
}

fn stdin_that_stays_open(bed: &Bed) {
    let bundle = bed.bundle("a", Some(json!({})));
    let (reader, writer) = std::io::pipe().expect("makes a pipe");
    let output = bed.shim("a", &bundle).arg("start").stdin(reader).output().expect("runs");
    drop(writer);
    assert_eq!(said(&output), "stdin was not closed within 5 s");
}

fn delete_of_a_member(bed: &Bed) {
    let (_, address) = bed.sandbox("pod");
    let pid = ask(&address)["pid"].clone();
    let bundle = bed.member("c1", "pod");
    let begun = Instant::now();
    let response = bed.delete("c1", &bundle);
    println!("delete took {:?}", begun.elapsed());
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 1_600_000_000);
    assert_eq!(ask(&address)["pid"], pid);
}

fn delete_of_a_sandbox(bed: &Bed) {
    let (bundle, address) = bed.sandbox("pod");
    let member = bed.member("c1", "pod");
    let sandbox_dir = fs::read_link(bundle.join("bulkhead")).expect("is linked");
    assert!(ask(&address)["pid"].is_number() && sandbox_dir.join("pid").exists());
    assert_eq!(bed.delete("pod", &bundle).exit_status, 137);
    assert!(!sandbox_dir.exists() && !socket(&address).exists());
    // containerd asks for each container of a pod, and does not mind the order.
    assert_eq!(bed.delete("c1", &member).exit_status, 137);
    assert_eq!(bed.delete("pod", &bundle).exit_status, 137);
}

/// As the sandbox API makes it: its bundle has no spec, and containers of the second version of the task service ask by `start`.
fn sandbox_without_a_spec(bed: &Bed) {
    let bundle = bed.bundle("pod", None);
    let address = address_of(&bed.start("pod", &bundle, b""));
    let member = bed.member("c1", "pod");
    assert_eq!(fs::read_to_string(member.join("address")).expect("is there"), address);
    assert_eq!(bed.delete("c1", &member).exit_status, 137);
    let sandbox_dir = fs::read_link(bundle.join("bulkhead")).expect("is linked");
    assert!(ask(&address)["pid"].is_number() && sandbox_dir.exists(), "the pod lives on");
    for _ in 0..2 {
        assert_eq!(bed.delete("pod", &bundle).exit_status, 137);
        assert!(!sandbox_dir.exists() && !socket(&address).exists());
    }
}

fn delete_of_a_member_of_a_dead_pod(bed: &Bed) {
    let (bundle, address) = bed.sandbox("pod");
    let member = bed.member("c1", "pod");
    let sandbox_dir = fs::read_link(bundle.join("bulkhead")).expect("is linked");
    let pid = ask(&address)["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("is a pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("is killed");
    wait_for_silence(&address);
    assert_eq!(bed.delete("c1", &member).exit_status, 137);
    assert!(!sandbox_dir.exists() && !socket(&address).exists());
    assert_eq!(bed.delete("pod", &bundle).exit_status, 137);
}

fn wait_for_silence(address: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(socket(address)).is_ok() {
        assert!(Instant::now() < deadline, "the server is killed and still answers");
        std::thread::yield_now();
    }
}

fn delete_is_idempotent(bed: &Bed) {
    let bundle = bed.bundle("a", Some(json!({})));
    let rootfs = bundle.join("rootfs");
    let lower = bed.dir.path().join("lower");
    fs::create_dir(&lower).expect("makes a directory");
    fs::write(lower.join("kept"), "x").expect("writes");
    for _ in 0..2 {
        rustix::mount::mount_bind(&lower, &rootfs).expect("mounts");
    }
    for _ in 0..2 {
        assert_eq!(bed.delete("a", &bundle).exit_status, 137);
        assert!(!rootfs.join("kept").exists());
    }
    assert!(lower.join("kept").exists());
    fs::remove_dir(&rootfs).expect("is not mounted");
    bed.delete("a", &bundle);
}

fn info_and_version(_: &Bed) {
    let run = |word: &str| {
        let exe = std::env::current_exe().expect("has a path");
        let output = Command::new(exe).arg(word).env_clear().stdin(Stdio::null()).output().expect("runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        output.stdout
    };
    let info = run("-info");
    assert!(!info.is_empty());
    assert!(String::from_utf8(run("-v")).expect("is text").contains(env!("CARGO_PKG_VERSION")));
}
