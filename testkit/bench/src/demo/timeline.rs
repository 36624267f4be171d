//! What happened when, in one line of text per restore.

use std::fmt::Write;

use super::report::time;

/// Columns of the drawing.
const WIDTH: usize = 64;

/// The moments of one restore, in microseconds from the call on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// The guest's first instruction.
    pub resumed: u64,
    /// The last page.
    pub complete: u64,
}

/// Draws all on one scale, from the call (left) to `end` (right).
#[must_use]
pub fn draw(lines: &[(&str, &Timeline)], end: u64) -> String {
    let label = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, timeline) in lines {
        let bar: String = (0..WIDTH).map(|column| symbol(timeline, column, end)).collect();
        let _ = writeln!(text, "{name:label$} |{bar}|");
    }
    let _ = writeln!(text, "{:label$} 0{:>WIDTH$}", "", time(end));
    let _ = writeln!(
        text,
        "{:label$} .  the guest waits   *  it runs while pages are loaded   #  it runs, all is loaded",
        ""
    );
    text
}

/// What the column shows that begins at its share of the time.
fn symbol(timeline: &Timeline, column: usize, end: u64) -> char {
    let at = end.saturating_mul(column as u64) / WIDTH as u64;
    if at < timeline.resumed {
        '.'
    } else if at < timeline.complete {
        '*'
    } else {
        '#'
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_share_a_scale() {
        let eager = Timeline { resumed: 500, complete: 500 };
        let on_demand = Timeline { resumed: 10, complete: 1000 };
        let text = draw(&[("eager", &eager), ("on demand", &on_demand)], 1000);
        let lines: Vec<&str> = text.lines().collect();
        let dots = ".".repeat(32);
        assert_eq!(lines[0], format!("eager     |{dots}{}|", "#".repeat(32)));
        assert_eq!(lines[1], format!("on demand |.{}|", "*".repeat(63)));
        assert!(lines[2].ends_with("1.0 ms"));
        assert!(draw(&[("x", &eager)], u64::MAX).contains('.'));
        assert_eq!(draw(&[], 0).lines().count(), 2);
    }
}
