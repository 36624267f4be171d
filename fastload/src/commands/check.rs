//! `fastload check`: everything that can be verified of a snapshot file.

mod devices;
mod host;
mod pages;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mapped_ram::{Snapshot, Warning};
use serde::Serialize;
use serde_json::json;

use crate::commands::Failure;
use crate::event::Event;
use crate::offset::Offset;
use crate::output::{BAD, GOOD, WARN};
use crate::{contents, output};

/// Verify everything that can be verified of snapshot files.
///
/// The headers and the list of RAM blocks; that the sections of the devices tile the stream, decode as the file's own
/// description says, and are all there; that bitmaps and pages are inside the file and can be read, all of them. There
/// is no checksum in the format: that the content is right can't be told.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code 0 if nothing is wrong with any of them. Notes are oddities that do not hurt.

Examples:
  fastload check vm.snap
  fastload check *.snap
  fastload check vm.snap --quick
      Without reading the pages
  fastload check --host vm.snap --qemu /usr/bin/qemu-system-x86_64
      Whether it can run here
  fastload check vm.snap --json | jq .problems")]
pub(crate) struct Check {
    /// Files that QEMU saved with the capability mapped-ram.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Do not read the pages.
    #[arg(long)]
    quick: bool,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Tell whether it can run here: what the guest needs of processor, KVM and QEMU. The pages are not read.
    #[arg(long, conflicts_with = "quick")]
    host: bool,
    /// The QEMU that is to load it, for --host: whether it knows the machine type and the devices.
    #[arg(long, value_name = "PATH", requires = "host")]
    qemu: Option<PathBuf>,
    #[command(flatten)]
    offset: Offset,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Findings {
    #[serde(skip)]
    file: PathBuf,
    ok: bool,
    /// `None` if it can't be opened.
    machine: Option<String>,
    ram_blocks: usize,
    devices: usize,
    /// `None` if the pages were not read.
    pages: Option<pages::Pages>,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl Check {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut failed = Vec::new();
        for file in &self.files {
            if self.host {
                let snapshot = self.offset.open(file)?;
                failed.extend(host::check(&snapshot, self.qemu.as_deref(), self.json)?);
                continue;
            }
            let findings = self.check(file)?;
            if self.json {
                Event::new("checked").path("file", file).with(&findings).print()?;
            } else if findings.machine.is_some() || self.files.len() > 1 {
                output::print(&findings.text())?;
            }
            failed.extend(findings.failure());
        }
        match failed.as_slice() {
            [] if self.json => Ok(Event::new("complete").with(json!({ "files": self.files.len() })).print()?),
            [] => Ok(()),
            [one] => Err(one.as_str().into()),
            [first, ..] => Err(format!("{} of {} files have problems: {first}", failed.len(), self.files.len()).into()),
        }
    }

    fn check(&self, file: &Path) -> Result<Findings, Failure> {
        let mut findings = Findings { file: file.to_owned(), ..Findings::default() };
        match self.offset.open_damaged(file) {
            Ok(snapshot) => self.look(&snapshot, &mut findings)?,
            Err(failure) => findings.problems.push(failure.to_string()),
        }
        // Many errors name the file, which is said anyway.
        let named = format!("{}: ", file.display());
        for problem in &mut findings.problems {
            if let Some(what) = problem.strip_prefix(&named) {
                *problem = what.to_owned();
            }
        }
        findings.ok = findings.problems.is_empty();
        Ok(findings)
    }

    fn look(&self, snapshot: &Snapshot, findings: &mut Findings) -> Result<(), Failure> {
        findings.machine = Some(snapshot.configuration().machine.clone());
        findings.ram_blocks = snapshot.layout().blocks().len();
        for warning in contents::diagnose(snapshot)? {
            let harmless = matches!(warning, Warning::TrailingBytes { .. });
            let list = if harmless { &mut findings.notes } else { &mut findings.problems };
            list.push(warning.to_string());
        }
        devices::check(snapshot, findings);
        if !self.quick {
            pages::check(snapshot, findings, self.json);
        }
        if let Some(what) = contents::changed(snapshot)? {
            findings.problems.push(format!("{what} changed while the file was checked"));
        }
        Ok(())
    }
}

impl Findings {
    fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    /// Why it is not a good file, in one line.
    fn failure(&self) -> Option<String> {
        let file = self.file.display();
        match self.problems.as_slice() {
            [] => None,
            [one] => Some(format!("{file}: {one}")),
            [first, others @ ..] => Some(format!("{file}: {first} (and {} more)", others.len())),
        }
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Findings { ram_blocks, devices, .. } = self;
        if let Some(machine) = &self.machine {
            writeln!(out, "{machine}: {ram_blocks} RAM blocks, {devices} device sections")?;
            match &self.pages {
                Some(pages) => writeln!(
                    out,
                    "{} pages stored ({} of them zero), {} not; {} of those have stale bytes in the file",
                    pages.stored, pages.stored_but_zero, pages.zero, pages.stale
                )?,
                None => writeln!(out, "pages not read")?,
            }
        }
        for note in &self.notes {
            writeln!(out, "{WARN}note{WARN:#}: {note}")?;
        }
        for problem in &self.problems {
            writeln!(out, "{BAD}problem{BAD:#}: {problem}")?;
        }
        let file = self.file.display();
        if self.ok {
            writeln!(out, "{file}: {GOOD}nothing wrong{GOOD:#}")?;
        } else if self.machine.is_none() {
            writeln!(out, "{file}: not checked")?;
        }
        Ok(())
    }
}
