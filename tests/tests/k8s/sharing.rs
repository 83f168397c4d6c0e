//! How far programs reach through a volume: what is written, watched, locked, mapped or talked to in it.

use std::fs;

use anyhow::{Result, ensure};
use bulkhead_tests::cluster::images::PERL;
use bulkhead_tests::cluster::table::Row;
use bulkhead_tests::cluster::user::{SOON, User, wait_for};
use serde_json::{Value, json};

use crate::life::{idle, script, with};
use crate::talk::{logs_of, sh_in};
use crate::volumes::{host_directory, mounts};

/// The rows of this subject.
pub const ROWS: &[Row] = &[
    Row::new("a watch tells what the pod's containers write, and with runc what the node does", watches),
    Row::new("a lock on a file of a volume holds in its pod, and with runc against everybody", locks),
    Row::new("containers of a pod meet in their volumes: by sockets, FIFOs and mappings, whole or in part", meeting),
];

/// A container that runs a Perl script.
fn perl(name: &str, script: &str, args: &[&str]) -> Value {
    let command = [&["perl", "-e", script][..], args].concat();
    json!({"name": name, "image": PERL, "command": command})
}

/// Prints the name of each file in a directory that somebody has closed after writing to it.
///
/// 253 and 254 are inotify_init and inotify_add_watch of x86-64, 8 is `IN_CLOSE_WRITE`.
const WATCH: &str = r#"
    $| = 1;
    my ($path, $events) = @ARGV;
    my $number = syscall(253);
    syscall(254, $number, $path, 8) < 0 and die "watch: $!";
    open(my $watch, "<&=", $number) or die "open: $!";
    print "watching\n";
    while (sysread($watch, $events, 4096)) { print "$_\n" for unpack("(x12L/Z)*", $events) }
"#;

fn watches(user: &User) -> Result<()> {
    let data = host_directory(user)?;
    fs::write(data.join("node"), "one\n")?;
    let mounted = mounts(json!([{"name": "data", "mountPath": "/data"}]));
    let containers = [with(perl("main", WATCH, &["/data"]), mounted.clone()), with(idle("peer"), mounted)];
    let volumes = json!([{"name": "data", "hostPath": {"path": data}}]);
    user.ready_pod("watcher", json!({"volumes": volumes, "containers": containers}))?;
    let wait_told = |name: &str| {
        wait_for(&format!("the watch to tell of {name}"), SOON, || {
            let told = logs_of(user, "watcher", "main")?;
            ensure!(told.lines().any(|line| line == name), "it tells {told:?}");
            Ok(told)
        })
    };
    wait_told("watching")?;
    let said = user.sh("watcher", "cat /data/node")?;
    ensure!(said == "one", "the node's file is {said:?}");
    // Of the same size: what the guest has cached of it has to be dropped for its time alone.
    fs::write(data.join("node"), "two\n")?;
    let said = user.sh("watcher", "cat /data/node")?;
    ensure!(said == "two", "after the node's change, its file is {said:?}");
    sh_in(user, "watcher", "peer", "echo three > /data/peer")?;
    let said = user.sh("watcher", "cat /data/peer")?;
    ensure!(said == "three", "the other container's file is {said:?}");
    user.sh("watcher", "echo four > /data/own")?;
    // Events come in order, so those of the writes before have come by now, or never will.
    let told = wait_told("own")?;
    let expected: &[&str] =
        if user.is_bulkhead() { &["watching", "peer", "own"] } else { &["watching", "node", "peer", "own"] };
    ensure!(told.lines().collect::<Vec<_>>() == expected, "the watch tells {told:?}");
    Ok(())
}

/// Locks a file by flock(2) and by fcntl(2), waiting for neither, and prints which it could; with a second argument it
/// keeps them.
///
/// 6 is `LOCK_EX | LOCK_NB`, and `F_SETLK` with a `struct flock` whose type, 1, is `F_WRLCK`.
const LOCK: &str = r#"
    $| = 1;
    open(my $file, "+<", $ARGV[0]) or die "open: $!";
    my $record = pack("ssx4qqix4", 1, 0, 0, 0, 0);
    print join(" ", flock($file, 6) ? "flock" : (), fcntl($file, 6, $record) ? "fcntl" : ()), "\n";
    sleep if @ARGV > 1;
"#;

