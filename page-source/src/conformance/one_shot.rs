//! Checking a source that is started once.

use std::sync::Arc;
use std::time::Duration;

use page_units::{PageCount, PageRun};

use super::witness::{Manner, Witness};
use super::{Breach, Page, Rule, Suite};
use crate::{Answer, End, Feed, OneShot, PageSink, Urgency, is_zero};

/// How long more pages are waited for, from a source that does not say that they are complete.
const LATE: Duration = Duration::from_millis(300);

impl Suite {
    /// Checks a source that is started once; `make` makes one at a time, each with the same content.
    ///
    /// # Errors
    /// The first rule that they break.
    pub fn one_shot(&self, mut make: impl FnMut() -> Box<dyn OneShot>) -> Result<(), Breach> {
        let source = make();
        let pages = source.pages();
        self.pages(&*pages)?;
        self.each_page_once(source)?;
        self.pages(&*pages)?;
        for (ask, finish) in [(false, false), (false, true), (true, false), (true, true)] {
            self.ends_early(make(), ask, finish)?;
        }
        self.stopped(make())?;
        self.thread_dies(make())
    }

    fn begin(&self, source: Box<dyn OneShot>, manner: Manner) -> Result<(Arc<Witness>, Box<dyn Feed>), Breach> {
        let witness = Witness::new(source.pages().layout(), &self.truth, manner);
        let feed = source.start(Arc::clone(&witness) as Arc<dyn PageSink>);
        let feed = feed.map_err(|error| Rule::DoesNotStart.breach(error))?;
        Ok((witness, feed))
    }

    fn each_page_once(&self, source: Box<dyn OneShot>) -> Result<(), Breach> {
        let pages = source.pages();
        let (witness, feed) = self.begin(source, Manner::Takes)?;
        let all: Vec<PageRun> = pages.layout().runs().filter(|run| !run.is_empty()).collect();
        for piece in all.iter().flat_map(|run| run.pieces(PageCount(run.pages.0.div_ceil(3)))) {
            if feed.request(piece, Urgency::Background) == Answer::Here {
                return Err(Rule::HereFromOneShot.breach(format_args!("{piece}")));
            }
        }
        let arrived = |witness: &Witness| all.iter().all(|run| witness.times(*run) > 0);
        let ended = |witness: &Witness| !witness.ends().is_empty();
        let over = |witness: &Witness| arrived(witness) || ended(witness) || witness.verdict().is_err();
        let waited = witness.wait(self.patience, over);
        witness.verdict()?;
        let complete = matches!(witness.ends().first(), Some(End::Complete));
        // With `Complete`, what has not come is zero.
        let right = |one: PageRun| {
            witness.times(one) > 0 || matches!((self.truth)(one), Page::Content(bytes) if is_zero(&bytes))
        };
        let lacking = all.iter().flat_map(|run| run.pieces(PageCount(1))).find(|one| !right(*one));
        match lacking {
            Some(one) if complete => return Err(Rule::CompleteTooEarly.breach(format_args!("{one} has not come"))),
            Some(one) if !waited || !arrived(&witness) => {
                return Err(Rule::NoAnswer.breach(format_args!("{one} was requested and never ended")));
            }
            _ => {}
        }
        // What comes twice comes late.
        witness.wait(self.patience.min(LATE), ended);
        let _ = self.end(feed, true)?;
        self.ended(&witness)?;
        match witness.twice() {
            Some((block, page)) => Err(Rule::Twice.breach(format_args!("page {page} of block {}", block.0))),
            None => Ok(()),
        }
    }

    fn ends_early(&self, source: Box<dyn OneShot>, ask: bool, finish: bool) -> Result<(), Breach> {
        let pages = source.pages();
        let (witness, feed) = self.begin(source, Manner::Takes)?;
        if ask {
            for run in pages.layout().runs() {
                feed.request(run, Urgency::Demand);
            }
        }
        let _ = self.end(feed, finish)?;
        self.ended(&witness)
    }

    fn stopped(&self, source: Box<dyn OneShot>) -> Result<(), Breach> {
        let pages = source.pages();
        let (witness, feed) = self.begin(source, Manner::Stops)?;
        for run in pages.layout().runs() {
            feed.request(run, Urgency::Demand);
        }
        witness.wait(self.patience, |witness| witness.said().is_some() || !witness.ends().is_empty());
        let _ = self.end(feed, true)?;
        self.ended(&witness)
    }

    fn thread_dies(&self, source: Box<dyn OneShot>) -> Result<(), Breach> {
        let pages = source.pages();
        let (witness, feed) = self.begin(source, Manner::Panics)?;
        for run in pages.layout().runs() {
            feed.request(run, Urgency::Demand);
        }
        let ended = |witness: &Witness| !witness.ends().is_empty();
        witness.wait(self.patience, |witness| witness.said().is_some() || ended(witness));
        // Nobody asks for anything any more: the end must come all the same.
        if witness.said().is_some() && !witness.wait(self.patience, ended) {
            return Err(Rule::DiesSilently.breach("a thread died, and the end did not come"));
        }
        self.died(&witness, feed)
    }
}
