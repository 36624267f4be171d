//! `cargo xtask tidy`: rules for the source files that neither the compiler nor clippy knows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Done, root};

/// Longer files hold more than one idea.
const MOST_LINES: usize = 450;

/// Checks all files under version control.
///
/// # Errors
/// If one breaks a rule; every place was printed then.
pub(crate) fn run() -> Done {
    let files = tracked(root())?;
    let mut problems = Vec::new();
    for file in &files {
        // A file that was deleted but not yet committed is no problem; one that is not text has no lines.
        let Ok(bytes) = fs::read(root().join(file)) else { continue };
        problems.extend(check(file, &bytes));
    }
    problems.extend(crates(root(), &files));
    problems.extend(ci(root()));
    problems.extend(crate::circles::check(root())?);
    for problem in &problems {
        say!("{problem}");
    }
    match problems.len() {
        0 => {
            say!("   {} files", files.len());
            Ok(())
        }
        count => Err(format!("{count} breaches of the source rules").into()),
    }
}

/// git, in a directory, whatever repository a hook is about that may have called us.
fn git(root: &Path) -> Command {
    let mut git = Command::new("git");
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        git.env_remove(variable);
    }
    // Whoever runs this builds what is there: it is trusted, also where it belongs to somebody else (a user's clone, and
    // root, who may install).
    git.args(["-c", "safe.directory=*", "-C"]).arg(root);
    git
}

/// What git knows, or may come to know, relative to the root.
fn tracked(root: &Path) -> Done<Vec<PathBuf>> {
    let mut git = git(root);
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.output().map_err(|error| format!("git: {error}"))?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    let names = String::from_utf8(output.stdout)?;
    Ok(names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}

/// The rules for one file.
fn check(file: &Path, bytes: &[u8]) -> Vec<String> {
    let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let Ok(text) = std::str::from_utf8(bytes) else { return Vec::new() };
    let mut problems = Vec::new();
    let mut report = |line: usize, what: &str| problems.push(format!("{}:{line}: {what}", file.display()));
    let source = matches!(extension, "rs" | "toml" | "md" | "sh" | "S" | "yml");
    let in_tests_directory = file.components().any(|part| part.as_os_str() == "tests");
    let mut in_test_module = false;
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        if source && !line.is_ascii() {
            report(number, "not ASCII");
        }
        if source && line.ends_with([' ', '\t']) {
            report(number, "white space at the end of the line");
        }
        if file != Path::new("Cargo.lock") && registries().iter().any(|name| line.contains(name.as_str())) {
            report(number, "the host name of a package registry");
        }
        if extension == "rs" {
            in_test_module |= line.trim_start().starts_with("#[cfg(test)]");
            if line.trim_start().starts_with(&["#[", "ignore"].concat()) {
                report(number, "an ignored test: make it run, or let it require what it needs");
            }
            if (in_tests_directory || in_test_module) && line.contains(&["thread", "::sleep"].concat()) {
                report(number, "a test that waits by the clock");
            }
        }
    }
    if extension == "rs" && text.lines().count() > MOST_LINES {
        report(text.lines().count(), "more than 450 lines: is there more than one idea in it?");
    }
    problems
}

/// Host names that must not be written into a file: where packages come from is the user's choice. (Put together here,
/// so that this file passes.)
fn registries() -> Vec<String> {
    [
        ["crates", ".io/api"],
        ["static.crates", ".io"],
        ["index.crates", ".io"],
        ["deb.debian", ".org"],
        ["snapshot.debian", ".org"],
        ["security.debian", ".org"],
        ["pypi", ".org"],
        ["registry.npmjs", ".org"],
        ["proxy.golang", ".org"],
    ]
    .map(|parts| parts.concat())
    .into()
}

/// Every crate has a README with something to run, or an example.
fn crates(root: &Path, files: &[PathBuf]) -> Vec<String> {
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
fn ci(root: &Path) -> Option<String> {
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

    fn problems(file: &str, text: &str) -> usize {
        check(Path::new(file), text.as_bytes()).len()
    }

    #[test]
    fn each_rule_bites() {
        assert_eq!(problems("a.rs", "fn f() {}\n"), 0);
        assert_eq!(problems("a.rs", "// \u{e9}\n"), 1);
        assert_eq!(problems("a.md", "end \n"), 1);
        assert_eq!(problems("a.txt", &["https://static.crates", ".io/x"].concat()), 1);
        assert_eq!(problems("Cargo.lock", &["https://static.crates", ".io/x"].concat()), 0);
        assert_eq!(problems("a.rs", &["    #[", "ignore = \"slow\"]\n"].concat()), 1);
        let sleep = ["std::thread", "::sleep(d);\n"].concat();
        assert_eq!(problems("a/src/x.rs", &sleep), 0);
        assert_eq!(problems("a/tests/x.rs", &sleep), 1);
        assert_eq!(problems("a/src/x.rs", &format!("#[cfg(test)]\nmod tests {{\n{sleep}}}\n")), 1);
        assert_eq!(problems("a.rs", &"//\n".repeat(450)), 0);
        assert_eq!(problems("a.rs", &"//\n".repeat(451)), 1);
    }

    #[test]
    fn a_clone_of_somebody_else_is_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let made = git(root.path()).args(["init", "--quiet"]).status().unwrap();
        assert!(made.success());
        fs::write(root.path().join("a.rs"), "").unwrap();
        // Only root can give it away.
        for path in [root.path().to_owned(), root.path().join(".git")] {
            let _ = std::os::unix::fs::chown(path, Some(65534), None);
        }
        assert_eq!(tracked(root.path()).unwrap(), [Path::new("a.rs")]);
    }

    #[test]
    fn a_crate_without_readme_is_found() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("c")).unwrap();
        fs::write(root.path().join("c/Cargo.toml"), "[package]\npublish = false\n").unwrap();
        let files = [PathBuf::from("c/Cargo.toml")];
        assert_eq!(crates(root.path(), &files).len(), 1);
        fs::write(root.path().join("c/README.md"), "text\n").unwrap();
        assert_eq!(crates(root.path(), &files).len(), 1);
        fs::write(root.path().join("c/README.md"), "```rust\n```\n").unwrap();
        assert_eq!(crates(root.path(), &files).len(), 0);
        assert!(ci(root.path()).is_some());
    }
}
