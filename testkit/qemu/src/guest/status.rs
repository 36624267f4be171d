//! What the guest writes down about itself.

use super::MOST_CPUS;

/// The [status page](super::STATUS).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// How many words were wrong.
    pub errors: u64,
    /// The address of the last wrong word.
    pub wrong_at: u64,
    /// The number of the pass, in [`Generations`](super::Work::Generations).
    pub generation: u64,
    /// Whether memory is filled.
    pub ready: bool,
    /// Passes of each processor.
    pub passes: Vec<u64>,
}

impl Status {
    /// Reads it from the bytes of the page. `None` if the guest has not begun.
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<Status> {
        let word = |at: usize| Some(u64::from_le_bytes(page.get(at..at + 8)?.try_into().ok()?));
        if word(field::MAGIC)? != MAGIC {
            return None;
        }
        Some(Status {
            errors: word(field::ERRORS)?,
            wrong_at: word(field::WRONG_AT)?,
            generation: word(field::GENERATION)?,
            ready: word(field::READY)? != 0,
            passes: (0..usize::try_from(MOST_CPUS).ok()?)
                .map(|cpu| word(field::PASSES + 8 * cpu))
                .collect::<Option<_>>()?,
        })
    }
}

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"FASTLOAD");

/// Offset in the status page of what is read from a disk and written to it: a sector.
pub(super) const SECTOR: usize = 2048;

/// Offsets in the status page.
pub(super) mod field {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const ALIVE: usize = 8;
    pub(in super::super) const HOLD: usize = 16;
    pub(in super::super) const ERRORS: usize = 24;
    pub(in super::super) const WRONG_AT: usize = 32;
    pub(in super::super) const GENERATION: usize = 40;
    pub(in super::super) const READY: usize = 48;
    pub(in super::super) const PASSES: usize = 64;
    pub(in super::super) const HELD: usize = 128;
    pub(in super::super) const TICKS: usize = 192;
    /// The limit of the interrupt table, two bytes that end where its address begins: together what `lidt` takes.
    pub(in super::super) const TABLE_LIMIT: usize = 206;
    pub(in super::super) const TABLE: usize = 208;
}
