//! `cargo xtask demo`.

use crate::run::{Done, cargo, run as run_command};
use crate::setup::{self, Need};

/// What the demo takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask demo
  cargo xtask demo --ram 256M
  cargo xtask demo --json | jq .on_demand.resume_us")]
pub(crate) struct Args {
    /// Guest memory, such as 256M or 1G
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    ram: String,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// Builds and runs it.
pub(crate) fn run(args: &Args) -> Done {
    setup::ensure(&[Need::Libclang])?;
    let mut command = cargo("run");
    command.args(["--quiet", "--release", "--package", "bench", "--bin", "demo", "--", "--ram", &args.ram]);
    if args.json {
        command.arg("--json");
    } else {
        eprintln!("Building the demo (the first time takes a minute or two) ...");
    }
    run_command(&mut command)
}
