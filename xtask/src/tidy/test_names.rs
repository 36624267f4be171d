//! The names of tests: sentences with an outcome, which tell something where only the name is seen.

use std::path::Path;

/// Not tests, but what a test starts as another process.
const PROCESSES: [&str; 2] = ["victim", "the_other_process"];

/// Checks the names of a file's tests.
pub(super) fn check(file: &Path, text: &str) -> Vec<String> {
    if file.extension().is_none_or(|extension| extension != "rs") {
        return Vec::new();
    }
    let named = names(text).into_iter().filter(|(_, name)| !name.is_empty() && !PROCESSES.contains(name));
    let bad = named.filter_map(|(line, name)| Some((line, name, fault(name)?)));
    bad.map(|(line, name, fault)| format!("{}:{line}: the test {name}: {fault}", file.display())).collect()
}

/// The tests of a file, with their lines.
fn names(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut in_test = false;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        in_test |= line.starts_with("#[test]");
        if let Some(name) = line.strip_prefix("fn ").filter(|_| in_test) {
            found.push((number, name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()));
            in_test = false;
        }
    }
    found
}

/// What is wrong with a name.
fn fault(name: &str) -> Option<&'static str> {
    let words: Vec<&str> = name.split('_').collect();
    if words.first() == Some(&"and") {
        return Some("it begins with \"and\", but stands alone where it fails");
    }
    if words.last() == Some(&"too") {
        return Some("it ends with \"too\": like what?");
    }
    if words.len() < 3 || !words.iter().any(|word| may_be_a_verb(word)) {
        return Some("it has no verb: a name says what happens");
    }
    None
}

/// Whether a word could be a finite verb: a few that are known, and the endings of the others.
fn may_be_a_verb(word: &str) -> bool {
    const KNOWN: &[&str] = &[
        "are", "begin", "can", "come", "cost", "do", "end", "fail", "find", "get", "give", "go", "have", "hold",
        "keep", "leave", "look", "make", "may", "mean", "must", "need", "read", "run", "say", "see", "stay", "survive",
        "take", "tell", "wait", "was", "were", "win", "work", "write", "agree", "bite", "cancel", "change", "cross",
        "fit", "follow", "free", "grow", "hang", "know", "lose", "match", "meet", "move", "overtake", "pass", "put",
        "reach", "remain", "return", "share", "show", "stand", "start", "stop", "went", "will", "arrive", "choose",
        "hear", "load", "save", "serve", "use", "want", "appear", "become", "differ", "open", "close", "bring",
        "belong", "found", "became", "kept", "left",
    ];
    const NO_VERBS: &[&str] = &["its", "this", "less", "always", "as", "us", "vcpus", "pages", "bytes", "guests"];
    let ends = word.len() > 2 && (word.ends_with('s') || word.ends_with("ed")) && !word.ends_with("ss");
    KNOWN.contains(&word) || ends && !NO_VERBS.contains(&word) || word == "is"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_say_nothing_are_found() {
        for name in ["and_it_goes_on", "huge_pages_too", "five_generations", "again_and_again", "reads"] {
            assert!(fault(name).is_some(), "{name}");
        }
        for name in ["a_page_that_fails_is_poisoned", "demand_overtakes_the_background", "one_path_wins_a_claim"] {
            assert_eq!(fault(name), None, "{name}");
        }
    }

    #[test]
    fn tests_are_told_from_other_functions() {
        let text =
            ["fn a() {}\n#[", "test]\n#[cfg(unix)]\nfn b_c() {}\n    #[", "test]\n    fn d(x in 0..1) {}\n"].concat();
        assert_eq!(names(&text), [(4, "b_c"), (6, "d")]);
    }
}
