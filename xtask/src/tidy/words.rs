//! Words that do not stand in what a person reads: those of a private vocabulary, and phrases that are translated from
//! another language. The glossary in ARCHITECTURE.md has the words to use.

use std::path::Path;

use super::prose::{self, Line};

/// What to look for, in lower case, and what to write instead. (This directory is not checked.)
const PHRASES: &[(&str, &str)] = &[
    ("whoever", "name the actor: the handler, the loader, the caller"),
    ("be had", "say that it is unavailable, or can't be read"),
    ("so many", "say how many, or `that many`"),
    ("so much", "say how much"),
    ("so often", "\"How often the ...\""),
    ("what of", "name the thing"),
    ("turned away", "refused, or rejected"),
    ("no point in", "useless"),
    ("knock", "interrupt"),
    ("knocks", "interrupts"),
    ("haste", "priority"),
    ("solo", "parked"),
    ("whereabouts", "where the content is"),
    ("keeper", "the stand-by process"),
    ("beside", "next to, with"),
    ("knot", "a cycle"),
    ("house", "a crate, a module"),
    ("room", "space"),
];

/// Checks the prose of a file.
pub(super) fn check(file: &Path, text: &str) -> Vec<String> {
    let lines = match file.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => prose::of_rust(text),
        Some("md") => prose::of_markdown(text),
        _ => return Vec::new(),
    };
    if file.starts_with("xtask/src/tidy") {
        return Vec::new();
    }
    let found = find(&lines).into_iter();
    found.map(|(line, phrase, instead)| format!("{}:{line}: \"{phrase}\": {instead}", file.display())).collect()
}

/// Every phrase, also where it goes on in the next line.
fn find(lines: &[Line]) -> Vec<(usize, &'static str, &'static str)> {
    let words: Vec<(usize, String)> = lines.iter().flat_map(words_of).collect();
    let mut found = Vec::new();
    for (phrase, instead) in PHRASES {
        let wanted: Vec<&str> = phrase.split(' ').collect();
        for window in words.windows(wanted.len()) {
            let near = window.last().map_or(0, |last| last.0) - window.first().map_or(0, |first| first.0) <= 1;
            if near && window.iter().map(|(_, word)| word.as_str()).eq(wanted.iter().copied()) {
                found.push((window[0].0, *phrase, *instead));
            }
        }
    }
    found.sort();
    found
}

/// The words of a line in lower case. What looks like code is one word, and none of these.
fn words_of(line: &Line) -> impl Iterator<Item = (usize, String)> {
    let word = |word: &str| word.trim_matches(|c: char| ".,;:!?()[]\"*".contains(c)).to_ascii_lowercase();
    line.text.split_whitespace().map(move |text| (line.number, word(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(file: &str, text: &str) -> Vec<usize> {
        find(&match file {
            "rs" => prose::of_rust(text),
            _ => prose::of_markdown(text),
        })
        .into_iter()
        .map(|(line, ..)| line)
        .collect()
    }

    #[test]
    fn phrases_are_found_in_comments_and_messages_and_across_lines() {
        assert_eq!(lines("rs", "// For whoever, once.\nlet a = \"whoever\";\nlet whoever = 1;\n"), [1, 2]);
        assert_eq!(lines("rs", "// It can't be\n// had.\n//\n// so\n\n\n// many\n"), [1]);
        assert_eq!(lines("md", "It can't be\nhad.\n"), [1]);
    }

    #[test]
    fn code_is_left_alone() {
        assert_eq!(lines("md", "Call `solo()`.\n"), Vec::<usize>::new());
    }
}
