//! The thread that pushes what nobody asked for, keeps the main connection flowing, and sends the end.

use std::sync::atomic::Ordering;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_units::{ByteLen, PageCount, PageRun};

use super::ServeError;
use super::order::{Next, Order};
use super::outlet::Outlet;
use crate::{Feed, PageSource, Urgency};

/// Pages per piece of the background.
const PIECE: u64 = 16;
/// The same, after a request.
const SMALL_PIECE: u64 = 4;
/// After a request, so many pieces go out small and with a small window.
const HURRY: u32 = 64;

/// What to do.
enum Step {
    Push(PageRun),
    Wait,
}

pub(super) struct Pusher<'a> {
    outlet: &'a Outlet,
    source: &'a dyn PageSource,
    feed: &'a dyn Feed,
    order: Order,
    /// Small pieces that are left, and requests seen.
    hurry: u32,
    requests: u64,
    narrow: bool,
}

/// Ends the server if the thread dies.
struct Alarm<'a>(&'a Outlet);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(ServeError::Stopped { started: self.0.started() });
        }
    }
}

impl<'a> Pusher<'a> {
    pub(super) fn new(outlet: &'a Outlet, source: &'a dyn PageSource, feed: &'a dyn Feed) -> Pusher<'a> {
        Pusher { outlet, source, feed, order: Order::default(), hurry: 0, requests: 0, narrow: false }
    }

    pub(super) fn run(mut self) {
        let _alarm = Alarm(self.outlet);
        let _ = self.outlet.own_threads[1].set(thread::current().id());
        while !self.outlet.is_over() {
            self.outlet.main.flush();
            if let Step::Push(run) = self.step() {
                self.push(run);
                continue;
            }
            let bell = &self.outlet.shared.pusher;
            bell.listen();
            if let Step::Push(run) = self.step() {
                bell.hush();
                self.push(run);
                continue;
            }
            if !self.outlet.is_over() {
                self.wait();
            }
            bell.hush();
        }
    }

    fn wait(&self) {
        let bell = PollFd::new(self.outlet.shared.pusher.fd(), PollFlags::POLLIN);
        let socket = PollFd::new(std::os::fd::AsFd::as_fd(self.outlet.main.socket()), PollFlags::POLLOUT);
        let mut both = [bell, socket];
        let which = if self.outlet.main.kept() > 0 { &mut both[..] } else { &mut both[..1] };
        // Interrupted or not: everything is looked at again.
        let _ = poll(which, PollTimeout::NONE);
    }

    fn push(&mut self, run: PageRun) {
        self.outlet.pages.ask(run);
        self.feed.request(run, Urgency::Background);
        self.hurry = self.hurry.saturating_sub(1);
    }

    fn step(&mut self) -> Step {
        let outlet = self.outlet;
        let wanted = outlet.options.background || outlet.shared.drain.load(Ordering::Acquire);
        let flowing = outlet.flowing.load(Ordering::SeqCst);
        if !wanted || !flowing || outlet.is_over() || outlet.main.kept() > 0 || outlet.has_ended() {
            return Step::Wait;
        }
        let piece = self.adapt();
        if let Some(credit) = &outlet.credit {
            let window = if self.narrow { outlet.options.window.0 / 4 } else { outlet.options.window.0 };
            // A huge page may be longer than the window: one at a time, then.
            let room = PageCount(piece).to_bytes().0;
            let under_way = credit.under_way(outlet.main.position());
            if under_way > 0 && under_way + room > window {
                return Step::Wait;
            }
        }
        if outlet.pages.asked.load(Ordering::SeqCst) >= 4 * PIECE {
            return Step::Wait;
        }
        if let Some((block, granule)) = outlet.follow.lock().take() {
            self.order.follow(block, granule);
        }
        let next =
            if outlet.is_source_complete() { Next::Done } else { self.order.next(&outlet.pages, self.source, piece) };
        match next {
            Next::Run(run) => return Step::Push(run),
            Next::Waiting => {}
            Next::Done => self.finish(),
        }
        Step::Wait
    }

    /// The size of the next piece: small, with little under way, for a while after each request.
    fn adapt(&mut self) -> u64 {
        let outlet = self.outlet;
        let requests = outlet.requests.load(Ordering::Relaxed);
        if requests != self.requests {
            self.requests = requests;
            self.hurry = HURRY;
        }
        let narrow = self.hurry > 0 && outlet.fast.get().is_none();
        if narrow != self.narrow {
            self.narrow = narrow;
            if outlet.credit.is_none() {
                let window = outlet.options.window.0;
                outlet.main.limit_buffer(ByteLen(if narrow { window / 4 } else { window }));
            }
        }
        if narrow { SMALL_PIECE } else { PIECE }
    }

    /// Everything that is not zero was sent.
    fn finish(&self) {
        match self.source.verify() {
            // A request that is being answered comes first; its delivery rings again.
            Ok(()) => _ = self.outlet.send_end(),
            Err(error) => self.outlet.fail(ServeError::Source { error, started: self.outlet.started() }),
        }
    }
}
