//! A pool of huge pages that is empty: what is missing is never taken for zeros, no fault is served for ever, and the error
//! says what to do.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::refused::right_or_refused;
use common::scripted::full;
use common::{HUGE, Kind, Memory};
use page_units::{BlockId, PageIndex};
use testkit::hugepages::Overcommit;
use testkit::source::MemorySource;
use uffd_engine::{Background, EngineError};

const GRANULES: u64 = 6;

/// All huge pages but some, taken until it is dropped.
struct Hog {
    _pages: Option<vm_memory::MmapRegion>,
}

impl Hog {
    fn leave(pages: u64) -> Hog {
        let of = |name: &str| -> u64 {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages");
            std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
        };
        let available = (of("free") + of("nr_overcommit")).saturating_sub(of("surplus") + of("resv"));
        let take = usize::try_from(available.saturating_sub(pages)).unwrap();
        if take == 0 {
            return Hog { _pages: None };
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
        let map = vm_memory::mmap::MmapRegionBuilder::new(take * HUGE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .build()
            .unwrap();
        #[expect(unsafe_code, reason = "taking pages without a signal has no safe wrapper")]
        // SAFETY: the test's own mapping, of which nothing is borrowed.
        unsafe {
            // As many as there are.
            libc::madvise(map.as_ptr().cast(), take * HUGE, libc::MADV_POPULATE_WRITE);
        }
        Hog { _pages: Some(map) }
    }
}

#[test]
fn an_empty_pool_fails_the_engine_and_nothing_reads_as_zero() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(4).unwrap();
    let oracle = full(GRANULES * 512);
    for kind in [Kind::HugetlbPrivate, Kind::HugetlbShared, Kind::HugetlbAlias] {
        for in_pieces in [false, true] {
            for on_demand in [false, true] {
                let what = format!("{kind:?}, in pieces: {in_pieces}, on demand: {on_demand}");
                let memory = Memory::unreserved(kind, oracle.layout());
                let hog = Hog::leave(2);
                // A piece of 64 pages is part of a huge page, which is put together then.
                let piece = page_units::PageCount(if in_pieces { 64 } else { 512 });
                let background = Background::default().with_piece(piece);
                let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
                let engine = memory
                    .engine(source)
                    .background(if on_demand { background.paused() } else { background })
                    .start()
                    .unwrap();
                if on_demand {
                    for granule in 0..GRANULES {
                        // The first ones are there; then there is an error, and no page of zeros.
                        let page = PageIndex(granule * 512 + 7);
                        if let Ok(bytes) = memory.read(BlockId(0), page) {
                            let one = page_units::PageRun::single(BlockId(0), page);
                            assert!(bytes == oracle.run(one), "{what}: {page} is wrong");
                        }
                    }
                }
                let ended = engine.wait_for(Duration::from_secs(20));
                let error = ended.unwrap_or_else(|| panic!("{what}: it goes on")).unwrap_err();
                assert!(
                    matches!(error, EngineError::NoHugePage { .. } | EngineError::Staging { .. }),
                    "{what}: {error}"
                );
                assert!(error.to_string().contains("pool"), "{what}: {error}");
                drop(engine);
                // Now there are pages again.
                drop(hog);
                assert!(right_or_refused(&memory, &oracle) > 0, "{what}");
            }
        }
    }
}
