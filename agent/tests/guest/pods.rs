//! What the containers of a pod share: namespaces, network, sysctls.

use bulkhead_proto::agent as api;
use serde_json::json;

use crate::machine::Machine;
use crate::requests::{Exec, busybox, create, delete, kill, process, run, sandbox, sleeper, spec, start};

#[tokio::test]
async fn pid_namespaces_are_as_asked() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    sandbox(&mut machine).await;
    // By the shell alone: whether a pipe's second half is there when the first looks is chance.
    let list = || process(&["sh", "-c", "set -- /proc/[0-9]*; echo $#"]);
    for (id, kind, target) in [("own", 0, ""), ("pod1", 1, ""), ("pod2", 1, ""), ("joined", 2, "own")] {
        busybox(&machine, id);
        let mut request = create(id, &spec(process(&["sleep", "1000"])), api::Stdio::default());
        request.pid_namespace = kind;
        request.pid_namespace_target = target.into();
        machine.client.create_container(request).await.expect("create");
        machine.client.start_process(start(id, "")).await.expect("start");
    }
    let seen = |output: String| output.lines().next().and_then(|line| line.parse::<u32>().ok()).expect("a count");
    // Each counts itself on top of what is there.
    let own = seen(run(&mut machine, "own", "a", list()).await.1);
    let joined = seen(run(&mut machine, "joined", "a", list()).await.1);
    let pod = seen(run(&mut machine, "pod1", "a", list()).await.1);
    assert_eq!(own, joined, "own and joined are one namespace");
    assert_eq!(pod, own + 1, "the pod's namespace has a holder and two sleepers, the other one two sleepers");

    // A container of the shared namespace dies alone, with all that is its own.
    let exec = Exec { id: "pod1", exec: "bg", process: process(&["sleep", "1000"]), stdio: api::Stdio::default() };
    exec.start(&mut machine).await.expect("exec");
    kill(&mut machine, "pod1", 9).await.expect("kill");
    assert_eq!(machine.exit(|_| ()).await.exec_id, "bg");
    assert_eq!(machine.exit(|_| ()).await.container_id, "pod1");
    assert_eq!(run(&mut machine, "pod2", "b", process(&["true"])).await.0, 0);
    machine.client.delete(delete("pod1", "")).await.expect("delete");
}

#[tokio::test]
async fn the_pods_network_and_sysctls_are_set() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    let address = |address: &[u8], prefix_length| api::IpAddress { address: address.into(), prefix_length };
    let v6 = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let route = |gateway: &[u8], onlink| api::Route {
        gateway: gateway.into(),
        interface: "net7".into(),
        onlink,
        ..Default::default()
    };
    let request = api::CreateSandboxRequest {
        hostname: "web-0".into(),
        share_tag: "share".into(),
        shm_size_bytes: 1 << 20,
        sysctls: [("net.ipv4.ip_unprivileged_port_start", "0"), ("net/ipv4/conf/net7/rp_filter", "2")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        interfaces: vec![api::Interface {
            name: "net7".into(),
            mac: vec![2, 0, 0, 0, 0, 5],
            mtu: 1400,
            addresses: vec![address(&[10, 9, 0, 5], 24), address(&v6(5), 64)],
        }],
        routes: vec![
            route(&[169, 254, 1, 1], true),
            route(&v6(1), false),
            api::Route { destination: Some(address(&[10, 8, 0, 0], 16)), ..route(&[10, 9, 0, 1], false) },
            api::Route {
                destination: Some(address(&[10, 9, 0, 0], 24)),
                source: vec![10, 9, 0, 5],
                scope: 253,
                ..route(&[], false)
            },
        ],
        neighbours: vec![api::Neighbour {
            address: vec![10, 9, 0, 1],
            mac: vec![2, 0, 0, 0, 0, 9],
            interface: "net7".into(),
            state: 0x80,
        }],
        user_namespace: None,
    };
    machine.client.create_sandbox(request.clone()).await.expect("sandbox");
    machine.client.create_sandbox(request).await.expect("a repeated request is answered as the first was");
    sleeper(&mut machine, "c1").await;
    let script = "hostname; ip addr show net7; ip route; ip -6 route show default; ip neigh; ip addr show lo; df /dev/shm; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/conf/net7/rp_filter";
    let (status, output) = run(&mut machine, "c1", "e", process(&["sh", "-c", script])).await;
    for expected in [
        "web-0\n",
        "mtu 1400",
        "inet 10.9.0.5/24",
        "inet6 fd00::5/64 scope global",
        "default via 169.254.1.1 dev net7",
        "10.8.0.0/16 via 10.9.0.1 dev net7",
        "default via fd00::1 dev net7",
        "10.9.0.1 dev net7 lladdr 02:00:00:00:00:09",
        "inet 127.0.0.1/8",
        "shm                       1024",
        "\n0\n2\n",
    ] {
        assert!(output.contains(expected), "{expected:?} is not in {output}");
    }
    assert!(!output.contains("tentative"), "{output}");
    assert_eq!(status, 0);
}

/// A user namespace whose ids begin at `first` in the guest.
fn user_namespace(first: u32) -> api::UserNamespace {
    let map = vec![api::IdMapping { container_id: 0, guest_id: first, size: 65_536 }];
    api::UserNamespace { uids: map.clone(), gids: map }
}

#[tokio::test]
async fn a_pod_with_a_user_namespace_has_its_containers_in_it_and_takes_no_others() {
    let Some(mut machine) = Machine::boot(256).await else { return };
    let request = api::CreateSandboxRequest {
        hostname: "pod".into(),
        share_tag: "share".into(),
        user_namespace: Some(user_namespace(100_000)),
        sysctls: [("net.ipv4.ip_local_port_range", "20000 30000"), ("kernel.shm_rmid_forced", "1")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..Default::default()
    };
    machine.client.create_sandbox(request.clone()).await.expect("sandbox");
    machine.client.create_sandbox(request).await.expect("sandbox again");
    busybox(&machine, "c1");

    let plain = spec(process(&["sleep", "1000"]));
    let error =
        machine.client.create_container(create("c1", &plain, api::Stdio::default())).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");

    let mut mapped = plain;
    mapped["linux"]["namespaces"].as_array_mut().expect("array").push(json!({ "type": "user" }));
    mapped["process"]["rlimits"] = json!([{ "type": "RLIMIT_MEMLOCK", "soft": 1_u64 << 30, "hard": 1_u64 << 40 }]);
    machine.client.create_container(create("c1", &mapped, api::Stdio::default())).await.expect("create");
    machine.client.start_process(start("c1", "")).await.expect("start");

    let script =
        "cat /proc/self/uid_map; id -u; hostname; ls /sys/class/net; grep -c mqueue /proc/filesystems; ulimit -H -l";
    let mut look = process(&["sh", "-c", script]);
    look["rlimits"] = mapped["process"]["rlimits"].clone();
    let (status, output) = run(&mut machine, "c1", "look", look).await;
    let words: Vec<_> = output.split_whitespace().collect();
    assert_eq!((status, words), (0, vec!["0", "100000", "65536", "0", "pod", "lo", "1", "1073741824"]));

    let mut outside = process(&["true"]);
    outside["user"]["uid"] = json!(70_000);
    let exec = Exec { id: "c1", exec: "outside", process: outside, stdio: api::Stdio::default() };
    let error = exec.start(&mut machine).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert_eq!(error.message(), "process.user.uid 70000 is not mapped in the pod's user namespace");
}
