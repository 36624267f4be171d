//! The summary of a file.

use std::fmt::Write;

use mapped_ram::Snapshot;
use page_units::PAGE_SIZE;
use serde::Serialize;
use vmstate::{RawCommand, SectionKind};

use crate::commands::Failure;
use crate::contents;
use crate::output::{HEAD, WARN, size};

#[derive(Debug, Serialize)]
pub(super) struct Report {
    machine: String,
    /// How it is compressed, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed: Option<Compressed>,
    base: u64,
    capabilities: Vec<String>,
    blocks: Vec<Block>,
    sections: Vec<Section>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Compressed {
    codec: &'static str,
    frames: u64,
    frame_bytes: u64,
    bytes: u64,
    root: String,
}

#[derive(Debug, Serialize)]
struct Block {
    name: String,
    length: u64,
    page_size: u64,
    bitmap_offset: u64,
    pages_offset: u64,
    /// What the bitmap says, even of pages that a truncated file does not have; `None` if it can't be used.
    stored_pages: Option<u64>,
    /// What the bitmap does not mark. Of a block without content in the file 0, as is `stored_pages`: together they are
    /// fewer than its pages.
    zero_pages: Option<u64>,
    /// Whether the file has the block's content: not with x-ignore-shared, if the memory is shared.
    #[serde(skip)]
    in_file: bool,
}

#[derive(Debug, Serialize)]
struct Section {
    kind: String,
    id: u32,
    name: String,
    instance: u32,
    version: u32,
    start: u64,
    end: u64,
}

impl Report {
    pub(super) fn of(snapshot: &Snapshot) -> Result<Report, Failure> {
        let mut blocks = Vec::new();
        for ((id, ram), file) in snapshot.layout().iter().map(|block| (block, snapshot.block(block.0))) {
            let Some(file) = file else { continue };
            let pages = if file.in_file { ram.pages().0 } else { 0 };
            let stored = snapshot.marked_pages(id).ok().map(|stored| stored.0);
            blocks.push(Block {
                name: ram.name().to_owned(),
                length: ram.length().0,
                page_size: PAGE_SIZE,
                bitmap_offset: file.bitmap_offset.0,
                pages_offset: file.pages_offset.0,
                stored_pages: stored,
                zero_pages: stored.map(|stored| pages.saturating_sub(stored)),
                in_file: file.in_file,
            });
        }
        let sections = snapshot.sections().iter().map(|entry| Section {
            kind: entry.kind.to_string(),
            id: entry.id,
            name: entry.name.clone(),
            instance: entry.instance,
            version: entry.version,
            start: entry.range.start.0,
            end: entry.range.end.0,
        });
        Ok(Report {
            machine: snapshot.configuration().machine.clone(),
            compressed: snapshot.frames().map(|frames| Compressed {
                codec: frames.codec().name(),
                frames: frames.frames(),
                frame_bytes: frames.frame_limit().0,
                bytes: snapshot.identity().size,
                root: frames.root().to_string(),
            }),
            base: snapshot.base().0,
            capabilities: snapshot.configuration().capabilities().map(str::to_owned).collect(),
            blocks,
            sections: sections.collect(),
            warnings: contents::diagnose(snapshot)?.iter().map(ToString::to_string).collect(),
        })
    }

    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "machine       {}", self.machine)?;
        writeln!(out, "capabilities  {}", self.capabilities.join(", "))?;
        if let Some(Compressed { codec, frames, frame_bytes, bytes, root }) = &self.compressed {
            let (bytes, frame) = (size(*bytes), size(*frame_bytes));
            writeln!(out, "compressed    {codec}, {bytes} in {frames} frames of up to {frame}")?;
            writeln!(out, "root          {root}")?;
        }
        if self.base != 0 {
            writeln!(out, "begins at     {:#x}", self.base)?;
        }
        writeln!(out, "\n{HEAD}RAM blocks{HEAD:#}")?;
        let wide = self.blocks.iter().map(|block| block.name.len()).max().unwrap_or(0).max(4);
        writeln!(
            out,
            "  {:wide$}  {:>10}  {:>9}  {:>9}  {:>12}  {:>12}",
            "name", "length", "stored", "zero", "bitmap at", "pages at"
        )?;
        for block in &self.blocks {
            let count = |pages: Option<u64>| match pages {
                _ if !block.in_file => "not here".to_owned(),
                Some(pages) => pages.to_string(),
                None => "?".to_owned(),
            };
            let (stored, zero) = (count(block.stored_pages), count(block.zero_pages));
            writeln!(
                out,
                "  {:wide$}  {:>10}  {stored:>9}  {zero:>9}  {:>#12x}  {:>#12x}",
                block.name,
                size(block.length),
                block.bitmap_offset,
                block.pages_offset
            )?;
        }
        writeln!(out, "\n{HEAD}Sections{HEAD:#}")?;
        let wide = self.sections.iter().map(|section| section.name.len()).max().unwrap_or(0).max(16);
        writeln!(
            out,
            "  kind    id  {:wide$}  {:>8}  {:>7}  {:>12}  {:>9}",
            "name", "instance", "version", "offset", "bytes"
        )?;
        for section in &self.sections {
            let name = self.name_of(section);
            writeln!(
                out,
                "  {:5} {:>4}  {name:wide$}  {:>8}  {:>7}  {:>#12x}  {:>9}",
                section.kind,
                section.id,
                section.instance,
                section.version,
                section.start,
                section.end.saturating_sub(section.start)
            )?;
        }
        for warning in &self.warnings {
            writeln!(out, "\n{WARN}warning{WARN:#}: {warning}")?;
        }
        Ok(())
    }

    /// A command has a number and no name in the stream; people want one.
    fn name_of<'s>(&self, section: &'s Section) -> &'s str {
        if section.kind != SectionKind::Command.to_string() {
            return &section.name;
        }
        let number = u16::try_from(section.id).unwrap_or(u16::MAX);
        RawCommand { number, payload: Vec::new() }.name()
    }
}
