//! `cargo xtask tidy`: rules for the source files that neither the compiler nor clippy knows. Each rule has a file.

mod circles;
mod crates;
mod dependencies;
mod manifests;
pub(crate) mod metadata;
mod paths;
mod promised;
mod prose;
mod test_names;
mod text;
mod words;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Done, root};

/// Where the rules for names and words are not kept yet.
const LATER: &[&str] = &[];

/// Checks all files under version control, and the manifests.
///
/// # Errors
/// If a rule is broken; every place was printed then.
pub(crate) fn run() -> Done {
    let files = tracked(root())?;
    let mut problems = Vec::new();
    for file in &files {
        // A file that was deleted but not yet committed is no problem; one that is not text has no lines.
        let Ok(text) = fs::read_to_string(root().join(file)) else { continue };
        problems.extend(text::check(file, &text));
        problems.extend(paths::check(root(), file, &text));
        if !LATER.iter().any(|directory| file.starts_with(directory)) {
            problems.extend(test_names::check(file, &text));
            problems.extend(words::check(file, &text));
        }
    }
    problems.extend(crates::check(root(), &files));
    problems.extend(crates::ci(root()));
    let members = metadata::members(root())?;
    problems.extend(dependencies::check(&members));
    problems.extend(promised::check(root(), &members));
    problems.extend(manifests::check(&members));
    problems.extend(circles::check(root())?);
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
    // The user builds what is there, and so trusts it, also where it belongs to somebody else: a user's clone, and
    // root, who may install.
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
