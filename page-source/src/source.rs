//! Who has pages.

use std::fmt::Debug;
use std::sync::Arc;

use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};

use crate::{Feed, PageSink, SourceError};

/// What is known of pages without starting anything.
///
/// # Implementing
/// Neither the layout nor the content of a page ever changes: *a source has one content per page*. (Precopy sends a page
/// again and newer; that happens before there is a source.) What is *known* may grow: [`Content::Unknown`] becomes
/// something else once a request has found it out.
pub trait Pages: Debug + Send + Sync {
    /// The RAM blocks.
    fn layout(&self) -> &Layout;

    /// What is known of the first pages of `run`: a span of one kind, of at least one page and never longer than `run`.
    /// The span may be shorter than what is really of that kind; who wants more asks again behind it.
    ///
    /// Does no I/O: what would need some is [`Content::Unknown`]. Empty exactly if `run` is, or if its first page is
    /// outside the layout ([`Layout::clip`] says so).
    fn content(&self, run: PageRun) -> Span;

    /// What is cheapest to ask for if this page is wanted: a page, a compressed frame, a range of an object. It contains
    /// the page and lies in its block. A request may be for less; the source then does the work for all of it, and may
    /// deliver all of it.
    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        PageRun::single(block, page)
    }
}

/// A source that may be started any number of times, each time with another sink, and asked again for what it has
/// delivered: a file, for example.
pub trait PageSource: Pages {
    /// Begins to push into `sink` what is requested through the feed (and what the source sends unasked).
    ///
    /// # Errors
    /// If the source can't be read at all. Nothing was pushed then, and no [`end`](PageSink::end) comes.
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError>;
}

/// A source that is started once and delivers each page once: a peer, a stream, frozen memory.
///
/// It answers [`Later`](crate::Answer::Later) only, from a thread of its own, since who takes its bytes may have to wait,
/// and could not ask again. Two takers share one through a tee.
pub trait OneShot: Debug + Send {
    /// What is known of its pages, also after it was started.
    fn pages(&self) -> Arc<dyn Pages>;

    /// As [`PageSource::start`], for good.
    ///
    /// # Errors
    /// If the source can't be read at all. Nothing was pushed then, and no [`end`](PageSink::end) comes.
    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError>;
}

/// Either kind of source, as those take it who need to start it only once.
#[derive(Debug)]
pub enum Source {
    /// It may be started and asked again.
    Repeatable(Arc<dyn PageSource>),
    /// It is started once, and each page comes once.
    OneShot(Box<dyn OneShot>),
}

impl Source {
    /// What is known of its pages, also after it was started.
    #[must_use]
    pub fn pages(&self) -> Arc<dyn Pages> {
        match self {
            Source::Repeatable(source) => Arc::<dyn PageSource>::clone(source),
            Source::OneShot(source) => source.pages(),
        }
    }

    /// The source, if it may be started again.
    #[must_use]
    pub fn repeatable(&self) -> Option<&Arc<dyn PageSource>> {
        match self {
            Source::Repeatable(source) => Some(source),
            Source::OneShot(_) => None,
        }
    }

    /// Starts it.
    ///
    /// # Errors
    /// As [`PageSource::start`].
    pub fn start(self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        match self {
            Source::Repeatable(source) => source.start(sink),
            Source::OneShot(source) => source.start(sink),
        }
    }
}

impl<S: PageSource + 'static> From<Arc<S>> for Source {
    fn from(source: Arc<S>) -> Source {
        Source::Repeatable(source)
    }
}

impl From<Arc<dyn PageSource>> for Source {
    fn from(source: Arc<dyn PageSource>) -> Source {
        Source::Repeatable(source)
    }
}

impl From<Box<dyn OneShot>> for Source {
    fn from(source: Box<dyn OneShot>) -> Source {
        Source::OneShot(source)
    }
}

impl<S: OneShot + 'static> From<Box<S>> for Source {
    fn from(source: Box<S>) -> Source {
        Source::OneShot(source)
    }
}

impl<P: Pages + ?Sized> Pages for Arc<P> {
    fn layout(&self) -> &Layout {
        (**self).layout()
    }

    fn content(&self, run: PageRun) -> Span {
        (**self).content(run)
    }

    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        (**self).unit(block, page)
    }
}

impl<S: PageSource + ?Sized> PageSource for Arc<S> {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        (**self).start(sink)
    }
}

/// What is known of a span of pages without I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// All zero: it need not be asked for.
    Zero,
    /// The source has content for them, which may be zero or not.
    Stored,
    /// The source has nothing to say about them: look below, where there is something below.
    Absent,
    /// Not known before it was asked for.
    Unknown,
}

/// A number of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// What they are.
    pub content: Content,
    /// How many.
    pub pages: PageCount,
}

impl Span {
    /// `pages` pages of `content`.
    #[must_use]
    pub const fn new(content: Content, pages: PageCount) -> Span {
        Span { content, pages }
    }

    /// Nothing is known of pages that there are not: the answer about a run outside the layout.
    pub const OUTSIDE: Span = Span::new(Content::Unknown, PageCount(0));
}
