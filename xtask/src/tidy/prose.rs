//! What a person reads in a file: comments and string literals of Rust, all of Markdown but its code.

/// The prose of a line, which is numbered from 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) text: String,
}

/// Where a scan of Rust stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// How deep comments are nested.
    BlockComment(usize),
    Text,
    /// How many `#` end it.
    RawText(usize),
}

/// The comments and string literals of a Rust file.
pub(super) fn of_rust(source: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut state = State::Code;
    for (number, line) in (1..).zip(source.lines()) {
        let mut text = String::new();
        state = scan_line(line, state, &mut text);
        if !text.trim().is_empty() {
            lines.push(Line { number, text });
        }
    }
    lines
}

fn scan_line(line: &str, mut state: State, prose: &mut String) -> State {
    let mut rest = line;
    while !rest.is_empty() {
        let (length, next) = match state {
            State::Code => step_in_code(rest),
            State::LineComment => (rest.len(), State::LineComment),
            State::BlockComment(depth) => match (rest.starts_with("/*"), rest.starts_with("*/")) {
                (true, _) => (2, State::BlockComment(depth + 1)),
                (_, true) if depth > 1 => (2, State::BlockComment(depth - 1)),
                (_, true) => (2, State::Code),
                _ => (first_len(rest), state),
            },
            State::Text if rest.starts_with('\\') => (1 + first_len(&rest[1..]), state),
            State::Text if rest.starts_with('"') => (1, State::Code),
            State::RawText(hashes) if ends_raw(rest, hashes) => (1 + hashes, State::Code),
            State::Text | State::RawText(_) => (first_len(rest), state),
        };
        let (taken, behind) = rest.split_at(length.min(rest.len()));
        match (state, next) {
            // An escape, such as the end of a line.
            (State::Text, State::Text) if taken.starts_with('\\') => prose.push(' '),
            (State::Code, State::Code) => {}
            (State::Code, _) | (_, State::Code) => prose.push(' '),
            _ => prose.push_str(taken),
        }
        (rest, state) = (behind, next);
    }
    if state == State::LineComment { State::Code } else { state }
}

/// How much of code to step over, and what begins behind it.
fn step_in_code(rest: &str) -> (usize, State) {
    if rest.starts_with("//") {
        let marks = rest.len() - rest.trim_start_matches(['/', '!']).len();
        return (marks, State::LineComment);
    }
    if rest.starts_with("/*") {
        return (2, State::BlockComment(1));
    }
    if rest.starts_with('"') {
        return (1, State::Text);
    }
    if let Some(raw) = rest.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            return (hashes + 2, State::RawText(hashes));
        }
    }
    if let Some(quoted) = rest.strip_prefix('\'') {
        // A character, or else a lifetime.
        if let Some(escaped) = quoted.strip_prefix('\\') {
            let end = escaped.char_indices().skip(1).find(|(_, c)| *c == '\'');
            return (end.map_or(1, |(at, _)| at + 3), State::Code);
        }
        let length = first_len(quoted);
        let closed = quoted.get(length..).is_some_and(|behind| behind.starts_with('\''));
        return (if closed { length + 2 } else { 1 }, State::Code);
    }
    let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    (word.max(first_len(rest).min(1)).max(1), State::Code)
}

fn first_len(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

fn ends_raw(rest: &str, hashes: usize) -> bool {
    rest.strip_prefix('"').is_some_and(|behind| behind.bytes().take_while(|byte| *byte == b'#').count() >= hashes)
}

/// All of a Markdown file but blocks of code.
pub(super) fn of_markdown(source: &str) -> Vec<Line> {
    let mut in_code = false;
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(source.lines()) {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        if !in_code && !fence && !line.trim().is_empty() {
            lines.push(Line { number, text: line.to_owned() });
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prose(source: &str) -> Vec<(usize, String)> {
        let words = |line: Line| (line.number, line.text.split_whitespace().collect::<Vec<_>>().join(" "));
        of_rust(source).into_iter().map(words).collect()
    }

    #[test]
    fn comments_and_strings_are_prose_and_code_is_not() {
        let source =
            "/// A doc.\nfn solo<'a>(c: char) { say(\"one \\\n  two\", 'x', '\\'', '\"'); } // end\nlet a = 1;\n";
        let expected = [(1, "A doc.".into()), (2, "one end".into()), (3, "two end".into())];
        let found = prose(source);
        assert_eq!(found[0], expected[0]);
        assert_eq!(found[1], (2, "one".into()));
        assert_eq!(found[2], (3, "two end".into()));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn raw_strings_and_block_comments_end_where_they_end() {
        let found = prose("let a = r#\"x \"y\" \"#; knock();\n/* a /* b */ c */ solo();\nlet r = b\"z\";\n");
        assert_eq!(found, [(1, "x \"y\"".into()), (2, "a /* b */ c".into()), (3, "z".into())]);
    }

    #[test]
    fn code_in_markdown_is_no_prose() {
        let found = of_markdown("text\n```rust\nsolo();\n```\nmore\n");
        let numbers: Vec<usize> = found.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [1, 5]);
    }
}
