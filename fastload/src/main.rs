//! `fastload`: looks into, checks, converts and serves VM snapshots.

mod commands;
mod contents;
mod flat;
mod offset;
mod output;
mod parse;
mod recognise;
mod rewrite;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fast snapshot load for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "fastload", version, about, propagate_version = true)]
#[command(after_help = "Examples:
  fastload inspect vm.snap                          what is in a file
  fastload check vm.snap                            whether it is whole
  fastload load vm.snap --qmp /run/vm.qmp           into a QEMU started with -incoming defer: its guest runs at once
  fastload resume --qmp /run/vm.qmp                 starts a guest that was loaded paused
  fastload capture --qmp /run/vm.qmp vm.snap        out of a QEMU whose guest goes on running
  fastload convert old.snap new.snap                the same snapshot, without stale bytes
  fastload repair broken.snap good.snap             bitmaps for a file that QEMU saved without

Each command has more: fastload load --help

Exit codes: 0 done, 1 failed (with one line that says why), 2 wrong usage.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(commands::inspect::Inspect),
    Check(commands::check::Check),
    Convert(commands::convert::Convert),
    Repair(commands::repair::Repair),
    Load(Box<commands::load::Load>),
    Serve(Box<commands::serve::Serve>),
    Resume(commands::resume::Resume),
    Capture(commands::capture::Capture),
    #[command(hide = true)]
    StandBy(commands::load::StandBy),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Check(check) => check.run(),
        Command::Convert(convert) => convert.run(),
        Command::Repair(repair) => repair.run(),
        Command::Load(load) => load.run(),
        Command::Serve(serve) => serve.run(),
        Command::Resume(resume) => resume.run(),
        Command::Capture(capture) => capture.run(),
        Command::StandBy(stand_by) => stand_by.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever the message is made of.
            let line: Vec<String> = error.to_string().split_whitespace().map(str::to_owned).collect();
            // Nobody may hear it any more.
            let _ = writeln!(std::io::stderr(), "fastload: {}", line.join(" "));
            ExitCode::FAILURE
        }
    }
}
