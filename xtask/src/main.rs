//! `cargo xtask`: the demo, the tests, the benchmarks, and what they need on the machine.
//!
//! It builds with Rust alone (no C library, no build script that looks for one), because it is what brings the rest.

/// A line on standard output. Who reads it may have left (`| head`).
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

mod bench;
mod demo;
mod dist;
mod e2e;
mod hung;
mod kernels;
mod package;
mod results;
mod run;
mod setup;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tasks of this workspace")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Resume a real guest from a snapshot, eagerly and on demand, and compare the two
    Demo(demo::Args),
    /// Run everything that CI runs: format, source rules, lints, tests, documentation, packages, fuzz targets, QEMU
    Test(test::Args),
    /// Run the tests against a real QEMU only
    E2e(e2e::Args),
    /// Run the tests of memory and permissions on the kernels that users have, in QEMU
    Kernels(kernels::Args),
    /// Run the test programs, as the init of a test machine
    #[command(hide = true)]
    InGuest(kernels::GuestArgs),
    /// Measure, each figure as a ratio to the floor measured in the same run
    Bench(bench::Args),
    /// Build what a release has: a static program, man pages, completions, a Debian package
    Dist(dist::Args),
    /// Install what is missing on this machine (as root on Debian), or print the command that does
    Setup(setup::Args),
    /// Pack every published crate, and build each from its package
    Package,
    /// Check the rules for source files that no compiler knows
    Tidy,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::E2e(args) => e2e::run(&args),
        Task::Kernels(args) => kernels::run(&args),
        Task::InGuest(args) => kernels::run_guest(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Setup(args) => setup::run(&args),
        Task::Package => package::run(run::root()),
        Task::Tidy => tidy::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
