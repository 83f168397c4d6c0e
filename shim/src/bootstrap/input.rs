//! What `start` is told, by whom: containerd 2.3 and newer write a `BootstrapParams` to stdin, older ones the runtime's
//! options if it has any, CRI-O nothing; the rest is in flags and the environment.
//!
//! The bytes do not say which they are: an options `Any` also decodes as `BootstrapParams`, with its type URL as the id. So
//! the message is believed only if it speaks of the same container as the flags.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::flags::Flags;
use crate::config::{LogLevel, RuntimeOptions};

/// containerd writes the input and closes it before it waits for the answer.
pub const INPUT_PATIENCE: Duration = Duration::from_secs(5);

/// Larger than any options table that a person writes.
const MAX_INPUT_BYTES: usize = 4 << 20;

/// Everything that `start` was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Whether the answer must be a `BootstrapResult`; else it is a bare address.
    pub wants_message: bool,
    /// Runtime options; `None` if none came, as always under CRI-O.
    pub options: Option<RuntimeOptions>,
    /// containerd's gRPC socket; empty under CRI-O.
    pub grpc_address: String,
    /// containerd's ttrpc socket, a path; `None` under CRI-O.
    pub ttrpc_address: Option<String>,
    /// Path of containerd's binary; may be empty.
    pub containerd_binary: String,
    /// Version of containerd as it calls itself; `None` before 2.3.
    pub containerd_version: Option<String>,
    /// Level that containerd logs at.
    pub log_level: LogLevel,
    /// Directory for the socket, where containerd chooses it.
    pub socket_dir: Option<String>,
}

/// The environment that `start` looks at.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `TTRPC_ADDRESS`.
    pub ttrpc_address: Option<String>,
    /// `GRPC_ADDRESS`.
    pub grpc_address: Option<String>,
}

impl Environment {
    /// That of this process.
    pub fn read() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { ttrpc_address: variable("TTRPC_ADDRESS"), grpc_address: variable("GRPC_ADDRESS") }
    }
}

impl Input {
    /// Puts together what stdin, flags and environment say.
    pub fn parse(stdin: &[u8], flags: &Flags, environment: Environment) -> anyhow::Result<Self> {
        let params = match BootstrapParams::parse_from_bytes(stdin) {
            Ok(params) if params.instance_id == flags.id && params.namespace == flags.namespace => Some(params),
            // An `Any` has only the fields 1 and 2: with one of these this is a message, meant for another.
            Ok(params)
                if !params.containerd_version.is_empty()
                    || !params.containerd_binary.is_empty()
                    || !params.containerd_grpc_address.is_empty()
                    || !params.containerd_ttrpc_address.is_empty() =>
            {
                bail!(
                    "bootstrap parameters on stdin are for {}/{}, but the flags say {}/{}",
                    params.namespace,
                    params.instance_id,
                    flags.namespace,
                    flags.id
                );
            }
            _ => None,
        };
        let Some(params) = params else {
            let any =
                Any::parse_from_bytes(stdin).context("stdin holds neither bootstrap parameters nor runtime options")?;
            let options = match stdin {
                [] => None,
                _ => Some(RuntimeOptions::decode(&any.type_url, &any.value)?),
            };
            return Ok(Self {
                wants_message: false,
                options,
                grpc_address: first([&flags.address]).or(environment.grpc_address).unwrap_or_default(),
                ttrpc_address: environment.ttrpc_address.map(|address| path_of(&address)),
                containerd_binary: flags.publish_binary.clone(),
                containerd_version: None,
                log_level: if flags.debug { LogLevel::Debug } else { LogLevel::Info },
                socket_dir: None,
            });
        };
        Ok(Self {
            wants_message: true,
            options: options_among(&params)?,
            grpc_address: first([&params.containerd_grpc_address, &flags.address])
                .or(environment.grpc_address)
                .unwrap_or_default(),
            ttrpc_address: first([&params.containerd_ttrpc_address])
                .or(environment.ttrpc_address)
                .map(|address| path_of(&address)),
            containerd_binary: first([&params.containerd_binary, &flags.publish_binary]).unwrap_or_default(),
            containerd_version: first([&params.containerd_version]),
            log_level: log_level(params.log_level.value(), flags.debug),
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
        })
    }
}

