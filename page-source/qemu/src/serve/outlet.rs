//! The sink: what the source pushes goes into the socket, each page once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;

use page_source::{PageBytes, SharedFeed, SourceError, SourceErrorKind, Subject, Urgency};
use page_units::{BlockId, PageCount, PageRun};
use parking_lot::{Mutex, RwLock};

use super::assembly::{Assemblies, Assembly};
use super::channel::{Channel, Unreadable};
use super::message::Message;
use super::opening::end_of_stream;
use super::options::{Options, Phase, Shared};
use super::pages::{BlockPages, Pages, masks};
use super::sys;
use super::window::Window;
use super::{ServeError, Started};

/// Everything that the threads of a server share.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) to: String,
    pub(super) options: Options,
    pub(super) shared: Arc<Shared>,
    pub(super) pages: Pages,
    pub(super) main: Channel,
    /// The second connection, with preempt.
    pub(super) fast: OnceLock<Channel>,
    /// What may be under way on the main connection.
    pub(super) window: Window,
    /// Read while pages are on their way into a channel; true once the end was sent.
    ended: RwLock<bool>,
    /// The destination is ready for what it did not ask for.
    pub(super) flowing: AtomicBool,
    /// No more pages: the server is being dismantled.
    over: AtomicBool,
    failure: Mutex<Option<ServeError>>,
    /// The source has said that what it has not sent is zero.
    pub(super) source_complete: AtomicBool,
    /// The source is being finished, since it is needed no more: that it ends is no news then.
    pub(super) source_finishes: AtomicBool,
    /// The granule after the last request, for the background.
    pub(super) follow: Mutex<Option<(BlockId, u64)>>,
    /// Requests so far.
    pub(super) requests: AtomicU64,
    pub(super) assemblies: Assemblies,
    /// The server's own threads, which never wait here.
    pub(super) own_threads: [OnceLock<ThreadId>; 2],
}

/// Records on their way.
#[derive(Default)]
struct Outgoing<'a> {
    main: Message<'a>,
    fast: Message<'a>,
}

impl<'a> Outgoing<'a> {
    fn record(&mut self, fast: bool, block: &BlockPages, page: u64, content: Option<PageBytes<'a>>) {
        if fast {
            self.fast.bare_page(block, page, content);
        } else {
            self.main.page(block, page, content);
        }
    }
}

impl Outlet {
    pub(super) fn new(to: String, options: Options, shared: Arc<Shared>, pages: Pages, main: Channel) -> Outlet {
        let window = Window::new(&main, options.window);
        Outlet {
            to,
            options,
            shared,
            pages,
            main,
            fast: OnceLock::new(),
            window,
            ended: RwLock::new(false),
            flowing: AtomicBool::new(false),
            over: AtomicBool::new(false),
            failure: Mutex::default(),
            source_complete: AtomicBool::new(false),
            source_finishes: AtomicBool::new(false),
            follow: Mutex::default(),
            requests: AtomicU64::new(0),
            assemblies: Assemblies::default(),
            own_threads: Default::default(),
        }
    }

    pub(super) fn started(&self) -> Started {
        match self.shared.counters.phase() {
            Phase::Opening => Started::No,
            Phase::Loading => Started::Perhaps,
            Phase::Resuming | Phase::Started | Phase::Finishing => Started::Yes,
        }
    }

