//! `fastload view`: a map of a snapshot's memory.

mod map;
mod svg;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;

use self::map::{Cell, Map};
use crate::commands::Failure;
use crate::event::Event;
use crate::offset::Offset;
use crate::output::{self, BAD, HEAD};
use crate::rewrite;

/// How many cells the map of a block has in a row.
const ROW: usize = 64;

/// Draw a map of a snapshot's memory: which pages are stored, which are zero, which are stale.
///
/// Reads the bitmaps, and of the pages only those that are not marked as stored although the file has bytes for them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fastload view vm.snap
  fastload view vm.snap --svg map.svg
      A picture for a browser, with figures under the pointer")]
pub(crate) struct View {
    /// A file that QEMU saved with the capability mapped-ram.
    file: PathBuf,
    /// Write the map as an SVG picture.
    #[arg(long, value_name = "OUT")]
    svg: Option<PathBuf>,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    offset: Offset,
}

impl View {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let snapshot = self.offset.open_damaged(&self.file)?;
        let maps = map::of(&snapshot)?;
        if let Some(out) = &self.svg {
            rewrite::refuse_same(&self.file, out)?;
            let title = self.file.display().to_string();
            std::fs::write(out, svg::draw(&title, &maps)).map_err(|error| format!("{}: {error}", out.display()))?;
        }
        if self.json {
            let mut event = Event::new("complete").path("file", &self.file);
            if let Some(out) = &self.svg {
                event = event.path("svg", out);
            }
            return Ok(event.with(json!({ "blocks": maps })).print()?);
        }
        if let Some(out) = &self.svg {
            return Ok(output::print(&format!("{}: {} RAM blocks\n", out.display(), maps.len()))?);
        }
        Ok(output::print(&text(&maps)?)?)
    }
}

fn text(maps: &[Map]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    for map in maps {
        let (length, cell) = (output::size(map.length), output::size(map.pages_per_cell * page_units::PAGE_SIZE));
        writeln!(out, "{HEAD}{}{HEAD:#}  {length}, {cell} a character", map.name)?;
        writeln!(out, "{} stored, {} zero, {} stale", map.sum.stored, map.sum.zero, map.sum.stale)?;
        for row in map.cells.chunks(ROW) {
            out.push_str("  ");
            for cell in row {
                match sign(cell) {
                    '!' => write!(out, "{BAD}!{BAD:#}")?,
                    sign => out.push(sign),
                }
            }
            out.push('\n');
        }
        out.push('\n');
    }
    writeln!(out, "\u{b7} zero  \u{2591}\u{2592}\u{2593}\u{2588} stored: some to all  ! stale bytes among them")?;
    Ok(out)
}

fn sign(cell: &Cell) -> char {
    let all = cell.stored + cell.zero + cell.stale;
    match cell.stored {
        _ if cell.stale > 0 => '!',
        0 => '\u{b7}',
        stored if stored == all => '\u{2588}',
        stored if stored * 3 < all => '\u{2591}',
        stored if stored * 3 < all * 2 => '\u{2592}',
        _ => '\u{2593}',
    }
}
