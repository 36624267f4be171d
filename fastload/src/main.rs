//! `fastload`: looks into, checks, converts and serves VM snapshots.

mod commands;
mod contents;
mod event;
mod flat;
mod offset;
mod output;
mod parse;
mod recognise;
mod rewrite;
mod screen;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use serde_json::json;

/// Fast snapshot load for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "fastload", version, about, propagate_version = true)]
#[command(after_help = "Examples:
  fastload inspect vm.snap
      What is in a file
  fastload check vm.snap
      Whether it is whole
  fastload load vm.snap --qmp /run/vm.qmp
      Into a QEMU started with -incoming defer: its guest runs at once
  fastload resume --qmp /run/vm.qmp
      Start a guest that was loaded paused
  fastload capture --qmp /run/vm.qmp vm.snap
      Out of a QEMU whose guest goes on running
  fastload convert old.snap new.snap
      The same snapshot, without stale bytes
  fastload compress vm.snap vm.snap.zst
      A third of its size, and loads page by page all the same
  fastload view vm.snap
      A map of its memory
  fastload repair broken.snap good.snap
      Bitmaps for a file that QEMU saved without

Each command has more: fastload load --help, man fastload-load

Exit codes: 0 done, 1 failed (with one line that says why), 2 wrong usage.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    manner: screen::Manner,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(commands::inspect::Inspect),
    Check(commands::check::Check),
    Convert(commands::convert::Convert),
    Compress(commands::compress::Compress),
    Decompress(commands::compress::Decompress),
    Repair(commands::repair::Repair),
    Load(Box<commands::load::Load>),
    Serve(Box<commands::serve::Serve>),
    Resume(commands::resume::Resume),
    Capture(commands::capture::Capture),
    View(commands::view::View),
    Completions(commands::completions::Completions),
    #[command(hide = true)]
    Manual(commands::manual::Manual),
    #[command(hide = true)]
    StandBy(commands::load::StandBy),
}

impl Command {
    /// Its name, and whether a program wants to read what it says.
    fn manner(&self) -> (&'static str, bool) {
        match self {
            Command::Inspect(inspect) => ("inspect", inspect.json),
            Command::Check(check) => ("check", check.json),
            Command::Convert(convert) => ("convert", convert.json),
            Command::Compress(compress) => ("compress", compress.json),
            Command::Decompress(decompress) => ("decompress", decompress.json),
            Command::Repair(repair) => ("repair", repair.json),
            Command::Load(load) => ("load", load.json),
            Command::Serve(serve) => ("serve", serve.json),
            Command::Resume(resume) => ("resume", resume.json),
            Command::Capture(capture) => ("capture", capture.json),
            Command::View(view) => ("view", view.json),
            Command::Completions(_) => ("completions", false),
            Command::Manual(_) => ("manual", false),
            Command::StandBy(_) => ("stand-by", false),
        }
    }

    fn run(&self) -> Result<(), commands::Failure> {
        match self {
            Command::Inspect(inspect) => inspect.run(),
            Command::Check(check) => check.run(),
            Command::Convert(convert) => convert.run(),
            Command::Compress(compress) => compress.run(),
            Command::Decompress(decompress) => decompress.run(),
            Command::Repair(repair) => repair.run(),
            Command::Load(load) => load.run(),
            Command::Serve(serve) => serve.run(),
            Command::Resume(resume) => resume.run(),
            Command::Capture(capture) => capture.run(),
            Command::View(view) => view.run(),
            Command::Completions(completions) => completions.run(),
            Command::Manual(manual) => manual.run(),
            Command::StandBy(stand_by) => stand_by.run(),
        }
    }
}

fn main() -> ExitCode {
    event::begin();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    let (name, json) = arguments.command.manner();
    event::name(name);
    arguments.manner.begin(json);
    match arguments.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = one_line(&error.to_string());
            if json {
                // Standard output may be what failed.
                let _ = failed(&line, 1);
            }
            screen::error(&line);
            ExitCode::FAILURE
        }
    }
}

/// Help, or what is wrong with the command line.
fn usage(error: &clap::Error) -> ExitCode {
    let wrong = error.use_stderr();
    if wrong && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let json = std::env::args_os().any(|word| word == "--json");
        if json {
            let text = error.render().to_string();
            let what = text.split("\n\n").next().unwrap_or_default();
            // Nobody may hear it any more.
            let _ = failed(&one_line(what.strip_prefix("error: ").unwrap_or(what)), 2);
        }
    }
    // The same.
    let _ = error.print();
    if wrong { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

fn failed(message: &str, exit_code: u8) -> std::io::Result<()> {
    event::Event::new("error").with(json!({ "message": message, "exit_code": exit_code })).print()
}

/// One line, whatever the message is made of; names stay as they are, so far as they have no line ends in them.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ").replace(char::is_control, "\u{fffd}")
}
