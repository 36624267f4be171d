//! The map as a picture.

use std::fmt::Write as _;

use super::map::{Cell, Map};
use super::{ROW, output};

/// The side of a cell, and the margin, in pixels.
const SIDE: usize = 12;
const MARGIN: usize = 24;
/// The space for the name of a block.
const NAME: usize = 40;

/// Draws it. The result is a whole SVG file.
pub(super) fn draw(title: &str, maps: &[Map]) -> String {
    let rows = |map: &Map| map.cells.len().div_ceil(ROW);
    let height = MARGIN * 3 + maps.iter().map(|map| NAME + rows(map) * SIDE).sum::<usize>();
    let width = MARGIN * 2 + ROW * SIDE;
    let mut out = String::new();
    // Writing into a string does not fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<title>{}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        escaped(title)
    );
    let mut y = MARGIN;
    for map in maps {
        let (name, length) = (escaped(&map.name), output::size(map.length));
        let Cell { stored, zero, stale } = map.sum;
        let _ = writeln!(
            out,
            "<text x=\"{MARGIN}\" y=\"{}\"><tspan font-weight=\"bold\">{name}</tspan> {length}: {stored} pages stored, \
             {zero} zero, {stale} stale; {} pages a square</text>",
            y + NAME / 2,
            map.pages_per_cell
        );
        y += NAME - SIDE / 2;
        for (number, cell) in map.cells.iter().enumerate() {
            let (x, top) = (MARGIN + number % ROW * SIDE, y + number / ROW * SIDE);
            let first = number as u64 * map.pages_per_cell;
            let Cell { stored, zero, stale } = cell;
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{top}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"{}\" stroke=\"#ffffff\"><title>from \
                 {:#x}: {stored} stored, {zero} zero, {stale} stale</title></rect>",
                color(cell),
                first * page_units::PAGE_SIZE
            );
        }
        y += rows(map) * SIDE + SIDE / 2;
    }
    let legend = [("#e6e6e6", "zero"), ("#0b4f8a", "stored"), ("#c8321e", "stale bytes")];
    for (number, (fill, what)) in legend.iter().enumerate() {
        let (x, y) = (MARGIN + number * 120, y + MARGIN / 2);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"{fill}\"/><text x=\"{}\" y=\"{}\">{what}\
             </text>",
            x + SIDE + 6,
            y + SIDE - 1
        );
    }
    out.push_str("</svg>\n");
    out
}

/// From light to dark as more is stored.
fn color(cell: &Cell) -> String {
    let all = cell.stored + cell.zero + cell.stale;
    if cell.stale > 0 {
        return "#c8321e".into();
    }
    let mix = |empty: u64, full: u64| {
        let sum = empty * (all - cell.stored) + full * cell.stored;
        sum.checked_div(all).unwrap_or(empty)
    };
    format!("#{:02x}{:02x}{:02x}", mix(0xe6, 0x0b), mix(0xe6, 0x4f), mix(0xe6, 0x8a))
}

/// A text that may stand in XML: names come from files, and may have anything in them.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
