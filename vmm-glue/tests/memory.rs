//! Guest memory: pieces, gaps, other people's regions, impossible wishes.

mod common;

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use page_files::{FlatBlock, FlatSink};
use page_source::conformance::{Page, Suite};
use page_source::{PumpOptions, pump};
use page_units::{BlockId, ByteLen, GuestAddr, HostAddr, Layout, PageIndex, PageRun, PageSize, RamBlock};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_glue::{Backing, GuestRam, Memory, RamSource, RamSpec};

/// A page that is touched may bring a whole huge page, where the system is set up so.
const HUGE: u64 = 512;

#[test]
fn addresses_go_both_ways_around_the_gaps() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let ram = GuestRam::allocate(&common::specs(), backing).unwrap();
        assert_eq!(ram.layout().total(), ByteLen(12 << 20));
        assert_eq!(ram.pieces().len(), 3);
        for piece in ram.pieces() {
            let last = ByteLen(piece.run.len().0 - 1);
            for at in [ByteLen(0), last] {
                assert_eq!(ram.to_host(piece.guest + at), Some(piece.host + at));
                assert_eq!(ram.to_guest(piece.host + at), Some(piece.guest + at));
            }
            assert!(!ram.contains(piece.guest + piece.run.len()));
            assert_eq!(ram.page_to_guest(piece.run.block, piece.run.first), Some(piece.guest));
        }
        // The second piece of the first block begins where the first one ends.
        assert_eq!(ram.page_to_guest(BlockId(0), PageIndex(1024)), Some(GuestAddr(1 << 32)));
        assert_eq!(ram.page_to_guest(BlockId(0), PageIndex(1024 + 1536)), None);
    }
}

#[test]
fn impossible_memory_is_refused() {
    let allocate = |specs: &[RamSpec]| GuestRam::allocate(specs, Backing::Anonymous);
    let at = |name: &str, guest, len| RamSpec::new(name).at(GuestAddr(guest), ByteLen(len));
    assert!(allocate(&[at("a", 0, 8192), at("b", 8192, 4096)]).is_ok());
    assert!(allocate(&[at("a", 0, 8192), at("b", 4096, 4096)]).is_err(), "overlap");
    assert!(allocate(&[at("a", 0, 8192), at("a", 8192, 4096)]).is_err(), "one name");
    assert!(allocate(&[at("a", 0, 100)]).is_err(), "partial page");
    assert!(allocate(&[at("a", 1, 4096)]).is_err(), "unaligned");
    assert!(allocate(&[at("a", 0, !4095)]).is_err(), "too much");
    assert!(allocate(&[at("a", !4095, 8192)]).is_err(), "too high");
    assert!(allocate(&[at("a\0b", 0, 4096)]).is_ok(), "names of anonymous memory go nowhere");
    assert!(GuestRam::allocate(&[at("a\0b", 0, 4096)], Backing::Memfd).is_err());
}

#[test]
fn a_source_of_other_blocks_is_refused() {
    let ram = GuestRam::allocate(&common::specs(), Backing::Anonymous).unwrap();
    let block = |name: &str, len| RamBlock::new(name, ByteLen(len), PageSize::SMALL).unwrap();
    let regions = |blocks| ram.regions(&Layout::new(blocks).unwrap());
    // Another order and more blocks are fine: they are found by name.
    let more = vec![block("rom", 4096), block("more", 2 << 20), block("ram", 10 << 20)];
    assert_eq!(regions(more).unwrap().len(), 3);
    let error = regions(vec![block("ram", 10 << 20)]).unwrap_err().to_string();
    assert!(error.contains("\"more\""), "{error}");
    let error = regions(vec![block("ram", 8 << 20), block("more", 2 << 20)]).unwrap_err().to_string();
    assert!(error.contains("\"ram\""), "{error}");
}

#[test]
fn regions_of_a_vmm_are_adopted() {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 2 << 20)]).unwrap();
    memory.write_slice(b"hello", GuestAddress((1 << 32) + 5)).unwrap();
    let ram = GuestRam::adopt(memory, |guest| format!("ram@{guest}")).unwrap();
    let names: Vec<_> = ram.layout().blocks().iter().map(RamBlock::name).collect();
    assert_eq!(names, ["ram@0x0", "ram@0x100000000"]);
    assert!(ram.pieces().iter().all(|piece| piece.backing == Backing::Anonymous && !piece.shared));
    // Only what was touched exists.
    let source = RamSource::new(Arc::new(ram)).unwrap();
    assert!((1..=HUGE).contains(&source.populated().0), "{:?}", source.populated());
}

