//! What a block's pages are, in cells of equally many.

use mapped_ram::Snapshot;
use page_source::is_zero;
use page_units::{FileOffset, PAGE_SIZE, PageCount, PageIndex, PageRun};
use serde::Serialize;

use super::ROW;
use crate::commands::Failure;

/// The most rows of a map.
const ROWS: usize = 16;

/// The map of one block.
#[derive(Debug, Serialize)]
pub(super) struct Map {
    pub(super) name: String,
    pub(super) length: u64,
    pub(super) pages_per_cell: u64,
    #[serde(flatten)]
    pub(super) sum: Cell,
    pub(super) cells: Vec<Cell>,
}

/// How many pages are of which kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Cell {
    pub(super) stored: u64,
    pub(super) zero: u64,
    /// Not marked as stored, though not zero in the file.
    pub(super) stale: u64,
}

/// The maps of all blocks whose content is in the file.
pub(super) fn of(snapshot: &Snapshot) -> Result<Vec<Map>, Failure> {
    let mut maps = Vec::new();
    for (id, block) in snapshot.layout().iter() {
        if snapshot.block(id).is_none_or(|place| !place.in_file) {
            continue;
        }
        let pages = block.pages();
        let per_cell = pages.0.div_ceil((ROW * ROWS) as u64).next_power_of_two();
        let cells = usize::try_from(pages.0.div_ceil(per_cell))?;
        let mut map = Map {
            name: block.name().to_owned(),
            length: block.length().0,
            pages_per_cell: per_cell,
            sum: Cell::default(),
            cells: vec![Cell::default(); cells],
        };
        let mut rest = PageRun::new(id, PageIndex(0), pages);
        while !rest.is_empty() {
            let found = snapshot.load_run(id, rest.first, rest.pages)?;
            let (now, later) = rest.split_at(found.pages().max(PageCount(1)));
            if found.is_stored() {
                map.add(now, |cell| &mut cell.stored);
            } else {
                map.add(now, |cell| &mut cell.zero);
                for page in stale(snapshot, now)? {
                    map.move_to_stale(page);
                }
            }
            rest = later;
        }
        maps.push(map);
    }
    Ok(maps)
}

impl Map {
    fn add(&mut self, run: PageRun, count: impl Fn(&mut Cell) -> &mut u64) {
        let (mut page, end) = (run.first.0, run.first.0 + run.pages.0);
        while page < end {
            let next = (page / self.pages_per_cell + 1) * self.pages_per_cell;
            let pages = next.min(end) - page;
            if let Some(cell) = self.cell(page) {
                *count(cell) += pages;
            }
            *count(&mut self.sum) += pages;
            page += pages;
        }
    }

    fn move_to_stale(&mut self, page: u64) {
        if let Some(cell) = self.cell(page) {
            cell.zero -= 1;
            cell.stale += 1;
        }
        self.sum.zero -= 1;
        self.sum.stale += 1;
    }

    fn cell(&mut self, page: u64) -> Option<&mut Cell> {
        self.cells.get_mut(usize::try_from(page / self.pages_per_cell).ok()?)
    }
}

/// The pages of a run, none of which is marked as stored, that the file has bytes for. Holes are passed over.
fn stale(snapshot: &Snapshot, run: PageRun) -> Result<Vec<u64>, Failure> {
    let Some(place) = snapshot.block(run.block) else { return Ok(Vec::new()) };
    let size = snapshot.length().0;
    let at = |page: u64| place.pages_offset.0 + page * PAGE_SIZE;
    let mut found = Vec::new();
    let mut bytes = vec![0; usize::try_from(PAGE_SIZE)?];
    let (mut page, end) = (run.first.0, run.first.0 + run.pages.0);
    while page < end && at(page) < size {
        // Where holes are not known everything is read.
        let Some(data) = snapshot.data_from(FileOffset(at(page)))? else { break };
        page = page.max(data.0.saturating_sub(place.pages_offset.0) / PAGE_SIZE);
        if page >= end {
            break;
        }
        let there = usize::try_from(PAGE_SIZE.min(size.saturating_sub(at(page))))?;
        let part = bytes.get_mut(..there).unwrap_or_default();
        snapshot.read_exact_at(part, FileOffset(at(page))).map_err(|error| {
            format!("{}: reading at offset {:#x} failed: {error}", snapshot.path().display(), at(page))
        })?;
        if !is_zero(part) {
            found.push(page);
        }
        page += 1;
    }
    Ok(found)
}
