//! Checking a source that may be started and asked again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use page_units::{PageCount, PageIndex, PageRun};

use super::witness::{Manner, Witness};
use super::{Breach, Page, Rule, Suite};
use crate::{Answer, Content, End, Feed, PageSink, PageSource, Pages, Urgency, is_zero};

/// How long a call that must not come is waited for. Being too short can only overlook a breach, never invent one.
const GRACE: Duration = Duration::from_millis(20);

impl Suite {
    /// Checks a source that may be started and asked again.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn source(&self, source: Arc<dyn PageSource>) -> Result<(), Breach> {
        self.pages(&*source)?;
        self.asks_for_everything(&*source, true)?;
        // Again, and ended by a drop.
        self.asks_for_everything(&*source, false)?;
        self.drops_in_the_middle(&*source)?;
        self.stops(&*source)?;
        self.can_not_read(&*source)?;
        self.dies(&*source)?;
        self.pages(&*source)
    }

    /// What is said without I/O.
    pub(super) fn pages(&self, source: &dyn Pages) -> Result<(), Breach> {
        let layout = source.layout();
        for all in layout.runs() {
            let behind = PageRun::new(all.block, all.end(), PageCount(3));
            if !source.content(behind).pages.0.eq(&0) {
                return Err(Rule::Span.breach(format_args!("{behind} is outside the layout, and has a span")));
            }
            for first in (0..all.pages.0).step_by(usize::try_from(all.pages.0 / 64 + 1).unwrap_or(1)) {
                for most in [1, 7, u64::MAX - first] {
                    self.span(source, PageRun::new(all.block, PageIndex(first), PageCount(most)))?;
                }
                let unit = source.unit(all.block, PageIndex(first));
                if unit.block != all.block || !unit.contains(PageIndex(first)) || !layout.contains(unit) {
                    return Err(Rule::Unit.breach(format_args!("of page {first} of {all}, it is {unit}")));
                }
            }
        }
        Ok(())
    }

    fn span(&self, source: &dyn Pages, run: PageRun) -> Result<(), Breach> {
        let span = source.content(run);
        let inside = source.layout().clip(run);
        if span.pages.0 == 0 || span.pages > inside.pages {
            return Err(Rule::Span.breach(format_args!("that of {run} has {} pages", span.pages)));
        }
        for page in inside.split_at(span.pages).0.iter().take(64) {
            let one = PageRun::single(run.block, page);
            let right = match ((self.truth)(one), span.content) {
                (_, Content::Unknown) | (Page::Absent, Content::Absent) => true,
                (Page::Absent, Content::Zero) => {
                    return Err(Rule::AbsentAsZero.breach(format_args!("{one} is said to be zero")));
                }
                (Page::Content(bytes), Content::Zero) => is_zero(&bytes),
                (Page::Content(_) | Page::Fails, Content::Stored) => true,
                (Page::Content(_) | Page::Fails | Page::Absent, _) => false,
            };
            if !right {
                return Err(Rule::WrongContent.breach(format_args!("{one} is said to be {:?}", span.content)));
            }
        }
        Ok(())
    }

    fn start(&self, source: &dyn PageSource, manner: Manner) -> Result<(Arc<Witness>, Box<dyn Feed>), Breach> {
        let witness = Witness::new(source.layout(), &self.truth, manner);
        let feed = source.start(Arc::clone(&witness) as Arc<dyn PageSink>);
        let feed = feed.map_err(|error| Rule::DoesNotStart.breach(error))?;
        Ok((witness, feed))
    }

    /// Asks, and waits until each page has ended `times` times.
    pub(super) fn ask(
        &self,
        witness: &Witness,
        feed: &dyn Feed,
        run: PageRun,
        urgency: Urgency,
    ) -> Result<Answer, Breach> {
        let before = witness.times(run);
        let answer = feed.request(run, urgency);
        witness.verdict()?;
        let answered = |witness: &Witness| witness.times(run) > before;
        if answer == Answer::Here && !answered(witness) {
            return Err(Rule::HereWithoutAnswer.breach(format_args!("{run} was not answered when the call returned")));
        }
        let over = |witness: &Witness| answered(witness) || witness.verdict().is_err() || !witness.ends().is_empty();
        let waited = witness.wait(self.patience, over);
        witness.verdict()?;
        if !waited || !answered(witness) {
            return Err(Rule::NoAnswer.breach(format_args!("{run} was requested and never ended")));
        }
        Ok(answer)
    }

    fn asks_for_everything(&self, source: &dyn PageSource, finish: bool) -> Result<(), Breach> {
        let (witness, feed) = self.start(source, Manner::Takes)?;
        for all in source.layout().runs().filter(|run| !run.is_empty()) {
            let last = PageRun::single(all.block, PageIndex(all.end().0 - 1));
            self.ask(&witness, &*feed, last, Urgency::Demand)?;
            for piece in all.pieces(PageCount(all.pages.0.div_ceil(5))) {
                self.ask(&witness, &*feed, piece, Urgency::Background)?;
            }
            // What was delivered may be asked for again.
            self.ask(&witness, &*feed, last, Urgency::Demand)?;
        }
        if let Err(error) = self.end(feed, finish)? {
            return Err(Rule::WrongContent.breach(format_args!("nothing has changed, and it says: {error}")));
        }
        self.ended(&witness)
    }

    /// After the feed has gone: one end, and nothing else.
    pub(super) fn ended(&self, witness: &Witness) -> Result<(), Breach> {
        witness.gone();
        witness.verdict()?;
        if witness.ends().is_empty() {
            return Err(Rule::NoEnd.breach("the feed is gone, and nothing was said"));
        }
        thread::park_timeout(GRACE);
        witness.verdict()
    }

    fn drops_in_the_middle(&self, source: &dyn PageSource) -> Result<(), Breach> {
        for urgency in [Urgency::Background, Urgency::Demand] {
            let (witness, feed) = self.start(source, Manner::Takes)?;
            for all in source.layout().runs() {
                feed.request(all, urgency);
            }
            let _ = self.end(feed, false)?;
            self.ended(&witness)?;
        }
        let (witness, feed) = self.start(source, Manner::Takes)?;
        let _ = self.end(feed, true)?;
        self.ended(&witness)
    }

    fn stops(&self, source: &dyn PageSource) -> Result<(), Breach> {
        let (witness, feed) = self.start(source, Manner::Stops)?;
        for all in source.layout().runs() {
            feed.request(all, Urgency::Background);
            if witness.said().is_some() {
                break;
            }
        }
        // If it has no content there is nothing to be stopped.
        witness.wait(GRACE, |witness| witness.said().is_some());
        thread::park_timeout(GRACE);
        let _ = self.end(feed, true)?;
        self.ended(&witness)
    }

    fn can_not_read(&self, source: &dyn PageSource) -> Result<(), Breach> {
        let (witness, feed) = self.start(source, Manner::Unreadable)?;
        for all in source.layout().runs().filter(|run| !run.is_empty()) {
            let answered = self.ask(&witness, &*feed, all, Urgency::Background);
            let said = witness.said();
            match answered {
                Err(Breach { rule: Rule::NoAnswer | Rule::HereWithoutAnswer, how }) if said.is_some() => {
                    return Err(Rule::UnreadableNotFailed.breach(how));
                }
                answered => _ = answered?,
            }
            if let Some(run) = said.filter(|run| run.block == all.block && witness.failed(*run) == 0) {
                return Err(Rule::UnreadableNotFailed.breach(format_args!("{run} did not fail")));
            }
        }
        let _ = self.end(feed, true)?;
        self.ended(&witness)
    }

    /// A sink that panics kills the thread that calls it.
    fn dies(&self, source: &dyn PageSource) -> Result<(), Breach> {
        let (witness, feed) = self.start(source, Manner::Panics)?;
        for all in source.layout().runs() {
            // On this thread, if that is the one that answers.
            let _ = catch_unwind(AssertUnwindSafe(|| feed.request(all, Urgency::Background)));
            if witness.said().is_some() {
                break;
            }
        }
        self.died(&witness, feed)
    }

    /// What is left of a flow one of whose threads has died.
    pub(super) fn died(&self, witness: &Arc<Witness>, feed: Box<dyn Feed>) -> Result<(), Breach> {
        let _ = self.end(feed, false)?;
        let panicked = witness.said().is_some();
        self.ended(witness)?;
        match witness.ends().first() {
            Some(End::Complete) if panicked => {
                Err(Rule::DiesSilently.breach("a thread died, and the end was Complete"))
            }
            _ => Ok(()),
        }
    }
}
