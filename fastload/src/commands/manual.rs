//! `fastload manual`: the man pages, for those who package it (`cargo xtask dist`).

mod sections;

use std::fs;
use std::path::{Path, PathBuf};

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
        Man::new(command.clone().name(title)).render(&mut text)?;
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
