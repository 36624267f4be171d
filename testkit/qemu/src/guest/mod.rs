//! A guest without an operating system: machine code in an ELF file that QEMU starts with `-kernel` (through the PVH
//! entry, on pc, q35 and microvm).
//!
//! It fills its memory with a pattern that depends on nothing but the address ([`Plan::word`]), then checks it for
//! ever and counts the passes. It takes no interrupts, unless the plan [says so](Plan::ticks), and writes no memory but
//! its [status page](STATUS) and its stacks. Bytes that arrive at its serial port are orders:
//!
//! | byte | what it does | what it answers |
//! |---|---|---|
//! | `?` | | `? passes errors` |
//! | `s` | stands still: writes nothing to memory, unless an interrupt comes, until `g` | `s passes errors` |
//! | `g` | goes on | `g passes errors` |
//! | `h` | halts its (one) processor for good, as an idle guest does | `h passes errors` |
//!
//! Both numbers are hexadecimal; a line feed ends the answer. When it has filled its memory it says `r passes errors`
//! by itself.

mod code;
mod disk;
mod elf;
mod program;
mod status;
mod ticks;

pub use status::Status;

/// Guest-physical address of the page that the guest itself writes.
pub const STATUS: u64 = 0x13_0000;
/// Where it counts its interrupts.
pub(crate) const TICKS: u64 = STATUS + status::field::TICKS as u64;
/// Where the stacks lie: a page for each processor.
pub const STACKS: u64 = 0x14_0000;
/// The most processors it uses.
pub const MOST_CPUS: u64 = 4;
/// The lowest address of a range of [`Plan::ranges`].
pub const LOWEST: u64 = 0x20_0000;

/// The guest-physical memory that the guest itself changes once it is ready, then that of the firmware, which changes
/// too under KVM.
pub const CHANGING: [(u64, u64); 4] =
    [(STATUS, STATUS + 4096), (STACKS, STACKS + 4096 * MOST_CPUS), (0xe_0000, 0x10_0000), (0xfffe_0000, 0x1_0000_0000)];

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Fills memory with the pattern and checks it for ever.
    Check,
    /// Writes the number of the pass into the first word of each page, in ascending order, for ever: in a picture of
    /// one instant the numbers never rise with the address, and fall once at most, by one.
    Generations,
}

/// A guest, before it is built.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What it does.
    pub work: Work,
    /// The guest-physical memory it uses, in bytes, page-aligned: at most four ranges, none below [`LOWEST`].
    pub ranges: Vec<(u64, u64)>,
    /// Of each `stride` pages ...
    pub stride: u64,
    /// ... the first `stored` have content; the others stay zero.
    pub stored: u64,
    /// The distance of the words that it compares, in bytes: a multiple of 8 that divides 4096.
    pub step: u64,
    /// How many processors it starts, at most [`MOST_CPUS`].
    pub cpus: u64,
    /// With [`Work::Generations`]: it also writes the number of each pass to the first sector of the first IDE disk (of a
    /// pc), before it begins the pass, and counts an error if it does not find the number of the pass before there.
    pub disk: bool,
    /// The first processor takes an interrupt every 2 ms. Each is looked up in a page of its own: the next of this
    /// guest-physical memory, in bytes, page-aligned, below 2 GiB, and not in the ranges. While that page is missing QEMU
    /// (without KVM) waits for it, and holds its main thread up.
    pub ticks: Option<(u64, u64)>,
}

impl Plan {
    /// A guest that checks the memory from [`LOWEST`] to `end`, a quarter of which stays zero.
    #[must_use]
    pub fn check(end: u64) -> Plan {
        Plan {
            work: Work::Check,
            ranges: vec![(LOWEST, end)],
            stride: 8,
            stored: 6,
            step: 64,
            cpus: 1,
            disk: false,
            ticks: None,
        }
    }

    /// The ELF file.
    ///
    /// # Panics
    /// If the plan contradicts itself.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        assert!(self.ranges.len() <= 4 && (1..=MOST_CPUS).contains(&self.cpus));
        assert!(self.ranges.iter().all(|(start, end)| *start >= LOWEST && start < end && (start | end) % 4096 == 0));
        assert!(self.ticks.is_none_or(|(start, end)| start >= LOWEST && start < end && (start | end) % 4096 == 0));
        assert!(self.step.is_multiple_of(8) && 4096 % self.step == 0 && self.stride > 0);
        elf::wrap(&code::image(self))
    }

    /// Whether the page that holds this address has content.
    #[must_use]
    pub fn is_stored(&self, address: u64) -> bool {
        let used = self.ranges.iter().any(|(start, end)| (*start..*end).contains(&address));
        used && (address >> 12) % self.stride < self.stored
    }

    /// The eight bytes at `address` (little endian) once memory is filled.
    #[must_use]
    pub fn word(address: u64) -> u64 {
        address.wrapping_mul(code::MIX) ^ code::SEED
    }
}
