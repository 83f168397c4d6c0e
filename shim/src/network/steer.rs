//! Steers connections to the loopback of the pod's network namespace to one listening socket there.
//!
//! containerd dials localhost inside that namespace for a port-forward, whereas the services listen in the guest. Nothing
//! else of the pod is in the namespace, so all of 127.0.0.0/8 and ::1 is ours. Two means, tried in this order:
//!
//! - A *socket lookup*: a BPF program of thirty instructions that picks the listener for each new connection to loopback,
//!   attached by a link (<https://docs.kernel.org/bpf/prog_sk_lookup.html>, Linux 5.9). Program, map and link are files of
//!   this process: whenever and however it ends, they are gone. The accepted socket's own address is the one dialled.
//! - A *redirect*: an nftables table in the namespace, for kernels that refuse the first. The port dialled is in the
//!   connection's record (`SO_ORIGINAL_DST`). A killed shim leaves the table, without effect but that connections are
//!   refused as before; it ends with the namespace, and the next one to come there replaces it.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt as option};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::netns;
use crate::error::{Error, Kind, Result, WithKind};
use crate::sys;

/// Connections that may wait to be accepted; the kernel has a limit of its own.
const BACKLOG: i32 = 512;

/// What leads connections to the listener, while it lasts.
#[derive(Debug)]
pub struct Steering {
    netns: PathBuf,
    means: Means,
}

#[derive(Debug)]
enum Means {
    /// The link that attaches the program; it holds the program, and the program the map.
    Lookup {
        link: OwnedFd,
    },
    Redirect,
}

/// Makes a listener in the namespace at `netns` and steers its loopback there, by whichever means works.
pub async fn steer(netns: &Path) -> Result<(Steering, TcpListener)> {
    match by_lookup(netns).await {
        Ok(steered) => Ok(steered),
        Err(lookup) => {
            tracing::debug!(error = %lookup, "no socket lookup by BPF, a redirect by nftables is tried");
            by_redirect(netns).await.map_err(|redirect| Error::unavailable(format!("{lookup}; {redirect}")))
        }
    }
}

/// Steers by a socket lookup.
pub async fn by_lookup(netns: &Path) -> Result<(Steering, TcpListener)> {
    let (link, listener) = netns::enter(netns, async |_| {
        let listener = listen().or_kind(Kind::Internal, "listen on the pod's loopback")?;
        let attach = || -> anyhow::Result<OwnedFd> {
            let map = sys::bpf_socket_map(&listener).context("make a map of sockets")?;
            let program = sys::bpf_socket_lookup(&lookup_program(&map)).context("load a program")?;
            let own = File::open(netns::OWN).context("open the namespace")?;
            sys::bpf_link(&program, &own).context("attach a program")
        };
        Ok((attach().context("steer by BPF")?, listener))
    })
    .await?;
    Ok((Steering { netns: netns.into(), means: Means::Lookup { link } }, listener))
}

/// Steers by a redirect.
pub async fn by_redirect(netns: &Path) -> Result<(Steering, TcpListener)> {
    let listener = netns::enter(netns, async |_| {
        let listener = listen().or_kind(Kind::Internal, "listen on the pod's loopback")?;
        let port = listener.local_addr().or_kind(Kind::Internal, "listen on the pod's loopback")?.port();
        nft(&redirect_rules(port)).await.or_kind(Kind::Unavailable, "steer by nftables")?;
        Ok(listener)
    })
    .await?;
    Ok((Steering { netns: netns.into(), means: Means::Redirect }, listener))
}

impl Steering {
    /// The port that the client of an accepted connection dialled.
    pub fn port_dialled(&self, socket: &TcpStream) -> io::Result<u16> {
        let own = socket.local_addr()?;
        match self.means {
            Means::Lookup { .. } => Ok(own.port()),
            Means::Redirect if own.ip().to_canonical().is_ipv4() => {
                let original = getsockopt(socket, sockopt::OriginalDst)?;
                Ok(u16::from_be(original.sin_port))
            }
            Means::Redirect => {
                let original = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
                Ok(u16::from_be(original.sin6_port))
            }
        }
    }

