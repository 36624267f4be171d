//! A load: where the pages come from, and what takes them in.

use std::sync::Arc;

use page_source::{Feed, PageSource};
use page_units::PageCount;

use super::intake::Intake;
use super::plan::Plan;

/// What asks for pages: for a fault, and in the background.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) intake: Arc<Intake>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) feed: Arc<dyn Feed>,
    /// How many pages are asked for at a time, around a fault.
    pub(crate) around: PageCount,
    pub(crate) plan: Plan,
}
