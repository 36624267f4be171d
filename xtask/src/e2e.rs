//! `cargo xtask e2e`: the tests that drive a real QEMU.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::Done;
use crate::test;

/// What it takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask e2e
  cargo xtask e2e --full
  cargo xtask e2e recover     tests with that word in their name")]
pub(crate) struct Args {
    /// Also the long matrices
    #[arg(long)]
    full: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Installs QEMU where it may, and runs them.
pub(crate) fn run(args: &Args) -> Done {
    test::run_e2e(args.full, args.filter.as_deref())
}

/// The names of all integration tests, by what they need.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Those that use the QEMU harness.
    pub(crate) qemu: Vec<String>,
    /// The others.
    pub(crate) other: Vec<String>,
}

/// Finds the integration tests of the workspace: `tests/NAME.rs` and `tests/NAME/main.rs` of every crate. What a test
/// needs is read from its text. A name that two crates use, one with QEMU and one without, counts as with QEMU.
pub(crate) fn test_targets(root: &Path) -> Targets {
    let mut targets = Targets::default();
    for package in packages(root) {
        for entry in fs::read_dir(package.join("tests")).into_iter().flatten().flatten() {
            let path = entry.path();
            let single = path.extension().is_some_and(|extension| extension == "rs");
            if !single && !path.join("main.rs").exists() {
                continue;
            }
            let Some(name) = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
            let kind = if text_of(&path).contains("testkit_qemu") { &mut targets.qemu } else { &mut targets.other };
            if !kind.contains(&name) {
                kind.push(name);
            }
        }
    }
    targets.qemu.sort();
    targets.other.sort();
    targets.other.retain(|name| !targets.qemu.contains(name));
    targets
}

/// Makes a `cargo test` choose these tests.
pub(crate) fn select(command: &mut Command, names: &[String]) {
    for name in names {
        command.args(["--test", name]);
    }
}

/// All directories with a `Cargo.toml`, two levels deep.
fn packages(root: &Path) -> Vec<std::path::PathBuf> {
    let subdirectories = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.join("Cargo.toml").exists()).collect::<Vec<_>>()
    };
    let mut found = subdirectories(root);
    found.retain(|path| !path.ends_with("fuzz"));
    for path in found.clone() {
        found.extend(subdirectories(&path));
    }
    found
}

fn text_of(path: &Path) -> String {
    if path.is_dir() {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        return entries.map(|entry| text_of(&entry.path())).collect();
    }
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let tests = root.path().join("a/b/tests");
        fs::create_dir_all(tests.join("big")).unwrap();
        fs::create_dir_all(tests.join("helpers")).unwrap();
        for path in ["a/Cargo.toml", "a/b/Cargo.toml"] {
            fs::write(root.path().join(path), "").unwrap();
        }
        fs::write(tests.join("plain.rs"), "fn f() {}").unwrap();
        fs::write(tests.join("big/main.rs"), "mod part;").unwrap();
        fs::write(tests.join("big/part.rs"), "use testkit_qemu::Qemu;").unwrap();
        fs::write(tests.join("helpers/mod.rs"), "").unwrap();
        let expected = Targets { qemu: vec!["big".into()], other: vec!["plain".into()] };
        assert_eq!(test_targets(root.path()), expected);
        fs::create_dir_all(root.path().join("a/tests")).unwrap();
        fs::write(root.path().join("a/tests/big.rs"), "").unwrap();
        assert_eq!(test_targets(root.path()), expected);
    }
}