/// The owner of the memory may have told `vm-memory` nothing about huge pages.
#[test]
fn huge_pages_are_recognised() {
    const LEN: usize = 4 << 20;
    let _room = testkit::hugepages::Overcommit::reserve(8).unwrap();
    let file = File::from(memfd_create("huge", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB).unwrap());
    file.set_len(LEN as u64).unwrap();
    let anonymous = libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let file = FileOffset::new(file, 0);
    let small = File::from(memfd_create("small", MFdFlags::empty()).unwrap());
    small.set_len(LEN as u64).unwrap();
    let adopted_of = |len, flags, file: Option<FileOffset>| {
        let builder = MmapRegionBuilder::new_with_bitmap(len, ());
        let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
        let builder = if let Some(file) = file { builder.with_file_offset(file) } else { builder };
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
        let ram = GuestRam::adopt(GuestMemoryMmap::from_regions(vec![region]).unwrap(), |_| "ram".into())?;
        let piece = &ram.pieces()[0];
        Ok::<_, vmm_glue::MemoryError>((piece.backing, piece.shared))
    };
    let adopted = |flags, file| adopted_of(LEN, flags, file);
    assert_eq!(adopted(libc::MAP_SHARED, Some(file.clone())).unwrap(), (Backing::Hugetlb, true));
    assert_eq!(adopted(libc::MAP_PRIVATE | libc::MAP_NORESERVE, Some(file)).unwrap(), (Backing::Hugetlb, false));
    assert_eq!(adopted(libc::MAP_PRIVATE | anonymous, None).unwrap(), (Backing::Hugetlb, false));
    assert_eq!(adopted(libc::MAP_PRIVATE | anonymous | libc::MAP_HUGE_2MB, None).unwrap(), (Backing::Hugetlb, false));
    assert_eq!(adopted(libc::MAP_SHARED, Some(FileOffset::new(small, 0))).unwrap(), (Backing::Memfd, true));
    // Where the processor has pages of 1 GiB, a mapping can be made of them, though there may be none.
    if std::fs::exists("/sys/kernel/mm/hugepages/hugepages-1048576kB").unwrap() {
        let error = adopted_of(1 << 30, libc::MAP_PRIVATE | anonymous | libc::MAP_HUGE_1GB, None).unwrap_err();
        assert!(error.to_string().contains("1073741824 bytes"), "{error}");
    }
}

#[test]
fn looking_for_pages_does_not_make_any() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let ram = Arc::new(GuestRam::allocate(&[RamSpec::pc("ram", ByteLen(5 << 30))], backing).unwrap());
        for at in [0, (3 << 30) - 4096, 4 << 30, (6 << 30) - 1] {
            ram.memory().write_obj(7u8, GuestAddress(at)).unwrap();
        }
        let populated = || RamSource::new(Arc::clone(&ram)).unwrap().populated().0;
        let first = populated();
        assert!((4..=4 * HUGE).contains(&first), "{first} pages of {backing:?}");
        assert_eq!(populated(), first, "{backing:?}");
    }
}

/// Another process, which has inherited the mapping, writes there.
#[expect(unsafe_code, reason = "no other process has this memory")]
fn store_elsewhere(at: HostAddr, byte: u8) {
    let at: *mut u8 = std::ptr::with_exposed_provenance_mut(usize::try_from(at.0).unwrap());
    // SAFETY: the child does nothing but store a byte and end, neither of which takes a lock.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // SAFETY: a byte of the test's own mapping, which nobody else uses now.
            unsafe { at.write_volatile(byte) };
            // SAFETY: it always ends the process.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).unwrap();
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
}

/// Of a private mapping of a file, what nobody has touched is what the file holds; of shared memory without a file, what
/// another process has written.
#[test]
fn what_was_never_touched_here_is_saved() {
    const LEN: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..LEN).map(|at| u8::try_from(at / 4096 % 251).unwrap() + 1).collect();
    let of_file = || {
        let path = dir.path().join("content");
        std::fs::write(&path, &content).unwrap();
        FileOffset::new(File::options().read(true).write(true).open(path).unwrap(), 0)
    };
    for (flags, file) in [(libc::MAP_PRIVATE, Some(of_file())), (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)] {
        let mut expected = if file.is_some() { content.clone() } else { vec![0; LEN] };
        let builder = MmapRegionBuilder::new_with_bitmap(LEN, ());
        let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
        let builder = if let Some(file) = file { builder.with_file_offset(file) } else { builder };
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        memory.write_slice(b"hello", GuestAddress(5 * 4096 + 7)).unwrap();
        expected[5 * 4096 + 7..][..5].copy_from_slice(b"hello");
        let ram = Arc::new(GuestRam::adopt(memory, |_| "ram".into()).unwrap());
        if flags & libc::MAP_SHARED != 0 {
            store_elsewhere(ram.pieces()[0].host + ByteLen(9 * 4096), 0x77);
            expected[9 * 4096] = 0x77;
        }
        let source = RamSource::new(ram).unwrap();
        let truth = expected.clone();
        let page = move |one: PageRun| Page::Content(truth[one.first.byte_offset().get()..][..4096].to_vec());
        Suite::new(page).source(Arc::new(source.clone())).unwrap();
        let path = dir.path().join("saved");
        let block = RamBlock::new("ram", ByteLen(LEN as u64), PageSize::SMALL).unwrap();
        let blocks = FlatBlock::concatenated(vec![block]).unwrap();
        let sink = Arc::new(FlatSink::create(&path, &blocks).unwrap());
        pump(Arc::new(source), sink.clone(), &PumpOptions::default()).unwrap();
        sink.publish().unwrap();
        assert!(std::fs::read(&path).unwrap() == expected, "{flags:#x}");
    }
}
