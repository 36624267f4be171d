//! Guest memory: RAM blocks, where they lie in guest-physical memory, and where in this process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use page_units::{
    BlockId, ByteLen, FileOffset, GuestAddr, HostAddr, Layout, LayoutError, PageIndex, PageRun, RamBlock,
};
use uffd_engine::{Backing, Region};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::bitmap::OwnersBitmap;
use super::discard::Frozen;
use super::{MemoryError, RamSpec, map};
use crate::sys;

/// Guest memory as `vm-memory` has it. What is written through it is noted in the bitmap of the VMM that it was adopted
/// from, if it was.
pub type Memory = GuestMemoryMmap<OwnersBitmap>;

/// A part of a RAM block that is contiguous everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// Where the guest sees it.
    pub guest: GuestAddr,
    /// Where it is mapped here.
    pub host: HostAddr,
    /// Which pages of which block.
    pub run: PageRun,
    /// What it is made of.
    pub backing: Backing,
    /// Whether the mapping is shared.
    pub shared: bool,
}

impl Piece {
    pub(super) fn len(&self) -> ByteLen {
        self.run.len()
    }
}

/// All RAM of a guest.
#[derive(Debug)]
pub struct GuestRam {
    memory: Memory,
    layout: Layout,
    pub(super) pieces: Vec<Piece>,
    /// Second mappings of shared huge pages, by piece.
    aliases: Vec<Option<Arc<MmapRegion<OwnersBitmap>>>>,
    /// A live snapshot has it write-protected.
    pub(super) frozen: Frozen,
}

impl GuestRam {
    /// Allocates memory, which is all zero and costs nothing until it is touched.
    ///
    /// # Errors
    /// If the blocks overlap or are not whole pages of the backing, or there is no such memory.
    pub fn allocate(specs: &[RamSpec], backing: Backing) -> Result<GuestRam, MemoryError> {
        let mut blocks = Vec::new();
        let mut regions = Vec::new();
        for (spec, id) in specs.iter().zip(0..) {
            let length = spec.length().ok_or(LayoutError::TooLarge)?;
            let block = RamBlock::new(spec.name(), length, backing.granule())?;
            let failed =
                |error: String| MemoryError::Allocate { block: spec.name().to_owned(), length, backing, reason: error };
            let file = map::file_of(&block, backing).map_err(|error| failed(error.to_string()))?;
            let mut offset = ByteLen(0);
            for &(guest, len) in spec.pieces() {
                if len.0 == 0 || !(len.0 | guest.0).is_multiple_of(backing.granule().bytes().0) {
                    return Err(failed(format!("{len} bytes at guest-physical {guest} are not whole pages")));
                }
                let map = || map::map(len, file.as_ref(), offset, backing);
                let region = map().map_err(|error| failed(error.to_string()))?;
                let alias = match backing {
                    Backing::Hugetlb => Some(map().map_err(|error| failed(error.to_string()))?),
                    Backing::Anonymous | Backing::Memfd => None,
                };
                let run = PageRun::new(BlockId(id), PageIndex::at_byte(offset), len.to_pages());
                regions.push((guest, run, region, alias));
                offset += len;
            }
            blocks.push(block);
        }
        let layout = Layout::new(blocks)?;
        let shared = backing != Backing::Anonymous;
        let mut pieces = Vec::new();
        let mut aliases = Vec::new();
        let mut mapped = Vec::new();
        // Sorted, as `vm-memory` wants them; it refuses regions that overlap.
        regions.sort_by_key(|(guest, ..)| *guest);
        for (guest, run, region, alias) in regions {
            pieces.push(Piece { guest, host: HostAddr(region.as_ptr().addr() as u64), run, backing, shared });
            let region = GuestRegionMmap::new(region, guest.into());
            mapped.push(region.ok_or_else(|| MemoryError::Collection(format!("{guest} is too high")))?);
            aliases.push(alias.map(Arc::new));
        }
        let memory = Memory::from_regions(mapped).map_err(|error| MemoryError::Collection(error.to_string()))?;
        Ok(GuestRam { memory, layout, pieces, aliases, frozen: Frozen::default() })
    }

