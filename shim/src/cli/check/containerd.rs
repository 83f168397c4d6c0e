//! containerd's configuration: whether a handler runs Bulkhead.
//!
//! containerd itself is asked for it (`containerd config dump`), which merges imports and brings old versions up to date. Where
//! that does not work the file is read here, with the files that it imports. Which plugin has the handlers depends on the
//! version of the file; a table that is right in another version is passed over by containerd without a word.
//!
//! <https://github.com/containerd/containerd/blob/main/docs/man/containerd-config.toml.5.md>

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::Finding;
use super::programs::{ask, on_path};
use crate::RUNTIME_NAME;

/// Where the configuration is unless containerd is told otherwise.
pub const DEFAULT_PATH: &str = "/etc/containerd/config.toml";

/// Where CRI-O has its own.
const CRIO: &str = "/etc/crio";

const HANDLER: &str = "containerd handler";

/// The plugins that have handlers, and the versions of a file in which they do.
const PLUGINS: [(&str, &[i64]); 3] =
    [("cri", &[1]), ("io.containerd.grpc.v1.cri", &[2]), ("io.containerd.cri.v1.runtime", &[3, 4])];

/// Files imported one by another, at most: a circle ends there.
const MOST_IMPORTS: usize = 64;

/// A handler that runs Bulkhead.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Handler {
    name: String,
    /// It lies in a table that containerd does not read in a file of this version; this is the right one.
    belongs_into: Option<&'static str>,
    /// Bulkhead's configuration for it; None for the default.
    config_path: Option<PathBuf>,
}

/// Looks into the configuration at `path`. `config` is the configuration of Bulkhead that is looked at otherwise.
pub async fn look(path: &Path, config: Option<&Path>) -> Vec<Finding> {
    let binary = on_path("containerd", &std::env::var_os("PATH").unwrap_or_default());
    if binary.is_none() && !path.exists() {
        return vec![without_containerd(path, Path::new(CRIO).exists())];
    }
    match read(path, binary.as_deref()).await {
        Ok(document) => judge(path, &handlers(&document), config),
        Err(error) => vec![Finding::missing(HANDLER, format!("{error:#}"), "Correct containerd's configuration.")],
    }
}

fn without_containerd(path: &Path, has_crio: bool) -> Finding {
    if has_crio {
        let mend = "Look into CRI-O's configuration yourself: a handler has runtime_type = \"vm\" and the shim's path.";
        return Finding::warning(HANDLER, "there is CRI-O and no containerd", mend);
    }
    let found = format!("neither containerd in PATH nor {}", path.display());
    Finding::missing(HANDLER, found, "Install containerd, or name its configuration with --containerd-config.")
}

/// The whole configuration, by containerd's own word if it has one.
async fn read(path: &Path, binary: Option<&Path>) -> anyhow::Result<toml::Table> {
    let own = || read_files(path);
    let Some(binary) = binary else { return own() };
    let shown = path.display().to_string();
    let dump = ["--config", &shown, "config", "dump"];
    // A file that is named must exist; without one containerd has a configuration all the same, drop-ins included.
    let arguments = if path == Path::new(DEFAULT_PATH) { &dump[2..] } else { &dump };
    match ask(binary, arguments).await {
        Ok(text) => text.parse().with_context(|| format!("parse the answer of {} config dump", binary.display())),
        // What it says is the better error, if there is nothing to read here either.
        Err(said) => own().map_err(|_| said),
    }
}

