//! Where the content of pages is.

use std::fmt::Debug;

use page_source::{Content, SourceError, Urgency};
use page_units::{FileOffset, Layout, PageCount, PageRun};

use crate::mapped_file::MappedFile;

/// What the pages of a source are, and where: in one file or several.
pub(crate) trait Places: Debug + Send + Sync + 'static {
    /// The blocks.
    fn layout(&self) -> &Layout;

    /// All files that content may come from.
    fn files(&self) -> impl Iterator<Item = &MappedFile>;

    /// What the first pages of `run`, which is in the layout, are and where: at least one page. With
    /// [`Urgency::Demand`] it does not wait for a lock, and does no more I/O than it must.
    fn find(&self, run: PageRun, urgency: Urgency) -> Result<Extent<'_>, SourceError>;
}

/// Pages of one kind that lie one behind the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent<'a> {
    /// What they are. [`Content::Unknown`] is delivered as if it were stored.
    pub(crate) content: Content,
    /// How many; more than were asked about are of no use.
    pub(crate) pages: PageCount,
    /// Where the first one is, if it is in a file.
    pub(crate) at: Option<(&'a MappedFile, FileOffset)>,
}
