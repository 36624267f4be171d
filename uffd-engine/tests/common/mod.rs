//! Memory to be served, and a look at every byte of it.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod behind;
pub(crate) mod blocked;
pub(crate) mod collector;
pub(crate) mod discards;
pub(crate) mod refused;
pub(crate) mod scripted;

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use page_source::Source;
use page_units::{BlockId, ByteLen, HostAddr, Layout, PageIndex, PageRun};
use testkit::oracle::Oracle;
use testkit::require::Prerequisite;
use uffd_engine::{Backing, Builder, Descriptor, Engine, Features, Region, Stats};
use userfaultfd::{RegisterMode, UffdBuilder};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

pub(crate) const PAGE: usize = 4096;
pub(crate) const HUGE: usize = 2 << 20;

/// What the memory of a test is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    MemfdShared,
    MemfdPrivate,
    HugetlbPrivate,
    HugetlbShared,
    HugetlbAlias,
}

pub(crate) const SMALL_KINDS: [Kind; 3] = [Kind::Anonymous, Kind::MemfdShared, Kind::MemfdPrivate];
pub(crate) const HUGE_KINDS: [Kind; 3] = [Kind::HugetlbPrivate, Kind::HugetlbShared, Kind::HugetlbAlias];

/// Those that can be frozen while they are loading. A kernel before Linux 6.4 refuses what is in files: `tests/kernel.rs`
/// shows that.
pub(crate) fn freezable_while_loading(kinds: &[Kind]) -> Vec<Kind> {
    let all = Prerequisite::ProtectedContinue.check().is_ok();
    let private = |kind: &Kind| matches!(kind, Kind::Anonymous | Kind::HugetlbPrivate);
    kinds.iter().copied().filter(|kind| all || private(kind)).collect()
}

/// A mapping for each RAM block.
pub(crate) struct Memory {
    pub(crate) kind: Kind,
    pub(crate) layout: Layout,
    pub(crate) maps: Vec<MmapRegion>,
    aliases: Vec<Option<MmapRegion>>,
}

fn map(len: usize, flags: i32, file: Option<FileOffset>) -> MmapRegion {
    let builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
    let builder = match file {
        Some(file) => builder.with_file_offset(file),
        None => builder,
    };
    builder.build().expect("memory for a test")
}

/// Of a mapping that lives longer than the engine: the tests see to that.
#[expect(unsafe_code, reason = "mappings of another crate")]
fn region(map: &MmapRegion, alias: Option<&MmapRegion>, run: PageRun, backing: Backing) -> Region {
    // SAFETY: the mapping is as long as its block, and outlives the engine; nobody has a reference into it.
    let region = unsafe { Region::from_raw(HostAddr(map.as_ptr() as u64), run, backing) };
    match alias {
        // SAFETY: a second mapping of the same file, for which the same holds.
        Some(alias) => unsafe { region.with_alias(HostAddr(alias.as_ptr() as u64)) },
        None => region,
    }
}

impl Memory {
    pub(crate) fn new(kind: Kind, layout: &Layout) -> Memory {
        Memory::with(kind, layout, 0)
    }

    /// Without a reservation of huge pages: there may be too few of them when they are needed.
    pub(crate) fn unreserved(kind: Kind, layout: &Layout) -> Memory {
        Memory::with(kind, layout, libc::MAP_NORESERVE)
    }

