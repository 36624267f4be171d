//! The rules for the lines of a file.

use std::path::Path;

/// Longer files hold more than one idea.
const MOST_LINES: usize = 450;
/// The width of a line of Markdown, as that of Rust.
const MOST_COLUMNS: usize = 120;
/// The width of a row of a table in Markdown, which can't be wrapped.
const MOST_COLUMNS_OF_A_ROW: usize = 170;

/// Checks the lines of one file.
pub(super) fn check(file: &Path, text: &str) -> Vec<String> {
    let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let mut problems = Vec::new();
    let mut report = |line: usize, what: &str| problems.push(format!("{}:{line}: {what}", file.display()));
    let source = matches!(extension, "rs" | "toml" | "md" | "sh" | "S" | "yml");
    let in_tests_directory = file.components().any(|part| part.as_os_str() == "tests");
    let mut in_test_module = false;
    for (number, line) in (1..).zip(text.lines()) {
        if source && !line.is_ascii() {
            report(number, "not ASCII");
        }
        if source && line.ends_with([' ', '\t']) {
            report(number, "white space at the end of the line");
        }
        if file != Path::new("Cargo.lock") && registries().iter().any(|name| line.contains(name.as_str())) {
            report(number, "the host name of a package registry");
        }
        if extension == "md" && line.len() > if line.starts_with('|') { MOST_COLUMNS_OF_A_ROW } else { MOST_COLUMNS } {
            report(number, "a long line: prose has 120 columns at most, a row of a table 170");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(file: &str, text: &str) -> usize {
        check(Path::new(file), text).len()
    }

    #[test]
    fn each_rule_finds_its_breach() {
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
        assert_eq!(problems("a.md", &"x".repeat(121)), 1);
        assert_eq!(problems("a.md", &format!("|{}|", "x".repeat(119))), 0);
        assert_eq!(problems("a.md", &format!("|{}|", "x".repeat(169))), 1);
    }
}
