//! What the guest says, and what comes of it: which test ran on which kernel, and how it ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::results::Counts;

/// One line on the serial line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// The kernel's release.
    Kernel(String),
    /// A program begins.
    Begin(String),
    /// It said something.
    Output(String),
    /// It has ended.
    End { name: String, ok: bool, how: String, took: Duration },
    /// A test was skipped.
    Skip(String),
    /// All programs have ended.
    Done,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Kernel(release) => write!(f, "@kernel {release}"),
            Line::Begin(name) => write!(f, "@begin {name}"),
            Line::Output(text) => write!(f, "|{text}"),
            Line::End { name, ok, how, took } => {
                write!(f, "@end {name} {} {} {how}", if *ok { "ok" } else { "failed" }, took.as_millis())
            }
            Line::Skip(text) => write!(f, "@skip {text}"),
            Line::Done => write!(f, "@done"),
        }
    }
}

impl Line {
    /// Reads a line. What is none of ours was said by somebody else, and is output.
    pub(crate) fn parse(text: &str) -> Line {
        let said = || Line::Output(text.strip_prefix('|').unwrap_or(text).to_owned());
        let Some((word, rest)) = text.strip_prefix('@').map(|text| text.split_once(' ').unwrap_or((text, ""))) else {
            return said();
        };
        match word {
            "kernel" => Line::Kernel(rest.to_owned()),
            "begin" => Line::Begin(rest.to_owned()),
            "skip" => Line::Skip(rest.to_owned()),
            "done" => Line::Done,
            "end" => {
                let mut words = rest.splitn(4, ' ');
                let (Some(name), Some(ok), Some(took)) = (words.next(), words.next(), words.next()) else {
                    return said();
                };
                let Ok(took) = took.parse() else { return said() };
                let how = words.next().unwrap_or_default().to_owned();
                Line::End { name: name.to_owned(), ok: ok == "ok", how, took: Duration::from_millis(took) }
            }
            _ => said(),
        }
    }
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ended {
    Passed,
    Failed,
    /// What was missing.
    Skipped(String),
}

/// One kernel.
#[derive(Debug, Default)]
pub(crate) struct Column {
    name: String,
    package: String,
    release: String,
    /// What kept the machine from its end.
    pub(crate) problem: Option<String>,
    /// Whether all programs have ended.
    pub(crate) complete: bool,
    /// With the boot.
    pub(crate) took: Duration,
    running: Option<String>,
    output: Vec<String>,
    programs: Vec<(String, Duration)>,
    tests: BTreeMap<(String, String), Ended>,
    /// Programs that failed without a test that did.
    broken: Vec<String>,
}

impl Column {
    /// The program that has begun and not ended.
    pub(crate) fn running(&self) -> Option<&str> {
        self.running.as_deref()
    }

    /// Takes a line, and shows what somebody who waits wants to see of it.
    pub(crate) fn hear(&mut self, line: &Line) {
        match line {
            Line::Kernel(release) => self.release.clone_from(release),
            Line::Begin(name) => {
                self.running = Some(name.clone());
                self.output.clear();
            }
            Line::Output(text) => {
                self.output.push(text.clone());
                let Some(program) = &self.running else { return };
                let Some((test, how)) = text.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) else {
                    return;
                };
                // "should panic" and the like.
                let test = test.split(" - ").next().unwrap_or(test);
                let ended = match how {
                    "ok" => Ended::Passed,
                    "FAILED" => Ended::Failed,
                    how if how.starts_with("ignored") => Ended::Skipped("ignored".into()),
                    _ => return,
                };
                self.tests.insert((program.clone(), test.to_owned()), ended);
            }
            Line::End { name, ok, how, took } => {
                self.running = None;
                self.programs.push((name.clone(), *took));
                let of_this = |counted: &(&(String, String), &Ended)| counted.0.0 == *name;
                let ran = self.tests.iter().filter(of_this).count();
                let failed = self.tests.iter().filter(of_this).filter(|(_, ended)| **ended == Ended::Failed).count();
                if *ok {
                    say!("   {name}: {ran} tests, {:.1} s", took.as_secs_f64());
                    return;
                }
                say!("   {name}: FAILED ({how}), {failed} of {ran} tests, {:.1} s", took.as_secs_f64());
                self.output.iter().for_each(|text| say!("     {text}"));
                if failed == 0 {
                    self.broken.push(name.clone());
                }
            }
            Line::Skip(text) => self.skip(text),
            Line::Done => self.complete = true,
        }
    }

    /// `SKIPPED test: what: reason`, from a program that is not named: all that have a test of that name.
    fn skip(&mut self, text: &str) {
        let Some((test, why)) = text.strip_prefix("SKIPPED ").and_then(|rest| rest.split_once(": ")) else { return };
        for ((_, name), ended) in &mut self.tests {
            if name == test && *ended == Ended::Passed {
                *ended = Ended::Skipped(why.to_owned());
            }
        }
    }

