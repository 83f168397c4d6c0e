//! The files that an installation brings: QEMU, virtiofsd, the guest's kernel and initramfs, the shim.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};

use super::Finding;
use crate::config::{Asset, Config, Machine};
use crate::error;
use crate::timeouts;
use crate::vm::asset;

/// The shim, as containerd derives its name from the runtime's.
const SHIM: &str = "containerd-shim-bulkhead-v2";

/// The oldest QEMU that Bulkhead is tested with.
const OLDEST_QEMU: (u32, u32) = (7, 2);

/// Looks at them, in the order of a boot. `exe` as in [`Config::find`].
pub async fn look(config: &Config, exe: &Path) -> Vec<Finding> {
    vec![
        qemu(config, exe).await,
        guest_file("guest kernel", config.find(Asset::Kernel, exe), |path| asset::open_kernel(path).map(drop)),
        guest_file("guest initramfs", config.find(Asset::Initramfs, exe), |path| asset::open_initramfs(path).map(drop)),
        virtiofsd(config, exe).await,
        shim(exe).await,
    ]
}

async fn qemu(config: &Config, exe: &Path) -> Finding {
    const WHAT: &str = "QEMU";
    let path = match config.find(Asset::Qemu, exe) {
        Ok(path) => path,
        Err(error) => {
            return Finding::missing(WHAT, error.to_string(), "Install QEMU 7.2 or newer (Debian: qemu-system-x86).");
        }
    };
    let (version, machines) = (ask(&path, &["--version"]).await, ask(&path, &["-machine", "help"]).await);
    match version.and_then(|version| Ok((version, machines?))) {
        Ok((version, machines)) => judge_qemu(&path, &version, &machines, config.machine),
        Err(error) => Finding::missing(WHAT, format!("{error:#}"), "Install a QEMU that runs on this machine."),
    }
}

fn judge_qemu(path: &Path, version: &str, machines: &str, wanted: Machine) -> Finding {
    const WHAT: &str = "QEMU";
    let Some((number, told)) = version_after(version, "version ") else {
        let found = format!("{} calls itself {:?}", path.display(), first_line(version));
        return Finding::missing(WHAT, found, "Name qemu-system-x86_64 as qemu.path in the configuration.");
    };
    let found = format!("{told}, {}", path.display());
    let has = |machine: &str| machines.lines().any(|line| line.split_whitespace().next() == Some(machine));
    // A microvm with too many devices becomes a q35, which has an alias for its newest version.
    let needed = if wanted == Machine::Q35 { &["q35"][..] } else { &["microvm", "q35"] };
    if let Some(lacking) = needed.iter().find(|machine| !has(machine)) {
        let mend = if *lacking == "microvm" {
            "Set machine = \"q35\" in the configuration, or install a QEMU with microvm."
        } else {
            "Install a QEMU for x86_64 with q35."
        };
        return Finding::missing(WHAT, format!("{found}, without the machine {lacking}"), mend);
    }
    if number < OLDEST_QEMU {
        return Finding::warning(WHAT, found, "Install QEMU 7.2 or newer: Bulkhead is not tested with older ones.");
    }
    Finding::ok(WHAT, found)
}

fn guest_file(
    what: &'static str,
    found: error::Result<PathBuf>,
    check: impl FnOnce(&Path) -> Result<(), asset::AssetError>,
) -> Finding {
    let mend = "Install it again (make install), or name it in the configuration.";
    match found.map_err(|error| error.to_string()).and_then(|path| match check(&path) {
        Ok(()) => Ok(path),
        Err(error) => Err(error.to_string()),
    }) {
        Ok(path) => Finding::ok(what, path.display().to_string()),
        Err(why) => Finding::missing(what, why, mend),
    }
}

async fn virtiofsd(config: &Config, exe: &Path) -> Finding {
    const WHAT: &str = "virtiofsd";
    const MEND: &str = "Install virtiofsd, the Rust one, or name it as virtiofsd in the configuration.";
    let path = match config.find(Asset::Virtiofsd, exe) {
        Ok(path) => path,
        Err(error) => return Finding::missing(WHAT, error.to_string(), MEND),
    };
    match ask(&path, &["--version"]).await {
        Ok(version) => judge_virtiofsd(&path, &version),
        Err(error) => Finding::missing(WHAT, format!("{error:#}"), MEND),
    }
}

/// The C one of QEMU before 8.0 says `virtiofsd version 7.2.0 (…)`, and has other options.
fn judge_virtiofsd(path: &Path, version: &str) -> Finding {
    const WHAT: &str = "virtiofsd";
    match version_after(version, "virtiofsd ") {
        Some((_, told)) => Finding::ok(WHAT, format!("{told}, {}", path.display())),
        None => Finding::missing(
            WHAT,
            format!("{} calls itself {:?}", path.display(), first_line(version)),
            "Install the virtiofsd that is written in Rust (1.0 or newer), not the one of QEMU before 8.0.",
        ),
    }
}

async fn shim(exe: &Path) -> Finding {
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    let path = on_path(SHIM, &search_path);
    let version = match &path {
        Some(path) => Some(ask(path, &["-v"]).await.map_err(|error| format!("{error:#}"))),
        None => None,
    };
    judge_shim(path, version, exe)
}

