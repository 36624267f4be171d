//! Guest memory: RAM blocks, where they lie in guest-physical memory, and where in this process.

mod discard;
mod map;
mod spec;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use page_units::{BlockId, ByteLen, GuestAddr, HostAddr, Layout, LayoutError, PageIndex, PageRun, RamBlock};
use uffd_engine::{Backing, Region};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

pub use self::discard::Discard;
pub(crate) use self::discard::FreezeClaim;
use self::discard::Frozen;
pub use self::spec::{MemoryError, RamSpec};
use crate::sys;

/// Guest memory as `vm-memory` has it.
pub type Memory = GuestMemoryMmap<()>;

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
    fn len(&self) -> ByteLen {
        self.run.len()
    }
}

/// All RAM of a guest.
#[derive(Debug)]
pub struct GuestRam {
    memory: Memory,
    layout: Layout,
    pieces: Vec<Piece>,
    /// Second mappings of shared huge pages, by piece.
    aliases: Vec<Option<Arc<MmapRegion<()>>>>,
    /// A live snapshot has it write-protected.
    frozen: Frozen,
}

impl GuestRam {
    /// Allocates memory, which is all zero and costs nothing until it is touched.
    ///
    /// # Errors
    /// If the blocks overlap or are not whole pages of the backing, or there is no such memory to be had.
    pub fn allocate(specs: &[RamSpec], backing: Backing) -> Result<GuestRam, MemoryError> {
        let mut blocks = Vec::new();
        let mut regions = Vec::new();
        for (spec, id) in specs.iter().zip(0..) {
            let length = spec.length().ok_or(LayoutError::TooLarge)?;
            let block = RamBlock::new(&spec.name, length, backing.granule())?;
            let failed =
                |error: String| MemoryError::Allocate { block: spec.name.clone(), length, backing, reason: error };
            let file = map::file_of(&block, backing).map_err(|error| failed(error.to_string()))?;
            let mut offset = ByteLen(0);
            for &(guest, len) in &spec.pieces {
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
            let region = GuestRegionMmap::new(region, GuestAddress(guest.0));
            mapped.push(region.ok_or_else(|| MemoryError::Collection(format!("{guest} is too high")))?);
            aliases.push(alias.map(Arc::new));
        }
        let memory = Memory::from_regions(mapped).map_err(|error| MemoryError::Collection(error.to_string()))?;
        Ok(GuestRam { memory, layout, pieces, aliases, frozen: Frozen::default() })
    }

    /// Takes memory that a VMM has already: each region is a RAM block of its own, named by `name`. What it is made of is
    /// told by how it is mapped, and by its file.
    ///
    /// # Errors
    /// If names repeat, a region is not whole pages, or its huge pages are not of 2 MiB.
    pub fn adopt(memory: Memory, name: impl Fn(GuestAddr) -> String) -> Result<GuestRam, MemoryError> {
        let mut blocks = Vec::new();
        let mut pieces = Vec::new();
        for (region, id) in memory.iter().zip(0..) {
            let guest = GuestAddr(region.start_addr().0);
            let shared = region.flags() & libc::MAP_SHARED != 0;
            let (name, length) = (name(guest), ByteLen(region.len()));
            let backing = map::backing_of(region)
                .map_err(|reason| MemoryError::Collection(format!("RAM block \"{name}\" at {guest}: {reason}")))?;
            let block = RamBlock::new(name, length, backing.granule())?;
            let run = PageRun::new(BlockId(id), PageIndex(0), block.pages());
            let host = HostAddr(region.as_ptr().addr() as u64);
            blocks.push(block);
            pieces.push(Piece { guest, host, run, backing, shared });
        }
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
        let regions = self.pieces.iter().zip(&self.aliases).map(|(piece, alias)| {
            let number = usize::try_from(piece.run.block.0).ok().and_then(|at| numbers.get(at)).copied();
            let run = PageRun { block: number.unwrap_or(piece.run.block), ..piece.run };
            sys::region(self.memory.clone(), alias.clone(), piece, run)
        });
        Ok(regions.collect())
    }

    /// Refuses files that hold pages although nobody has touched them: an engine maps what is there, and the guest would
    /// find zeros. (Private memory is refused by the engine.)
    pub(crate) fn check_untouched(&self) -> Result<(), MemoryError> {
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

    /// Gives the memory to a VM: one slot per piece, numbered from 0 on. Do it **before** creating an irqchip: after
    /// that the first slot costs KVM milliseconds.
    ///
    /// The memory must stay mapped for as long as the VM runs; a [`Machine`](crate::Machine) sees to it.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_slots(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (piece, slot) in self.pieces.iter().zip(0..) {
            sys::set_slot(vm, slot, piece.guest, piece.host, piece.len()).map_err(|error| MemoryError::Slot {
                guest: piece.guest,
                length: piece.len(),
                error,
            })?;
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
