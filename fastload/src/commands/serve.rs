//! `fastload serve`: feeds a QEMU that waits for a migration.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use page_units::PageSize;
use qemu_pages::serve::{Address, Options, Phase};
use serde_json::json;

use super::serving::{self, Fate, Image};
use crate::commands::Failure;
use crate::event::{self, Event};
use crate::offset::Offset;
use crate::{output, parse};

/// Feed a waiting QEMU from a snapshot: its guest runs at once and gets its memory as it needs it.
///
/// The QEMU has been started with the same machine type, RAM and devices as the one that was saved, with the migration
/// capability postcopy-ram on and mapped-ram off, and listens at ADDRESS. `fastload load` does all of that itself.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qemu-system-x86_64 ... -global migration.x-postcopy-ram=on -incoming unix:/run/vm.in &
  fastload serve vm.snap --to unix:/run/vm.in

Ctrl-C (or SIGTERM, or SIGHUP) once the guest runs sends the rest, then ends; a second one leaves at once.

After a crash of `fastload serve` the guest waits. Tell its QEMU through QMP where to listen, and go on:
  {\"execute\": \"migrate-recover\", \"arguments\": {\"uri\": \"unix:/run/vm.in2\"}}
  fastload serve vm.snap --to unix:/run/vm.in2 --recover
(QEMU refuses the first until it has noticed, and query-migrate says \"postcopy-paused\".) No second process stands by here. \
The guest may hold up QEMU's main thread while it waits. A QMP client that is to be heard nevertheless must have been \
there before, with {\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}, and say \"exec-oob\" instead of \
\"execute\". `fastload load` sees to that itself.")]
pub(crate) struct Serve {
    /// A file that QEMU saved with the capability mapped-ram.
    snapshot: PathBuf,
    #[command(flatten)]
    offset: Offset,
    /// Where QEMU listens: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    to: Address,
    /// Send only what the guest asks for, until Ctrl-C (or SIGTERM, or SIGHUP).
    #[arg(long)]
    no_background: bool,
    /// Answer requests on a second connection. QEMU has the capability postcopy-preempt on.
    #[arg(long)]
    preempt: bool,
    /// Go on where another server was cut off.
    #[arg(long)]
    recover: bool,
    /// A RAM block that QEMU backs with pages of another size than 4 KiB, e.g. pc.ram=2M.
    #[arg(long, value_name = "BLOCK=SIZE", value_parser = page_size)]
    page_size: Vec<(String, PageSize)>,
    /// Print the figures as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Serve {
    /// The command that goes on after a crash.
    fn recovery(&self) -> String {
        let (file, offset) = (serving::quoted(&self.snapshot), self.offset.words());
        let preempt = if self.preempt { " --preempt" } else { "" };
        let sizes = self.page_size.iter().map(|(block, size)| {
            let size = format!("{block}={}", size.bytes());
            format!(" --page-size {}", serving::quoted(Path::new(&size)))
        });
        let sizes: String = sizes.collect();
        format!("(QMP migrate-recover, then) fastload serve {file}{offset} --to ADDRESS --recover{preempt}{sizes}")
    }

    pub(crate) fn run(&self) -> Result<(), Failure> {
        let image = Image::open(&self.snapshot, &self.offset)?;
        if let Some((name, _)) = self.page_size.iter().find(|(name, _)| image.snapshot.layout().find(name).is_none()) {
            return Err(format!("{}: it has no RAM block \"{name}\"", self.snapshot.display()).into());
        }
        let page_sizes: HashMap<String, PageSize> = self.page_size.iter().cloned().collect();
        let mut options = Options::default();
        options.background = !self.no_background;
        options.preempt = self.preempt;
        let server = image.server(&page_sizes, options)?;
        let recover = self.recovery();
        serving::interrupts(server.control(), recover.clone())?;
        let mut told = self.recover;
        let connecting = event::now();
        let report = serving::attend(&image, server, &self.to, self.recover, self.json, |control| {
            std::thread::park_timeout(serving::MOMENT);
            if !told && control.progress().phase >= Phase::Started {
                told = true;
                if self.json {
                    Event::new("started").print()?;
                } else {
                    serving::note(
                        "the devices are loaded; QEMU starts the guest, unless it was started with -S, or its disks are in use",
                    );
                }
            }
            Ok(!told)
        });
        let report = report.map_err(|failure| serving::explain(failure, &recover, || Fate::Unknown))?;
        if self.json {
            let mut figures = serving::figures(&report);
            figures["started_us"] = json!(report.to_started.map(|to| serving::micros(connecting + to)));
            figures["complete_us"] = json!(serving::micros(connecting + report.to_complete));
            return Ok(Event::new("complete").with(figures).print()?);
        }
        Ok(output::print(&serving::summary(&report, connecting + report.to_complete))?)
    }
}

fn page_size(text: &str) -> Result<(String, PageSize), String> {
    let (block, size) = text.rsplit_once('=').ok_or("expected BLOCK=SIZE, e.g. pc.ram=2M")?;
    let size = PageSize::new(parse::bytes(size)?).ok_or("a page size is a power of two, and at least 4k")?;
    Ok((block.to_owned(), size))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        serve: Serve,
    }

    #[test]
    fn the_command_that_recovers_means_the_same_destination() {
        let words = ["serve", "a b", "--to", "unix:/x", "--offset", "2M", "--preempt"];
        let sizes = ["--page-size", "pc.ram=2M", "--page-size", "it's=8k"];
        let before = Line::parse_from(words.iter().chain(&sizes)).serve;
        let command = before.recovery();
        let arguments = command.split_once("fastload ").unwrap().1.replace("ADDRESS", "unix:/x");
        assert!(arguments.contains("'a b'"), "{arguments}");
        // A shell takes the quotes away.
        let shell =
            std::process::Command::new("sh").arg("-c").arg(format!("printf '%s\\n' {arguments}")).output().unwrap();
        let text = String::from_utf8(shell.stdout).unwrap();
        let after = Line::parse_from(text.lines()).serve;
        assert!(after.recover && !before.recover);
        assert_eq!((after.preempt, &after.page_size), (before.preempt, &before.page_size));
        assert_eq!((after.snapshot, after.offset.words()), (before.snapshot, before.offset.words()));
    }
}
