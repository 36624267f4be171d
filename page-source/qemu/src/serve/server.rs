//! A source of pages at the service of one destination.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use page_source::{SharedFeed, Source, SourceError};
use page_units::{ByteLen, Layout, LayoutError, PageSize, RamBlock};

use super::channel::Channel;
use super::connect::Connector;
use super::options::Control;
use super::outlet::Outlet;
use super::pages::Pages;
use super::pusher::Pusher;
use super::session::Session;
use super::{Address, Opening, Options, Report, ServeError, Started};

/// Serves one guest from one source, over one connection (two with preempt).
#[derive(Debug)]
pub struct Server {
    source: Source,
    layout: Layout,
    options: Options,
    control: Control,
}

impl Server {
    /// A server of these pages. `page_sizes` names the blocks that the destination backs with pages of another size
    /// than 4 KiB: the protocol does not tell, and QEMU refuses what does not agree.
    ///
    /// # Errors
    /// If a block is not a whole number of its pages, or the system has no descriptors left.
    pub fn new(
        source: impl Into<Source>,
        page_sizes: &HashMap<String, PageSize>,
        options: Options,
    ) -> Result<Server, SourceError> {
        let block = |block: &RamBlock| {
            let page_size = page_sizes.get(block.name()).copied().unwrap_or(PageSize::SMALL);
            if !block.length().0.is_multiple_of(page_size.bytes().0) {
                return Err(LayoutError::PartialPage { block: block.name().to_owned(), length: block.length() });
            }
            RamBlock::new(block.name(), block.length(), page_size)
        };
        let source = source.into();
        let blocks: Result<Vec<RamBlock>, LayoutError> = source.pages().layout().blocks().iter().map(block).collect();
        let layout = Layout::new(blocks?)?;
        let control = Control::new().map_err(SourceError::stopped)?;
        Ok(Server { source, layout, options, control })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Starts the guest of a QEMU that waits at `to`, and serves it until it has all of its memory.
    ///
    /// # Errors
    /// If the destination or the source fails, or [`Control::stop`] was called. Whether the guest survives:
    /// [`ServeError::is_recoverable`].
    pub fn start(self, to: &Address, opening: &Opening) -> Result<Report, ServeError> {
        self.run(to, Some(opening))
    }

    /// Goes on where another server was cut off. The QEMU at `to` has been told to wait for that (QMP
    /// `migrate-recover`). The source must have the same content as that server's.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn resume(self, to: &Address) -> Result<Report, ServeError> {
        self.run(to, None)
    }

    fn run(self, to: &Address, opening: Option<&Opening>) -> Result<Report, ServeError> {
        let begun = Instant::now();
        let started = if opening.is_some() { Started::No } else { Started::Yes };
        let shared = Arc::clone(&self.control.shared);
        let connector = Connector { shared: &shared, until: begun + self.options.patience };
        let socket = connector.connect(to).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => ServeError::Stopped { started },
            _ => ServeError::Connect { to: to.to_string(), error: Arc::new(error), started },
        })?;
        let (pages, main) = (Pages::new(&self.layout), Channel::to(socket, &self.layout));
        let outlet = Arc::new(Outlet::new(to.to_string(), self.options, shared, pages, main));
        let known = self.source.pages();
        let feed = self.source.start(Arc::<Outlet>::clone(&outlet));
        let feed = SharedFeed::new(feed.map_err(|error| ServeError::Source { error, started })?);
        let _ = outlet.own_threads[0].set(thread::current().id());
        let served = thread::scope(|scope| {
            let pusher = Pusher::new(&outlet, &*known, &feed);
            let spawned = thread::Builder::new().name("postcopy-push".into()).spawn_scoped(scope, || pusher.run());
            let served = match spawned {
                Ok(_) => {
                    let mut session = Session::new(&outlet, &*known, &feed, &self.layout, to);
                    let opened = match opening {
                        Some(opening) => session.open(opening),
                        None => session.resume(),
                    };
                    opened.and_then(|()| session.serve())
                }
                Err(error) => Err(thread_error(&error, started)),
            };
            outlet.dismantle();
            served
        });
        drop(feed);
        let to_complete = begun.elapsed();
        // A destination that is still there must not wait for us.
        outlet.main.socket().close();
        if let Some(fast) = outlet.fast.get() {
            fast.socket().close();
        }
        let sent = outlet.main.position() + outlet.fast.get().map_or(0, Channel::position);
        served.map(|loaded| Report {
            progress: self.control.progress(),
            sent: ByteLen(sent),
            to_started: loaded.map(|loaded| loaded - begun),
            to_complete,
        })
    }
}

fn thread_error(error: &io::Error, started: Started) -> ServeError {
    let error = SourceError::stopped(format_args!("a thread can't be started: {error}"));
    ServeError::Source { error, started }
}