/// The file and its imports, merged as far as handlers go: a later one has the last word.
fn read_files(path: &Path) -> anyhow::Result<toml::Table> {
    let mut merged = toml::Table::new();
    let mut waiting = vec![path.to_owned()];
    let mut seen = Vec::new();
    while let Some(path) = waiting.pop() {
        if seen.contains(&path) || seen.len() > MOST_IMPORTS {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let table: toml::Table = text.parse().with_context(|| format!("parse {}", path.display()))?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let mut imports = imports_of(&table, dir);
        // The next one to be taken is the last.
        imports.reverse();
        waiting.extend(imports);
        seen.push(path);
        merge(&mut merged, table);
    }
    Ok(merged)
}

/// Files that `imports` names, in their order; from version 3 on there is a directory without its being named.
fn imports_of(table: &toml::Table, dir: &Path) -> Vec<PathBuf> {
    let named = table.get("imports").and_then(toml::Value::as_array);
    let patterns: Vec<&str> = match named {
        Some(patterns) => patterns.iter().filter_map(toml::Value::as_str).collect(),
        None if version_of(table) >= 3 => vec!["conf.d/*.toml"],
        None => Vec::new(),
    };
    patterns.into_iter().flat_map(|pattern| expand(&dir.join(pattern))).collect()
}

/// The files that a path names whose last part may have one `*`, by name.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let Some((begin, end)) = name.split_once('*') else {
        return Some(pattern.to_owned()).filter(|path| path.is_file()).into_iter().collect();
    };
    let entries = std::fs::read_dir(pattern.parent().unwrap_or(Path::new("/"))).into_iter().flatten().flatten();
    let matches = |name: &str| name.len() >= begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end);
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| matches(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(value)) => merge(below, value),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

/// A file without a version is of the first.
fn version_of(document: &toml::Table) -> i64 {
    document.get("version").and_then(toml::Value::as_integer).unwrap_or(1)
}

/// The handlers that run Bulkhead, wherever they are.
fn handlers(document: &toml::Table) -> Vec<Handler> {
    let version = version_of(document);
    let right = PLUGINS.iter().find(|(_, versions)| versions.contains(&version)).map(|(plugin, _)| *plugin);
    let mut found = Vec::new();
    for (plugin, _) in PLUGINS {
        let runtimes = ["plugins", plugin, "containerd", "runtimes"];
        let Some(runtimes) = runtimes.into_iter().try_fold(document, |table, key| table.get(key)?.as_table()) else {
            continue;
        };
        let ours = runtimes
            .iter()
            .filter(|(_, runtime)| runtime.get("runtime_type").and_then(toml::Value::as_str) == Some(RUNTIME_NAME));
        found.extend(ours.map(|(name, runtime)| {
            Handler {
                name: name.clone(),
                belongs_into: right.filter(|right| *right != plugin),
                config_path: runtime
                    .get("options")
                    .and_then(|options| options.get("ConfigPath")?.as_str())
                    .filter(|path| !path.is_empty())
                    .map(PathBuf::from),
            }
        }));
    }
    found
}

