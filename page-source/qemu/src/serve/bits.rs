//! A bitmap that many threads change, and that takes no memory where nothing is set: a file of a few KiB may claim RAM
//! without end.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words that are allocated together: 4 KiB.
const WORDS: usize = 512;
const CHUNK_BITS: u64 = WORDS as u64 * 64;

type Chunk = Box<[AtomicU64; WORDS]>;

#[derive(Debug)]
pub(super) struct Bits {
    chunks: Vec<OnceLock<Chunk>>,
    bits: u64,
}

impl Bits {
    /// Makes a number of bits, all clear.
    pub(super) fn new(bits: u64) -> Bits {
        Bits { chunks: (0..bits.div_ceil(CHUNK_BITS)).map(|_| OnceLock::new()).collect(), bits }
    }

    fn chunk(&self, at: u64) -> Option<&OnceLock<Chunk>> {
        self.chunks.get(usize::try_from(at / CHUNK_BITS).ok()?).filter(|_| at < self.bits)
    }

    fn word(chunk: &Chunk, at: u64) -> Option<&AtomicU64> {
        chunk.get(usize::try_from(at % CHUNK_BITS / 64).ok()?)
    }

    pub(super) fn get(&self, at: u64) -> bool {
        self.among(at) >> (at % 64) & 1 == 1
    }

    /// Sets a bit; whether it was clear.
    pub(super) fn set(&self, at: u64) -> bool {
        self.set_some(at, 1 << (at % 64)) != 0
    }

    /// The 64 bits among which is `at`.
    pub(super) fn among(&self, at: u64) -> u64 {
        let word = self.chunk(at).and_then(OnceLock::get).and_then(|chunk| Bits::word(chunk, at));
        word.map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Sets the bits of the mask, of the 64 among which is `at`; those that were clear.
    pub(super) fn set_some(&self, at: u64, mask: u64) -> u64 {
        if mask == 0 {
            return 0;
        }
        let made = |chunk: &OnceLock<Chunk>| {
            let chunk = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            Bits::word(chunk, at).map(|word| mask & !word.fetch_or(mask, Ordering::SeqCst))
        };
        self.chunk(at).and_then(made).unwrap_or(0)
    }

    /// Clears the bits of the mask, of the 64 among which is `at`; those that were set.
    pub(super) fn clear_some(&self, at: u64, mask: u64) -> u64 {
        let word = self.chunk(at).and_then(OnceLock::get).and_then(|chunk| Bits::word(chunk, at));
        word.map_or(0, |word| mask & word.fetch_and(!mask, Ordering::SeqCst))
    }

    /// Whether a bit is set here that is not set there.
    pub(super) fn has_some_outside(&self, there: &Bits) -> bool {
        let chunks = (0..).step_by(WORDS * 64).zip(&self.chunks);
        let made = chunks.filter_map(|(at, chunk)| Some((at, chunk.get()?)));
        let mut words = made.flat_map(|(at, chunk): (u64, &Chunk)| (at..).step_by(64).zip(chunk.iter()));
        words.any(|(at, word)| word.load(Ordering::SeqCst) & !there.among(at) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_without_end_cost_next_to_nothing() {
        // Pages of 64 TiB.
        let (here, there) = (Bits::new(1 << 34), Bits::new(1 << 34));
        let far = (1 << 34) - 5;
        assert!(!here.get(far) && here.clear_some(far, u64::MAX) == 0 && !here.has_some_outside(&there));
        assert!(here.set(far) && !here.set(far) && here.get(far) && !here.get(far - 1) && !here.get(far - (1 << 15)));
        assert!(here.has_some_outside(&there) && !there.has_some_outside(&here));
        assert!(there.set(far) && there.set(7) && !here.has_some_outside(&there) && there.has_some_outside(&here));
        assert_eq!(here.clear_some(far, u64::MAX), 1 << (far % 64));
        assert!(!here.get(far));
        let made = |bits: &Bits| bits.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        assert_eq!((made(&here), made(&there)), (1, 2));
        assert!(!here.set(1 << 34) && !here.get(1 << 34) && Bits::new(0).among(0) == 0);
    }
}