/// Of containerd's own `PATH` nothing is known here; a service's is often shorter than a person's.
fn judge_shim(path: Option<PathBuf>, version: Option<Result<String, String>>, exe: &Path) -> Finding {
    const WHAT: &str = "shim";
    let own = env!("CARGO_PKG_VERSION");
    match (path, version) {
        (Some(path), Some(Ok(version))) => match version_after(&version, "version ") {
            Some((_, told)) if told == own => Finding::ok(WHAT, format!("{told}, {}", path.display())),
            _ => Finding::warning(
                WHAT,
                format!("{} is {:?}, this is version {own}", path.display(), first_line(&version)),
                "Install shim and CLI of one version.",
            ),
        },
        (Some(_), Some(Err(error))) => Finding::missing(WHAT, error, "Install a shim that runs on this machine."),
        _ => Finding::missing(
            WHAT,
            format!("{SHIM} is not in PATH"),
            match exe.with_file_name(SHIM) {
                beside if beside.is_file() => {
                    format!("Put {} into the PATH of containerd.", beside.parent().unwrap_or(Path::new("/")).display())
                }
                _ => format!("Install {SHIM} into a directory of containerd's PATH."),
            },
        ),
    }
}

/// The first program `name` in the directories of `search_path`.
pub fn on_path(name: &str, search_path: &OsStr) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(search_path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(executable)
}

/// What the program says on stdout, within [`timeouts::PROGRAM_ANSWER`]; an error is what it says on stderr.
pub async fn ask(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let what = || format!("run {} {}", program.display(), arguments.join(" "));
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(timeouts::PROGRAM_ANSWER, command.output()).await {
        Ok(output) => output.with_context(what)?,
        Err(_) => bail!("{}: no answer within {:?}", what(), timeouts::PROGRAM_ANSWER),
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}: {}", what(), output.status, first_line(&said));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default().trim()
}

/// The version that follows `word` in the first line: its first two numbers, and the whole of it.
fn version_after<'a>(text: &'a str, word: &str) -> Option<((u32, u32), &'a str)> {
    let (_, rest) = first_line(text).split_once(word)?;
    let told = rest.split_whitespace().next()?;
    let mut numbers = told.split(['.', '-', '+']).map(str::parse);
    Some(((numbers.next()?.ok()?, numbers.next()?.ok()?), told))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    const DEBIAN: &str = "QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7+deb12u16)\nCopyright (c)\n";
    const MACHINES: &str =
        "Supported machines are:\nmicrovm              microvm (i386)\nq35     Standard PC (alias of pc-q35-7.2)\n";

    #[test]
    fn qemu_is_judged_by_its_version_and_its_machines() {
        let judge = |version, machines, wanted| judge_qemu("/q".as_ref(), version, machines, wanted);
        assert_eq!(judge(DEBIAN, MACHINES, Machine::Auto), Finding::ok("QEMU", "7.2.19, /q"));
        let old = judge("QEMU emulator version 5.2.0\n", MACHINES, Machine::Auto);
        assert_eq!(old.verdict, Verdict::Warning);
        let enterprise = "q35  RHEL-9.4.0 PC\n";
        let lacking = judge(DEBIAN, enterprise, Machine::Auto);
        assert_eq!((lacking.verdict, &*lacking.found), (Verdict::Missing, "7.2.19, /q, without the machine microvm"));
        assert_eq!(judge(DEBIAN, enterprise, Machine::Q35).verdict, Verdict::Ok);
        assert_eq!(judge("bash, 5.2", MACHINES, Machine::Auto).verdict, Verdict::Missing);
    }

    #[test]
    fn the_virtiofsd_of_qemu_is_told_from_the_one_in_rust() {
        assert_eq!(judge_virtiofsd("/v".as_ref(), "virtiofsd 1.13.2\n"), Finding::ok("virtiofsd", "1.13.2, /v"));
        let theirs =
            judge_virtiofsd("/v".as_ref(), "virtiofsd version 7.2.0 (Debian 1:7.2)\nusing FUSE kernel interface\n");
        assert_eq!(theirs.verdict, Verdict::Missing);
        assert!(theirs.found.contains("virtiofsd version 7.2.0"), "{}", theirs.found);
    }

    #[test]
    fn the_shim_is_of_the_same_version() {
        let judge = |version: Result<&str, &str>| {
            let version = version.map(str::to_owned).map_err(str::to_owned);
            judge_shim(Some("/bin/s".into()), Some(version), "/bin/bulkhead".as_ref())
        };
        let own = env!("CARGO_PKG_VERSION");
        assert_eq!(
            judge(Ok(&format!("bulkhead-shim: version {own}\n"))),
            Finding::ok("shim", format!("{own}, /bin/s"))
        );
        assert_eq!(judge(Ok("bulkhead-shim: version 0.0.1\n")).verdict, Verdict::Warning);
        assert_eq!(judge(Err("it crashed")).verdict, Verdict::Missing);
    }

    #[test]
    fn a_shim_beside_the_cli_tells_what_is_lacking_in_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let lost = judge_shim(None, None, &dir.path().join("bulkhead"));
        assert!(lost.mend.is_some_and(|mend| mend.starts_with("Install containerd-shim-bulkhead-v2")));
        std::fs::write(dir.path().join(SHIM), "x").expect("writes");
        let beside = judge_shim(None, None, &dir.path().join("bulkhead"));
        assert_eq!(beside.mend, Some(format!("Put {} into the PATH of containerd.", dir.path().display())));
    }

    #[tokio::test]
    async fn a_program_that_fails_is_told_with_its_words() {
        let shell = Path::new("/bin/sh");
        assert_eq!(ask(shell, &["-c", "echo yes"]).await.expect("answers"), "yes\n");
        let said = format!("{:#}", ask(shell, &["-c", "echo no >&2; exit 3"]).await.expect_err("fails"));
        assert!(said.ends_with("exit status: 3: no"), "{said}");
    }
}
