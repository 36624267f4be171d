//! What the memory of a guest is supposed to be: plain bytes, and nothing clever.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use page_files::FlatBlock;
use page_source::is_zero;
use page_units::{BlockId, ByteLen, Layout, LayoutError, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const PAGE: usize = 4096;

/// The content of every RAM block, as plain vectors. Two oracles are equal if every byte is.
#[derive(Clone, PartialEq, Eq)]
pub struct Oracle {
    layout: Layout,
    blocks: Vec<Vec<u8>>,
}

impl std::fmt::Debug for Oracle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oracle").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Oracle {
    /// Blocks of these names and contents, with small pages.
    ///
    /// # Errors
    /// If a length is not a multiple of 4096, or two names are the same.
    pub fn new<'a>(blocks: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> Result<Oracle, LayoutError> {
        let (blocks, contents): (Vec<_>, Vec<_>) = blocks
            .into_iter()
            .map(|(name, bytes)| (RamBlock::new(name, ByteLen::of(bytes.len()), PageSize::SMALL), bytes))
            .unzip();
        let layout = Layout::new(blocks.into_iter().collect::<Result<_, _>>()?)?;
        Ok(Oracle { layout, blocks: contents })
    }

    /// All zero.
    #[must_use]
    pub fn zero(layout: Layout) -> Oracle {
        let blocks = layout.blocks().iter().map(|block| vec![0; block.length().get()]).collect();
        Oracle { layout, blocks }
    }

    /// Random content: runs of zero pages and of others, every page different from all others. `stored` of 256 runs
    /// are not zero, on the average. The same seed gives the same content.
    #[must_use]
    pub fn random(seed: u64, layout: Layout, stored: u8) -> Oracle {
        let mut oracle = Oracle::zero(layout);
        let mut random = StdRng::seed_from_u64(seed);
        for bytes in &mut oracle.blocks {
            let mut pages = bytes.chunks_exact_mut(PAGE);
            while pages.len() > 0 {
                let longest = if random.random_range(0..8) == 0 { 600 } else { 12 };
                let run = pages.by_ref().take(random.random_range(1..=longest));
                if random.random::<u8>() >= stored {
                    run.for_each(drop);
                    continue;
                }
                for page in run {
                    match random.random_range(0..8) {
                        // A page that only just is not zero.
                        0 => page[random.random_range(0..PAGE)] = random.random_range(1..=u8::MAX),
                        _ => random.fill(page),
                    }
                }
            }
        }
        oracle
    }

    /// One to four blocks of at most `pages` pages together, none empty.
    #[must_use]
    pub fn random_layout(seed: u64, pages: u64) -> Layout {
        let mut random = StdRng::seed_from_u64(seed ^ 0x6c61_796f_7574);
        let names = ["pc.ram", "/rom@etc/acpi/tables", "vga.vram", "0000:00:02.0/virtio-net-pci.rom"];
        let count = random.random_range(1..=names.len());
        let longest = (pages / count as u64).max(1);
        let blocks = names[..count].iter().map(|name| {
            let length = PageCount(random.random_range(1..=longest));
            RamBlock::new(*name, length.to_bytes(), PageSize::SMALL).expect("whole pages")
        });
        Layout::new(blocks.collect()).expect("small blocks of different names")
    }

    /// The blocks.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The content of a block.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block(&self, block: BlockId) -> &[u8] {
        &self.blocks[block.0 as usize]
    }

    /// The same, to be written to.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block_mut(&mut self, block: BlockId) -> &mut [u8] {
        &mut self.blocks[block.0 as usize]
    }

    /// The content of a run of pages.
    ///
    /// # Panics
    /// If there are no such pages.
    #[must_use]
    pub fn run(&self, run: PageRun) -> &[u8] {
        let range: Range<usize> = run.first.byte_offset().get()..run.end().byte_offset().get();
        &self.block(run.block)[range]
    }

    /// Whether a page is all zero.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn zero_at(&self, block: BlockId, page: PageIndex) -> bool {
        is_zero(self.run(PageRun::single(block, page)))
    }

    /// The pages of `run` in runs that are all zero (`true`), or have no zero page.
    pub fn kinds(&self, run: PageRun) -> impl Iterator<Item = (PageRun, bool)> {
        let mut rest = run;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let zero = self.zero_at(rest.block, rest.first);
            let same = rest.iter().take_while(|page| self.zero_at(rest.block, *page) == zero).count();
            let (now, later) = rest.split_at(PageCount(same as u64));
            rest = later;
            Some((now, zero))
        })
    }

    /// How many pages are not zero.
    #[must_use]
    pub fn stored_pages(&self) -> PageCount {
        let runs = self.layout.runs().flat_map(|run| self.kinds(run));
        PageCount(runs.filter(|(_, zero)| !zero).map(|(run, _)| run.pages.0).sum())
    }

    /// Writes a flat memory file: the blocks one after the other, zero pages as holes.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_flat(&self, path: &Path) -> io::Result<Vec<FlatBlock>> {
        let blocks = FlatBlock::concatenated(self.layout.blocks().to_vec()).map_err(io::Error::other)?;
        let file = File::create(path)?;
        file.set_len(self.layout.total().0)?;
        for (all, place) in self.layout.runs().zip(&blocks) {
            for (run, zero) in self.kinds(all) {
                if !zero {
                    file.write_all_at(self.run(run), place.offset.0 + run.first.byte_offset().0)?;
                }
            }
        }
        Ok(blocks)
    }

    /// Writes a mapped-ram file: zero pages are not stored. `device_state` follows RAM, as
    /// [`Writer::finish`](mapped_ram::Writer::finish) wants it.
    ///
    /// # Errors
    /// What the writer says.
    pub fn write_mapped_ram(
        &self,
        path: &Path,
        configuration: &vmstate::Configuration,
        device_state: &[u8],
    ) -> Result<(), mapped_ram::CreateError> {
        let writer = mapped_ram::Writer::create(path, configuration, self.layout.clone())?;
        let write = |run| {
            writer.write(run, self.run(run)).map_err(|error| mapped_ram::CreateError::Io {
                path: path.to_owned(),
                what: "writing pages",
                error,
            })
        };
        let runs = self.layout.runs().flat_map(|all| self.kinds(all));
        runs.filter(|(_, zero)| !zero).try_for_each(|(run, _)| write(run))?;
        writer.finish(device_state)
    }
}
