//! `fastload manual`: the man pages, for packages (`cargo xtask dist`).

mod sections;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::CommandFactory as _;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::Arguments;
use crate::commands::Failure;

/// Write the man pages into a directory.
#[derive(Debug, clap::Args)]
pub(crate) struct Manual {
    /// Where to.
    directory: PathBuf,
}

impl Manual {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut program = Arguments::command();
        program.build();
        for command in
            program.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help")
        {
            self.page(&format!("fastload-{}", command.get_name()), command)?;
        }
        self.page("fastload", &program)
    }

    fn page(&self, name: &str, command: &clap::Command) -> Result<(), Failure> {
        let path = self.directory.join(format!("{name}.1"));
        let title: &'static str = String::leak(name.to_owned());
        let mut text = Vec::new();
        Man::new(command.clone().name(title)).date(date()).render(&mut text)?;
        for section in sections::ALL.iter().filter(|section| section.page.is_none_or(|page| page == name)) {
            let mut roff = Roff::new();
            roff.control("SH", [section.title]);
            for (number, paragraph) in section.text.split("\n\n").enumerate() {
                if number > 0 {
                    roff.control("PP", []);
                }
                roff.text([roman(paragraph.replace('\n', " "))]);
            }
            roff.to_writer(&mut text)?;
        }
        write(&path, &text)
    }
}

fn write(path: &Path, text: &[u8]) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// The day that stands on the pages: today, or what a build that can be repeated says
/// (<https://reproducible-builds.org/specs/source-date-epoch/>).
fn date() -> String {
    // Until the year 9999.
    let possible = |seconds: &u64| *seconds < 253_402_300_800;
    let named = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok()).filter(possible);
    let time = named.map_or_else(SystemTime::now, |seconds| UNIX_EPOCH + Duration::from_secs(seconds));
    humantime::format_rfc3339_seconds(time).to_string().chars().take(10).collect()
}