    /// Leaves the namespace as it was. New connections to its loopback are refused from here on.
    pub async fn close(self) -> Result<()> {
        match self.means {
            // A child that has not reached its program yet holds a copy of the file, so its close alone would be too late.
            Means::Lookup { link } => match sys::bpf_detach(&link) {
                Err(_) if netns::is_gone(&self.netns) => Ok(()),
                detached => detached.or_kind(Kind::Internal, "end the steering of the pod's loopback"),
            },
            Means::Redirect => {
                let removed = netns::enter(&self.netns, async |_| {
                    nft(&removal()).await.or_kind(Kind::Internal, "remove the redirect of the pod's loopback")
                });
                match removed.await {
                    Err(_) if netns::is_gone(&self.netns) => Ok(()),
                    removed => removed,
                }
            }
        }
    }
}

/// A listener for both families in the calling thread's namespace, on a port that the kernel chooses.
fn listen() -> io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (socket, any) = match rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None) {
        Ok(socket) => {
            option::set_ipv6_v6only(&socket, false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
        }
        // A kernel without IPv6.
        Err(rustix::io::Errno::AFNOSUPPORT) => {
            let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            (socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
        }
        Err(errno) => return Err(errno.into()),
    };
    // The socket takes what comes over loopback only, whatever else reaches the namespace.
    setsockopt(&socket, sockopt::BindToDevice, &"lo".into())?;
    rustix::net::bind(&socket, &any)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// Name of our tables.
const TABLE: &str = "bulkhead";

/// Two tables, since kernels before 5.2 know no common one with addresses to translate.
const FAMILIES: [(&str, &str); 2] = [("ip", "ip daddr 127.0.0.0/8"), ("ip6", "ip6 daddr ::1")];

fn redirect_rules(port: u16) -> String {
    let rules = FAMILIES.map(|(family, to_loopback)| {
        format!(
            "table {family} {TABLE} {{\nchain output {{\ntype nat hook output priority -100;\n\
             {to_loopback} meta l4proto tcp redirect to :{port}\n}}\n}}\n"
        )
    });
    // Tables that a killed shim left are replaced, in the same transaction.
    removal() + &rules.concat()
}

/// The first line makes the second one valid where there is no table.
fn removal() -> String {
    FAMILIES.map(|(family, _)| format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n")).concat()
}

/// Runs `nft` in the calling thread's namespace; all of `script` is done, or nothing. The caller bounds the wait.
async fn nft(script: &str) -> io::Result<()> {
    let mut nft = tokio::process::Command::new("nft");
    nft.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = nft.spawn().map_err(|error| io::Error::new(error.kind(), format!("run nft: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // It may end without reading; its exit and its words tell why.
        drop(stdin.write_all(script.as_bytes()).await);
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("nft: {}: {}", output.status, said.lines().next().unwrap_or_default())))
}

/// The program: a TCP connection to 127.0.0.0/8 or ::1 goes to the only socket in `map`, any other where it would have gone.
///
/// Offsets are those of `struct bpf_sk_lookup` in linux/bpf.h, opcodes and helpers those of
/// <https://docs.kernel.org/bpf/standardization/instruction-set.html> and bpf-helpers(7).
fn lookup_program(map: &OwnedFd) -> Vec<u64> {
    use asm::{Label, Step, add, and, call, exit, load, load_map, move_imm, move_reg, store};
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const SK_PASS: i32 = 1;
    let unless = |register, value, to| Step::JumpUnless(register, value, to);
    let mut steps = vec![
        Step::Do(move_reg(6, 1)),
        Step::Do(load(2, 6, PROTOCOL)),
        unless(2, libc::IPPROTO_TCP, Label::Pass),
        Step::Do(load(2, 6, FAMILY)),
        unless(2, libc::AF_INET, Label::Ip6),
        // Addresses are in network order.
        Step::Do(load(2, 6, LOCAL_IP4)),
        Step::Do(and(2, i32::from_ne_bytes([0xff, 0, 0, 0]))),
        unless(2, i32::from_ne_bytes([127, 0, 0, 0]), Label::Pass),
        Step::Jump(Label::Assign),
        Step::At(Label::Ip6),
        unless(2, libc::AF_INET6, Label::Pass),
    ];
    for (word, value) in [0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])].into_iter().enumerate() {
        steps.extend([Step::Do(load(2, 6, LOCAL_IP6 + 4 * word as i16)), unless(2, value, Label::Pass)]);
    }
    let [map_low, map_high] = load_map(1, map.as_fd().as_raw_fd());
    steps.extend([
        Step::At(Label::Assign),
        // The key, 0, on the stack.
        Step::Do(store(10, -4, 0)),
        Step::Do(move_reg(2, 10)),
        Step::Do(add(2, -4)),
        Step::Do(map_low),
        Step::Do(map_high),
        Step::Do(call(MAP_LOOKUP_ELEM)),
        Step::JumpIf(0, 0, Label::Pass),
        Step::Do(move_reg(7, 0)),
        Step::Do(move_reg(1, 6)),
        Step::Do(move_reg(2, 7)),
        Step::Do(move_imm(3, 0)),
        Step::Do(call(SK_ASSIGN)),
        // The lookup took a reference.
        Step::Do(move_reg(1, 7)),
        Step::Do(call(SK_RELEASE)),
        Step::At(Label::Pass),
        Step::Do(move_imm(0, SK_PASS)),
        Step::Do(exit()),
    ]);
    asm::assemble(&steps)
}

/// As much of an assembler as the program takes.
mod asm {
    /// A place to jump to.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Label {
        Ip6,
        Assign,
        Pass,
    }

    /// An instruction, or a place among them.
    #[derive(Debug, Clone, Copy)]
    pub enum Step {
        Do(u64),
        Jump(Label),
        /// If the register has the value.
        JumpIf(u8, i32, Label),
        /// If it has another.
        JumpUnless(u8, i32, Label),
        At(Label),
    }

    /// Puts in how far the jumps go. Every label is in `steps`, or the kernel refuses the program.
    pub fn assemble(steps: &[Step]) -> Vec<u64> {
        let is_code = |step: &&Step| !matches!(step, Step::At(_));
        let index_of = |label: Label| {
            let before = steps.iter().take_while(|step| !matches!(step, Step::At(at) if *at == label));
            before.filter(is_code).count()
        };
        let code = steps.iter().filter(is_code).enumerate();
        code.map(|(index, step)| {
            let to = |label| (index_of(label) as i16) - (index as i16) - 1;
            match *step {
                Step::Do(instruction) => instruction,
                Step::Jump(label) => encode(0x05, 0, 0, to(label), 0),
                Step::JumpIf(register, value, label) => encode(0x15, register, 0, to(label), value),
                Step::JumpUnless(register, value, label) => encode(0x55, register, 0, to(label), value),
                Step::At(_) => unreachable!("labels were left out"),
            }
        })
        .collect()
    }

    fn encode(opcode: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
        let [o0, o1] = offset.to_ne_bytes();
        let [v0, v1, v2, v3] = value.to_ne_bytes();
        // Four bits each, in the order of a little-endian machine, which is all that the shim is built for.
        u64::from_ne_bytes([opcode, from << 4 | to, o0, o1, v0, v1, v2, v3])
    }

    pub fn move_reg(to: u8, from: u8) -> u64 {
        encode(0xbf, to, from, 0, 0)
    }

    pub fn move_imm(to: u8, value: i32) -> u64 {
        encode(0xb7, to, 0, 0, value)
    }

    pub fn add(to: u8, value: i32) -> u64 {
        encode(0x07, to, 0, 0, value)
    }

    pub fn and(to: u8, value: i32) -> u64 {
        encode(0x57, to, 0, 0, value)
    }

    /// 32 bits at an address.
    pub fn load(to: u8, from: u8, offset: i16) -> u64 {
        encode(0x61, to, from, offset, 0)
    }

    /// 32 bits to an address.
    pub fn store(to: u8, offset: i16, value: i32) -> u64 {
        encode(0x62, to, 0, offset, value)
    }

    /// The address of the map behind a file, in two instructions.
    pub fn load_map(to: u8, map: i32) -> [u64; 2] {
        [encode(0x18, to, 1, 0, map), 0]
    }

    pub fn call(helper: i32) -> u64 {
        encode(0x85, 0, 0, 0, helper)
    }

    pub fn exit() -> u64 {
        encode(0x95, 0, 0, 0, 0)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn jumps_count_from_the_instruction_behind_them() {
            let steps = [
                Step::JumpUnless(2, 7, Label::Pass),
                Step::Jump(Label::Assign),
                Step::At(Label::Assign),
                Step::Do(move_imm(0, -1)),
                Step::At(Label::Pass),
                Step::Do(exit()),
            ];
            assert_eq!(assemble(&steps), [0x0000_0007_0002_0255, 0x05, 0xffff_ffff_0000_00b7, 0x95]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream as Client;
    use std::process::Command;
    use std::time::Duration;

    use nix::sched::{CloneFlags, setns};
    use tokio::time::timeout;

    use super::*;
    use crate::network::tests::Netns;

    const SOON: Duration = Duration::from_secs(5);

    fn namespace() -> Option<Netns> {
        let pod = Netns::new()?;
        pod.ip("link set lo up");
        pod.ip("link add eth0 type bridge");
        pod.ip("link set eth0 up");
        pod.ip("addr add 10.99.0.2/24 dev eth0");
        Some(pod)
    }

    /// What `job` returns in the namespace.
    fn inside<T: Send>(netns: &Netns, job: impl FnOnce() -> T + Send) -> T {
        let file = File::open(netns.path()).expect("is there");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("enters");
                job()
            });
            thread.join().expect("does not panic")
        })
    }

    fn dial(netns: &Netns, address: &str) -> io::Result<Client> {
        inside(netns, || Client::connect_timeout(&address.parse().expect("an address"), SOON))
    }

    /// Dials each loopback address and sees the port arrive, and everything else refused.
    async fn check(netns: &Netns, steering: &Steering, listener: &tokio::net::TcpListener) {
        for address in ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:443", "127.0.0.1:1"] {
            let client = dial(netns, address).expect(address);
            let (accepted, _) = timeout(SOON, listener.accept()).await.expect("in time").expect("accepts");
            let port = steering.port_dialled(&accepted).expect("is known");
            assert_eq!(port, client.peer_addr().expect("is connected").port(), "{address}");
        }
        let error = dial(netns, "10.99.0.2:80").expect_err("is not the loopback");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_lookup_leads_every_port_of_the_loopback_to_one_socket() {
        let Some(pod) = namespace() else { return };
        let (steering, listener) = match by_lookup(&pod.path()).await {
            Ok(steered) => steered,
            // A machine that forbids BPF; whatever else the kernel says is a fault of the program's.
            Err(error) if ["(os error 1)", "(os error 38)"].iter().any(|errno| error.to_string().contains(errno)) => {
                return println!("skipped: {error}");
            }
            Err(error) => panic!("{error}"),
        };
        let listener = tokio::net::TcpListener::from_std(listener).expect("can be watched");
        check(&pod, &steering, &listener).await;
        // The link's end is the end of it, even while the listener is open.
        steering.close().await.expect("closes");
        let refused = dial(&pod, "127.0.0.1:80").expect_err("is refused");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let (steering, listener) = by_lookup(&pod.path()).await.expect("another one comes");
        steering.close().await.expect("closes");
        drop(listener);
        assert!(dial(&pod, "[::1]:80").is_err());
    }

    #[tokio::test]
    async fn a_redirect_leads_every_port_of_the_loopback_to_one_socket() {
        let Some(pod) = namespace() else { return };
        let tables = || {
            let list = || Command::new("nft").args(["list", "tables"]).output().expect("nft runs");
            String::from_utf8(inside(&pod, list).stdout).expect("is text")
        };
        if Command::new("nft").arg("--version").output().is_err() {
            return println!("skipped: there is no nft");
        }
        let (lost, _) = by_redirect(&pod.path()).await.expect("steers");
        // A shim that was killed removes nothing; the next one takes over all the same.
        drop(lost);
        assert!(tables().contains("table ip bulkhead"), "{}", tables());
        let (steering, listener) = by_redirect(&pod.path()).await.expect("takes over");
        let listener = tokio::net::TcpListener::from_std(listener).expect("can be watched");
        check(&pod, &steering, &listener).await;
        steering.close().await.expect("closes");
        assert_eq!(tables(), "");
    }

    #[tokio::test]
    async fn a_redirect_may_be_closed_when_its_namespace_is_gone() {
        let netns = Path::new("/no/such/netns").to_owned();
        Steering { netns, means: Means::Redirect }.close().await.expect("there is nothing to do");
    }

    #[tokio::test]
    async fn the_host_s_own_loopback_is_never_steered() {
        let error = steer(Path::new("/proc/self/ns/net")).await.expect_err("is refused");
        assert!(error.to_string().contains("hostNetwork"), "{error}");
    }
}
