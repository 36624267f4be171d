//! The conformance suite finds each breach by name, and nothing in what keeps to the contract.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::broken::{Broken, BrokenOneShot, BrokenSink, Flaw, SinkFlaw};
use page_source::conformance::{self, Page, Rule, Suite};
use page_source::{Collect, End, OneShot, PageSink, PageSource, Threaded};
use page_units::{ByteLen, Layout, PageRun, PageSize, RamBlock};
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;

fn oracle() -> Arc<Oracle> {
    let block = |name: &str, pages: u64| RamBlock::new(name, ByteLen(pages * 4096), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![block("a", 150), block("empty", 0), block("b", 3)]).unwrap();
    Arc::new(Oracle::random(7, layout, 150))
}

fn suite(oracle: &Arc<Oracle>) -> Suite {
    let oracle = Arc::clone(oracle);
    Suite::new(move |one| Page::Content(oracle.run(one).to_vec()))
}

#[test]
fn sources_that_keep_to_the_contract_pass() {
    let oracle = oracle();
    let memory = MemorySource::new(Arc::clone(&oracle));
    let late = LateSource::new(Arc::clone(&oracle), 3);
    let sources: [Arc<dyn PageSource>; 6] = [
        Arc::new(memory.clone()),
        Arc::new(memory.clone().knowing_nothing()),
        Arc::new(Threaded::new(memory.clone(), 2)),
        Arc::new(late.clone().with_threads(3)),
        Arc::new(Threaded::new(late.clone(), 1)),
        Arc::new(Broken::new(&oracle, Flaw::None)),
    ];
    for (number, source) in sources.into_iter().enumerate() {
        suite(&oracle).source(source).unwrap_or_else(|breach| panic!("source {number}: {breach}"));
    }
    suite(&oracle).one_shot(|| Box::new(late.clone().sending_each_page_once())).unwrap();
    suite(&oracle).one_shot(|| Box::new(BrokenOneShot::new(&oracle, Flaw::None))).unwrap();
}

#[test]
fn each_flaw_of_a_source_is_found_by_name() {
    let oracle = oracle();
    let flaws = [
        (Flaw::TwoEnds, Rule::TwoEnds),
        (Flaw::NoEnd, Rule::NoEnd),
        (Flaw::AfterEnd, Rule::CallAfterEnd),
        (Flaw::AfterDrop, Rule::CallAfterDrop),
        (Flaw::BeyondTheLayout, Rule::BeyondTheLayout),
        (Flaw::WrongLength, Rule::WrongLength),
        (Flaw::EmptyRun, Rule::EmptyRun),
        (Flaw::HereWithoutAnswer, Rule::HereWithoutAnswer),
        (Flaw::NoAnswer, Rule::NoAnswer),
        (Flaw::OtherBytes, Rule::WrongContent),
        (Flaw::SaysZero, Rule::WrongContent),
        (Flaw::FinishHangs, Rule::FinishHangs),
        (Flaw::DropHangs, Rule::DropHangs),
        (Flaw::IgnoresStop, Rule::GoesOnAfterStop),
        (Flaw::IgnoresUnreadable, Rule::UnreadableNotFailed),
        (Flaw::LongSpan, Rule::Span),
        (Flaw::EmptySpan, Rule::Span),
        (Flaw::OtherUnit, Rule::Unit),
        (Flaw::StartsOnce, Rule::DoesNotStart),
    ];
    for (flaw, rule) in flaws {
        let found = suite(&oracle).with_patience(Duration::from_millis(300));
        let breach = found.source(Arc::new(Broken::new(&oracle, flaw))).expect_err(&format!("{flaw:?} is not found"));
        assert_eq!(breach.rule, rule, "{flaw:?}: {breach}");
    }
}

