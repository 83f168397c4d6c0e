//! The command line as containerd and CRI-O write it: flags in the style of Go's `flag` package, then one action.
//!
//! `-name value`, `-name=value` and the same with two dashes; switches take no value unless after `=`. Parsing ends at the
//! first word that is not a flag, the action. <https://pkg.go.dev/flag#hdr-Command_line_flag_syntax>

use std::path::PathBuf;

use anyhow::{Context, bail};

/// What the command line says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket; empty under CRI-O.
    pub address: String,
    /// Path of containerd's binary.
    pub publish_binary: String,
    /// Id of the container, or of the sandbox.
    pub id: String,
    /// The bundle; given to `delete` alone, `start` has it as its working directory.
    pub bundle: PathBuf,
    /// containerd logs at level debug.
    pub debug: bool,
    /// What to do.
    pub action: Action,
}

/// What the binary is run for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// Make a server for this container, or name the one that its pod has.
    Start,
    /// Remove what is left of a container.
    Delete,
    /// Be the server; only `start` runs this.
    Serve,
    /// Say what the runtime can do.
    Info,
    /// Say the version.
    Version,
    /// Say how this is used.
    #[default]
    Help,
}

/// Told with every wrong command line, and by `-help`.
pub const USAGE: &str = "usage: containerd-shim-bulkhead-v2 -namespace NAMESPACE -id ID [-address SOCKET] \
     [-publish-binary PATH] [-bundle PATH] [-debug] start|delete, or -info, or -v; containerd runs it";

impl Flags {
    /// Parses the words after the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> anyhow::Result<Self> {
        let mut flags = Self::default();
        let (mut help, mut version, mut info) = (false, false, false);
        let mut words = words.into_iter();
        let mut action = None;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                action = Some(word);
                break;
            };
            if word == "--" {
                action = words.next();
                break;
            }
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, attached) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let switch = match name {
                "debug" => Some(&mut flags.debug),
                "v" | "version" => Some(&mut version),
                "info" => Some(&mut info),
                "h" | "help" => Some(&mut help),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = match attached.as_deref() {
                    None | Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(other) => bail!("flag -{name} is {other:?}, accepted are true and false"),
                };
                continue;
            }
            let mut bundle = String::new();
            let target = match name {
                "namespace" => &mut flags.namespace,
                "address" => &mut flags.address,
                "publish-binary" => &mut flags.publish_binary,
                "id" => &mut flags.id,
                "bundle" => &mut bundle,
                _ => bail!("flag -{name} is not known; {USAGE}"),
            };
            *target = match attached {
                Some(value) => value,
                None => words.next().with_context(|| format!("flag -{name} needs a value; {USAGE}"))?,
            };
            if name == "bundle" {
                flags.bundle = bundle.into();
            }
        }
        flags.action = if help {
            Action::Help
        } else if version {
            Action::Version
        } else if info {
            Action::Info
        } else {
            match action.as_deref() {
                Some("start") => Action::Start,
                Some("delete") => Action::Delete,
                Some("serve") => Action::Serve,
                Some(other) => bail!("action {other:?} is not known; {USAGE}"),
                None => bail!("no action given; {USAGE}"),
            }
        };
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Flags> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_line_that_containerd_writes_is_read() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
                    -id abc -bundle /run/b -debug start";
        let expected = Flags {
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            id: "abc".into(),
            bundle: "/run/b".into(),
            debug: true,
            action: Action::Start,
        };
        assert_eq!(parse(line).expect("parses"), expected);
    }

    #[test]
    fn both_dashes_and_both_ways_to_give_a_value_are_read() {
        let one = parse("-id=a -namespace n -debug=false delete").expect("parses");
        let two = parse("--id a --namespace=n delete").expect("parses");
        assert_eq!(one, two);
        assert_eq!((one.action, one.debug), (Action::Delete, false));
    }

    #[test]
    fn an_empty_value_is_a_value() {
        // CRI-O has no address.
        let words = ["-namespace", "default", "-address", "", "-id", "a", "start"].map(str::to_owned);
        let flags = Flags::parse(words).expect("parses");
        assert_eq!((&*flags.address, &*flags.id), ("", "a"));
    }

    #[test]
    fn a_value_may_look_like_a_flag() {
        assert_eq!(parse("-id -x start").expect("parses").id, "-x");
        assert_eq!(parse("-id a=b start").expect("parses").id, "a=b");
    }

    #[test]
    fn info_version_and_help_need_nothing_else() {
        for (line, action) in
            [("-info", Action::Info), ("-v", Action::Version), ("--version", Action::Version), ("-h", Action::Help)]
        {
            assert_eq!(parse(line).expect("parses").action, action, "{line}");
        }
    }

    #[test]
    fn wrong_lines_are_refused_by_name() {
        for (line, words) in [
            ("-foo start", "-foo"),
            ("-id", "-id needs a value"),
            ("-debug=maybe start", "maybe"),
            ("-id a", "no action"),
            ("", "no action"),
            ("-id a restart", "\"restart\""),
        ] {
            let said = parse(line).expect_err("is refused").to_string();
            assert!(said.contains(words), "{line}: {said}");
        }
    }
}
