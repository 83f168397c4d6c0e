//! The network of pods: addresses, Services, names, and what rules of the node do to them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_tests::cluster::images::AGNHOST;
use bulkhead_tests::cluster::network::MTU;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, wait_for};
use bulkhead_tests::command::Run;
use bulkhead_tests::row::Runtime;
use serde_json::{Value, json};

use crate::life::{PAGE, idle, script, with};
use crate::volumes::host_directory;

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("pods and the node reach one another by both families, whole packets and true addresses", reach),
    Row::new(
        "a Service is reached by its names and addresses, TCP and UDP, from others and from its own pod",
        services,
    ),
    Row::new("a headless Service names its pods and their addresses", headless),
    Row::new("a Service spreads over pods of both kinds, and stays with one of them where asked", spread),
    Row::new("ports of the node lead to the pod, which sees who asks", ports),
    Row::new("rules of the node hold for what pods send and get", rules),
];

/// Where agnhost's server listens, for TCP; for UDP it is the next port.
const PORT: u16 = 8080;
/// A port of the node that no other program has.
const NODE_SERVER: u16 = 18_070;
/// The port of the node that a pod asks for.
const HOST_PORT: u16 = 18_080;

/// A container with agnhost's server, which is ready when that answers.
pub fn server(args: &[&str]) -> Value {
    let command = [&["/agnhost", "netexec"][..], args].concat();
    json!({
        "name": "main", "image": AGNHOST, "command": command,
        "readinessProbe": {"httpGet": {"path": "/hostname", "port": PORT}, "periodSeconds": 1, "timeoutSeconds": 10},
    })
}

/// A pod with a second label, `set`, that a Service can select several pods by.
fn pod_of_set(user: &User, name: &str, set: &str, spec: Value) -> Value {
    let mut pod = user.manifest(name, spec);
    pod["metadata"]["labels"]["set"] = json!(set);
    pod
}

fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

fn url(address: &str, port: u16) -> Result<String> {
    let address: IpAddr = address.parse().with_context(|| format!("parse the address {address:?}"))?;
    Ok(format!("http://{}", SocketAddr::new(address, port)))
}

/// The address in what agnhost tells of its client.
fn peer(told: &str) -> Result<IpAddr> {
    let peer: SocketAddr = told.parse().with_context(|| format!("the server told {told:?} of its client"))?;
    Ok(peer.ip())
}