    /// No more pages are taken, because all is done or something failed.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst) || self.shared.is_stopped()
    }

    /// Lets the background begin.
    pub(super) fn let_flow(&self) {
        self.flowing.store(true, Ordering::SeqCst);
        self.shared.pusher.ring();
    }

    pub(super) fn dismantle(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.shared.pusher.ring();
        self.shared.session.ring();
    }

    /// Ends the server with an error, unless it has one.
    pub(super) fn fail(&self, error: ServeError) {
        self.failure.lock().get_or_insert(error);
        self.dismantle();
    }

    pub(super) fn failure(&self) -> Option<ServeError> {
        self.failure.lock().clone()
    }

    pub(super) fn has_ended(&self) -> bool {
        *self.ended.read()
    }

    /// Sends the end, if everything that has to be before it is: the caller has found nothing left to send. Whether
    /// it did.
    pub(super) fn send_end(&self) -> bool {
        let mut ended = self.ended.write();
        if self.pages.has_unanswered() {
            return false;
        }
        if !*ended {
            *ended = true;
            self.main.send_bytes(end_of_stream());
            self.shared.counters.enter(Phase::Finishing);
        }
        true
    }

    /// Whether the destination waits for a page that did not go yet.
    pub(super) fn is_waited_for(&self) -> bool {
        // Meanwhile no page is marked as sent and not in the socket.
        let _nothing_on_its_way = self.ended.write();
        self.pages.has_unanswered()
    }

    /// Whether the source will send nothing more, and all the rest is zero.
    pub(super) fn is_source_complete(&self) -> bool {
        self.source_complete.load(Ordering::SeqCst)
    }

    /// The source is about to be finished: everything that is needed has come.
    pub(super) fn source_finishes(&self) {
        self.source_finishes.store(true, Ordering::SeqCst);
    }

    /// Asks the source for pages.
    pub(super) fn request(&self, feed: &SharedFeed, run: PageRun, urgency: Urgency) {
        if feed.request(run, urgency).is_none() {
            let what = format!("{run} is needed, after everything had come");
            self.source_fails(SourceError::new(SourceErrorKind::Stopped, Subject::none().run(run), what));
        }
    }

    pub(super) fn source_fails(&self, error: SourceError) {
        self.fail(ServeError::Source { error, started: self.started() });
    }

    /// Pages of 4 KiB each: with content, or zero.
    pub(super) fn post_small(
        &self,
        block: &BlockPages,
        run: PageRun,
        content: Option<PageBytes<'_>>,
    ) -> Result<(), Unreadable> {
        if let Some(content) = content {
            // Nobody is held up while a disk is read.
            content.bring();
            sys::prefetch(content);
        }
        let ended = self.ended.read();
        let mut out = Outgoing::default();
        let (mut on_main, mut on_fast) = (Vec::new(), Vec::new());
        let (mut demand, mut background) = (0_u64, 0_u64);
        for (at, mask) in masks(run.first.0, run.end().0) {
            self.pages.answered_some(block, at, mask);
            if content.is_none() {
                block.zero.set_some(at, mask);
            }
            let wanted = block.wanted.among(at) & mask;
            let fast = if self.fast.get().is_some() { wanted } else { 0 };
            // Zero pages go only where they are waited for, and nothing follows the end on the main connection.
            let may_go = if *ended { fast } else { mask } & if content.is_none() { wanted } else { mask };
            let mut go = block.sent.set_some(at, may_go);
            demand += u64::from((go & wanted).count_ones());
            background += u64::from((go & !wanted).count_ones());
            on_fast.push((at, go & fast));
            on_main.push((at, go & !fast));
            while go != 0 {
                let bit = go.trailing_zeros();
                go &= go - 1;
                let page = at / 64 * 64 + u64::from(bit);
                let from = PageCount(page - run.first.0).to_bytes();
                let bytes = content.map(|content| content.slice(from, PageCount(1).to_bytes()));
                out.record(fast >> bit & 1 == 1, block, page, bytes);
            }
        }
        self.count(content.is_none(), demand, background);
        // What did not go counts as needed when the source says that it does not have it. All else is none of our
        // business: another thread has sent it, and nothing goes twice.
        let not_sent = |parts: &[(u64, u64)]| parts.iter().for_each(|&(at, mask)| _ = block.sent.clear_some(at, mask));
        let posted = self.post_fast(&out.fast).inspect_err(|_| not_sent(&on_fast));
        let posted = posted.and_then(|()| self.post_main(out.main)).inspect_err(|_| not_sent(&on_main));
        self.shared.pusher.ring();
        posted
    }

    /// A huge page.
    pub(super) fn post_huge(&self, block: &BlockPages, granule: u64, assembly: &Assembly) -> Result<(), Unreadable> {
        let ended = self.ended.read();
        self.pages.answered(block, granule);
        if assembly.is_zero() {
            block.zero.set(granule);
        }
        let wanted = block.wanted.get(granule);
        let fast = wanted && self.fast.get().is_some();
        if (assembly.is_zero() && !wanted) || (*ended && !fast) || !block.sent.set(granule) {
            // The pusher, which waits for this answer, goes on.
            self.shared.pusher.ring();
            return Ok(());
        }
        let mut out = Outgoing::default();
        for (page, content) in (granule * block.per_granule..).zip(assembly.pages()) {
            out.record(fast, block, page, content.map(PageBytes::from_slice));
            self.count(content.is_none(), u64::from(wanted), u64::from(!wanted));
        }
        self.post_fast(&out.fast)?;
        self.post_main(out.main)?;
        self.shared.pusher.ring();
        Ok(())
    }

    fn count(&self, zero: bool, demand: u64, background: u64) {
        let counters = &self.shared.counters;
        if zero {
            counters.zero.fetch_add(demand + background, Ordering::Relaxed);
        } else {
            counters.demand.fetch_add(demand, Ordering::Relaxed);
            counters.background.fetch_add(background, Ordering::Relaxed);
        }
    }

    fn post_fast(&self, message: &Message<'_>) -> Result<(), Unreadable> {
        if let Some(fast) = self.fast.get().filter(|_| !message.is_empty()) {
            fast.send(message)?;
            if fast.kept() > 0 {
                self.shared.session.ring();
            }
        }
        Ok(())
    }

    fn post_main(&self, mut message: Message<'_>) -> Result<(), Unreadable> {
        if !message.is_empty() {
            message.end();
            self.window.send(&self.main, message)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
