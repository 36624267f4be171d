//! Frozen memory is a source that keeps to the contract.

mod common;

use std::sync::Arc;

use common::collector::layout;
use common::{Kind, Memory};
use page_source::OneShot;
use page_source::conformance::{Page, Suite};
use page_units::PageRun;
use testkit::oracle::Oracle;
use uffd_engine::{FreezeOptions, Freezer};

#[test]
fn frozen_memory_is_a_source_that_keeps_to_the_contract() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(4, layout(&[300, 20]), 150));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    for (run, zero) in oracle.layout().runs().flat_map(|run| oracle.kinds(run).collect::<Vec<_>>()) {
        for page in run.iter().filter(|_| !zero) {
            memory.store(run.block, page, oracle.run(PageRun::single(run.block, page)));
        }
    }
    let freeze = || {
        let freezer = Freezer::prepare(memory.regions(), memory.layout.clone(), &FreezeOptions::default()).unwrap();
        Box::new(freezer.arm().unwrap()) as Box<dyn OneShot>
    };
    let truth = Arc::clone(&oracle);
    Suite::new(move |one| Page::Content(truth.run(one).to_vec())).one_shot(freeze).unwrap();
}