fn locks(user: &User) -> Result<()> {
    const BOTH: &str = "flock fcntl";
    let data = host_directory(user)?;
    fs::write(data.join("file"), "")?;
    let mounted = mounts(json!([{"name": "data", "mountPath": "/data"}]));
    let volumes = json!([{"name": "data", "hostPath": {"path": data}}]);
    let sleeper = |name: &str| with(with(idle(name), json!({"image": PERL})), mounted.clone());
    let main = with(perl("main", LOCK, &["/data/file", "keep"]), mounted.clone());
    user.pod("locker", json!({"volumes": volumes, "containers": [main, sleeper("peer")]}))?;
    user.pod("other", json!({"volumes": volumes, "containers": [sleeper("main")]}))?;
    user.ready("locker")?;
    user.ready("other")?;
    wait_for("the first to have its locks", SOON, || {
        let said = logs_of(user, "locker", "main")?;
        ensure!(said == BOTH, "it locked by {said:?}");
        Ok(())
    })?;
    let path = data.join("file").display().to_string();
    let inside = ["perl", "-e", LOCK, "/data/file"];
    let of = |pod: &str, container: &str| user.kubectl(&["exec", pod, "-c", container, "--"]).args(inside).success();
    let elsewhere = if user.is_bulkhead() { BOTH } else { "" };
    for (who, locked, expected) in [
        ("the same container", of("locker", "main")?, ""),
        ("another container of the pod", of("locker", "peer")?, ""),
        ("another pod", of("other", "main")?, elsewhere),
        ("the node", user.cluster.inside(&["/usr/bin/perl", "-e", LOCK, &path]).success()?, elsewhere),
    ] {
        let locked = locked.text();
        ensure!(locked == expected, "{who} could lock the file by {locked:?}");
    }
    Ok(())
}

/// Serves a socket `s` and fills a FIFO `f` in the first directory; then maps the file `m` of it and waits for the other side
/// to write to its own mapping.
///
/// 1 is `AF_UNIX`, and `SOCK_STREAM`. 9 and 0 are mmap(2) and read(2) of x86-64; 3 and 1 are `PROT_READ | PROT_WRITE` and
/// `MAP_SHARED`.
const MEETING: &str = r#"
    $| = 1;
    my ($directory, $serves) = @ARGV;
    my $address = pack("Sa108", 1, "$directory/s");
    open(my $file, "+<", "$directory/m") or die "open: $!";
    my $at = syscall(9, 0, 4096, 3, 1, fileno($file), 0);
    if ($serves) {
        socket(my $server, 1, 1, 0) or die "socket: $!";
        bind($server, $address) or die "bind: $!";
        listen($server, 1) or die "listen: $!";
        print "listening\n";
        accept(my $client, $server) or die "accept: $!";
        print {$client} "by socket\n";
        close($client);
        open(my $fifo, ">", "$directory/f") or die "open: $!";
        print {$fifo} "by FIFO\n";
        close($fifo);
        until (unpack("P4", pack("Q", $at)) eq "seen") { select(undef, undef, undef, 0.05) }
        print "mapped\n";
        sleep;
    }
    socket(my $client, 1, 1, 0) or die "socket: $!";
    connect($client, $address) or die "connect: $!";
    print <$client>;
    open(my $fifo, "<", "$directory/f") or die "open: $!";
    print <$fifo>;
    # read(2) into the mapping.
    pipe(my $from, my $to);
    syswrite($to, "seen");
    syscall(0, fileno($from), $at, 4);
"#;

fn meeting(user: &User) -> Result<()> {
    let data = host_directory(user)?;
    let volumes = json!([{"name": "work", "emptyDir": {}}, {"name": "data", "hostPath": {"path": data}}]);
    let prepare = script("prepare", "for d in /both/part /data; do mkfifo $d/f; head -c 4096 /dev/zero > $d/m; done");
    let whole = mounts(json!([{"name": "work", "mountPath": "/both"}, {"name": "data", "mountPath": "/data"}]));
    let prepare = with(
        prepare,
        mounts(json!([
            {"name": "work", "mountPath": "/both/part", "subPath": "part"}, {"name": "data", "mountPath": "/data"},
        ])),
    );
    let part = mounts(json!([{"name": "work", "mountPath": "/mine", "subPath": "part"}]));
    let spec = json!({
        "volumes": volumes, "initContainers": [prepare],
        "containers": [
            with(perl("in-part", MEETING, &["/mine", "serve"]), part),
            with(perl("in-whole", MEETING, &["/data", "serve"]), whole.clone()),
            with(with(idle("peer"), json!({"image": PERL})), whole),
        ],
    });
    user.ready_pod("meeting", spec)?;
    let told = |container: &str, line: &str| {
        wait_for(&format!("{container} to say {line}"), SOON, || {
            let told = logs_of(user, "meeting", container)?;
            ensure!(told.lines().last() == Some(line), "it says {told:?}");
            Ok(())
        })
    };
    for (container, directory) in [("in-part", "/both/part"), ("in-whole", "/data")] {
        told(container, "listening")?;
        let meet = ["exec", "meeting", "-c", "peer", "--", "perl", "-e", MEETING, directory];
        let said = user.kubectl(&meet).success()?.text();
        ensure!(said == "by socket\nby FIFO", "in {directory}, the other container was told {said:?}");
        told(container, "mapped")?;
    }
    Ok(())
}
