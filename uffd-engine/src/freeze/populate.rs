//! Which pages of memory exist at all. The others are zero, and are not touched to find that out: touching them would make
//! them exist.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use page_units::{FileOffset, HostAddr, PageRun};

use super::file::{self, Inode, add, held};
use crate::memory::backing::Backing;
use crate::memory::huge_file::HugeFile;
use crate::memory::page_table::PageTable;
use crate::memory::region::Region;

/// Finds the pages of memory of this process that may be other than zero, region by region and in order: for shared memory
/// those that its [file](Region::with_file) holds; for private memory those of the page table.
/// Nothing is touched.
///
/// Memory that is still being loaded has content besides, which this does not tell.
///
/// # Errors
/// If the system does not say.
pub fn populated(regions: &[Region]) -> io::Result<Vec<PageRun>> {
    Ok(Populated::new(regions)?.pages()?.concat())
}

/// Finds the pages of some regions that exist.
#[derive(Debug)]
pub(super) struct Populated {
    parts: Vec<Part>,
    table: PageTable,
}

#[derive(Debug)]
struct Part {
    region: Region,
    /// Of a file of huge pages.
    inode: Option<Inode>,
    asked: OnceLock<HugeFile>,
}

impl Populated {
    pub(super) fn new(regions: &[Region]) -> io::Result<Populated> {
        let part = |region: &Region| {
            let huge = region.file.as_ref().filter(|_| region.shared && region.backing == Backing::Hugetlb);
            let inode = huge.map(|(file, _)| Inode::of(file)).transpose()?;
            Ok(Part { region: region.clone(), inode, asked: OnceLock::new() })
        };
        Ok(Populated { parts: regions.iter().map(part).collect::<io::Result<_>>()?, table: PageTable::open()? })
    }

    /// Makes what may be needed while the guest stands still.
    pub(super) fn prepare(&self) -> io::Result<()> {
        self.parts.iter().filter(|part| part.inode.is_some()).try_for_each(|part| part.asked().map(drop))
    }

    pub(super) fn page_table(&self) -> &PageTable {
        &self.table
    }

    /// By region.
    pub(super) fn pages(&self) -> io::Result<Vec<Vec<PageRun>>> {
        self.look_up(|_| true, file::data)
    }

    /// Of shared memory alone, by region, in little time: of small pages all those that have a page table in common with
    /// one that exists.
    pub(super) fn shared_page_tables(&self) -> io::Result<Vec<Vec<PageRun>>> {
        self.look_up(|region| region.shared, file::page_tables)
    }

    /// The pages of shared memory that the file behind a region holds now.
    pub(super) fn in_file(&self, number: usize, run: PageRun) -> io::Result<Vec<PageRun>> {
        let part = &self.parts[number];
        let Some((file, offset)) = &part.region.file else { return Ok(vec![run]) };
        let from = (run.first - part.region.run.first).to_bytes();
        match part.region.backing {
            Backing::Hugetlb => part.huge_pages(run, &[]),
            Backing::Anonymous | Backing::Memfd => file::data(file, FileOffset(offset.0 + from.0), run),
        }
    }

    fn look_up(
        &self,
        wanted: impl Fn(&Region) -> bool,
        in_memfd: fn(&File, FileOffset, PageRun) -> io::Result<Vec<PageRun>>,
    ) -> io::Result<Vec<Vec<PageRun>>> {
        let of = |part: &Part| {
            let region = &part.region;
            match &region.file {
                _ if !wanted(region) => Ok(Vec::new()),
                Some((file, offset)) if region.is_shared_memfd() => in_memfd(file, *offset, region.run),
                // What nobody has touched here is what the file holds, or another process has written.
                Some(_) if !region.shared => Ok(vec![region.run]),
                None if region.shared => Ok(vec![region.run]),
                _ => self.in_page_table(region),
            }
        };
        let mut pages = self.parts.iter().map(of).collect::<io::Result<Vec<_>>>()?;
        // Huge pages may have been filled elsewhere, by another process or through another mapping. Then the file has more
        // of them than are mapped here.
        for (number, part) in self.parts.iter().enumerate().filter(|(_, part)| wanted(&part.region)) {
            let (Some(inode), Some((file, _))) = (part.inode, &part.region.file) else { continue };
            let same = self.parts.iter().zip(&pages).filter(|(other, _)| other.inode == Some(inode));
            let known: u64 = same.flat_map(|(_, pages)| pages).map(|run| run.len().0).sum();
            if known != held(file)?.0 {
                pages[number] = part.huge_pages(part.region.run, &pages[number])?;
            }
        }
        Ok(pages)
    }

