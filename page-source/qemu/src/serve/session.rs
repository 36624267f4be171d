//! The conversation with the destination: sets up, answers requests, waits for the last word.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_source::{Content, PageSink, Pages, SharedFeed, Urgency};
use page_units::{BlockId, ByteLen, Layout, PAGE_SIZE, PageIndex, PageRun};

use super::channel::Channel;
use super::connect::Connector;
use super::opening::{PING_LOADED, PING_OPEN};
use super::options::Phase;
use super::outlet::Outlet;
use super::pages::{granules_of, run_of};
use super::{Address, Opening, ServeError, Started};
use crate::wire::return_path::{Decoder, Message, ReturnPathError};

/// No time limit: as long as nobody waits, and still a time that can be counted.
const FOR_EVER: Duration = Duration::from_secs(1 << 32);

/// How often a silent destination is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// The same, in messages, where they come without a pause.
const CHECKED: u64 = 256;
/// The most messages kept while an answer is waited for. A destination that is resumed asks again for what its threads
/// wait for, each of them for one page.
const MOST_OTHERS: usize = 1 << 16;

pub(super) struct Session<'a> {
    pub(super) outlet: &'a Outlet,
    pub(super) source: &'a dyn Pages,
    pub(super) feed: &'a SharedFeed,
    pub(super) layout: &'a Layout,
    pub(super) address: &'a Address,
    decoder: Decoder,
    /// Messages that came before their time.
    pub(super) backlog: VecDeque<Message>,
    /// The block of the last request.
    block: Option<BlockId>,
    buffer: Vec<u8>,
    /// Messages that came.
    messages: u64,
    /// Since when nothing has moved.
    stillness: Option<([(u64, u64); 2], Instant)>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        outlet: &'a Outlet,
        source: &'a dyn Pages,
        feed: &'a SharedFeed,
        layout: &'a Layout,
        address: &'a Address,
    ) -> Session<'a> {
        let largest = layout.blocks().iter().map(|block| block.pages().0).max().unwrap_or(0);
        let decoder = Decoder::new(ByteLen(largest.div_ceil(64) * 8));
        let (backlog, buffer) = (VecDeque::new(), vec![0; 1 << 16]);
        let (block, stillness) = (None, None);
        Session { outlet, source, feed, layout, address, decoder, backlog, block, buffer, messages: 0, stillness }
    }

    /// A conversation from the beginning. Returns when the devices were loaded.
    pub(super) fn open(&mut self, opening: &Opening) -> Result<(), ServeError> {
        let (head, package) = (opening.head(self.layout)?, opening.package()?);
        self.outlet.main.send_bytes(head);
        // Who does not speak the protocol is told from who does before anything is lost. And with preempt the destination
        // tells the connections apart by their order.
        self.wait_for("that it is there", |message| *message == Message::Pong(PING_OPEN))?;
        if self.outlet.options.preempt {
            self.open_fast()?;
        }
        if !self.outlet.shared.commit() {
            return Err(ServeError::Stopped { started: Started::No });
        }
        self.outlet.shared.counters.enter(Phase::Loading);
        self.outlet.main.send_bytes(package);
        self.outlet.window.begin(&self.outlet.main);
        self.outlet.shared.pusher.ring();
        Ok(())
    }

    pub(super) fn open_fast(&self) -> Result<(), ServeError> {
        let shared = &self.outlet.shared;
        let connector = Connector { shared, until: Instant::now() + self.outlet.options.patience.min(FOR_EVER) };
        let socket = connector.connect(self.address).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => ServeError::Stopped { started: self.outlet.started() },
            _ => self.broken(&format!("a second one can't be made: {error}")),
        })?;
        // Set once only: each server makes one session.
        let _ = self.outlet.fast.set(Channel::to(socket, self.layout));
        Ok(())
    }

    /// Answers until the destination has everything. Returns when the devices were loaded.
    pub(super) fn serve(&mut self) -> Result<Option<Instant>, ServeError> {
        let mut loaded = None;
        loop {
            let Some(message) = self.next(None)? else { continue };
            match message {
                Message::Request { block, start, length } => self.request(block, start, length)?,
                Message::Pong(PING_LOADED) => {
                    loaded.get_or_insert_with(Instant::now);
                    self.outlet.shared.counters.enter(Phase::Started);
                    self.outlet.let_flow();
                }
                Message::Pong(number) => {
                    if self.outlet.window.pong(number) {
                        self.outlet.shared.pusher.ring();
                    }
                }
                Message::Shut(0) if self.outlet.has_ended() => return Ok(loaded),
                Message::Shut(code) => return Err(self.shut(code)),
                Message::SwitchoverAck => {}
                Message::Received { .. } => return Err(self.protocol(ReturnPathError::Unexpected("RECV_BITMAP"))),
                Message::ResumeAck(_) => return Err(self.protocol(ReturnPathError::Unexpected("RESUME_ACK"))),
            }
        }
    }

    /// The pages that the destination waits for.
    fn request(&mut self, name: Option<String>, start: u64, length: u32) -> Result<(), ServeError> {
        let outlet = self.outlet;
        let id = match &name {
            Some(name) => outlet.pages.find(name).map(|(id, _)| id),
            None => self.block,
        };
        let no_block = || self.protocol(ReturnPathError::Block(name.clone().unwrap_or_default()));
        let id = id.ok_or_else(no_block)?;
        let block = outlet.pages.block(id).ok_or_else(no_block)?;
        self.block = Some(id);
        let size = block.per_granule * PAGE_SIZE;
        let end = start.checked_add(length.into()).filter(|end| *end <= block.granules * size);
        let aligned = length > 0 && start.is_multiple_of(size) && u64::from(length).is_multiple_of(size);
        let Some(end) = end.filter(|_| aligned) else {
            let block = block.name.clone();
            return Err(self.protocol(ReturnPathError::Range { block, start, length }));
        };
        outlet.requests.fetch_add(1, Ordering::Relaxed);
        outlet.shared.counters.requested.fetch_add((end - start) / PAGE_SIZE, Ordering::Relaxed);
        *outlet.follow.lock() = Some((id, end / size));
        let mut open: Option<(u64, u64)> = None;
        for granule in start / size..end / size {
            let new = block.wanted.set(granule);
            // What was sent is on its way, what was asked for before will be, and what is known to be zero needs no
            // source.
            if !new || block.sent.get(granule) {
                continue;
            }
            let run = run_of(id, block, granule, granule + 1);
            if block.zero.get(granule) || outlet.is_source_complete() || self.is_zero(run) {
                // Stops only if all is over, which is seen elsewhere.
                let _ = outlet.zero(run);
                continue;
            }
            match &mut open {
                Some((_, last)) if *last == granule => *last += 1,
                _ => {
                    if let Some((first, last)) = open.replace((granule, granule + 1)) {
                        outlet.request(self.feed, run_of(id, block, first, last), Urgency::Demand);
                    }
                }
            }
        }
        if let Some((first, last)) = open {
            outlet.request(self.feed, run_of(id, block, first, last), Urgency::Demand);
        }
        Ok(())
    }

    fn is_zero(&self, run: PageRun) -> bool {
        let span = self.source.content(run);
        span.content == Content::Zero && span.pages >= run.pages
    }

    /// The destination said its last word too early.
    fn shut(&self, code: u32) -> ServeError {
        match code {
            0 => self.broken("it ended before it had all pages"),
            _ => ServeError::Refused { to: self.outlet.to.clone(), code, started: self.outlet.started() },
        }
    }

    fn silent(&self, what: &'static str) -> ServeError {
        let (to, patience) = (self.outlet.to.clone(), self.outlet.options.patience);
        ServeError::Silent { to, what, patience, started: self.outlet.started() }
    }

    /// Waits for an answer; other messages are kept for later.
    pub(super) fn wait_for(
        &mut self,
        what: &'static str,
        mut is_it: impl FnMut(&Message) -> bool,
    ) -> Result<Message, ServeError> {
        let until = Instant::now() + self.outlet.options.patience.min(FOR_EVER);
        let mut others = VecDeque::new();
        loop {
            match self.next(Some(until))? {
                Some(message) if is_it(&message) => {
                    others.append(&mut self.backlog);
                    self.backlog = others;
                    return Ok(message);
                }
                Some(Message::Shut(code)) => return Err(self.shut(code)),
                // Long, and in the order in which they were asked for.
                Some(Message::Received { .. }) => {
                    return Err(self.protocol(ReturnPathError::Unexpected("RECV_BITMAP")));
                }
                Some(_) if others.len() == MOST_OTHERS => {
                    return Err(self.protocol(ReturnPathError::Unexpected("too many messages instead of an answer")));
                }
                // Who never stops talking does not answer either.
                Some(message) if Instant::now() < until => {
                    self.check()?;
                    others.push_back(message);
                }
                _ => return Err(self.silent(what)),
            }
        }
    }

    /// The next message; `None` when the time is over.
    fn next(&mut self, until: Option<Instant>) -> Result<Option<Message>, ServeError> {
        if let Some(message) = self.backlog.pop_front() {
            return Ok(Some(message));
        }
        loop {
            if let Some(message) = self.decoder.next_message().map_err(|error| self.protocol(error))? {
                self.messages += 1;
                if self.messages.is_multiple_of(CHECKED) {
                    // There may always be another one.
                    self.check()?;
                }
                return Ok(Some(message));
            }
            if self.fill()? {
                self.stillness = None;
                continue;
            }
            self.check()?;
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            if until.is_none() {
                self.check_stillness()?;
            }
            self.wait(left.unwrap_or(LOOK).min(LOOK));
        }
    }

    /// Ends the wait for a destination that has nothing to do but answer, and does nothing.
    fn check_stillness(&mut self) -> Result<(), ServeError> {
        let what = match self.outlet.shared.counters.phase() {
            Phase::Loading => "that its devices are loaded",
            Phase::Finishing => "that it has everything",
            Phase::Opening | Phase::Resuming | Phase::Started => {
                self.stillness = None;
                return Ok(());
            }
        };
        let now = self.moved();
        match self.stillness {
            Some((before, since)) if before == now => {
                if since.elapsed() < self.outlet.options.patience {
                    return Ok(());
                }
                // If it waits for a page it is the source that is slow.
                if !self.outlet.is_waited_for() && self.moved() == now {
                    return Err(self.silent(what));
                }
            }
            _ => {}
        }
        self.stillness = Some((now, Instant::now()));
        Ok(())
    }

    /// Of each connection how much was put in, and how much of that is not received.
    fn moved(&self) -> [(u64, u64); 2] {
        let channels = [Some(&self.outlet.main), self.outlet.fast.get()];
        channels.map(|channel| channel.map_or((0, 0), |channel| (channel.position(), channel.unreceived())))
    }

    /// Takes what has come; whether anything had.
    fn fill(&mut self) -> Result<bool, ServeError> {
        match self.outlet.main.socket().read(&mut self.buffer) {
            Ok(0) => Err(self.broken("QEMU closed it: it has ended, or paused the migration")),
            Ok(n) => {
                self.decoder.take(self.buffer.get(..n).unwrap_or_default());
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(self.broken(&error.to_string())),
        }
    }

    fn check(&self) -> Result<(), ServeError> {
        if let Some(error) = self.outlet.failure() {
            return Err(error);
        }
        let started = self.outlet.started();
        if self.outlet.is_over() {
            return Err(ServeError::Stopped { started });
        }
        if let Some(error) = self.outlet.main.error() {
            return Err(self.broken(&error.to_string()));
        }
        // When it is all over the destination shuts this connection down at a moment of its choosing.
        match self.outlet.fast.get().and_then(Channel::error).filter(|_| !self.outlet.has_ended()) {
            Some(error) => Err(self.broken(&format!("the second connection: {error}"))),
            None => Ok(()),
        }
    }

    fn wait(&self, longest: Duration) {
        let bell = &self.outlet.shared.session;
        bell.listen();
        if self.outlet.is_over() {
            bell.hush();
            return;
        }
        let mut fds = vec![
            PollFd::new(bell.fd(), PollFlags::POLLIN),
            PollFd::new(self.outlet.main.socket().as_fd(), PollFlags::POLLIN),
        ];
        if let Some(fast) = self.outlet.fast.get().filter(|fast| fast.kept() > 0) {
            fds.push(PollFd::new(fast.socket().as_fd(), PollFlags::POLLOUT));
        }
        // Interrupted or not: everything is looked at again.
        let _ = poll(&mut fds, PollTimeout::try_from(longest).unwrap_or(PollTimeout::ZERO));
        bell.hush();
        if let Some(fast) = self.outlet.fast.get() {
            fast.flush();
        }
    }

    pub(super) fn broken(&self, reason: &str) -> ServeError {
        ServeError::Broken { to: self.outlet.to.clone(), reason: reason.to_owned(), started: self.outlet.started() }
    }

    pub(super) fn protocol(&self, error: ReturnPathError) -> ServeError {
        ServeError::Protocol { to: self.outlet.to.clone(), error, started: self.outlet.started() }
    }

    /// Notes that the destination has pages already: a bit for each page of a block.
    pub(super) fn note_received(&self, id: BlockId, bits: &[u8]) -> Result<(), ServeError> {
        let Some(block) = self.outlet.pages.block(id) else { return Ok(()) };
        let pages = block.granules * block.per_granule;
        if bits.len() as u64 != pages.div_ceil(64) * 8 {
            return Err(self.protocol(ReturnPathError::BitmapLength(ByteLen::of(bits.len()))));
        }
        let has = |page: PageIndex| {
            let byte = usize::try_from(page.0 / 8).ok().and_then(|at| bits.get(at));
            byte.is_some_and(|byte| byte >> (page.0 % 8) & 1 == 1)
        };
        for granule in 0..block.granules {
            let run = run_of(id, block, granule, granule + 1);
            debug_assert_eq!(granules_of(block, run), (granule, granule + 1));
            let there = run.iter().filter(|page| has(*page)).count() as u64;
            if there == block.per_granule {
                block.sent.set(granule);
                self.outlet.shared.counters.received_before.fetch_add(there, Ordering::Relaxed);
            } else if there > 0 {
                return Err(self.protocol(ReturnPathError::Unexpected("a bitmap with a part of a huge page")));
            }
        }
        Ok(())
    }
}
