//! Finds the program a container asks for, and fails in runc's words: users and their tools know them.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The file that `name` means: as it is when it holds a slash, else the first match in the `PATH` of `env`.
///
/// Seen from the calling process: run it inside the container, as the container's user.
/// Errors are those of Go's `exec.LookPath`, which runc passes on.
pub fn find(name: &str, env: &[String]) -> Result<PathBuf, String> {
    let quoted = format!("exec: {name:?}");
    if name.contains('/') {
        return match probe(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Probe::Stat(error)) => Err(format!("{quoted}: stat {name}: {}", text(&error))),
            Err(Probe::NotExecutable) => Err(format!("{quoted}: permission denied")),
        };
    }
    let path = env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or("");
    path.split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|file| probe(file).is_ok())
        .ok_or_else(|| format!("{quoted}: executable file not found in $PATH"))
}

enum Probe {
    Stat(io::Error),
    NotExecutable,
}

fn probe(path: &Path) -> Result<(), Probe> {
    let metadata = path.metadata().map_err(Probe::Stat)?;
    if metadata.is_dir() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(Probe::NotExecutable);
    }
    Ok(())
}

/// An errno as Go spells it: lower case, without the number.
pub fn text(error: &io::Error) -> String {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NOENT) => "no such file or directory".to_owned(),
        Some(rustix::io::Errno::ACCESS) => "permission denied".to_owned(),
        Some(rustix::io::Errno::PERM) => "operation not permitted".to_owned(),
        Some(rustix::io::Errno::NOTDIR) => "not a directory".to_owned(),
        Some(rustix::io::Errno::NOEXEC) => "exec format error".to_owned(),
        _ => {
            let text = error.to_string();
            let bare = text.split(" (os error").next().unwrap_or(&text);
            let mut letters = bare.chars();
            letters.next().map_or(String::new(), |first| first.to_lowercase().collect::<String>() + letters.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(path: &Path) -> Vec<String> {
        vec![format!("PATH=/nowhere:{}", path.display())]
    }

    #[test]
    fn programs_are_found_in_path_and_by_path() {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("prog");
        std::fs::write(&file, "").expect("write");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        assert_eq!(find("prog", &env(directory.path())), Ok(file.clone()));
        assert_eq!(find(&file.display().to_string(), &[]), Ok(file));
    }

    #[test]
    fn failures_read_as_runcs() {
        let directory = tempfile::tempdir().expect("tempdir");
        let file = directory.path().join("data");
        std::fs::write(&file, "").expect("write");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        let env = env(directory.path());
        assert_eq!(find("nosuch", &env), Err("exec: \"nosuch\": executable file not found in $PATH".to_owned()));
        assert_eq!(find("/nosuch", &env), Err("exec: \"/nosuch\": stat /nosuch: no such file or directory".to_owned()));
        let path = file.display().to_string();
        assert_eq!(find(&path, &env), Err(format!("exec: {path:?}: permission denied")));
        let path = directory.path().display().to_string();
        assert_eq!(find(&path, &env), Err(format!("exec: {path:?}: permission denied")));
    }
}
