//! Live snapshots of memory that others use too: what they wrote before the freeze point is in the file.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use common::live::{self, Kind};
use common::{PATIENCE, Signals};
use kvm_ioctls::Kvm;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use page_units::{ByteLen, GuestAddr, HostAddr};
use testkit::guest::{GuestImage, Pattern, Privilege};
use testkit::hugepages::Overcommit;
use testkit::require;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vmm_glue::{
    Backing, GuestRam, Host, LiveError, LiveOptions, MachineConfig, NewVm, RamSpec, SaveOptions, VcpuOptions, Vcpus,
    save, snapshot_live,
};

/// Memory of a VMM, as it maps it.
type Memory = GuestMemoryMmap<()>;

fn write<B: Bitmap>(memory: &GuestMemoryMmap<B>, page: u64, byte: u8) {
    memory.write_slice(&[byte; 5000], GuestAddress(page * HUGE + 3000)).unwrap();
}

const HUGE: u64 = 2 << 20;

/// A mapping of its own of a few huge pages of a file.
fn map(file: &File, first: u64, pages: u64) -> GuestRegionMmap {
    map_with(file, first, pages, libc::PROT_READ | libc::PROT_WRITE).unwrap()
}

fn map_with(file: &File, first: u64, pages: u64, rights: i32) -> Result<GuestRegionMmap, MmapRegionError> {
    let offset = FileOffset::new(file.try_clone().unwrap(), first * HUGE);
    let builder = MmapRegionBuilder::new_with_bitmap(usize::try_from(pages * HUGE).unwrap(), ())
        .with_mmap_prot(rights)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_hugetlbfs(fstatfs(file).unwrap().filesystem_type() == HUGETLBFS_MAGIC)
        .with_file_offset(offset);
    Ok(GuestRegionMmap::new(builder.build()?, GuestAddress(first * HUGE)).unwrap())
}

fn adopted(memory: Memory) -> GuestRam {
    GuestRam::adopt(memory, |guest| format!("ram{guest}")).unwrap()
}

/// vCPUs that do not run, with this memory.
fn standing(ram: GuestRam) -> Vcpus {
    let machine = NewVm::new(&Kvm::new().unwrap(), Arc::new(ram), MachineConfig::bare(1)).unwrap();
    let options = VcpuOptions::default().paused();
    Vcpus::start(machine, Arc::new(Signals::default()), options).unwrap()
}

fn host() -> Host {
    Host::probe(&Kvm::new().unwrap()).unwrap()
}

/// What the file itself says, and no mapping of it.
fn in_file(file: &File, blocks: &[(u64, u64)]) -> Vec<Vec<u8>> {
    let read = |&(first, pages): &(u64, u64)| {
        let mut bytes = vec![0; usize::try_from(pages * HUGE).unwrap()];
        file.read_exact_at(&mut bytes, first * HUGE).unwrap();
        bytes
    };
    blocks.iter().map(read).collect()
}

fn same(path: &Path, expected: &[Vec<u8>]) {
    live::assert_same(&live::content_of(path), expected);
}

/// Huge pages that another mapping has filled, and that this one has never touched: its page table does not have them.
#[test]
fn huge_pages_that_were_never_mapped_here_are_saved() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = Overcommit::reserve(32).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    // Of one file: two parts of it are the guest's, the last page is not.
    let blocks = [(0, 8), (8, 7)];
    for surplus in [false, true] {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let file = File::from(memfd_create("shared", flags).unwrap());
        file.set_len(16 * HUGE).unwrap();
        let regions = blocks.map(|(first, pages)| map(&file, first, pages));
        let vcpus = standing(adopted(GuestMemoryMmap::from_regions(regions.into()).unwrap()));
        let theirs = GuestMemoryMmap::from_regions(vec![map(&file, 0, 16)]).unwrap();
        // Mapped here: 0 and 9. Filled there: 2, 3, 7, 8 and 12. There and zero: 5.
        for page in [0, 9] {
            write(vcpus.ram().memory(), page, 0x11);
        }
        for page in [2, 3, 7, 8, 12] {
            write(&theirs, page, 0x22);
        }
        fallocate(&file, FallocateFlags::empty(), 5 << 21, 1 << 21).unwrap();
        if surplus {
            write(&theirs, 15, 0x33);
        }
        let before = in_file(&file, &blocks);
        // Written through the guest's mapping from the freeze point on: pages mapped before, never mapped, and holes.
        let (ram, changed) = (Arc::clone(vcpus.ram()), [0, 2, 5, 8, 11]);
        let unchecked = LiveOptions::default().unchecked_mappings();
        let options = unchecked.clone().with_observer(move |_| {
            for page in changed {
                ram.memory().write_slice(&[0x44; 5000], GuestAddress(page * HUGE + 3000)).unwrap();
            }
        });
        let report = snapshot_live(&vcpus, &host(), &path, &options).unwrap().wait().unwrap();
        assert!(report.stats.write_faults >= 3, "{report:?}");
        same(&path, &before);

        // And it goes on from there: what was written since is in the next one, with what others write until then.
        write(&theirs, 13, 0x55);
        let before = in_file(&file, &blocks);
        assert!(changed.iter().all(|page| before.concat()[usize::try_from(page * HUGE).unwrap() + 4000] == 0x44));
        snapshot_live(&vcpus, &host(), &path, &unchecked).unwrap().wait().unwrap();
        same(&path, &before);
        // So does a snapshot of a guest that stands still.
        write(&theirs, 14, 0x66);
        let before = in_file(&file, &blocks);
        vcpus.pause(PATIENCE).unwrap();
        let saved = save(&vcpus, &host(), &path, &SaveOptions::default()).unwrap();
        assert!(saved.stored.0 > 0 && saved.took.as_nanos() > 0);
        same(&path, &before);
        let pages = file.metadata().unwrap().blocks() * 512 / HUGE;
        assert_eq!(pages, 11 + u64::from(surplus), "nothing else was allocated");
    }
}

