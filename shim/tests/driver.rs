//! The sandbox's driver against an agent in this process: order of events, exits, output, and who waits for whom.
//!
//! No VM: a booter of the test's own hands the driver a pod without one. Events go to a ttrpc server that plays containerd.

#![allow(clippy::disallowed_methods, reason = "tasks of a test end with the test")]

mod support;

use std::time::Duration;

use bulkhead_shim::container::ContainerId;
use bulkhead_shim::container::process::Phase;
use bulkhead_shim::control::Report;
use bulkhead_shim::error::Kind;
use bulkhead_shim::sandbox::spec::PodResources;
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde_json::json;
use support::world::World;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn events_of_a_task_come_in_the_promised_order() {
    let mut world = World::start().await;
    world.create_container("web", json!(["exit", "3"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    let exit = world.sandbox.wait(World::init("web")).await.expect("exits");
    assert_eq!(exit.status, 3);
    world.sandbox.delete(World::init("web")).await.expect("deletes");
    let topics = world.topics_of("web").await;
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    world.stop().await;
}

#[tokio::test]
async fn output_is_whole_when_the_exit_is_told() {
    let world = World::start().await;
    let mut container = world.create_container("web", json!(["noisy", "3000000"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    let (output, exit) = tokio::join!(container.read_stdout(), world.sandbox.wait(World::init("web")));
    assert_eq!(exit.expect("exits").status, 0);
    assert_eq!(output.len(), 3_000_000);
    world.stop().await;
}

#[tokio::test]
async fn stdin_reaches_its_end_only_when_it_is_closed() {
    let world = World::start().await;
    let mut container = world.create_container("web", json!(["cat"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    container.write_stdin(b"hello").await;
    container.drop_stdin();
    // The first writer has gone, as at the end of an attach: that is no end of input.
    let early = timeout(Duration::from_millis(300), world.sandbox.wait(World::init("web"))).await;
    assert!(early.is_err(), "the process ended although its stdin was not closed");
    world.sandbox.close_stdin(World::init("web")).await.expect("closes");
    let (output, exit) = tokio::join!(container.read_stdout(), world.sandbox.wait(World::init("web")));
    assert_eq!((output.as_slice(), exit.expect("exits").status), (b"hello".as_slice(), 0));
    world.stop().await;
}

#[tokio::test]
async fn an_exec_exits_before_the_init_and_a_second_delete_finds_nothing() {
    let mut world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.exec("web", "e1", json!(["exit", "7"])).await.expect("registers");
    let again = world.exec("web", "e1", json!(["exit", "7"])).await.expect_err("is refused");
    assert_eq!(again.kind(), Kind::AlreadyExists);
    world.sandbox.start(World::process("web", "e1")).await.expect("starts");
    assert_eq!(world.sandbox.wait(World::process("web", "e1")).await.expect("exits").status, 7);
    world.sandbox.delete(World::process("web", "e1")).await.expect("deletes");
    let gone = world.sandbox.delete(World::process("web", "e1")).await.expect_err("is gone");
    assert_eq!(gone.kind(), Kind::NotFound);

    world.sandbox.kill(World::init("web"), 15, false).await.expect("signals");
    assert_eq!(world.sandbox.wait(World::init("web")).await.expect("exits").status, 143);
    let finished = world.sandbox.kill(World::init("web"), 9, false).await.expect_err("has exited");
    assert_eq!(finished.kind(), Kind::NotFound);
    let topics = world.topics_of("web").await;
    assert_eq!(
        topics,
        ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exit"]
    );
    world.stop().await;
}

#[tokio::test]
async fn the_report_has_every_process_and_its_phase() {
    let world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    let report = world.sandbox.report().await.expect("tells");
    assert_eq!(report.state, "ready");
    let told = |report: &Report, id: &str| report.containers.iter().find(|container| container.id == id).cloned();
    assert_eq!(told(&report, World::POD).expect("is told").role, "sandbox");
    let web = told(&report, "web").expect("is told");
    assert_eq!((&*web.role, &*web.init.expect("has one").phase), ("container", "created"));

    world.sandbox.start(World::init("web")).await.expect("starts");
    world.exec("web", "e1", json!(["exit", "7"])).await.expect("registers");
    world.sandbox.start(World::process("web", "e1")).await.expect("starts");
    world.sandbox.wait(World::process("web", "e1")).await.expect("exits");
    let web = told(&world.sandbox.report().await.expect("tells"), "web").expect("is told");
    assert_eq!(web.init.expect("has one").phase, "running");
    let exec = web.execs.first().expect("is told");
    assert_eq!((&*exec.exec_id, &*exec.phase, exec.exit_status), ("e1", "stopped", Some(7)));
    world.stop().await;
}

#[tokio::test]
async fn an_exec_that_cannot_start_says_why_and_can_be_deleted() {
    let world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.exec("web", "e1", json!(["refuse"])).await.expect("registers");
    let error = world.sandbox.start(World::process("web", "e1")).await.expect_err("fails");
    assert!(error.to_string().contains("executable file not found"), "{error}");
    world.sandbox.delete(World::process("web", "e1")).await.expect("deletes");
    world.stop().await;
}

#[tokio::test]
async fn the_end_of_the_pod_ends_every_process_and_the_sandbox_last() {
    let mut world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.lose_vm();
    let (web, pod) = tokio::join!(
        timeout(SOON, world.sandbox.wait(World::init("web"))),
        timeout(SOON, world.sandbox.wait(World::init(World::POD)))
    );
    assert_eq!(web.expect("in time").expect("exits").status, 137);
    assert_eq!(pod.expect("in time").expect("exits").status, 137);
    let exits = world.exits().await;
    assert_eq!(exits.last().map(String::as_str), Some(World::POD), "{exits:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_shutdown_is_granted_only_when_nothing_is_left() {
    let world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    assert!(!world.sandbox.shutdown().await.expect("answers"));
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.sandbox.kill(World::init("web"), 9, true).await.expect("signals");
    world.sandbox.wait(World::init("web")).await.expect("exits");
    let state = world.sandbox.state(World::init("web")).await.expect("answers");
    assert_eq!(state.phase, Phase::Exited);
    world.sandbox.delete(World::init("web")).await.expect("deletes");
    assert!(!world.sandbox.shutdown().await.expect("answers"), "the pod still stands");
    world.sandbox.kill(World::init(World::POD), 9, false).await.expect("signals");
    world.sandbox.wait(World::init(World::POD)).await.expect("exits");
    world.sandbox.delete(World::init(World::POD)).await.expect("deletes");
    assert!(world.sandbox.shutdown().await.expect("answers"));
}

#[tokio::test]
async fn what_does_not_exist_is_not_found_and_a_taken_id_is_taken() {
    let world = World::start().await;
    let unknown = world.sandbox.state(World::init("nobody")).await.expect_err("is unknown");
    assert_eq!(unknown.kind(), Kind::NotFound);
    world.create_container("web", json!(["hang"])).await.expect("creates");
    let taken = world.create_container("web", json!(["hang"])).await.err().expect("is refused");
    assert_eq!(taken.kind(), Kind::AlreadyExists);
    // containerd asks before it creates, and takes an error for a dead shim.
    assert_eq!(world.sandbox.task_pid(ContainerId("later".into())).await.expect("answers"), std::process::id());
    world.stop().await;
}

#[tokio::test]
async fn a_container_without_a_network_is_not_made_when_its_pid_would_lead_to_the_hosts() {
    let mut world = World::start().await;
    let rights = rustix::thread::capabilities(None).expect("tells");
    let effective = rights.effective.difference(CapabilitySet::SYS_ADMIN);
    // The driver runs on this thread, whose rights are also those of the threads that it starts.
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..rights }).expect("gives up");
    let refused = world.create_container("web", json!(["hang"])).await;
    rustix::thread::set_capabilities(None, rights).expect("takes back");
    let error = refused.err().expect("is refused");
    assert_eq!(error.kind(), Kind::Internal);
    assert!(error.to_string().starts_with("keep the pid of a container without a network out"), "{error}");
    assert!(world.topics_of("web").await.is_empty());
    world.create_container("web", json!(["hang"])).await.expect("is as if nothing had been");
    world.stop().await;
}

#[tokio::test]
async fn a_shim_ends_with_the_containerd_that_did_not_come_to_create_and_not_for_questions() {
    let (sandbox, commands) = bulkhead_shim::sandbox::SandboxHandle::new();
    let events = bulkhead_shim::events::EventQueue::start(None, "test");
    let booter = Box::new(|_| panic!("nothing is created"));
    let (creator, gone) = tokio::sync::oneshot::channel::<()>();
    let gone = futures::FutureExt::boxed(async move { drop(gone.await) });
    let driver = bulkhead_shim::sandbox::driver::Driver::new(booter, events.events()).created_by(gone).run(commands);
    let asked = async {
        for _ in 0..3 {
            let unknown = sandbox.state(World::init("pod")).await.expect_err("is unknown");
            assert_eq!(unknown.kind(), Kind::NotFound);
        }
        drop(creator);
    };
    timeout(SOON, async { tokio::join!(driver, asked) }).await.expect("ends");
    events.shutdown(SOON).await;
}

#[tokio::test(start_paused = true)]
async fn a_shim_that_nobody_gives_a_task_ends_by_itself() {
    let (sandbox, commands) = bulkhead_shim::sandbox::SandboxHandle::new();
    let events = bulkhead_shim::events::EventQueue::start(None, "test");
    let booter = Box::new(|_| panic!("nothing is created"));
    let started = tokio::time::Instant::now();
    bulkhead_shim::sandbox::driver::Driver::new(booter, events.events()).run(commands).await;
    assert_eq!(started.elapsed().as_secs(), bulkhead_shim::timeouts::UNCLAIMED.as_secs());
    let late = sandbox.state(World::init("pod")).await.expect_err("has ended");
    assert_eq!(late.kind(), Kind::NotFound);
    assert!(sandbox.shutdown().await.expect("nothing is left to end"));
    events.shutdown(SOON).await;
}

/// A containerd that came back kills what its predecessor was creating, waits for the exit, and deletes it.
#[tokio::test]
async fn a_task_that_is_killed_while_it_is_created_exits_and_can_be_deleted() {
    let (sandbox, commands) = bulkhead_shim::sandbox::SandboxHandle::new();
    let events = bulkhead_shim::events::EventQueue::start(None, "test");
    let booter = Box::new(|request: bulkhead_shim::sandbox::boot::BootRequest| {
        futures::FutureExt::boxed(async move {
            request.cancel.cancelled().await;
            Err(bulkhead_shim::error::Error::unavailable("boot was cancelled"))
        })
    });
    let driver = tokio::task::spawn(bulkhead_shim::sandbox::driver::Driver::new(booter, events.events()).run(commands));
    let creating = tokio::task::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.create(World::pod(std::path::Path::new("/bundle"))).await }
    });
    let pod = || World::init(World::POD);
    timeout(SOON, async {
        while sandbox.state(pod()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("is being created");
    let waiting = tokio::task::spawn({
        let sandbox = sandbox.clone();
        async move { sandbox.wait(World::init(World::POD)).await }
    });
    sandbox.kill(pod(), 9, true).await.expect("is killed");
    let failed = timeout(SOON, creating).await.expect("in time").expect("does not panic").expect_err("was killed");
    assert_eq!(failed.kind(), Kind::Unavailable);
    let exit = timeout(SOON, waiting).await.expect("in time").expect("does not panic").expect("exits");
    assert_eq!(exit.status, 137);
    assert_eq!(sandbox.delete(pod()).await.expect("deletes").exit.map(|exit| exit.status), Some(137));
    assert!(sandbox.shutdown().await.expect("answers"), "nothing is left");
    timeout(SOON, driver).await.expect("ends").expect("does not panic");
    events.shutdown(SOON).await;
}

#[tokio::test]
async fn what_happens_while_the_control_connection_is_broken_is_told_after_it() {
    let mut world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.agent().cut().await;
    // One exit that nobody hears, and a call that has nobody to go to.
    world.agent().end("web", 9);
    let sandbox = world.sandbox.clone();
    let calling = tokio::task::spawn(async move { sandbox.kill(World::init("web"), 15, false).await });
    tokio::task::yield_now().await;
    world.agent().dial_control().await;
    let exit = timeout(SOON, world.sandbox.wait(World::init("web"))).await.expect("in time").expect("exits");
    assert_eq!(exit.status, 9);
    // It came through: the process had ended.
    let late = timeout(SOON, calling).await.expect("in time").expect("does not panic").expect_err("has exited");
    assert_eq!(late.kind(), Kind::NotFound);
    let topics = world.topics_of("web").await;
    assert_eq!(topics.iter().filter(|topic| *topic == "/tasks/exit").count(), 1, "{topics:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_call_whose_answer_is_lost_is_repeated_and_takes_effect_once() {
    let mut world = World::start().await;
    let mut container = world.create_container("web", json!(["print", "once"])).await.expect("creates");
    world.agent().withhold_next_start();
    let sandbox = world.sandbox.clone();
    let starting = tokio::task::spawn(async move { sandbox.start(World::init("web")).await });
    // The program has run; only the answer is missing.
    assert_eq!(container.read_some().await, b"once");
    for _ in 0..3 {
        world.agent().cut().await;
        world.agent().dial_control().await;
    }
    timeout(SOON, starting).await.expect("in time").expect("does not panic").expect("starts");
    let exit = timeout(SOON, world.sandbox.wait(World::init("web"))).await.expect("in time").expect("exits");
    assert_eq!(exit.status, 0);
    assert!(world.agent().starts() >= 2, "the call was not repeated");
    assert_eq!(container.read_stdout().await, b"");
    assert_eq!(world.topics_of("web").await, ["/tasks/create", "/tasks/start", "/tasks/exit"]);
    world.stop().await;
}

fn pod() -> ContainerId {
    ContainerId(World::POD.into())
}

#[tokio::test]
async fn a_sandbox_of_the_api_is_ready_from_its_start_to_its_stop_and_no_event_tells_of_it() {
    let mut world = World::planned().await;
    let unknown = world.sandbox.status(pod()).await.expect_err("is unknown");
    assert_eq!(unknown.kind(), Kind::NotFound);
    let pid = world.sandbox.create_sandbox(World::pod_spec()).await.expect("creates");
    let again = world.sandbox.create_sandbox(World::pod_spec()).await.expect_err("exists");
    assert_eq!(again.kind(), Kind::AlreadyExists);
    assert!(!world.sandbox.status(pod()).await.expect("answers").ready, "it was not started");
    assert_eq!(world.sandbox.start(World::init(World::POD)).await.expect("starts"), pid);
    let status = world.sandbox.status(pod()).await.expect("answers");
    assert!(status.ready && status.pid == pid && status.exit.is_none(), "{status:?}");
    assert_eq!(world.sandbox.task_pid(pod()).await.expect("answers"), pid);
    assert_eq!(world.sandbox.pids(pod()).await.expect("answers"), [pid]);
    world.sandbox.stop_sandbox(pod()).await.expect("stops");
    world.sandbox.stop_sandbox(pod()).await.expect("is stopped already");
    let status = world.sandbox.status(pod()).await.expect("answers");
    assert!(!status.ready && status.exit.is_some(), "{status:?}");
    assert_eq!(world.sandbox.wait(World::init(World::POD)).await.expect("has ended").status, 0);
    assert!(world.topics_of(World::POD).await.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_container_of_a_sandbox_of_the_api_lives_as_any_other() {
    let mut world = World::start_by_sandbox_api().await;
    world.create_container("web", json!(["exit", "3"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    assert_eq!(world.sandbox.wait(World::init("web")).await.expect("exits").status, 3);
    world.sandbox.delete(World::init("web")).await.expect("deletes");
    // containerd asks this after every deletion, and between two containers the pod must not go.
    assert!(!world.sandbox.shutdown().await.expect("answers"));
    assert!(world.sandbox.status(pod()).await.expect("answers").ready);
    let topics = world.topics_of("web").await;
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    world.stop().await;
}

#[tokio::test]
async fn containers_get_the_files_that_containerd_makes_only_for_pause_containers() {
    let destinations = |mounts: serde_json::Value| -> Vec<String> {
        let mounts = mounts.as_array().cloned().unwrap_or_default();
        mounts.iter().map(|mount| mount["destination"].as_str().expect("text").to_owned()).collect()
    };
    let world = World::start_by_sandbox_api().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    let found = destinations(world.agent().mounts_of("web"));
    assert_eq!(found, ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/shm"]);
    let text = world.agent().mounts_of("web").to_string();
    assert!(!text.contains("/etc\"") && text.contains("shm:"), "paths of the host in {text}");
    world.stop().await;
    let world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    assert!(destinations(world.agent().mounts_of("web")).is_empty());
    world.stop().await;
}

#[tokio::test]
async fn the_death_of_the_vm_leaves_a_sandbox_that_is_not_ready_until_it_is_shut_down() {
    let world = World::start_by_sandbox_api().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.lose_vm();
    let exit = timeout(SOON, world.sandbox.wait(World::init(World::POD))).await.expect("in time").expect("ends");
    assert_eq!(exit.status, 137);
    let status = world.sandbox.status(pod()).await.expect("answers");
    assert!(!status.ready && status.exit == Some(exit), "{status:?}");
    assert_eq!(world.sandbox.wait(World::init("web")).await.expect("exits").status, 137);
    world.sandbox.delete(World::init("web")).await.expect("deletes");
    // That of the task service is not the sandbox's own.
    assert!(!world.sandbox.shutdown().await.expect("answers"));
    world.sandbox.stop_sandbox(pod()).await.expect("is stopped already");
    world.sandbox.shutdown_sandbox().await.expect("shuts down");
    world.sandbox.shutdown_sandbox().await.expect("is shut down already");
    world.stop().await;
}

#[tokio::test]
async fn a_shutdown_ends_a_running_pod_with_all_that_is_in_it() {
    let mut world = World::start_by_sandbox_api().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    timeout(SOON, world.sandbox.shutdown_sandbox()).await.expect("in time").expect("shuts down");
    assert_eq!(world.exits().await, ["web"]);
    while !world.has_ended() {
        tokio::task::yield_now().await;
    }
    world.stop().await;
}

#[tokio::test]
async fn a_shutdown_of_what_was_never_created_ends_the_driver() {
    let world = World::planned().await;
    timeout(SOON, world.sandbox.shutdown_sandbox()).await.expect("in time").expect("shuts down");
    world.stop().await;
}

#[tokio::test]
async fn limits_of_a_pod_change_inside_what_its_vm_has_and_back() {
    let world = World::start_by_sandbox_api().await;
    let small = PodResources { cpu_quota: 50_000, cpu_period: 100_000, memory_bytes: 64 << 20 };
    for limits in [small, small, PodResources::default()] {
        world.sandbox.update_sandbox(pod(), limits).await.expect("fits");
    }
    let large = PodResources { memory_bytes: 1 << 30, ..PodResources::default() };
    let refused = world.sandbox.update_sandbox(pod(), large).await.expect_err("is too much");
    assert_eq!(refused.kind(), Kind::FailedPrecondition);
    assert!(refused.to_string().contains("memory limit 1073741824"), "{refused}");
    let small = r#"{"cpu":{"period":100000,"quota":50000},"memory":{"limit":67108864}}"#;
    let none = r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#;
    assert_eq!(world.agent().pod_limits(), [small, small, none]);
    world.stop().await;
}

#[tokio::test]
async fn an_update_beyond_the_vm_is_refused_and_reaches_nobody() {
    let world = World::start().await;
    world.create_container("web", json!(["hang"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    let update = |resources| world.sandbox.update(ContainerId("web".into()), resources);
    let large = json!({"cpu": {"quota": 100_001, "period": 100_000}, "memory": {"limit": 64 << 20}});
    let refused = update(large).await.expect_err("is too much");
    assert_eq!(refused.kind(), Kind::FailedPrecondition);
    assert!(refused.to_string().contains("CPU limit 1001m of container web"), "{refused}");
    assert_eq!(world.agent().container_limits(), [""; 0]);
    let fits = json!({"memory": {"limit": 64 << 20}, "unified": {"memory.high": "60000000", "io.max": "8:0 wbps=1"}});
    update(fits).await.expect("fits");
    let told = r#"{"memory":{"limit":67108864},"unified":{"memory.high":"60000000"}}"#;
    assert_eq!(world.agent().container_limits(), [told]);
    world.stop().await;
}

#[tokio::test]
async fn an_update_of_what_has_exited_finds_nothing() {
    let world = World::start().await;
    world.create_container("web", json!(["exit", "0"])).await.expect("creates");
    world.sandbox.start(World::init("web")).await.expect("starts");
    world.sandbox.wait(World::init("web")).await.expect("exits");
    let gone = world.sandbox.update(ContainerId("web".into()), json!({"memory": {"limit": 64 << 20}}));
    assert_eq!(gone.await.expect_err("is gone").kind(), Kind::NotFound);
    world.stop().await;
}
