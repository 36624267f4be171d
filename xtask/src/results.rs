//! Counting tests: what `cargo test` says on its way, and what was skipped.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::hung::{Hung, Watch};
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

    /// Adds those of another run.
    pub(crate) fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
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

/// How long programs may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// One program that `cargo` runs: a test program, all examples in the documentation of a crate, or the compiler.
    pub(crate) program: Duration,
    /// What has been started and holds our pipe still, when `cargo` has ended.
    pub(crate) leftover: Duration,
}

/// How often hung programs are looked for.
const TICK: Duration = Duration::from_secs(1);

/// Runs a `cargo test` to its end; its output goes on `to` somebody line by line, and is counted. A program of it that
/// takes longer than the limit is described and ended, and the next one gets its turn.
///
/// # Errors
/// If it can't be started, or fails. A run that fails without a failed test (it did not compile, it was killed) counts
/// as one failure; so does each program that was ended.
pub(crate) fn run_counted(command: &mut Command, limits: Limits, counts: &mut Counts, mut to: impl Write) -> Done {
    let before = counts.failed;
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("{}: {error}", show(command)))?;
    let Some(output) = child.stdout.take() else { return Err("no standard output".into()) };
    let pipe = fs::read_link(format!("/proc/self/fd/{}", output.as_raw_fd())).unwrap_or_default();
    let (lines, heard) = channel();
    let reader = thread::spawn(move || {
        let _ = BufReader::new(output).split(b'\n').try_for_each(|line| lines.send(line));
    });
    let mut watch = Watch::new(child.id(), limits.program);
    let mut hung = Vec::new();
    let (mut looked, mut ended) = (Instant::now(), None);
    let tick = TICK.min(limits.program).min(limits.leftover);
    loop {
        match heard.recv_timeout(tick) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line?).into_owned();
                // The reader of our output may have left.
                let _ = writeln!(to, "{line}");
                counts.add_line(&line);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if looked.elapsed() < tick {
            continue;
        }
        looked = Instant::now();
        let mut found = watch.look();
        if child.try_wait()?.is_some() && ended.get_or_insert_with(Instant::now).elapsed() >= limits.leftover {
            found.extend(watch.end_writers(&pipe));
        }
        for Hung { name, report } in found {
            let _ = writeln!(to, "ENDED, it took too long: {name}\n{report}");
            counts.failed += 1;
            hung.push(name);
        }
    }
    let done = succeeded(command, child.wait()?);
    // It has ended: the channel says so.
    let _ = reader.join();
    if !hung.is_empty() {
        return Err(format!("took too long: {}", hung.join(", ")).into());
    }
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

    const LONG: Duration = Duration::from_secs(3600);
    const PATIENT: Limits = Limits { program: LONG, leftover: LONG };

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
        run_counted(Command::new("sh").args(["-c", "exit 3"]), PATIENT, &mut counts, std::io::sink()).unwrap_err();
        assert_eq!(counts, Counts { failed: 1, ..Counts::default() });
        run_counted(
            Command::new("sh").args(["-c", "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'"]),
            PATIENT,
            &mut counts,
            &mut said,
        )
        .unwrap();
        assert!(said.starts_with(b"test result: ok. 2 passed") && said.ends_with(b"\n"));
        assert_eq!(counts, Counts { passed: 2, failed: 1, skipped: 0 });
    }

    #[test]
    fn a_program_that_hangs_is_named_and_the_next_one_runs() {
        let (mut counts, mut said) = (Counts::default(), Vec::new());
        let script = "sleep 60; echo 'test result: ok. 2 passed; 0 failed; 0 ignored'";
        let limits = Limits { program: Duration::from_millis(50), ..PATIENT };
        let error = run_counted(Command::new("sh").args(["-c", script]), limits, &mut counts, &mut said).unwrap_err();
        // That of the shell, if it has not yet become that of the other program.
        assert!(error.to_string().starts_with("took too long: ") && error.to_string().contains("sleep 60"), "{error}");
        assert_eq!(counts, Counts { passed: 2, failed: 1, skipped: 0 });
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("ENDED, it took too long: ") && said.contains("\n  thread "), "{said}");
    }

    #[test]
    fn what_is_left_behind_does_not_keep_us() {
        let (mut counts, mut said) = (Counts::default(), Vec::new());
        let limits = Limits { leftover: Duration::from_millis(250), ..PATIENT };
        let mut command = Command::new("sh");
        let error = run_counted(command.args(["-c", "sleep 60 &"]), limits, &mut counts, &mut said).unwrap_err();
        assert!(error.to_string().starts_with("took too long: ") && error.to_string().contains("sleep 60"), "{error}");
        assert_eq!(counts, Counts { failed: 1, ..Counts::default() });
    }

    #[test]
    fn no_skips_is_no_file() {
        assert_eq!(read_skips(Path::new("/nonexistent/skips")).unwrap(), Vec::<String>::new());
    }
}