#[test]
fn each_flaw_of_a_one_shot_source_is_found_by_name() {
    let oracle = oracle();
    let flaws = [
        (Flaw::AnswersHere, Rule::HereFromOneShot),
        (Flaw::Twice, Rule::Twice),
        (Flaw::CompleteTooEarly, Rule::CompleteTooEarly),
        (Flaw::DiesSilently, Rule::DiesSilently),
        (Flaw::NoEnd, Rule::NoEnd),
        (Flaw::TwoEnds, Rule::TwoEnds),
        (Flaw::FinishHangs, Rule::FinishHangs),
        (Flaw::OtherBytes, Rule::WrongContent),
    ];
    for (flaw, rule) in flaws {
        let found = suite(&oracle).with_patience(Duration::from_millis(300));
        let make = || Box::new(BrokenOneShot::new(&oracle, flaw)) as Box<dyn OneShot>;
        let breach = found.one_shot(make).expect_err(&format!("{flaw:?} is not found"));
        assert_eq!(breach.rule, rule, "{flaw:?}: {breach}");
    }
}

/// A source that says zero where it has nothing to say.
#[test]
fn absent_pages_that_come_as_zero_are_found() {
    let oracle = Arc::new(Oracle::zero(oracle().layout().clone()));
    let absent = Suite::new(|one: PageRun| if one.first.0 == 2 { Page::Absent } else { Page::Content(vec![0; 4096]) });
    let breach = absent.source(Arc::new(MemorySource::new(Arc::clone(&oracle)))).unwrap_err();
    assert_eq!(breach.rule, Rule::AbsentAsZero, "{breach}");
    let unknowing = MemorySource::new(oracle).knowing_nothing();
    let breach = absent.source(Arc::new(unknowing)).unwrap_err();
    assert_eq!(breach.rule, Rule::AbsentAsZero, "{breach}");
}

#[test]
fn each_flaw_of_a_sink_is_found_by_name() {
    let layout = oracle().layout().clone();
    let check = |flaw: SinkFlaw| {
        conformance::sink(&layout, || {
            let sink = BrokenSink::new(&layout, flaw);
            let whole = Arc::clone(&sink);
            (sink as Arc<dyn PageSink>, Box::new(move || whole.is_whole()) as Box<dyn Fn() -> bool>)
        })
    };
    check(SinkFlaw::None).unwrap();
    let flaws = [
        (SinkFlaw::TakesAnyLength, Rule::TakesWhatIsWrong),
        (SinkFlaw::TakesOutside, Rule::TakesWhatIsWrong),
        (SinkFlaw::PanicsOutside, Rule::Panics),
        (SinkFlaw::TakesUnreadable, Rule::TakesUnreadable),
        (SinkFlaw::AbsentIsZero, Rule::AbsentAsZero),
        (SinkFlaw::WholeWhenStopped, Rule::CompleteWithoutComplete),
        (SinkFlaw::WholeWithoutFailed, Rule::CompleteWithoutComplete),
        (SinkFlaw::NeverWhole, Rule::NotComplete),
        (SinkFlaw::RefusesTwice, Rule::Refused),
    ];
    for (flaw, rule) in flaws {
        let breach = check(flaw).expect_err(&format!("{flaw:?} is not found"));
        assert_eq!(breach.rule, rule, "{flaw:?}: {breach}");
    }
}

#[test]
fn the_ready_sinks_keep_what_comes_and_say_how_it_ended() {
    let oracle = oracle();
    let sink = Collect::new(oracle.layout());
    let late = LateSource::new(Arc::clone(&oracle), 9);
    let asked = AtomicU64::new(0);
    let feed = late.start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    for run in oracle.layout().runs() {
        feed.request(run, page_source::Urgency::Background);
        assert!(sink.wait(run), "{:?}", sink.failed());
        assert!(sink.bytes(run).unwrap() == oracle.run(run));
        asked.fetch_add(run.pages.0, Ordering::Relaxed);
    }
    assert!(sink.ended().is_none());
    feed.finish().unwrap();
    assert!(matches!(sink.ended(), Some(End::Stopped)));
    let null = page_source::Null::new();
    page_source::pump(Arc::new(late), Arc::clone(&null) as Arc<dyn PageSink>, &page_source::PumpOptions::default())
        .unwrap();
    let counted = null.counted();
    assert!(counted.data.0 + counted.zero.0 >= asked.into_inner() && counted.absent.0 + counted.failed.0 == 0);
    assert!(matches!(null.ended(), Some(End::Complete)));
}
