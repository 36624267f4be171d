//! A deeper look at a file, which reads its bitmaps and, where they are all zero, its page areas.

use std::io;

use page_units::{BlockId, FileOffset, PageCount};

use crate::bitmap::Bitmap;
use crate::{PageError, Snapshot, Warning};

/// How much is read in one go.
const STEP: usize = 1 << 20;

impl Snapshot {
    /// What is odd about the file: what was found when it was opened, wrong bitmaps, and bitmaps that are all zero
    /// although there is page data. Reads the bitmaps, and of the pages only those of a file that tells of none.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn diagnose(&self) -> io::Result<Vec<Warning>> {
        let mut warnings = self.warnings().to_vec();
        let mut stored = 0;
        for (block, _) in self.layout().iter() {
            match self.stored_pages(block) {
                Ok(pages) => stored += pages.0,
                Err(error) => {
                    stored += 1;
                    let said = |warning: &Warning| match (warning, &error) {
                        (
                            Warning::TruncatedPages { block: truncated, .. },
                            PageError::BeyondFile { block: beyond, .. },
                        ) => truncated == beyond,
                        _ => false,
                    };
                    if !warnings.iter().any(said) {
                        warnings.push(Warning::Bitmap { what: error.to_string() });
                    }
                }
            }
        }
        if stored == 0 {
            for (block, ram) in self.layout().iter() {
                if let Some(data_at) = self.first_data(block)? {
                    warnings.retain(|warning| *warning != Warning::BitmapsNotWritten);
                    warnings.push(Warning::BitmapsAllZero { block: ram.name().to_owned(), data_at });
                    break;
                }
            }
        }
        Ok(warnings)
    }

    /// How many pages the bitmap of a block marks as stored, even those that a truncated file does not have. Of a block
    /// that is not in the file, none. Reads the block's whole bitmap.
    ///
    /// # Errors
    /// If the bitmap can't be read or has bits beyond the block.
    pub fn marked_pages(&self, block: BlockId) -> Result<PageCount, PageError> {
        let stored = self.stored_pages(block);
        match (&stored, self.block(block).zip(self.layout().get(block))) {
            (Err(PageError::BeyondFile { .. }), Some((place, ram))) => {
                let bitmap = Bitmap::new(place.bitmap_offset, ram.pages(), u64::MAX);
                bitmap.count(&self.watched()).map_err(|error| self.page_error(block, error))
            }
            _ => stored,
        }
    }

    /// The first byte of a block's pages that is not zero, whatever the bitmap says. Holes are passed over.
    fn first_data(&self, block: BlockId) -> io::Result<Option<FileOffset>> {
        let Some((place, ram)) = self.block(block).filter(|place| place.in_file).zip(self.layout().get(block)) else {
            return Ok(None);
        };
        let end = place.pages_offset.0.saturating_add(ram.length().0).min(self.bytes.size());
        let mut at = place.pages_offset.0;
        let mut buffer = vec![0; STEP];
        while at < end {
            match self.data_from(FileOffset(at))? {
                Some(data) => at = data.0,
                None => return Ok(None),
            }
            let length = usize::try_from(end.saturating_sub(at)).unwrap_or(STEP).min(STEP);
            let Some(bytes) = buffer.get_mut(..length).filter(|bytes| !bytes.is_empty()) else {
                return Ok(None);
            };
            self.bytes.read_exact_at(bytes, at)?;
            if let Some(index) = bytes.iter().position(|byte| *byte != 0) {
                return Ok(Some(FileOffset(at + index as u64)));
            }
            at += length as u64;
        }
        Ok(None)
    }
}