/// Extensions are a list of `Any`s with whatever later versions add: only options are for us, the rest is skipped.
fn options_among(params: &BootstrapParams) -> anyhow::Result<Option<RuntimeOptions>> {
    let options = params
        .extensions
        .iter()
        .filter_map(|extension| extension.value.as_ref())
        .find(|any| any.type_url.ends_with(".Options"));
    Ok(options.map(|any| RuntimeOptions::decode(&any.type_url, &any.value)).transpose()?)
}

/// Levels of Go's slog, any number: 0 is info, and each level is 4 from the next.
fn log_level(level: i32, debug: bool) -> LogLevel {
    let level = match level {
        ..=-8 => LogLevel::Trace,
        -7..=-1 => LogLevel::Debug,
        0..=3 => LogLevel::Info,
        4..=7 => LogLevel::Warn,
        8.. => LogLevel::Error,
    };
    if debug { level.max(LogLevel::Debug) } else { level }
}

fn first<const N: usize>(values: [&String; N]) -> Option<String> {
    values.into_iter().find(|value| !value.is_empty()).cloned()
}

/// The environment holds a bare path, the message's own documentation speaks of a URL.
fn path_of(address: &str) -> String {
    address.strip_prefix("unix://").unwrap_or(address).to_owned()
}

/// Reads `file` to its end, which must come within `patience`. A terminal counts as empty.
pub fn read_to_end(file: impl AsFd, patience: Duration) -> anyhow::Result<Vec<u8>> {
    let file = file.as_fd();
    let mut bytes = Vec::new();
    if rustix::termios::isatty(file) {
        return Ok(bytes);
    }
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("a deadline that long")?;
        match poll(&mut [PollFd::from_borrowed_fd(file, PollFlags::IN)], Some(&left)) {
            Ok(0) => bail!("stdin was not closed within {} s", patience.as_secs_f32()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(io::Error::from(errno)).context("wait for stdin"),
        }
        match rustix::io::read(file, &mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(io::Error::from(errno)).context("read stdin"),
        }
        if bytes.len() > MAX_INPUT_BYTES {
            bail!("stdin holds more than {MAX_INPUT_BYTES} bytes");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use containerd_shim_protos::bootstrap_api::Extension;
    use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};

    use super::*;

    fn flags() -> Flags {
        Flags {
            namespace: "k8s.io".into(),
            id: "web".into(),
            address: "/run/c.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            ..Flags::default()
        }
    }

    fn environment() -> Environment {
        Environment { ttrpc_address: Some("/run/c.sock.ttrpc".into()), grpc_address: None }
    }

    /// `runtimeoptions.v1.Options { config_path }` inside its `Any`.
    fn options(path: &str) -> Any {
        let mut value = vec![0x12, u8::try_from(path.len()).expect("is short")];
        value.extend_from_slice(path.as_bytes());
        Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            containerd_version: "v2.4.2".into(),
            containerd_ttrpc_address: "unix:///run/other.ttrpc".into(),
            ..BootstrapParams::default()
        }
    }

    fn bytes(message: &impl Message) -> Vec<u8> {
        message.write_to_bytes().expect("encodes")
    }

    #[test]
    fn no_input_means_an_old_caller_without_options() {
        let input = Input::parse(&[], &flags(), environment()).expect("parses");
        assert!(!input.wants_message);
        assert_eq!(input.options, None);
        assert_eq!(input.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        assert_eq!((&*input.grpc_address, &*input.containerd_binary), ("/run/c.sock", "/usr/bin/containerd"));
    }

    #[test]
    fn options_alone_mean_an_old_caller_although_they_decode_as_parameters() {
        let stdin = bytes(&options("/etc/x.toml"));
        let confused = BootstrapParams::parse_from_bytes(&stdin).expect("decodes");
        assert_eq!(confused.instance_id, "runtimeoptions.v1.Options");
        let input = Input::parse(&stdin, &flags(), environment()).expect("parses");
        assert!(!input.wants_message);
        assert_eq!(input.options.expect("has options").config_path, "/etc/x.toml");
    }

    #[test]
    fn parameters_for_this_container_are_believed() {
        let mut params = params();
        for any in [Any { type_url: "a.b.Later".into(), ..Any::default() }, options("/etc/y.toml")] {
            params.extensions.push(Extension { value: MessageField::some(any), ..Extension::default() });
        }
        params.socket_dir = Some("/run/s".into());
        params.log_level = EnumOrUnknown::from_i32(-4);
        let input = Input::parse(&bytes(&params), &flags(), environment()).expect("parses");
        assert!(input.wants_message);
        assert_eq!(input.options.expect("has options").config_path, "/etc/y.toml");
        assert_eq!(input.ttrpc_address.as_deref(), Some("/run/other.ttrpc"));
        assert_eq!(input.grpc_address, "/run/c.sock");
        assert_eq!(input.containerd_version.as_deref(), Some("v2.4.2"));
        assert_eq!(input.log_level, LogLevel::Debug);
        assert_eq!(input.socket_dir.as_deref(), Some("/run/s"));
    }

    #[test]
    fn parameters_fall_back_to_flags_and_environment() {
        let params =
            BootstrapParams { instance_id: "web".into(), namespace: "k8s.io".into(), ..BootstrapParams::default() };
        let input = Input::parse(&bytes(&params), &flags(), environment()).expect("parses");
        assert!(input.wants_message);
        assert_eq!(input.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        assert_eq!(input.containerd_binary, "/usr/bin/containerd");
    }

    #[test]
    fn parameters_for_another_container_are_refused() {
        let mut params = params();
        params.instance_id = "db".into();
        let said = Input::parse(&bytes(&params), &flags(), environment()).expect_err("is refused").to_string();
        assert_eq!(said, "bootstrap parameters on stdin are for k8s.io/db, but the flags say k8s.io/web");
    }

    #[test]
    fn garbage_is_refused() {
        let said = Input::parse(b"{\"json\":1}", &flags(), environment()).expect_err("is refused").to_string();
        assert!(said.starts_with("stdin holds neither"), "{said}");
    }

    #[test]
    fn crio_has_neither_address() {
        let flags = Flags { address: String::new(), ..flags() };
        let input = Input::parse(&[], &flags, Environment::default()).expect("parses");
        assert_eq!((&*input.grpc_address, input.ttrpc_address), ("", None));
    }

    #[test]
    fn levels_between_the_named_ones_are_understood() {
        let levels = [-100, -8, -7, -4, -1, 0, 3, 4, 7, 8, 12].map(|level| log_level(level, false));
        use LogLevel::{Debug, Error, Info, Trace, Warn};
        assert_eq!(levels, [Trace, Trace, Debug, Debug, Debug, Info, Info, Warn, Warn, Error, Error]);
        assert_eq!(log_level(0, true), Debug);
        assert_eq!(log_level(-8, true), Trace);
    }

    #[test]
    fn input_is_read_until_it_is_closed() {
        let (reader, mut writer) = io::pipe().expect("makes a pipe");
        writer.write_all(b"hello").expect("writes");
        drop(writer);
        assert_eq!(read_to_end(&reader, Duration::from_secs(5)).expect("reads"), b"hello");
        let null = std::fs::File::open("/dev/null").expect("opens");
        assert_eq!(read_to_end(&null, Duration::from_secs(5)).expect("reads"), b"");
    }

    #[test]
    fn input_that_is_never_closed_is_an_error_and_not_a_hang() {
        let (reader, writer) = io::pipe().expect("makes a pipe");
        let said = read_to_end(&reader, Duration::from_millis(50)).expect_err("gives up").to_string();
        assert!(said.starts_with("stdin was not closed within"), "{said}");
        drop(writer);
    }

    #[test]
    fn input_without_end_is_refused() {
        let zero = std::fs::File::open("/dev/zero").expect("opens");
        let said = read_to_end(&zero, Duration::from_secs(20)).expect_err("is refused").to_string();
        assert!(said.starts_with("stdin holds more than"), "{said}");
    }
}
