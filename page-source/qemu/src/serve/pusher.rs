//! The thread that pushes what nobody asked for, keeps the main connection flowing, and sends the end.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_source::{Pages, SharedFeed, Urgency};
use page_units::{PageCount, PageRun};

use super::ServeError;
use super::order::{Next, Order};
use super::outlet::Outlet;

/// So long after a request, pieces are small and few of them are under way: who has asked asks again.
const HURRY: Duration = Duration::from_millis(10);
/// A source that answers later is asked for no more pages before it has.
const ASKED: u64 = 64;

/// What to do.
enum Step {
    Push(PageRun),
    /// Wait for space in the socket.
    Room,
    Wait,
}

pub(super) struct Pusher<'a> {
    outlet: &'a Outlet,
    source: &'a dyn Pages,
    feed: &'a SharedFeed,
    order: Order,
    /// Requests seen, and when the last was.
    requests: u64,
    requested: Option<Instant>,
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
    pub(super) fn new(outlet: &'a Outlet, source: &'a dyn Pages, feed: &'a SharedFeed) -> Pusher<'a> {
        Pusher { outlet, source, feed, order: Order::default(), requests: 0, requested: None }
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
            let step = self.step();
            if let Step::Push(run) = step {
                bell.hush();
                self.push(run);
                continue;
            }
            if !self.outlet.is_over() {
                self.wait(matches!(step, Step::Room));
            }
            bell.hush();
        }
    }

    fn wait(&self, for_room: bool) {
        let bell = PollFd::new(self.outlet.shared.pusher.fd(), PollFlags::POLLIN);
        let socket = PollFd::new(self.outlet.main.socket().as_fd(), PollFlags::POLLOUT);
        let mut both = [bell, socket];
        let which = if for_room || self.outlet.main.kept() > 0 { &mut both[..] } else { &mut both[..1] };
        // Interrupted or not: everything is looked at again.
        let _ = poll(which, PollTimeout::NONE);
    }

    fn push(&self, run: PageRun) {
        self.outlet.pages.ask(run);
        self.outlet.request(self.feed, run, Urgency::Background);
    }

    fn step(&mut self) -> Step {
        let outlet = self.outlet;
        let wanted = outlet.options.background || outlet.shared.drain.load(Ordering::Acquire);
        let flowing = outlet.flowing.load(Ordering::SeqCst);
        if !wanted || !flowing || outlet.is_over() || outlet.main.kept() > 0 || outlet.has_ended() {
            return Step::Wait;
        }
        outlet.window.set_narrow(&outlet.main, self.is_hurried());
        let (piece, asked) = (outlet.window.piece(), outlet.pages.asked.load(Ordering::SeqCst));
        if asked >= ASKED {
            return Step::Wait;
        }
        if !outlet.window.has_room(&outlet.main, piece, PageCount(asked)) {
            // What comes rings, and so does a PONG.
            return if asked == 0 && outlet.window.is_room_writable() { Step::Room } else { Step::Wait };
        }
        if let Some((block, granule)) = outlet.follow.lock().take() {
            self.order.follow(block, granule);
        }
        let next =
            if outlet.is_source_complete() { Next::Done } else { self.order.next(&outlet.pages, self.source, piece.0) };
        match next {
            Next::Run(run) => return Step::Push(run),
            Next::Waiting => {}
            Next::Done => self.finish(),
        }
        Step::Wait
    }

    /// Whether a request came lately: the next would have to wait behind what is under way, or, with a connection of its
    /// own, for the processor.
    fn is_hurried(&mut self) -> bool {
        let requests = self.outlet.requests.load(Ordering::Relaxed);
        if requests != self.requests {
            self.requests = requests;
            self.requested = Some(Instant::now());
        }
        self.requested.is_some_and(|at| at.elapsed() < HURRY)
    }

    /// Everything that is not zero was sent.
    fn finish(&self) {
        // A request that is being answered comes first; its delivery rings again.
        if self.outlet.is_waited_for() {
            return;
        }
        self.outlet.source_finishes();
        match self.feed.finish() {
            Ok(()) => _ = self.outlet.send_end(),
            Err(error) => self.outlet.fail(ServeError::Source { error, started: self.outlet.started() }),
        }
    }
}
