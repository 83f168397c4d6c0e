//! QEMU's command line, built from options whose values are `key=value` lists.
//!
//! Values are escaped as QEMU's option parser wants it (a comma is doubled), so that no value can add an option.
//! <https://www.qemu.org/docs/master/system/invocation.html>

use std::ffi::OsString;
use std::fmt;

/// The arguments of a QEMU process, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args(Vec<String>);

impl Args {
    /// Adds an option without a value, such as `-nodefaults`.
    pub fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }

    /// Adds an option and its value. `value` is taken as it is: an option whose value is not a list has no escapes.
    pub fn option(&mut self, name: &str, value: impl fmt::Display) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.to_string());
        self
    }

    /// The arguments, one a line where an option begins: for tests and people.
    pub fn lines(&self) -> String {
        let mut lines = String::new();
        for (index, argument) in self.0.iter().enumerate() {
            let separator = match index {
                0 => "",
                _ if argument.starts_with('-') => "\n",
                _ => " ",
            };
            lines.push_str(separator);
            lines.push_str(argument);
        }
        lines.push('\n');
        lines
    }
}

impl From<Args> for Vec<OsString> {
    fn from(args: Args) -> Self {
        args.0.into_iter().map(OsString::from).collect()
    }
}

/// The value of `-device`, `-object` and the like: a name, then properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties(String);

impl Properties {
    /// A list that begins with a bare `driver`, as `-device virtio-rng-pci,…`.
    pub fn of(driver: &str) -> Self {
        Self(escape(driver))
    }

    /// Adds `key=value`.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.0.push(',');
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(&escape(&value.to_string()));
        self
    }
}

impl fmt::Display for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_add_a_property() {
        let device = Properties::of("scsi-hd").with("serial", "a,share-rw=on").with("lun", 3);
        assert_eq!(device.to_string(), "scsi-hd,serial=a,,share-rw=on,lun=3");
    }

    #[test]
    fn order_is_kept() {
        let mut args = Args::default();
        args.flag("-nodefaults").option("-m", 256);
        assert_eq!(args.lines(), "-nodefaults\n-m 256\n");
        assert_eq!(Vec::<OsString>::from(args), ["-nodefaults", "-m", "256"]);
    }
}
