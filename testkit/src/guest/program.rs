//! What a vCPU is to do: the parameters, and how the guest finds them in memory.

/// The order in which the units of memory are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Every `n`th unit, around and around; 1 is sequential. Visits each unit once per round if `n` and the number of
    /// units have no common divisor. Less than the number of units.
    Stride(u64),
    /// Each unit once per round, in an order that looks random: a linear congruential generator of full period.
    Random,
}

/// What is done with a unit. `k` is the number of the step, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Its first word is read.
    Read,
    /// Its first 8-byte words are set to `seed + k`: a generation number.
    Write {
        /// How many words; at least 1, and not more than fit into a unit.
        words: u64,
    },
    /// `k` is added to its first word, atomically.
    Add,
}

/// The work of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where in the window the vCPU's part begins, in bytes.
    pub start: u64,
    /// log2 of the size of a unit in bytes; at least 3.
    pub unit_shift: u32,
    /// How many units the part has; at least 1.
    pub units: u64,
    /// The order of visits.
    pub pattern: Pattern,
    /// What to do with each.
    pub operation: Operation,
    /// After how many steps it is done.
    pub steps: u64,
    /// How many steps lie between two [`Signal::Progress`](super::Signal::Progress); 0 for none.
    pub report_every: u64,
    /// What makes two equal programs differ: the first checksum, the values written, the random order.
    pub seed: u64,
}

/// Parameter words, in 8-byte words from the start of the program page.
pub(super) mod word {
    pub(crate) const BASE: usize = 0;
    pub(crate) const UNIT_SHIFT: usize = 1;
    pub(crate) const UNITS: usize = 2;
    pub(crate) const PATTERN: usize = 3;
    pub(crate) const INCREMENT: usize = 4;
    pub(crate) const MULTIPLIER: usize = 5;
    pub(crate) const MASK: usize = 6;
    pub(crate) const FOLD: usize = 7;
    pub(crate) const OPERATION: usize = 8;
    pub(crate) const WORDS: usize = 9;
    pub(crate) const STEPS: usize = 10;
    pub(crate) const REPORT_EVERY: usize = 11;
    pub(crate) const FIRST: usize = 12;
    pub(crate) const SEED: usize = 13;
    pub(crate) const SEED_HIGH: usize = 14;
    pub(crate) const COUNT: usize = 15;
}

/// The multiplier of the random order: 5 modulo 8, as full period modulo a power of two needs.
const MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;

impl Program {
    /// A walk over all of `bytes` of the window, page by page, that writes each first word once.
    #[must_use]
    pub fn write_all(bytes: u64) -> Program {
        let units = bytes >> 12;
        Program {
            start: 0,
            unit_shift: 12,
            units,
            pattern: Pattern::Stride(1),
            operation: Operation::Write { words: 1 },
            steps: units,
            report_every: 0,
            seed: 1,
        }
    }

    /// The words that the guest reads.
    ///
    /// # Panics
    /// If the parameters are not what their documentation asks for.
    pub(super) fn encode(&self) -> [u64; word::COUNT] {
        assert!(self.unit_shift >= 3 && self.units >= 1 && self.start.is_multiple_of(8), "{self:?}");
        let mask = self.units.next_power_of_two() - 1;
        let mut words = [0; word::COUNT];
        words[word::BASE] = super::layout::WINDOW + self.start;
        words[word::UNIT_SHIFT] = u64::from(self.unit_shift);
        words[word::UNITS] = self.units;
        words[word::MULTIPLIER] = MULTIPLIER;
        words[word::MASK] = mask;
        words[word::FOLD] = u64::from(mask.count_ones().div_ceil(2).max(1));
        words[word::STEPS] = self.steps;
        words[word::REPORT_EVERY] = self.report_every;
        words[word::SEED] = self.seed;
        words[word::SEED_HIGH] = !self.seed;
        match self.pattern {
            Pattern::Stride(stride) => {
                assert!(stride < self.units || self.units == 1, "{self:?}");
                words[word::INCREMENT] = if self.units == 1 { 0 } else { stride };
                words[word::FIRST] = 0;
            }
            Pattern::Random => {
                words[word::PATTERN] = 1;
                words[word::INCREMENT] = self.seed | 1;
                words[word::FIRST] = self.seed & mask;
            }
        }
        match self.operation {
            Operation::Read => {}
            Operation::Write { words: count } => {
                assert!(count >= 1 && count <= (1 << self.unit_shift) / 8, "{self:?}");
                words[word::OPERATION] = 1;
                words[word::WORDS] = count;
            }
            Operation::Add => words[word::OPERATION] = 2,
        }
        words
    }
}