    fn with(kind: Kind, layout: &Layout, flags: i32) -> Memory {
        let mut aliases = Vec::new();
        let maps = layout
            .blocks()
            .iter()
            .map(|block| {
                // An empty block still needs an address.
                let len = block.length().get().max(PAGE);
                let mut alias = None;
                let memfd = |flags| {
                    let file = std::fs::File::from(memfd_create("test", flags).unwrap());
                    file.set_len(len as u64).unwrap();
                    FileOffset::new(file, 0)
                };
                let huge = || memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB);
                let shared = libc::MAP_SHARED | flags;
                let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
                let map = match kind {
                    Kind::Anonymous => map(len, private | libc::MAP_ANONYMOUS, None),
                    Kind::MemfdShared => map(len, libc::MAP_SHARED, Some(memfd(MFdFlags::empty()))),
                    Kind::MemfdPrivate => map(len, private, Some(memfd(MFdFlags::empty()))),
                    Kind::HugetlbPrivate => map(len, private | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, None),
                    Kind::HugetlbShared => map(len, shared, Some(huge())),
                    Kind::HugetlbAlias => {
                        let file = huge();
                        alias = Some(map(len, shared, Some(file.clone())));
                        map(len, shared, Some(file))
                    }
                };
                aliases.push(alias);
                map
            })
            .collect();
        Memory { kind, layout: layout.clone(), maps, aliases }
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        let maps = self.layout.runs().filter(|run| !run.is_empty()).map(|run| &self.maps[run.block.0 as usize]);
        let with_file = |(region, map): (Region, &MmapRegion)| match map.file_offset() {
            Some(file) => region.with_file(Arc::clone(file.arc()), page_units::FileOffset(file.start())),
            None => region,
        };
        self.regions_without_file().into_iter().zip(maps).map(with_file).collect()
    }

    pub(crate) fn regions_without_file(&self) -> Vec<Region> {
        self.layout
            .runs()
            .filter(|run| !run.is_empty())
            .map(|run| {
                let (backing, shared) = match self.kind {
                    Kind::Anonymous => (Backing::Anonymous, false),
                    Kind::MemfdShared => (Backing::Memfd, true),
                    Kind::MemfdPrivate => (Backing::Memfd, false),
                    Kind::HugetlbPrivate => (Backing::Hugetlb, false),
                    Kind::HugetlbShared | Kind::HugetlbAlias => (Backing::Hugetlb, true),
                };
                let number = run.block.0 as usize;
                region(&self.maps[number], self.aliases[number].as_ref(), run, backing).with_shared(shared)
            })
            .collect()
    }

    pub(crate) fn addr(&self, block: BlockId) -> HostAddr {
        HostAddr(self.maps[block.0 as usize].as_ptr() as u64)
    }

    pub(crate) fn engine(&self, source: impl Into<Source>) -> Builder {
        Engine::builder().regions(self.regions()).source(source)
    }

    /// A descriptor on which it is registered, as if it came from another process.
    pub(crate) fn handed_over(&self) -> Descriptor {
        let uffd = UffdBuilder::new().user_mode_only(false).non_blocking(true).create().unwrap();
        for map in &self.maps {
            uffd.register_with_mode(map.as_ptr().cast(), map.size(), RegisterMode::MISSING).unwrap();
        }
        let descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
        Descriptor::handed_over(descriptor, Features::empty()).unwrap()
    }

    /// Reads a page as the kernel does for a system call: a page fault if it is missing, `EFAULT` if it is poisoned.
    pub(crate) fn read(&self, block: BlockId, page: PageIndex) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE];
        let base = usize::try_from((self.addr(block) + page.byte_offset()).0).unwrap();
        let remote = [RemoteIoVec { base, len: PAGE }];
        let n = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
        if n == PAGE { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Reads a page with plain loads.
    pub(crate) fn load(&self, block: BlockId, page: PageIndex) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        let slice = self.maps[block.0 as usize].as_volatile_slice();
        slice.read_slice(&mut bytes, page.byte_offset().get()).unwrap();
        bytes
    }

    pub(crate) fn store(&self, block: BlockId, page: PageIndex, bytes: &[u8]) {
        let slice = self.maps[block.0 as usize].as_volatile_slice();
        slice.write_slice(bytes, page.byte_offset().get()).unwrap();
    }

    /// Compares every byte.
    pub(crate) fn assert_equals(&self, oracle: &Oracle) {
        for run in self.layout.runs() {
            for page in run.iter() {
                let one = PageRun::single(run.block, page);
                assert!(self.load(run.block, page) == oracle.run(one), "{one} differs");
            }
        }
    }

    /// Bytes of the mappings that are resident.
    pub(crate) fn resident(&self) -> ByteLen {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut sum = 0;
        let mut inside = false;
        for line in smaps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((start, _)) = range.split_once('-')
                && let Ok(start) = u64::from_str_radix(start, 16)
            {
                inside = self.maps.iter().any(|map| {
                    let from = map.as_ptr() as u64;
                    (from..from + map.size() as u64).contains(&start)
                });
            } else if inside && let Some(rest) = line.strip_prefix("Rss:") {
                sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
            }
        }
        ByteLen(sum)
    }
}

/// A page or a fault is counted after its waiters go on, and after the engine is complete: the statistics as
/// soon as `all` are in, or as they are when that did not happen.
pub(crate) fn counted(engine: &Engine, all: impl Fn(&Stats) -> bool) -> Stats {
    let begun = Instant::now();
    loop {
        let stats = engine.stats();
        if all(&stats) || begun.elapsed() > Duration::from_secs(20) {
            return stats;
        }
        std::thread::yield_now();
    }
}

/// Something that is kept open as long as a test runs.
pub(crate) fn fd_count() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn raw(fd: &impl AsRawFd) -> i32 {
    fd.as_raw_fd()
}
