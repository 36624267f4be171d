//! `cargo xtask bench`.

use std::path::PathBuf;

use crate::run::{Done, cargo, run as run_command};
use crate::setup::{self, Need};

/// What the benchmarks take.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask bench --list
  cargo xtask bench resume fault.same_core
  cargo xtask bench --json figures.json && jq '.[] | select(.ok | not)' figures.json

It fails if a goal was missed.")]
pub(crate) struct Args {
    /// Only figures whose name begins so, such as `resume` or `fault.same_core`
    names: Vec<String>,
    /// Also write the figures to this file, as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only list the names
    #[arg(long)]
    list: bool,
}

/// Builds and runs them.
pub(crate) fn run(args: &Args) -> Done {
    setup::ensure(&[Need::Libclang])?;
    let mut command = cargo("run");
    command.args(["--quiet", "--release", "--package", "bench", "--bin", "bench", "--"]);
    if let Some(file) = &args.json {
        command.arg("--json").arg(file);
    }
    if args.list {
        command.arg("--list");
    }
    command.args(&args.names);
    run_command(&mut command)
}
