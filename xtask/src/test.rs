//! `cargo xtask test`: the gate. CI calls exactly this.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::e2e;
use crate::kernels;
use crate::package;
use crate::results::{Counts, Limits, read_skips, run_counted};
use crate::run::{Done, cargo, cargo_path, root, run as run_command, show, succeeded};
use crate::setup::{self, Need};
use crate::tidy;

/// What the gate takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask test             what CI runs: some ten minutes
  cargo xtask test --quick     while you work
  CI=true cargo xtask test     a test that lacks something fails instead of being skipped
  FASTLOAD_SEED=7 cargo xtask test
                               the same random moments as the run that said \"SEED ...: 7\"")]
pub(crate) struct Args {
    /// Also the long matrices and all kernels (an hour or more)
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Without documentation, packages, fuzz targets, QEMU and other kernels
    #[arg(long)]
    quick: bool,
}

/// Runs every step, even after one has failed, and sums up.
///
/// # Errors
/// If a step failed, or something is missing that the tests can't do without.
pub(crate) fn run(args: &Args) -> Done {
    setup::ensure(&[Need::Libclang, Need::Cxx, Need::Rustfmt, Need::Clippy, Need::Compressors])?;
    setup::ensure_or_skip(Need::Readers)?;
    let mut gate = Gate::new(args.full)?;
    gate.step("format", |_| run_command(cargo("fmt").args(["--all", "--check"])));
    gate.step("source rules", |_| tidy::run());
    gate.step("lints", |_| {
        run_command(cargo("clippy").args(["--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    });
    let split = e2e::test_targets(root());
    gate.step("tests", |gate| {
        let mut command = gate.cargo_test();
        // Benchmarks run each of their functions once here. The examples are built, and run, by a test of testkit.
        command.args(["--lib", "--bins", "--benches"]);
        e2e::select(&mut command, &split.other);
        gate.counted(&mut command)
    });
    gate.step("examples in the documentation", |gate| {
        let mut command = gate.cargo_test();
        gate.counted(command.arg("--doc"))
    });
    if !args.quick {
        gate.step("documentation", |_| {
            run_command(cargo("doc").args(["--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
        });
        gate.step("packages", |_| package::run(root()));
        gate.step("fuzz targets", fuzz);
        gate.step("tests with QEMU", |gate| gate.e2e(&split.qemu));
        gate.step("other kernels", |gate| kernels::in_gate(gate.full, &mut gate.counts));
    }
    gate.finish()
}

/// Only the tests with QEMU.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_e2e(full: bool, filter: Option<&str>) -> Done {
    setup::ensure(&[Need::Libclang])?;
    let mut gate = Gate::new(full)?;
    let targets = e2e::test_targets(root()).qemu;
    gate.filter = filter.map(str::to_owned);
    gate.step("tests with QEMU", |gate| gate.e2e(&targets));
    gate.finish()
}

/// The state of a run.
#[derive(Debug)]
struct Gate {
    full: bool,
    filter: Option<String>,
    skips: PathBuf,
    counts: Counts,
    steps: Vec<(&'static str, Duration, bool)>,
}

impl Gate {
    fn new(full: bool) -> Done<Gate> {
        let skips = std::env::temp_dir().join(format!("fastload-skips-{}", std::process::id()));
        match std::fs::remove_file(&skips) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", skips.display()).into());
            }
            _ => {}
        }
        Ok(Gate { full, filter: None, skips, counts: Counts::default(), steps: Vec::new() })
    }

    fn step(&mut self, name: &'static str, work: impl FnOnce(&mut Gate) -> Done) {
        say!("\n== {name}");
        let start = Instant::now();
        let done = work(self);
        let took = start.elapsed();
        match &done {
            Ok(()) => say!("-- {name}: ok, {:.1} s", took.as_secs_f64()),
            Err(error) => say!("-- {name}: FAILED, {:.1} s: {error}", took.as_secs_f64()),
        }
        self.steps.push((name, took, done.is_ok()));
    }

    /// `cargo test` of the whole workspace. Every run chooses the same packages, so that they are built with the same
    /// features, once.
    fn cargo_test(&self) -> Command {
        let mut command = cargo("test");
        command.args(["--quiet", "--workspace", "--no-fail-fast"]).env("TESTKIT_SKIPS", &self.skips);
        if self.full {
            command.env("FASTLOAD_FULL", "1");
        }
        command
    }

    fn counted(&mut self, command: &mut Command) -> Done {
        say!("   {}", show(command));
        run_counted(command, limits(self.full), &mut self.counts, std::io::stdout())
    }

    fn e2e(&mut self, targets: &[String]) -> Done {
        for need in [Need::Qemu, Need::QemuTools, Need::OlderQemu] {
            setup::ensure_or_skip(need)?;
        }
        if targets.is_empty() {
            return Ok(());
        }
        let mut command = self.cargo_test();
        e2e::select(&mut command, targets);
        if let Some(filter) = &self.filter {
            command.args(["--", filter]);
        }
        let before = self.counts;
        self.counted(&mut command)?;
        chosen(self.filter.as_deref(), before, self.counts)
    }

    fn finish(mut self) -> Done {
        let skips = read_skips(&self.skips)?;
        self.counts.take_skips(&skips);
        say!("\n== summary");
        for (name, took, ok) in &self.steps {
            say!("{} {:7.1} s  {name}", if *ok { "ok    " } else { "FAILED" }, took.as_secs_f64());
        }
        let total: Duration = self.steps.iter().map(|(_, took, _)| took).sum();
        say!("       {:7.1} s  together", total.as_secs_f64());
        if !skips.is_empty() {
            say!("\nSkipped on this machine:");
            skips.iter().for_each(|line| say!("  {line}"));
            std::fs::remove_file(&self.skips)?;
        }
        say!("\n{}", self.counts);
        let failed: Vec<&str> = self.steps.iter().filter(|(_, _, ok)| !ok).map(|(name, ..)| *name).collect();
        if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", ")).into()) }
    }
}

/// Nothing takes nearly as long, unless it hangs: all steps together are done in some ten minutes, a long matrix in an
/// hour. A slow machine takes three times as long.
fn limits(full: bool) -> Limits {
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    Limits { program: minutes(if full { 240 } else { 25 }), leftover: minutes(1) }
}

/// That a filter has chosen something: a word that fits no test is a mistake, and no success.
fn chosen(filter: Option<&str>, before: Counts, after: Counts) -> Done {
    match filter {
        Some(filter) if before == after => Err(format!("no test has \"{filter}\" in its name").into()),
        _ => Ok(()),
    }
}

/// Checks the fuzz targets, builds them, and runs each for a moment. They are a workspace of their own, with flags of its
/// own, which cargo finds by the directory it is called in.
fn fuzz(gate: &mut Gate) -> Done {
    let directory = root().join("fuzz");
    let cargo_there = |subcommand: &str| {
        let mut command = Command::new(cargo_path());
        command.args([subcommand, "--quiet"]).current_dir(&directory);
        command
    };
    run_command(cargo_there("fmt").arg("--check"))?;
    run_command(cargo_there("clippy").args(["--release", "--all-targets", "--", "-D", "warnings"]))?;
    run_command(cargo_there("build").args(["--release", "--bins"]))?;
    let seconds = if gate.full { 60 } else { 3 };
    for target in fuzz_targets(&directory.join("targets"))? {
        let mut command = cargo_there("run");
        let limit = format!("-max_total_time={seconds}");
        // An input that takes a minute is a hang, and a finding.
        command.args(["--release", "--bin", &target, "--", &format!("corpus/{target}"), &limit, "-timeout=60"]);
        say!("   {}", show(&command));
        // It says much, which is of use only if it finds something.
        let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if let Err(error) = succeeded(&command, output.status) {
            say!("{said}");
            return Err(error);
        }
        said.lines().filter(|line| line.starts_with("Done ")).for_each(|line| say!("   {target}: {line}"));
    }
    Ok(())
}

fn fuzz_targets(directory: &Path) -> Done<Vec<String>> {
    let entries = std::fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|path| path.file_stem()?.to_str().map(str::to_owned))
        .collect();
    names.sort();
    if names.is_empty() { Err(format!("no fuzz target in {}", directory.display()).into()) } else { Ok(names) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_fits_no_test_is_an_error() {
        let (none, one) = (Counts::default(), Counts { passed: 1, ..Counts::default() });
        assert!(chosen(Some("recoverr"), none, none).unwrap_err().to_string().contains("recoverr"));
        assert!(chosen(Some("recover"), none, one).is_ok() && chosen(None, none, none).is_ok());
    }
}