    /// From this process's page table: right for private memory, and, of huge pages of a file, for those that are mapped
    /// here.
    fn in_page_table(&self, region: &Region) -> io::Result<Vec<PageRun>> {
        let ranges = match region.shared && region.backing == Backing::Hugetlb {
            true => self.table.mapped(region.start, region.len())?,
            false => self.table.existing(region.start, region.len())?,
        };
        let run = |range: Range<HostAddr>| {
            let first = region.run.first + (range.start - region.start).to_pages();
            PageRun::new(region.run.block, first, (range.end - range.start).to_pages())
        };
        Ok(ranges.into_iter().map(run).collect())
    }
}

impl Part {
    fn asked(&self) -> io::Result<&HugeFile> {
        if let Some(asked) = self.asked.get() {
            return Ok(asked);
        }
        let (file, offset) = self.region.file.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let made = HugeFile::new(file, *offset, self.region.len())?;
        Ok(self.asked.get_or_init(|| made))
    }

    /// The huge pages of a run that the file holds, of which some are known: about a microsecond for each of the others.
    fn huge_pages(&self, run: PageRun, known: &[PageRun]) -> io::Result<Vec<PageRun>> {
        let asked = self.asked()?;
        let mut runs: Vec<PageRun> = Vec::new();
        let mut rest = run;
        while !rest.is_empty() {
            let (one, after) = rest.split_at(Backing::Hugetlb.granule().pages());
            rest = after;
            let near = known.get(known.partition_point(|known| known.end() <= one.first));
            let is_known = near.is_some_and(|known| known.contains(one.first));
            if is_known || asked.holds((one.first - self.region.run.first).to_bytes())? {
                add(&mut runs, one);
            }
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use page_units::{BlockId, ByteLen, PAGE_SHIFT, PageCount, PageIndex};
    use vm_memory::{Bytes, FileOffset as At, MmapRegion, VolatileMemory};

    use super::*;

    #[test]
    fn page_tables_are_found_fast_and_pages_exactly() {
        let file = Arc::new(File::from(memfd_create("populated", MFdFlags::MFD_CLOEXEC).unwrap()));
        file.set_len(13 << 20).unwrap();
        let map = |offset: u64, mib: usize| {
            MmapRegion::<()>::from_file(At::from_arc(Arc::clone(&file), offset), mib << 20).unwrap()
        };
        let maps = [map(0, 9), map(9 << 20, 4)];
        let run = |first: u64, pages: u64| PageRun::new(BlockId(0), PageIndex(first), PageCount(pages));
        let touch = |map: usize, page: u64| {
            maps[map].as_volatile_slice().write_slice(&[1], ByteLen(page << PAGE_SHIFT).get()).unwrap();
        };
        // The last page of the first part is alone in half a page table.
        [0, 5, 511, 1024, 2303].into_iter().for_each(|page| touch(0, page));
        // The second begins in the middle of what would be a page table of the file.
        touch(1, 1023);
        let region = |map: &MmapRegion<()>, run, offset| {
            let start = HostAddr(map.as_ptr().addr() as u64);
            Region::foreign(start, run, Backing::Memfd).with_file(Arc::clone(&file), FileOffset(offset))
        };
        let regions = [region(&maps[0], run(0, 2304), 0), region(&maps[1], run(2304, 1024), 9 << 20)];
        let found = Populated::new(&regions).unwrap();
        let tables = found.shared_page_tables().unwrap();
        assert_eq!(tables, [vec![run(0, 512), run(1024, 512), run(2048, 256)], vec![run(2304 + 512, 512)]]);
        let exact = [vec![run(0, 1), run(5, 1), run(511, 1), run(1024, 1), run(2303, 1)], vec![run(2304 + 1023, 1)]];
        assert_eq!(found.pages().unwrap(), exact);
        assert_eq!(found.in_file(0, run(4, 507)).unwrap(), [run(5, 1)]);
        assert_eq!(found.in_file(1, run(2304 + 1022, 2)).unwrap(), [run(2304 + 1023, 1)]);
        assert_eq!(populated(&regions).unwrap(), exact.concat());
    }
}
