//! The files and directories that ARCHITECTURE.md and README.md name: a reader who goes there must find them.

use std::path::Path;

/// The documents that are checked.
const DOCUMENTS: [&str; 3] = ["ARCHITECTURE.md", "README.md", "CHANGELOG.md"];

/// Checks a document: what looks like a path from the root must be one.
pub(super) fn check(root: &Path, file: &Path, text: &str) -> Vec<String> {
    if !DOCUMENTS.iter().any(|document| file == Path::new(document)) {
        return Vec::new();
    }
    let mut problems = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let missing = paths(root, line).filter(|path| !root.join(path).exists());
        problems.extend(missing.map(|path| format!("{}:{number}: there is no {path}", file.display())));
    }
    problems
}

/// The code of a line that begins with a directory of the root, and the targets of its links.
fn paths<'a>(root: &'a Path, line: &'a str) -> impl Iterator<Item = &'a str> {
    let code = line.split('`').skip(1).step_by(2).filter(|code| !code.contains([' ', '*', '<']));
    let code = code.filter(|code| code.split_once('/').is_some_and(|(first, _)| root.join(first).is_dir()));
    let links = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    code.chain(links.filter(|link| !link.contains("://") && !link.starts_with('#')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_nowhere_is_found() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("a")).unwrap();
        std::fs::write(root.path().join("a/b.rs"), "").unwrap();
        let found = |text| check(root.path(), Path::new("README.md"), text).len();
        assert_eq!(found("`a/b.rs`, `c/d.rs`, [a](a), [e](https://example.com), `a b/c`"), 0);
        assert_eq!(found("`a/c.rs` and [c](c.md)"), 2);
        assert_eq!(check(root.path(), Path::new("other.md"), "`a/c.rs`").len(), 0);
    }
}