/// What is written through another mapping is not caught: who has one that can be written through has to say that this
/// does no harm.
#[test]
fn memory_that_is_mapped_twice_is_refused_by_name() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = Overcommit::reserve(8).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let spec = RamSpec::new("ram").at(GuestAddr(0), ByteLen(2 * HUGE)).at(GuestAddr(1 << 32), ByteLen(6 * HUGE));
    for backing in [Backing::Memfd, Backing::Hugetlb] {
        let vcpus = standing(GuestRam::allocate(std::slice::from_ref(&spec), backing).unwrap());
        let ram = Arc::clone(vcpus.ram());
        ram.memory().write_slice(&[1; 100], GuestAddress(HUGE - 50)).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let content = || in_file(file, &[(0, 8)]);
        let before = content();
        let succeeds = |options: &LiveOptions| {
            snapshot_live(&vcpus, &host(), &path, options).unwrap().wait().unwrap();
            same(&path, &before);
            std::fs::remove_file(&path).unwrap();
        };
        let reader = map_with(file, 0, 8, libc::PROT_READ).unwrap();
        succeeds(&LiveOptions::default());
        // The second piece begins two huge pages into the file.
        for (first, pages, guest, of_it) in [(0, 8, 0, 2), (1, 1, HUGE, 1), (4, 2, (1 << 32) + 2 * HUGE, 2)] {
            let other = map(file, first, pages);
            let stopped = LiveOptions::default().with_drain(|_| panic!("it is refused before anything stops"));
            let error = snapshot_live(&vcpus, &host(), &path, &stopped).unwrap_err();
            let LiveError::MappedTwice { guest: found, start, end } = &error else { panic!("{error}") };
            assert_eq!(*found, GuestAddr(guest), "{error}");
            let mapped = HostAddr(other.as_ptr().addr() as u64);
            assert_eq!((*start, *end), (mapped, mapped + ByteLen(of_it * HUGE)), "{error}");
            assert!(error.to_string().contains(&start.to_string()), "{error}");
            assert_eq!(live::names(dir.path()), [""; 0]);
            succeeds(&LiveOptions::default().unchecked_mappings());
        }
        drop(reader);
        succeeds(&LiveOptions::default());
    }
}

/// What the documentation says to VMMs that have to do with other processes.
#[test]
fn a_sealed_memfd_can_not_be_mapped_writable_a_second_time() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let file = File::from(memfd_create("sealed", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(2 * HUGE).unwrap();
    let vcpus = standing(adopted(GuestMemoryMmap::from_regions(vec![map(&file, 0, 2)]).unwrap()));
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE))).unwrap();
    let refused = |error: Option<i32>| assert_eq!(error, Some(libc::EPERM));
    refused(match map_with(&file, 0, 2, libc::PROT_READ | libc::PROT_WRITE) {
        Err(MmapRegionError::Mmap(error)) => error.raw_os_error(),
        other => panic!("{other:?}"),
    });
    refused(file.write_at(&[1], 0).unwrap_err().raw_os_error());
    // The guest's own mapping is written to as before, and caught.
    let ram = Arc::clone(vcpus.ram());
    ram.memory().write_slice(&[1; 100], GuestAddress(8)).unwrap();
    let before = in_file(&file, &[(0, 2)]);
    let options =
        LiveOptions::default().with_observer(move |_| ram.memory().write_slice(&[2; 100], GuestAddress(8)).unwrap());
    let report = snapshot_live(&vcpus, &host(), &path, &options).unwrap().wait().unwrap();
    assert_eq!(report.stats.write_faults, 1);
    same(&path, &before);
    // The price: memory can't be given back.
    vcpus.ram().discard(GuestAddr(0), ByteLen(4096)).unwrap_err();
}

