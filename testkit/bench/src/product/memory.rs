//! Plain memory that an engine serves from a flat file.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use page_files::{FlatBlock, FlatFile};
use page_units::{BlockId, ByteLen, Layout, PageSize, RamBlock};
use uffd_engine::{Builder, Engine};

use crate::sys::Map;

/// An engine that is being set up, and the memory it will serve.
#[derive(Debug)]
pub struct Served {
    /// The engine: declared before the memory, because it must go first.
    pub engine: Engine,
    /// The memory.
    pub memory: Map,
}

/// Serves fresh memory from the first `len` bytes of the file, with options chosen by `options`.
///
/// # Errors
/// If the file can't be opened, or the engine can't be started.
pub fn serve(
    path: &Path,
    len: usize,
    options: impl FnOnce(Builder) -> Builder,
) -> Result<Served, Box<dyn Error + Send + Sync>> {
    serve_in(Map::anonymous(len)?, path, options)
}

/// The same for memory that is there.
///
/// # Errors
/// As for [`serve`].
pub fn serve_in(
    memory: Map,
    path: &Path,
    options: impl FnOnce(Builder) -> Builder,
) -> Result<Served, Box<dyn Error + Send + Sync>> {
    let block = RamBlock::new("memory", ByteLen::of(memory.len()), PageSize::SMALL)?;
    let source = FlatFile::open(path, FlatBlock::concatenated(vec![block.clone()])?)?;
    let run = Layout::new(vec![block])?.run_of(BlockId(0)).ok_or("an empty block")?;
    let region = crate::sys::region(&memory, run);
    let engine = options(Engine::builder()).region(region).source(Arc::new(source)).start()?;
    Ok(Served { engine, memory })
}