fn reach(user: &User) -> Result<()> {
    user.pod("server", json!({"containers": [server(&[])]}))?;
    user.pod("client", json!({"containers": [idle("main")]}))?;
    let pod = user.ready("server")?;
    user.ready("client")?;
    let addresses = pod["status"]["podIPs"].as_array().context("a pod without addresses")?;
    let families: Vec<_> = addresses.iter().filter_map(|entry| Some(entry["ip"].as_str()?.contains(':'))).collect();
    ensure!(families == [false, true], "the addresses are {addresses:?}");
    let mtu = user.sh("client", "cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == MTU.to_string(), "the MTU of the pod is {mtu}, that of the network {MTU}");

    let directory = host_directory(user)?;
    fs::write(directory.join("index.html"), "a page from the node\n")?;
    let (path, listen) = (directory.display().to_string(), NODE_SERVER.to_string());
    let _on_node = user.cluster.inside(&["/bin/busybox", "httpd", "-f", "-p", &listen, "-h", &path]).start()?;
    let big = "dd if=/dev/urandom of=/tmp/big bs=1M count=8 2>/dev/null; httpd -p 8090 -h /tmp; sha256sum < /tmp/big";
    let sum = user.sh("server", big)?;
    for v6 in [false, true] {
        let (server, client) = (user.address("server", v6)?, user.address("client", v6)?);
        let family = if v6 { "-6" } else { "-4" };
        let gateway = user.sh("client", &format!("ip {family} route | awk '/^default/ {{print $3}}'"))?;

        let page = format!("{}/clientip", url(&server, PORT)?);
        let told = user.sh("client", &format!("wget -q -O - {page}"))?;
        ensure!(peer(&told)? == client.parse::<IpAddr>()?, "{client} asked, the server saw {told}");
        let told = user.cluster.inside(&["/bin/busybox", "wget", "-q", "-O", "-", &page]).success()?.text();
        ensure!(peer(&told)? == gateway.parse::<IpAddr>()?, "the node, {gateway}, asked, the server saw {told}");
        let page = url(&gateway, NODE_SERVER)?;
        wait_for("the node to answer the pod", SOON, || {
            let said = user.sh("client", &format!("wget -q -O - {page}/"))?;
            ensure!(said == "a page from the node", "it answered {said:?}");
            Ok(())
        })?;

        // One in a whole packet, one in pieces.
        for bytes in [MTU - 50, 4000] {
            user.sh("client", &format!("ping -q -c 1 -W 20 -s {bytes} {server}"))?;
        }
        let fetched = user.sh("client", &format!("wget -q -O - {}/big | sha256sum", url(&server, 8090)?))?;
        ensure!(fetched == sum, "by {server} came {fetched}, sent was {sum}");
    }
    Ok(())
}

/// Has the agnhost of a pod ask `host:port` for its name, for each of `questions`; the answers.
fn dial(user: &User, pod: &str, questions: &[(&str, u16, &str)]) -> Result<Vec<String>> {
    let questions = questions.iter().map(|(host, port, protocol)| {
        let query = format!("host={host}&port={port}&protocol={protocol}&request=hostname");
        format!("wget -q -O - 'http://127.0.0.1:{PORT}/dial?{query}' 2>&1; echo")
    });
    Ok(user.sh(pod, &questions.collect::<Vec<_>>().join("; "))?.lines().map(str::to_owned).collect())
}

/// What the cluster's DNS tells of a whole name; empty for nothing.
fn resolve(user: &User, pod: &str, name: &str) -> Result<(BTreeSet<IpAddr>, String)> {
    let said = user.sh(pod, &format!("nslookup {name} 2>&1 || true"))?;
    // The server's own address comes first.
    let answer = said.split_once("\n\n").map(|(_, answer)| answer).unwrap_or_default();
    let found: BTreeSet<IpAddr> =
        answer.lines().filter_map(|line| line.strip_prefix("Address:")?.trim().parse().ok()).collect();
    Ok((found, answer.to_owned()))
}

fn cluster_addresses(user: &User, name: &str) -> Result<Vec<String>> {
    let service = user.get(&["service", name])?;
    let addresses = service["spec"]["clusterIPs"].as_array().context("a Service without addresses")?;
    Ok(addresses.iter().filter_map(|address| Some(address.as_str()?.to_owned())).collect())
}

fn services(user: &User) -> Result<()> {
    let ports = json!([
        {"name": "web", "port": 80, "targetPort": "web"},
        {"name": "echo", "port": 81, "targetPort": PORT + 1, "protocol": "UDP"},
    ]);
    let selector = json!({"app": "web"});
    let named = json!({"ports": [{"name": "web", "containerPort": PORT}]});
    user.pod("web", json!({"containers": [with(server(&[]), named)]}))?;
    user.pod("client", json!({"containers": [server(&[])]}))?;
    let dual = json!({"selector": selector, "ports": ports, "ipFamilyPolicy": "RequireDualStack"});
    user.apply(&service("front", dual))?;
    let v6 = json!({"selector": selector, "ports": ports, "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]});
    user.apply(&service("front-v6", v6))?;
    let domain = format!("{}.svc.cluster.local", user.namespace);
    let whole = format!("front.{domain}");
    user.apply(&service("alias", json!({"type": "ExternalName", "externalName": whole})))?;
    user.ready("web")?;
    user.ready("client")?;

    let (front, front_v6) = (cluster_addresses(user, "front")?, cluster_addresses(user, "front-v6")?);
    let [v4, v6] = &front[..] else { bail!("the addresses of front are {front:?}") };
    let [only_v6] = &front_v6[..] else { bail!("the addresses of front-v6 are {front_v6:?}") };
    ensure!(!v4.contains(':') && v6.contains(':') && only_v6.contains(':'), "the families of {front:?}, {front_v6:?}");
    let (near, far) = (format!("front.{}", user.namespace), format!("front.{}.svc", user.namespace));
    let hosts = ["front", &near, &far, &whole, v4, v6, "front-v6", only_v6, "alias"];
    let questions: Vec<(&str, u16, &str)> =
        hosts.into_iter().flat_map(|host| [(host, 80, "http"), (host, 81, "udp")]).collect();
    let expected = vec![r#"{"responses":["web"]}"#; questions.len()];
    for pod in ["client", "web"] {
        wait_for(&format!("all answers to {pod}"), SOON, || {
            let answers = dial(user, pod, &questions)?;
            ensure!(answers == expected, "asked for {questions:?} {pod} got {answers:?}");
            Ok(())
        })?;
    }
    let (found, answer) = resolve(user, "client", &whole)?;
    let expected: BTreeSet<IpAddr> = front.iter().filter_map(|address| address.parse().ok()).collect();
    ensure!(found == expected, "the addresses of {whole} are {front:?}, DNS tells {answer}");
    let (found, answer) = resolve(user, "client", &format!("alias.{domain}"))?;
    let canonical = format!("canonical name = {whole}");
    ensure!(found == expected && answer.contains(&canonical), "of the alias of {whole} DNS tells {answer}");
    let resolver = user.sh("client", "cat /etc/resolv.conf")?;
    let search = format!("search {domain} svc.cluster.local cluster.local");
    let lines: Vec<_> = resolver.lines().map(str::trim).collect();
    ensure!(lines.contains(&search.as_str()) && lines.contains(&"options ndots:5"), "resolv.conf is {resolver:?}");
    Ok(())
}

fn headless(user: &User) -> Result<()> {
    let domain = format!("{}.svc.cluster.local", user.namespace);
    let ports = json!([{"name": "web", "port": PORT}]);
    let spec = json!({
        "clusterIP": "None", "selector": {"set": "pair"}, "ports": ports, "ipFamilyPolicy": "RequireDualStack",
    });
    user.apply(&service("pair", spec))?;
    for name in ["one", "two"] {
        let spec = json!({
            "hostname": name, "subdomain": "pair",
            "containers": [script("main", &format!("exec httpd -f -p {PORT} -h /www"))],
        });
        user.apply(&pod_of_set(user, name, "pair", spec))?;
    }
    let mut all = BTreeSet::new();
    for name in ["one", "two"] {
        user.ready(name)?;
        let own = BTreeSet::<IpAddr>::from([user.address(name, false)?.parse()?, user.address(name, true)?.parse()?]);
        let whole = format!("{name}.pair.{domain}");
        wait_for(&format!("DNS to know {whole}"), SOON, || {
            let (found, answer) = resolve(user, "one", &whole)?;
            ensure!(found == own, "its addresses are {own:?}, DNS tells {answer}");
            Ok(())
        })?;
        all.extend(own);
    }
    wait_for("DNS to know the pair", SOON, || {
        let (found, answer) = resolve(user, "one", &format!("pair.{domain}"))?;
        ensure!(found == all, "the addresses are {all:?}, DNS tells {answer}");
        Ok(())
    })?;
    let page = user.sh("one", &format!("wget -q -O - http://two.pair:{PORT}/"))?;
    ensure!(page == PAGE, "the other pod served {page:?}");
    Ok(())
}

fn spread(user: &User) -> Result<()> {
    let mut two = pod_of_set(user, "two", "many", json!({"containers": [server(&["--http-override=/hostname"])]}));
    // The other kind than the row's, where that is Bulkhead.
    two["spec"]["runtimeClassName"] = json!(Runtime::Runc.handler());
    let one = pod_of_set(user, "one", "many", json!({"containers": [server(&["--http-override=/hostname"])]}));
    user.apply(&one)?;
    user.apply(&two)?;
    let ports = json!([{"port": 80, "targetPort": PORT}]);
    user.apply(&service("any", json!({"selector": {"set": "many"}, "ports": ports})))?;
    let sticky = json!({"selector": {"set": "many"}, "ports": ports, "sessionAffinity": "ClientIP"});
    user.apply(&service("sticky", sticky))?;
    user.ready("one")?;
    user.ready("two")?;
    let ask = |service: &str| -> Result<BTreeSet<String>> {
        let addresses = cluster_addresses(user, service)?;
        let page = url(addresses.first().context("no address")?, 80)?;
        let forty = format!("for i in $(seq 40); do /bin/busybox wget -q -O - {page}/ || exit 1; echo; done");
        let said = user.cluster.inside(&["/bin/sh", "-c", &forty]).success()?.text();
        Ok(said.lines().map(str::to_owned).collect())
    };
    let both = BTreeSet::from(["one", "two"].map(str::to_owned));
    wait_for("both pods to answer for the Service", SOON, || {
        let answered = ask("any")?;
        ensure!(answered == both, "forty questions were answered by {answered:?}");
        Ok(())
    })?;
    // Both stand behind the other Service by now, too.
    let answered = ask("sticky")?;
    ensure!(answered.len() == 1 && answered.is_subset(&both), "one client was answered by {answered:?}");
    Ok(())
}

fn ports(user: &User) -> Result<()> {
    let at_node = json!({"ports": [{"containerPort": PORT, "hostPort": HOST_PORT}]});
    user.pod("web", json!({"containers": [with(server(&[]), at_node)]}))?;
    let open = |name: &str, policy: &str| {
        let ports = json!([{"port": 80, "targetPort": PORT}]);
        let spec = json!({
            "type": "NodePort", "externalTrafficPolicy": policy, "selector": {"app": "web"}, "ports": ports,
        });
        user.apply(&service(name, spec))?;
        let port = user.get(&["service", name])?["spec"]["ports"][0]["nodePort"].as_u64();
        Ok::<_, anyhow::Error>(u16::try_from(port.context("a Service without a port of the node")?)?)
    };
    let (cluster, local) = (open("cluster", "Cluster")?, open("local", "Local")?);
    user.ready("web")?;
    let node = user.cluster.node_address();
    let route = Run::new("/sbin/ip").args(["-4", "route", "get", &node.to_string()]).success()?.text();
    let own = route.split_whitespace().skip_while(|word| *word != "src").nth(1);
    let own: IpAddr = own.with_context(|| format!("no address in {route:?}"))?.parse()?;
    let ask = |port: u16| {
        let page = format!("http://{node}:{port}/clientip");
        wait_for(&format!("an answer of {page}"), SOON, || {
            peer(&Run::new("/bin/busybox").args(["wget", "-q", "-O", "-", &page]).success()?.text())
        })
    };
    ask(cluster)?;
    for (what, port) in [("a Service of local policy", local), ("the pod's port of the node", HOST_PORT)] {
        let seen = ask(port)?;
        ensure!(seen == own, "by {what} asked {own}, the pod saw {seen}");
    }
    // As clients inside the cluster do.
    let told = user.sh("web", &format!("wget -q -O - http://{node}:{local}/clientip"))?;
    peer(&told)?;
    Ok(())
}

/// A rule of the node that drops what goes to a pod's server; dropping this removes it.
struct Dropped<'a> {
    user: &'a User,
    program: &'static str,
    address: String,
}

impl<'a> Dropped<'a> {
    fn new(user: &'a User, program: &'static str, address: &str) -> Result<Self> {
        let rule = Self { user, program, address: address.to_owned() };
        rule.run("-I").success()?;
        Ok(rule)
    }

    fn run(&self, action: &str) -> Run {
        let port = PORT.to_string();
        let rule = ["-d", &self.address, "-p", "tcp", "--dport", &port, "-j", "DROP"];
        self.user.cluster.inside(&[&[self.program, "--wait", action, "FORWARD"][..], &rule].concat())
    }
}

impl Drop for Dropped<'_> {
    fn drop(&mut self) {
        // If it cannot be removed, whoever asks the server next sees that.
        let _ = self.run("-D").output();
    }
}

fn rules(user: &User) -> Result<()> {
    user.pod("server", json!({"containers": [server(&[])]}))?;
    user.pod("client", json!({"containers": [idle("main")]}))?;
    user.ready("server")?;
    user.ready("client")?;
    for (program, v6) in [("/usr/sbin/iptables", false), ("/usr/sbin/ip6tables", true)] {
        let address = user.address("server", v6)?;
        let page = format!("{}/hostname", url(&address, PORT)?);
        let ask = || user.exec("client", &["timeout", "8", "wget", "-q", "-O", "-", &page]).output();
        let answer = ask()?.success()?.text();
        ensure!(answer == "server", "{page} answers {answer:?}");
        let rule = Dropped::new(user, program, &address)?;
        // Neither answered nor refused: `timeout` ends it by SIGTERM.
        ask()?.exited(143)?;
        drop(rule);
        let answer = ask()?.success()?.text();
        ensure!(answer == "server", "without the rule {page} answers {answer:?}");
    }
    Ok(())
}