    /// How many tests ended how; a program that died counts as a test that failed.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts { failed: self.broken.len() as u64, ..Counts::default() };
        for ended in self.tests.values() {
            match ended {
                Ended::Passed => counts.passed += 1,
                Ended::Failed => counts.failed += 1,
                Ended::Skipped(_) => counts.skipped += 1,
            }
        }
        counts
    }
}

/// All kernels.
#[derive(Debug, Default)]
pub(crate) struct Report {
    columns: Vec<Column>,
}

impl Report {
    /// A further kernel.
    pub(crate) fn column(&mut self, name: &str, package: &str) -> &mut Column {
        self.columns.push(Column { name: name.to_owned(), package: package.to_owned(), ..Column::default() });
        self.columns.last_mut().unwrap_or_else(|| unreachable!("one was added"))
    }

    /// Of all kernels together.
    pub(crate) fn counts(&self) -> Counts {
        let mut all = Counts::default();
        self.columns.iter().for_each(|column| all.add(column.counts()));
        all
    }

    /// A line for each kernel, and one for each test that failed or was skipped.
    pub(crate) fn summary(&self) -> String {
        let mut text = String::new();
        for column in &self.columns {
            let Column { name, release, package, .. } = column;
            text += &format!(
                "Linux {name} ({release}, {package}): {}, {:.1} s\n",
                column.counts(),
                column.took.as_secs_f64()
            );
            for ((program, test), ended) in &column.tests {
                match ended {
                    Ended::Passed => {}
                    Ended::Failed => text += &format!("  FAILED  {program}::{test}\n"),
                    Ended::Skipped(why) => text += &format!("  skipped {program}::{test}: {why}\n"),
                }
            }
            column.broken.iter().for_each(|program| text += &format!("  FAILED  {program}, without a test that did\n"));
            column.problem.iter().for_each(|problem| text += &format!("  FAILED  {problem}\n"));
        }
        text
    }
}

impl fmt::Display for Report {
    /// A line for each test, a column for each kernel; then the [summary](Report::summary).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tests: BTreeSet<&(String, String)> = self.columns.iter().flat_map(|column| column.tests.keys()).collect();
        let title = |test: &(String, String)| format!("{}::{}", test.0, test.1);
        let width = tests.iter().map(|test| title(test).len()).max().unwrap_or(0);
        write!(f, "{:width$}", "test")?;
        self.columns.iter().try_for_each(|column| write!(f, "  {:7}", column.name))?;
        writeln!(f)?;
        for test in tests {
            write!(f, "{:width$}", title(test))?;
            for column in &self.columns {
                let word = match column.tests.get(test) {
                    Some(Ended::Passed) => "ok",
                    Some(Ended::Failed) => "FAILED",
                    Some(Ended::Skipped(_)) => "skipped",
                    None => "-",
                };
                write!(f, "  {word:7}")?;
            }
            writeln!(f)?;
        }
        write!(f, "\n{}", self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_arrive_as_they_were_said() {
        for line in [
            Line::Kernel("6.1.0-50-cloud-amd64".into()),
            Line::Begin("serve".into()),
            Line::Output("test a ... ok".into()),
            Line::Output("@done".into()),
            Line::Output(String::new()),
            Line::End {
                name: "serve".into(),
                ok: false,
                how: "exit status: 101".into(),
                took: Duration::from_millis(12),
            },
            Line::Skip("SKIPPED a: b: c".into()),
            Line::Done,
        ] {
            assert_eq!(Line::parse(&line.to_string()), line);
        }
        for other in ["[    1.0] a kernel", "@end x", "@nothing"] {
            assert_eq!(Line::parse(other), Line::Output(other.into()));
        }
    }

    fn heard(report: &mut Report, lines: &[&str]) {
        let column = report.column("6.1", "linux-image");
        lines.iter().for_each(|line| column.hear(&Line::parse(line)));
    }

    #[test]
    fn each_test_is_counted_for_what_it_did() {
        let mut report = Report::default();
        let lines = [
            "@kernel 6.1.0",
            "@begin serve",
            "|test a ... ok",
            "|test b ... FAILED",
            "|test c - should panic ... ok",
            "@end serve failed 10 exit status: 101",
            "@begin lib",
            "|test a ... ok",
            "@end lib ok 5 exit status: 0",
            "@begin dead",
            "@end dead failed 5 signal: 7",
            "@skip SKIPPED c: Poison: Linux 6.6",
            "@done",
        ];
        heard(&mut report, &lines);
        assert!(report.columns[0].complete && report.columns[0].running().is_none());
        assert_eq!(report.counts(), Counts { passed: 2, failed: 2, skipped: 1 });
        let text = report.to_string();
        for part in
            ["serve::b  FAILED", "skipped serve::c: Poison: Linux 6.6", "FAILED  dead, without", "2 passed, 2 failed"]
        {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_machine_that_stops_is_not_complete() {
        let mut report = Report::default();
        heard(&mut report, &["@kernel 6.1.0", "@begin serve", "|test a ... ok"]);
        assert!(!report.columns[0].complete);
        assert_eq!(report.columns[0].running(), Some("serve"));
    }
}
