//! The rules for what a newcomer finds: a README with an example in every crate, and one command that CI runs as well.

use std::fs;
use std::path::{Path, PathBuf};

/// Every crate has a README with something to run, or an example.
pub(super) fn check(root: &Path, files: &[PathBuf]) -> Vec<String> {
    let mut problems = Vec::new();
    for manifest in files.iter().filter(|file| file.file_name().is_some_and(|name| name == "Cargo.toml")) {
        let text = fs::read_to_string(root.join(manifest)).unwrap_or_default();
        if !text.contains("[package]") {
            continue;
        }
        let directory = manifest.parent().unwrap_or(Path::new(""));
        let readme = fs::read_to_string(root.join(directory).join("README.md"));
        let example = files.iter().any(|file| file.starts_with(directory.join("examples")));
        match readme {
            Err(_) => problems.push(format!("{}: no README.md", directory.display())),
            Ok(readme) if !example && !readme.contains("```") => {
                problems.push(format!("{}: neither its README.md nor examples/ has an example", directory.display()));
            }
            Ok(_) => {}
        }
    }
    problems
}

/// CI runs what the README tells a newcomer to run.
pub(super) fn ci(root: &Path) -> Option<String> {
    let command = "cargo xtask test";
    let says = |file: &str| {
        let text = fs::read_to_string(root.join(file)).unwrap_or_default();
        text.lines().any(|line| line.trim() == command || line.trim() == format!("exec {command}"))
    };
    (!says("README.md") || !says(".ci/run")).then(|| format!("README.md and .ci/run do not both say `{command}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_without_readme_is_found() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("c")).unwrap();
        fs::write(root.path().join("c/Cargo.toml"), "[package]\npublish = false\n").unwrap();
        let files = [PathBuf::from("c/Cargo.toml")];
        assert_eq!(check(root.path(), &files).len(), 1);
        fs::write(root.path().join("c/README.md"), "text\n").unwrap();
        assert_eq!(check(root.path(), &files).len(), 1);
        fs::write(root.path().join("c/README.md"), "```rust\n```\n").unwrap();
        assert_eq!(check(root.path(), &files).len(), 0);
        assert!(ci(root.path()).is_some());
    }
}
