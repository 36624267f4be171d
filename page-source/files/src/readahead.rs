//! Reading ahead of a background load.

use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{ByteLen, FileOffset};

use crate::mapped_file::MappedFile;

/// How far ahead of a background load the kernel is told to read.
const WINDOW: u64 = 8 << 20;

/// Where the page cache was last told to fill itself. The mapping itself is advised as random, so that a demand
/// fault on a cold file reads one page and not 128 KiB; what streams is announced here instead.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    /// The end of what was last announced, in bytes of the file.
    until: AtomicU64,
}

impl ReadAhead {
    /// Stored pages at `offset` are about to be delivered, and those behind them, up to `limit`, soon.
    pub(crate) fn announce(&self, file: &MappedFile, offset: FileOffset, len: ByteLen, limit: FileOffset) {
        let end = offset.0 + len.0;
        let until = self.until.load(Ordering::Relaxed);
        // Inside what was announced, with more than half of the window still to go.
        if end + WINDOW / 2 <= until && until <= end + WINDOW {
            return;
        }
        let from = if (offset.0..=end + WINDOW).contains(&until) { until } else { offset.0 };
        let to = (end + WINDOW).min(limit.0);
        self.until.store(end + WINDOW, Ordering::Relaxed);
        if from < to {
            file.read_ahead(FileOffset(from), ByteLen(to - from));
        }
    }
}
