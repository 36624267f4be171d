//! `fastload check`: everything that can be verified of a snapshot file.

mod devices;
mod pages;

use std::fmt::Write as _;
use std::path::PathBuf;

use mapped_ram::Warning;
use serde::Serialize;

use crate::commands::Failure;
use crate::offset::Offset;
use crate::{contents, output};

/// Verify everything that can be verified of a snapshot file.
///
/// The headers and the list of RAM blocks; that the sections of the devices tile the stream, decode as the file's own
/// description says, and are all there; that bitmaps and pages are inside the file and can be read, all of them. There
/// is no checksum in the format: that the content is right can't be told.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code 0 if nothing is wrong. Notes are oddities that do not hurt.

Examples:
  fastload check vm.snap
  fastload check vm.snap --quick      without reading the pages
  fastload check vm.snap --json | jq .problems")]
pub(crate) struct Check {
    /// A file that QEMU saved with the capability mapped-ram.
    file: PathBuf,
    /// Do not read the pages.
    #[arg(long)]
    quick: bool,
    /// Print JSON, and no progress bar.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    offset: Offset,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Findings {
    file: PathBuf,
    ok: bool,
    machine: String,
    ram_blocks: usize,
    devices: usize,
    /// `None` if the pages were not read.
    pages: Option<pages::Pages>,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl Check {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let snapshot = self.offset.open_damaged(&self.file)?;
        let mut findings = Findings {
            file: self.file.clone(),
            machine: snapshot.configuration().machine.clone(),
            ram_blocks: snapshot.layout().blocks().len(),
            ..Findings::default()
        };
        for warning in contents::diagnose(&snapshot)? {
            let harmless = matches!(warning, Warning::TrailingBytes { .. });
            let list = if harmless { &mut findings.notes } else { &mut findings.problems };
            list.push(warning.to_string());
        }
        devices::check(&snapshot, &mut findings);
        if !self.quick {
            pages::check(&snapshot, &mut findings, self.json);
        }
        if let Some(what) = contents::changed(&snapshot)? {
            findings.problems.push(format!("{what} changed while the file was checked"));
        }
        // Many errors name the file, which is said anyway.
        let named = format!("{}: ", self.file.display());
        for problem in &mut findings.problems {
            if let Some(what) = problem.strip_prefix(&named) {
                *problem = what.to_owned();
            }
        }
        findings.ok = findings.problems.is_empty();
        output::print(&if self.json { serde_json::to_string_pretty(&findings)? + "\n" } else { findings.text() })?;
        match findings.problems.as_slice() {
            [] => Ok(()),
            [one] => Err(format!("{}: {one}", self.file.display()).into()),
            [first, others @ ..] => Err(format!("{}: {first} (and {} more)", self.file.display(), others.len()).into()),
        }
    }
}

impl Findings {
    fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Findings { machine, ram_blocks, devices, .. } = self;
        writeln!(out, "{machine}: {ram_blocks} RAM blocks, {devices} device sections")?;
        match &self.pages {
            Some(pages) => writeln!(
                out,
                "{} pages stored ({} of them zero), {} not; {} of those have stale bytes in the file",
                pages.stored, pages.stored_but_zero, pages.zero, pages.stale
            )?,
            None => writeln!(out, "pages not read")?,
        }
        for note in &self.notes {
            writeln!(out, "note: {note}")?;
        }
        for problem in &self.problems {
            writeln!(out, "problem: {problem}")?;
        }
        if self.ok {
            writeln!(out, "{}: nothing wrong", self.file.display())?;
        }
        Ok(())
    }
}