fn judge(path: &Path, handlers: &[Handler], config: Option<&Path>) -> Vec<Finding> {
    let (read, lost): (Vec<_>, Vec<_>) = handlers.iter().partition(|handler| handler.belongs_into.is_none());
    let names = |handlers: &[&Handler]| handlers.iter().map(|handler| &*handler.name).collect::<Vec<_>>().join(", ");
    if read.is_empty() {
        let finding = match lost.first().and_then(|handler| Some((handler, handler.belongs_into?))) {
            Some((handler, plugin)) => Finding::missing(
                HANDLER,
                format!("{} is in a table that containerd does not read, in {}", handler.name, path.display()),
                format!("In a file of this version handlers are below [plugins.'{plugin}'.containerd.runtimes]."),
            ),
            None => Finding::missing(
                HANDLER,
                format!("none of type {RUNTIME_NAME} in {}", path.display()),
                "Merge the snippet for your containerd from share/bulkhead/runtimeclass and restart containerd.",
            ),
        };
        return vec![finding];
    }
    let mut findings = vec![Finding::ok(HANDLER, format!("{} in {}", names(&read), path.display()))];
    let others =
        read.iter().filter(|handler| handler.config_path.is_some() && handler.config_path.as_deref() != config);
    findings.extend(others.filter_map(|handler| {
        let other = handler.config_path.as_ref()?.display().to_string();
        Some(Finding::warning(
            "handler's options",
            format!("{} has a configuration of its own, {other}", handler.name),
            format!("Check that one too: bulkhead --config {other} check."),
        ))
    }));
    findings
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Verdict;
    use super::*;

    fn handlers_of(text: &str) -> Vec<(String, Option<&'static str>)> {
        let found = handlers(&text.parse().expect("is TOML"));
        found.into_iter().map(|handler| (handler.name, handler.belongs_into)).collect()
    }

    #[test]
    fn the_snippets_that_come_with_bulkhead_are_found() {
        for text in [
            include_str!("../../../../runtimeclass/containerd-config-v2.toml"),
            include_str!("../../../../runtimeclass/containerd-config-v3.toml"),
            include_str!("../../../../runtimeclass/containerd-config-v4.toml"),
        ] {
            assert_eq!(handlers_of(text), [("bulkhead".to_owned(), None)]);
        }
    }

    #[test]
    fn a_table_of_another_version_is_told_with_the_right_one() {
        let table =
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.b]\nruntime_type = 'io.containerd.bulkhead.v2'\n";
        assert_eq!(handlers_of(&format!("version = 2\n{table}")), [("b".to_owned(), None)]);
        let newer = "io.containerd.cri.v1.runtime";
        assert_eq!(handlers_of(&format!("version = 3\n{table}")), [("b".to_owned(), Some(newer))]);
        let document = format!("version = 3\n{table}").parse().expect("is TOML");
        let finding = judge("/c".as_ref(), &handlers(&document), None).remove(0);
        assert_eq!(finding.verdict, Verdict::Missing);
        assert!(finding.mend.is_some_and(|mend| mend.contains(newer)));
    }

    #[test]
    fn other_runtimes_are_no_handler_of_ours() {
        let text = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n\
                    runtime_type = 'io.containerd.runc.v2'\n";
        assert_eq!(handlers_of(text), []);
        assert_eq!(judge("/c".as_ref(), &[], None)[0].verdict, Verdict::Missing);
    }

    #[test]
    fn imports_are_read_by_name_and_the_last_word_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).and_then(|()| fs::write(&path, text)).expect("writes");
        };
        let runtime = |kind: &str| {
            format!(
                "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.b]\nruntime_type = '{kind}'\n"
            )
        };
        write("config.toml", "version = 3\nimports = ['more/*.toml', 'config.toml']\n");
        write("more/1.toml", &runtime("io.containerd.runc.v2"));
        write("more/2.toml", &runtime(RUNTIME_NAME));
        write("more/3.conf", "is not read");
        let read = |name: &str| read_files(&dir.path().join(name)).map(|document| handlers(&document).len());
        assert_eq!(read("config.toml").expect("reads"), 1);
        // From version 3 on a directory is imported unless others are named.
        write("conf.d/b.toml", &runtime(RUNTIME_NAME));
        write("bare.toml", "version = 3\n");
        assert_eq!(read("bare.toml").expect("reads"), 1);
        write("old.toml", "version = 2\n");
        assert_eq!(read("old.toml").expect("reads"), 0);
        write("broken.toml", "version = ");
        assert!(format!("{:#}", read("broken.toml").expect_err("is refused")).contains("broken.toml"));
    }

    #[test]
    fn a_handler_with_another_configuration_is_told() {
        let handler = Handler { name: "b".into(), belongs_into: None, config_path: Some("/other.toml".into()) };
        let findings = judge("/c".as_ref(), std::slice::from_ref(&handler), None);
        assert_eq!(findings.iter().map(|finding| finding.verdict).collect::<Vec<_>>(), [Verdict::Ok, Verdict::Warning]);
        assert_eq!(judge("/c".as_ref(), &[handler], Some("/other.toml".as_ref())).len(), 1);
    }

    #[test]
    fn a_node_of_cri_o_is_told_from_one_without_anything() {
        assert_eq!(without_containerd("/c".as_ref(), true).verdict, Verdict::Warning);
        assert_eq!(without_containerd("/c".as_ref(), false).verdict, Verdict::Missing);
    }
}
