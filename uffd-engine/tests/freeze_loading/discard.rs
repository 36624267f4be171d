//! Discards that are announced to the engine, and a freeze at the same time: neither spoils the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, DiscardError, Discards, PausePoint};

use crate::common::collector::layout;
use crate::common::{Kind, Memory, freezable_while_loading};
use crate::guest::Guest;
use crate::save;

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

fn gone(guest: &Guest<'_>, run: PageRun) {
    let bytes = run.first.byte_offset().get()..run.end().byte_offset().get();
    guest.model.lock()[0][bytes].fill(0);
}

#[test]
fn what_a_snapshot_still_needs_is_not_given_back() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    let kinds = [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbShared];
    let kinds = freezable_while_loading(&kinds);
    for (kind, discards) in kinds.into_iter().flat_map(|kind| [(kind, Discards::Events), (kind, Discards::Announced)]) {
        let granule = if matches!(kind, Kind::Anonymous | Kind::MemfdShared) { 1 } else { 512 };
        let granules = |first: u64, count: u64| run(first * granule, count * granule);
        let oracle = Arc::new(Oracle::random(12, layout(&[4 * granule]), 255));
        let memory = Memory::new(kind, oracle.layout());
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .discards(discards)
            .start()
            .unwrap();
        let guest = Guest::new(&memory, &oracle);
        // The first two are there, the others are missing.
        guest.write(BlockId(0), PageIndex(0), 1);
        guest.write(BlockId(0), PageIndex(granule), 2);
        let (frozen, expected) = guest.freeze(&engine, ByteLen(8 << 20));
        let frozen = frozen.unwrap();
        // The second is saved, for its writer.
        guest.write(BlockId(0), PageIndex(granule), 3);
        for needed in [granules(0, 1), granules(2, 1), granules(1, 2), granules(0, 4)] {
            let refused = engine.discard(needed);
            assert!(matches!(refused, Err(DiscardError::Frozen(run)) if run == needed), "{kind:?}: {refused:?}");
        }
        guest.assert_memory_of(&[PageIndex(0), PageIndex(granule)]);
        engine.discard(granules(1, 1)).unwrap();
        gone(&guest, granules(1, 1));
        guest.assert_memory_of(&[PageIndex(granule)]);
        save(frozen, &expected, oracle.layout());
        // And then everything can be.
        engine.discard(granules(2, 2)).unwrap();
        gone(&guest, granules(2, 2));
        guest.assert_memory();
    }
}

/// A freeze waits for a discard that has begun: it is either in the snapshot as a whole or refused.
#[test]
fn memory_is_not_frozen_in_the_middle_of_a_discard() {
    testkit::require!(Userfaultfd);
    for kind in freezable_while_loading(&[Kind::Anonymous, Kind::MemfdShared]) {
        let discards = if kind == Kind::Anonymous { Discards::Announced } else { Discards::Events };
        let oracle = Arc::new(Oracle::random(13, layout(&[64]), 255));
        let memory = Memory::new(kind, oracle.layout());
        let gate = Gate::closed();
        let at_gate = gate.clone();
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .discards(discards)
            .pauses(move |point| {
                if point == PausePoint::Discarding {
                    at_gate.enter();
                }
            })
            .start()
            .unwrap();
        let guest = Guest::new(&memory, &oracle);
        for page in 0..8 {
            guest.write(BlockId(0), PageIndex(page), 7);
        }
        std::thread::scope(|scope| {
            let discarding = scope.spawn(|| engine.discard(run(2, 4)).unwrap());
            gate.wait_for(1);
            gone(&guest, run(2, 4));
            let freezing = scope.spawn(|| guest.freeze(&engine, ByteLen(1 << 20)));
            // Something that must not happen can only be waited for by the clock; what is right does not depend on it.
            let until = Instant::now() + Duration::from_millis(100);
            while Instant::now() < until && !freezing.is_finished() {
                std::thread::yield_now();
            }
            let early = freezing.is_finished();
            gate.open();
            discarding.join().unwrap();
            let (frozen, expected) = freezing.join().unwrap();
            assert!(!early, "{kind:?}: frozen in the middle of a discard");
            save(frozen.unwrap(), &expected, oracle.layout());
        });
        guest.assert_memory();
    }
}
