//! Counting tests: what `cargo test` says on its way, and what was skipped.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::run::{Done, show, succeeded};

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    /// Adds what one line of output says; other lines say nothing.
    fn add_line(&mut self, line: &str) {
        let Some((_, rest)) = line.split_once("test result: ") else { return };
        let Some((_, numbers)) = rest.split_once(". ") else { return };
        for part in numbers.split("; ") {
            let Some((number, what)) = part.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }

    /// Moves the tests that returned early for lack of something from `passed` to `skipped`.
    pub(crate) fn take_skips(&mut self, skips: &[String]) {
        let count = u64::try_from(skips.len()).unwrap_or(u64::MAX);
        self.passed = self.passed.saturating_sub(count);
        self.skipped += count;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs a `cargo test` to its end; its output goes on `to` somebody line by line, and is counted.
///
/// # Errors
/// If it can't be started, or fails. A run that fails without a failed test (it did not compile, it was killed) counts
/// as one failure.
pub(crate) fn run_counted(command: &mut Command, counts: &mut Counts, mut to: impl Write) -> Done {
    let before = counts.failed;
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("{}: {error}", show(command)))?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            // Whoever read it may have left.
            let _ = writeln!(to, "{line}");
            counts.add_line(&line);
        }
    }
    let done = succeeded(command, child.wait()?);
    if done.is_err() && counts.failed == before {
        counts.failed += 1;
    }
    done
}

/// The lines that skipped tests have left in the file that `TESTKIT_SKIPS` named.
///
/// # Errors
/// If there is such a file, but it can't be read.
pub(crate) fn read_skips(path: &Path) -> Done<Vec<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("{}: {error}", path.display()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed() {
        let mut counts = Counts::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test tests::test_result ... ok",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.00s",
        ] {
            counts.add_line(line);
        }
        assert_eq!(counts, Counts { passed: 15, failed: 2, skipped: 1 });
        counts.take_skips(&["SKIPPED a: Kvm: none".into(), "SKIPPED b: Qemu: none".into()]);
        assert_eq!(counts.to_string(), "13 passed, 2 failed, 3 skipped");
    }

    #[test]
    fn a_run_that_dies_counts_as_a_failure() {
        let (mut counts, mut said) = (Counts::default(), Vec::new());
        run_counted(Command::new("sh").args(["-c", "exit 3"]), &mut counts, std::io::sink()).unwrap_err();
        assert_eq!(counts, Counts { failed: 1, ..Counts::default() });
        run_counted(
            Command::new("sh").args(["-c", "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'"]),
            &mut counts,
            &mut said,
        )
        .unwrap();
        assert!(said.starts_with(b"test result: ok. 2 passed") && said.ends_with(b"\n"));
        assert_eq!(counts, Counts { passed: 2, failed: 1, skipped: 0 });
    }

    #[test]
    fn no_skips_is_no_file() {
        assert_eq!(read_skips(Path::new("/nonexistent/skips")).unwrap(), Vec::<String>::new());
    }
}