/// Scattered pages of a memfd are protected together with the holes between them. What is between them stays a hole: it is
/// neither saved nor brought into being, unless somebody writes there.
#[test]
fn holes_between_pages_stay_holes() {
    require!(Kvm, Userfaultfd);
    const PAGE: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let length = 8 * HUGE + 5 * PAGE;
    let spec = RamSpec::new("ram").at(GuestAddr(0), ByteLen(length));
    let ram = GuestRam::allocate(&[spec], Backing::Memfd).unwrap();
    let vcpus = standing(ram);
    let ram = Arc::clone(vcpus.ram());
    let write = |page: u64, byte: u8| ram.memory().write_slice(&[byte; 100], GuestAddress(page * PAGE + 8)).unwrap();
    let filled = [0, 1, 7, 511, 513, 2048, 2050, 3583, length / PAGE - 1];
    filled.into_iter().for_each(|page| write(page, 1));
    let region = ram.memory().iter().next().unwrap();
    let file = region.file_offset().unwrap().file();
    let content = || {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        vec![bytes]
    };
    for round in 0..3u8 {
        let (before, existed) = (content(), existing(&ram));
        // From the freeze point on: pages, holes between them, holes far from any.
        let changed = [1, 2 + u64::from(round), 2049, 1024 + u64::from(round), 3000];
        let (ram, byte) = (Arc::clone(&ram), 0x44 + round);
        let options = LiveOptions::default().with_observer(move |_| {
            assert_eq!(existing(&ram), existed, "protecting memory makes none");
            for page in changed {
                ram.memory().write_slice(&[byte; 100], GuestAddress(page * PAGE + 8)).unwrap();
            }
        });
        let report = snapshot_live(&vcpus, &host(), &path, &options).unwrap().wait().unwrap();
        same(&path, &before);
        assert_eq!(report.stored.0, existed, "{report:?}");
        let after = content();
        let came = changed.iter().filter(|page| before[0][usize::try_from(*page * PAGE + 8).unwrap()] == 0).count();
        let (came, changes) = (came as u64, changed.len() as u64);
        assert_eq!((report.stats.hole_faults, report.stats.write_faults), (came, changes - came), "{report:?}");
        assert_eq!(existing(vcpus.ram()), existed + came, "nothing but what was written to has come into being");
        assert!(changed.iter().all(|page| after[0][usize::try_from(page * PAGE + 8).unwrap()] == byte));
    }
}

/// How many pages the files behind memory hold.
fn existing(ram: &GuestRam) -> u64 {
    let files = ram.memory().iter().map(|region| region.file_offset().unwrap().file().metadata().unwrap());
    let by_inode: BTreeMap<u64, u64> = files.map(|of| (of.ino(), of.blocks() * 512 / 4096)).collect();
    by_inode.values().sum()
}

/// The same for a guest: what it writes first to holes between protected pages is there, and the snapshot has zeros.
#[test]
fn a_guest_writes_to_holes_between_protected_pages() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    for pattern in [Pattern::Random, Pattern::Stride(1)] {
        // Of each four pages, about one exists: there is no page table without any.
        let kind = Kind { privilege: Privilege::User, vcpus: 1, pattern, backing: Backing::Memfd, mib: 16, filled: 25 };
        let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(1));
        let vcpus = Arc::new(vcpus);
        for _ in 0..3 {
            let (existed, copy) = (existing(vcpus.ram()), live::Copy::default());
            let guest = Arc::clone(&vcpus);
            let image = GuestImage::found(guest.ram().memory(), image.config());
            // It stands still but for a while right after the freeze point, when nothing is saved yet.
            let options = copy.options(LiveOptions::default()).with_observer(move |_| {
                assert_eq!(existing(guest.ram()), existed, "protecting memory makes none");
                guest.resume();
                live::progress(&guest, &image, 300);
                guest.pause(PATIENCE).unwrap();
            });
            let report = snapshot_live(&vcpus, &host(), &path, &options).unwrap().wait().unwrap();
            same(&path, &copy.take());
            assert!(report.stats.hole_faults > 0 && report.stats.write_faults > 0, "{report:?}");
            assert_eq!(existing(vcpus.ram()), existed + report.stats.hole_faults, "{report:?}");
        }
        live::finish(&vcpus, &image, &bus, &kind);
    }
}
