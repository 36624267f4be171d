//! What the guest tells: through its port, and in its report page.

/// What a byte written to the port means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Another [`report_every`](super::Program::report_every) steps are done.
    Progress,
    /// The program is done. When the vCPU goes on it begins anew, with what the program page holds then.
    Done,
    /// The counter or checksum in memory is not that in the registers: a bad restore.
    Mismatch,
    /// The guest took an exception of this vector.
    Exception(u8),
    /// Something that the guest does not send.
    Unknown(u8),
}

impl Signal {
    pub(super) const PROGRESS: u32 = 1;
    pub(super) const DONE: u32 = 2;
    pub(super) const MISMATCH: u32 = 3;
    pub(super) const EXCEPTION: u32 = 0x80;

    /// From the byte.
    #[must_use]
    pub fn of(byte: u8) -> Signal {
        match byte {
            1 => Signal::Progress,
            2 => Signal::Done,
            3 => Signal::Mismatch,
            0x80..=0x9f => Signal::Exception(byte - 0x80),
            other => Signal::Unknown(other),
        }
    }
}

/// A vCPU's report page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Steps done.
    pub counter: u64,
    /// The checksum over them.
    pub checksum: u64,
    /// 1 while it runs, 2 when it is done.
    pub state: u64,
    /// How many stamps were taken: one at the start, one before each progress signal, one at the end.
    pub stamped: u64,
    /// The last 256 stamps, in ticks of the guest's time stamp counter; number `n` is at `n % 256`.
    pub stamps: Vec<u64>,
    /// What the SSE register held at the end of the last finished program: the seed, and its complement.
    pub sse: [u64; 2],
}

/// Report words, in 8-byte words from the start of the page.
pub(super) mod word {
    pub(crate) const COUNTER: usize = 0;
    pub(crate) const CHECKSUM: usize = 1;
    pub(crate) const STATE: usize = 2;
    pub(crate) const STAMPED: usize = 3;
    pub(crate) const SSE: usize = 4;
    /// From here on nothing can be known beforehand.
    pub(crate) const STAMPS: usize = 32;
    pub(crate) const STAMPS_COUNT: usize = 256;
}

impl Report {
    pub(super) fn parse(page: &[u8]) -> Report {
        let (words, _) = page.as_chunks::<8>();
        let word = |at: usize| u64::from_le_bytes(words[at]);
        Report {
            counter: word(word::COUNTER),
            checksum: word(word::CHECKSUM),
            state: word(word::STATE),
            stamped: word(word::STAMPED),
            stamps: (word::STAMPS..word::STAMPS + word::STAMPS_COUNT).map(word).collect(),
            sse: [word(word::SSE), word(word::SSE + 1)],
        }
    }
}