    /// Takes memory that a VMM has already, with a bitmap of any type (VMMs that migrate have `AtomicBitmap`): each region is
    /// a RAM block of its own, named by `name`. What it is made of is told by how it is mapped, and by its file. It stays
    /// mapped for as long as this or the VMM's own handle lives.
    ///
    /// What is written through [`memory`](GuestRam::memory) is noted in the VMM's bitmap. Pages that are loaded, by an engine
    /// or before the guest runs, are not: they are what the guest has from the beginning.
    ///
    /// # Errors
    /// If names repeat, a region is not whole pages, or its huge pages are not of 2 MiB.
    pub fn adopt<B: Bitmap + Send + Sync + 'static>(
        memory: GuestMemoryMmap<B>,
        name: impl Fn(GuestAddr) -> String,
    ) -> Result<GuestRam, MemoryError> {
        let mut blocks = Vec::new();
        let mut pieces = Vec::new();
        let mut regions = Vec::new();
        for (region, id) in memory.iter().zip(0..) {
            let guest = GuestAddr::from(region.start_addr());
            let shared = region.flags() & libc::MAP_SHARED != 0;
            let (name, length) = (name(guest), ByteLen(region.len()));
            let backing = map::backing_of(region)
                .map_err(|reason| MemoryError::Collection(format!("RAM block \"{name}\" at {guest}: {reason}")))?;
            let block = RamBlock::new(name, length, backing.granule())?;
            let run = PageRun::new(BlockId(id), PageIndex(0), block.pages());
            let host = HostAddr(region.as_ptr().addr() as u64);
            let collection = |error: String| MemoryError::Collection(format!("{guest}: {error}"));
            let view = sys::view_of(region.get_mmap()).map_err(|error| collection(error.to_string()))?;
            let region = GuestRegionMmap::new(view, region.start_addr());
            regions.push(region.ok_or_else(|| collection("it is too high".into()))?);
            blocks.push(block);
            pieces.push(Piece { guest, host, run, backing, shared });
        }
        let memory = Memory::from_regions(regions).map_err(|error| MemoryError::Collection(error.to_string()))?;
        let aliases = pieces.iter().map(|_| None).collect();
        Ok(GuestRam { layout: Layout::new(blocks)?, memory, pieces, aliases, frozen: Frozen::default() })
    }

    /// The memory itself. Reading a page that is still missing waits until the engine has brought it.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The RAM blocks.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the blocks are, in the order of guest-physical addresses.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The regions for an engine whose source has the RAM blocks `source`, found by name: a source may count its
    /// blocks in another order, and have others besides.
    ///
    /// # Errors
    /// If a block is missing there, or its length is another one.
    pub fn regions(&self, source: &Layout) -> Result<Vec<Region>, MemoryError> {
        let mut numbers = Vec::new();
        for block in self.layout.blocks() {
            let found = source.find(block.name()).ok_or_else(|| {
                MemoryError::Collection(format!("the snapshot has no RAM block \"{}\"", block.name()))
            })?;
            if found.1.length() != block.length() {
                return Err(MemoryError::Collection(format!(
                    "RAM block \"{}\" is {} bytes long, in the snapshot {}",
                    block.name(),
                    block.length(),
                    found.1.length()
                )));
            }
            numbers.push(found.0);
        }
        let mapped = self.aliases.iter().zip(self.memory.iter());
        let regions = self.pieces.iter().zip(mapped).map(|(piece, (alias, memory))| {
            let number = usize::try_from(piece.run.block.0).ok().and_then(|at| numbers.get(at)).copied();
            let run = PageRun { block: number.unwrap_or(piece.run.block), ..piece.run };
            let region = sys::region(self.memory.clone(), alias.clone(), piece, run);
            match memory.file_offset() {
                Some(file) => region.with_file(Arc::clone(file.arc()), FileOffset(file.start())),
                None => region,
            }
        });
        Ok(regions.collect())
    }

    /// Finds the pages that exist, in the RAM blocks' own numbers; nothing is touched for it.
    pub(crate) fn populated(&self) -> std::io::Result<Vec<PageRun>> {
        let regions = self.regions(&self.layout).map_err(std::io::Error::other)?;
        uffd_engine::populated(&regions)
    }

    /// Refuses memory whose files hold pages already, although no guest has touched them: an engine maps what is there, and
    /// the guest would find zeros. (The engine itself refuses private memory.) To be called before an engine loads it.
    ///
    /// # Errors
    /// If there are pages: `mlockall` makes some, or another user of the file has touched them.
    pub fn check_untouched(&self) -> Result<(), MemoryError> {
        for (piece, region) in self.pieces.iter().zip(self.memory.iter()) {
            let Some(file) = region.file_offset() else { continue };
            let held = file.file().metadata().map_or_else(
                |error| Some(error.to_string()),
                |of| (of.blocks() > 0).then(|| "its pages are there before the snapshot's (by mlockall?)".to_owned()),
            );
            if let Some(reason) = held {
                let block = self.layout.get(piece.run.block).map(|block| block.name().to_owned()).unwrap_or_default();
                return Err(MemoryError::Allocate { block, length: piece.len(), backing: piece.backing, reason });
            }
        }
        Ok(())
    }

    /// The first piece of which the end lies beyond its file, if there is one: somebody has cut that off, and what the guest
    /// had there is gone.
    pub(crate) fn cut_off(&self) -> io::Result<Option<GuestAddr>> {
        for (piece, region) in self.pieces.iter().zip(self.memory.iter()) {
            let Some(at) = region.file_offset() else { continue };
            let there = at.file().metadata()?.len().saturating_sub(at.start());
            if there < piece.len().0 {
                return Ok(Some(piece.guest + ByteLen(there)));
            }
        }
        Ok(None)
    }

    /// The file behind a piece, and where in it the piece begins.
    pub(crate) fn file_of(&self, piece: usize) -> Option<(&File, u64)> {
        let region = self.memory.iter().nth(piece)?;
        region.file_offset().map(|offset| (offset.file(), offset.start()))
    }

    /// Where this process has it mapped: the pieces, and second mappings of huge pages, which an engine fills while nobody
    /// else sees the pages.
    pub(crate) fn mapped(&self) -> Vec<Range<HostAddr>> {
        let of = |piece: &Piece, start: HostAddr| start..start + piece.len();
        let pieces = self.pieces.iter().map(|piece| of(piece, piece.host));
        let aliases = self.pieces.iter().zip(&self.aliases).filter_map(|(piece, alias)| {
            let alias = alias.as_ref()?;
            Some(of(piece, HostAddr(alias.as_ptr().addr() as u64)))
        });
        pieces.chain(aliases).collect()
    }

    /// Reads guest memory through the kernel: where its content could not be loaded, or its file was cut off, this is an error
    /// and not the `SIGBUS` of a plain load. For device models, whose threads have no other way to survive that; a page that
    /// is still missing is waited for.
    ///
    /// # Errors
    /// If not all of it is RAM, or can be read.
    pub fn read(&self, guest: GuestAddr, to: &mut [u8]) -> Result<(), MemoryError> {
        let length = ByteLen::of(to.len());
        let mut rest = to;
        self.each_part(guest, length, |_, host, length| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(length.get());
            rest = later;
            sys::read_memory(host, now)
        })
    }

    /// Writes guest memory through the kernel, as [`read`](GuestRam::read) reads it, and notes it in the bitmap of the VMM that
    /// the memory was adopted from.
    ///
    /// # Errors
    /// If not all of it is RAM, or can be written. Some of it may have been.
    pub fn write(&self, guest: GuestAddr, from: &[u8]) -> Result<(), MemoryError> {
        let mut rest = from;
        self.each_part(guest, ByteLen::of(from.len()), |at, host, length| {
            let (now, later) = rest.split_at(length.get());
            rest = later;
            sys::write_memory(now.as_ptr(), host, length)?;
            if let Some((region, offset)) = self.memory.to_region_addr(at.into()) {
                region.bitmap().mark_dirty(usize::try_from(offset.0).unwrap_or(usize::MAX), length.get());
            }
            Ok(())
        })
    }

    /// The pieces of a range, in order.
    fn each_part(
        &self,
        guest: GuestAddr,
        length: ByteLen,
        mut part: impl FnMut(GuestAddr, HostAddr, ByteLen) -> io::Result<()>,
    ) -> Result<(), MemoryError> {
        let (mut at, mut left) = (guest, length);
        while left.0 > 0 {
            let failed = |reason: String| MemoryError::Access { guest: at, length: left, reason };
            let inside = |piece: &&Piece| piece.guest <= at && at - piece.guest < piece.len();
            let piece = self.pieces.iter().find(inside).ok_or_else(|| failed("there is no RAM".into()))?;
            let offset = at - piece.guest;
            let now = left.min(piece.len() - offset);
            part(at, piece.host + offset, now).map_err(|error| failed(error.to_string()))?;
            (at, left) = (at + now, left - now);
        }
        Ok(())
    }

    /// Whether there is RAM at that address.
    #[must_use]
    pub fn contains(&self, guest: GuestAddr) -> bool {
        self.to_host(guest).is_some()
    }

    /// Where a guest-physical address is in this process.
    #[must_use]
    pub fn to_host(&self, guest: GuestAddr) -> Option<HostAddr> {
        let piece = self.pieces.iter().find(|piece| piece.guest <= guest && guest - piece.guest < piece.len())?;
        Some(piece.host + (guest - piece.guest))
    }

    /// Which guest-physical address an address of this process is.
    #[must_use]
    pub fn to_guest(&self, host: HostAddr) -> Option<GuestAddr> {
        let piece = self.pieces.iter().find(|piece| piece.host <= host && host - piece.host < piece.len())?;
        Some(piece.guest + (host - piece.host))
    }

    /// The guest-physical address of a page of a block.
    #[must_use]
    pub fn page_to_guest(&self, block: BlockId, page: PageIndex) -> Option<GuestAddr> {
        let piece = self.pieces.iter().find(|piece| piece.run.block == block && piece.run.contains(page))?;
        Some(piece.guest + (page - piece.run.first).to_bytes())
    }
}
