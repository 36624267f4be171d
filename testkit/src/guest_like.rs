//! Content that compresses as a guest's memory does, and can be computed again for any page.
//!
//! Pages of a kind lie together, 32 at a time. The kinds alternate:
//!
//! | share | kind | made of |
//! |---|---|---|
//! | 7 % | random | random bytes: keys, compressed files |
//! | 27 % | text | words of a vocabulary, the frequent ones more often |
//! | 32 % | records | 64 bytes each: pointers into one heap, small numbers, flags, zeros |
//! | 24 % | code | instructions of a few forms with operands that differ |
//! | 10 % | sparse | a few small numbers in zeros |
//!
//! All pages share the vocabulary, the forms and the heap, so larger frames compress better, as they do with real
//! memory. The shares are chosen so that `zstd -3` of all pages in one frame reaches a ratio of 2.6 to 3.0, which a test
//! checks.

use page_units::PAGE_SIZE;

/// Length of a page.
const PAGE: usize = 4096;
/// How many pages of a kind lie together.
const TOGETHER: u64 = 32;
/// How many words the vocabulary has.
const WORDS: u64 = 1024;
/// How many forms of instructions there are.
const FORMS: u64 = 256;

/// Memory of a guest that never was.
#[derive(Clone, Copy, Debug)]
pub struct GuestLike {
    seed: u64,
}

impl GuestLike {
    /// Another seed gives other content, which compresses alike.
    #[must_use]
    pub fn new(seed: u64) -> GuestLike {
        GuestLike { seed }
    }

    /// The content of page `number`. Never all zero.
    #[must_use]
    pub fn page(&self, number: u64) -> [u8; PAGE] {
        let mut random = Random(mix(self.seed ^ mix(number)));
        let mut page = [0; PAGE];
        // 61 and 100 have no common divisor: of 100 clusters each kind has exactly its share.
        match (number / TOGETHER % 100 * 61 + self.seed % 100) % 100 {
            0..7 => fill(&mut page, || random.next().to_le_bytes()),
            7..34 => text(&mut page, self.seed, &mut random),
            34..66 => records(&mut page, &mut random),
            66..90 => code(&mut page, self.seed, &mut random),
            _ => sparse(&mut page, &mut random),
        }
        page
    }
}

fn fill(page: &mut [u8; PAGE], mut next: impl FnMut() -> [u8; 8]) {
    for part in page.chunks_exact_mut(8) {
        part.copy_from_slice(&next());
    }
}

fn text(page: &mut [u8; PAGE], seed: u64, random: &mut Random) {
    let mut at = 0;
    while at < PAGE {
        // The smaller of three numbers: low ones are frequent.
        let word = (0..3).map(|_| random.below(WORDS)).min().unwrap_or(0);
        let mut letters = Random(mix(seed ^ (word << 20)));
        for _ in 0..3 + letters.below(8) {
            put(page, &mut at, &[b'a' + low(letters.below(26))]);
        }
        put(page, &mut at, if random.below(9) == 0 { b".\n" } else { b" " });
    }
}

fn records(page: &mut [u8; PAGE], random: &mut Random) {
    for record in page.chunks_exact_mut(64) {
        for (slot, part) in record.chunks_exact_mut(8).enumerate() {
            let value = match slot {
                0 | 3 => 0x7f3a_5000_0000 + random.below(1 << 13) * 64,
                1 => random.below(256),
                2 => random.below(4) << 32 | random.below(2),
                4 if random.below(12) == 0 => random.next() >> 24,
                6 => 0xffff_8880_0000_0000 + random.below(1 << 9) * 4096,
                _ => 0,
            };
            part.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn code(page: &mut [u8; PAGE], seed: u64, random: &mut Random) {
    let mut at = 0;
    while at < PAGE {
        let form = random.below(FORMS).min(random.below(FORMS));
        let mut opcode = Random(mix(seed ^ (form << 40)));
        let length = 2 + low(opcode.below(4));
        put(page, &mut at, &opcode.next().to_le_bytes()[..usize::from(length)]);
        match opcode.below(4) {
            0 => put(page, &mut at, &[low(random.below(256))]),
            1 => put(page, &mut at, &(0xffff_0000 + random.below(1 << 12) * 16).to_le_bytes()[..4]),
            _ => {}
        }
    }
}

fn sparse(page: &mut [u8; PAGE], random: &mut Random) {
    page[0] = 1;
    for _ in 0..40 {
        let at = usize::try_from(random.below(PAGE_SIZE)).unwrap_or(0);
        page[at] = low(random.below(256));
    }
}

/// Copies as much of `bytes` as fits into the page.
fn put(page: &mut [u8; PAGE], at: &mut usize, bytes: &[u8]) {
    let length = bytes.len().min(PAGE - *at);
    page[*at..*at + length].copy_from_slice(&bytes[..length]);
    *at += length;
}

/// A number below 256 as a byte.
fn low(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Numbers that follow from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_compresses_as_real_memory_does() {
        for seed in [1, 2] {
            let memory: Vec<u8> = (0..6400).flat_map(|number| GuestLike::new(seed).page(number)).collect();
            let one = zstd::bulk::compress(&memory, 3).unwrap().len();
            let ratio = memory.len() as f64 / one as f64;
            assert!((2.6..3.0).contains(&ratio), "one frame: {ratio}");
            // Smaller frames compress less, as measured with real memory: 4 KiB by 15 to 25 %, 64 KiB by 4 to 7 %.
            let frames = |size| -> usize {
                memory.chunks(size).map(|frame| zstd::bulk::compress(frame, 3).unwrap().len()).sum()
            };
            let (pages, large) = (frames(PAGE) as f64 / one as f64, frames(64 << 10) as f64 / one as f64);
            assert!((1.1..1.35).contains(&pages) && (1.01..1.1).contains(&large), "{pages}, {large}");
        }
    }

    #[test]
    fn a_page_is_the_same_each_time_and_never_zero() {
        let memory = GuestLike::new(7);
        for number in 0..500 {
            assert_eq!(memory.page(number), memory.page(number));
            assert!(memory.page(number).iter().any(|byte| *byte != 0));
        }
        assert_ne!(memory.page(1), memory.page(2));
    }
}
