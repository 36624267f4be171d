//! Which arrangement of handlers is the fastest here: tried, since it depends on the machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use page_source::{
    Answer, Content, EndGuard, Feed, PageBytes, PageSink, PageSource, Pages, SourceError, Span, Urgency,
};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun};

use crate::serve::placement::{affinity, bind, check_cores, set_affinity};
use crate::{Background, Discards, Engine, Handlers, Mapping, Region, StartError, Wait};

/// How many faults are timed for each arrangement.
const FAULTS: u64 = 200;

/// An arrangement of handlers with the median time that a fault of this process took with it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Measured {
    /// The arrangement.
    pub handlers: Handlers,
    /// From touching a missing page until going on.
    pub median: Duration,
}

impl Handlers {
    /// Tries the arrangements for vCPUs bound to `cores` on scratch memory, fastest first: a handler on each of these
    /// cores, blocking; one blocking and one spinning on `other`, if that is given; one unbound. Takes some tens of
    /// milliseconds, so do it once and keep the answer.
    ///
    /// It times faults of this process. A fault of a guest costs its exits on top, which are the same for each.
    ///
    /// # Errors
    /// If an engine can't be started.
    pub fn measure(cores: &[usize], other: Option<usize>) -> Result<Vec<Measured>, StartError> {
        let mut tries = vec![Handlers::default()];
        if !cores.is_empty() {
            tries.push(Handlers::on_cores(cores.iter().copied()));
        }
        if let Some(other) = other {
            tries.push(Handlers::on_cores([other]));
            tries.push(Handlers::on_cores([other]).waiting(Wait::Spin));
        }
        check_cores(cores.iter().chain(&other))?;
        let before = affinity();
        bind(cores.first().copied());
        let measured = tries.into_iter().map(try_out).collect::<Result<Vec<_>, _>>();
        set_affinity(before);
        let mut measured = measured?;
        measured.sort_by_key(|one| one.median);
        Ok(measured)
    }
}

fn try_out(handlers: Handlers) -> Result<Measured, StartError> {
    let system = |error| StartError::System { what: "scratch memory", error };
    let len = PageCount(FAULTS).to_bytes();
    let memory = Arc::new(Mapping::anonymous(len).map_err(system)?);
    let layout = Layout::single("scratch", len).map_err(SourceError::from)?;
    let run = PageRun::new(BlockId(0), PageIndex(0), PageCount(FAULTS));
    let engine = Engine::builder()
        .region(Region::of(&memory, run))
        .source(Arc::new(Ones { layout }))
        .handlers(handlers.clone())
        .background(Background::off())
        .discards(Discards::Announced)
        .start()?;
    let mut times: Vec<Duration> = (0..FAULTS)
        .map(|page| {
            let begin = Instant::now();
            memory.read(PageCount(page).to_bytes(), &mut [0]);
            begin.elapsed()
        })
        .collect();
    drop(engine);
    times.sort_unstable();
    Ok(Measured { handlers, median: times[times.len() / 2] })
}

/// A source whose pages are all alike.
#[derive(Debug)]
struct Ones {
    layout: Layout,
}

#[derive(Debug)]
struct OnesFeed {
    end: EndGuard,
    page: Vec<u8>,
}

impl Pages for Ones {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn content(&self, run: PageRun) -> Span {
        Span::new(Content::Stored, self.layout.clip(run).pages)
    }
}

impl PageSource for Ones {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let page = vec![1; ByteLen(page_units::PAGE_SIZE).get()];
        Ok(Box::new(OnesFeed { end: EndGuard::new(sink), page }))
    }
}

impl Feed for OnesFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        for one in run.pieces(PageCount(1)) {
            if !self.end.sink().data(one, PageBytes::from_slice(&self.page)).is_taken() {
                break;
            }
        }
        Answer::Here
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}
