//! The same guest in plain Rust: what the counter, the checksum and every byte of memory must be after a number of steps.

use std::fmt::{self, Debug};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::report::word as report;
use super::{GuestImage, Memory, Operation, Pattern, Program, layout};

/// What one step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number, from 1 on.
    pub number: u64,
    /// Where in the window the unit begins, in bytes.
    pub offset: u64,
}

/// The walk of one program, step by step.
#[derive(Clone, Debug)]
pub struct Walker {
    program: Program,
    position: u64,
    counter: u64,
    checksum: u64,
    signals: u64,
}

impl Walker {
    /// At the beginning.
    #[must_use]
    pub fn new(program: Program) -> Walker {
        let mask = program.units.next_power_of_two() - 1;
        let position = match program.pattern {
            Pattern::Stride(_) => 0,
            Pattern::Random => program.seed & mask,
        };
        Walker { program, position, counter: 0, checksum: program.seed, signals: 0 }
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Steps done.
    #[must_use]
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// The checksum over them.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Whether all steps are done.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.counter >= self.program.steps
    }

    fn unit(&mut self) -> u64 {
        let units = self.program.units;
        match self.program.pattern {
            Pattern::Stride(stride) => {
                let unit = self.position;
                self.position = if unit + stride >= units && units > 1 {
                    unit + stride - units
                } else if units > 1 {
                    unit + stride
                } else {
                    0
                };
                unit
            }
            Pattern::Random => {
                let mask = units.next_power_of_two() - 1;
                let fold = mask.count_ones().div_ceil(2).max(1);
                loop {
                    self.position = self.position.wrapping_mul(0x5851_f42d_4c95_7f2d);
                    self.position = self.position.wrapping_add(self.program.seed | 1) & mask;
                    let unit = self.position ^ (self.position >> fold);
                    if unit < units {
                        return unit;
                    }
                }
            }
        }
    }

    /// Does the next step on `memory`, which reads and writes words at an offset of the window. `None` when finished.
    pub fn step(&mut self, memory: &mut impl WindowWords) -> Option<Step> {
        if self.finished() {
            return None;
        }
        let offset = self.program.start + (self.unit() << self.program.unit_shift);
        let number = self.counter + 1;
        let value = match self.program.operation {
            Operation::Read => memory.read(offset),
            Operation::Write { words } => {
                let value = number.wrapping_add(self.program.seed);
                for word in 0..words {
                    memory.write(offset + 8 * word, value);
                }
                value
            }
            Operation::Add => {
                let value = memory.read(offset);
                memory.write(offset, value.wrapping_add(number));
                value
            }
        };
        self.checksum = (self.checksum.rotate_left(5) ^ value).wrapping_add(self.counter);
        self.counter = number;
        if self.program.report_every != 0 && number.is_multiple_of(self.program.report_every) {
            self.signals += 1;
        }
        Some(Step { number, offset })
    }
}

/// The window, word by word.
pub trait WindowWords {
    /// The word at `offset`, in bytes.
    fn read(&self, offset: u64) -> u64;
    /// Sets it.
    fn write(&mut self, offset: u64, value: u64);
}

impl WindowWords for Vec<u8> {
    fn read(&self, offset: u64) -> u64 {
        let at = index(offset);
        u64::from_le_bytes(self[at..at + 8].try_into().expect("8 bytes"))
    }
    fn write(&mut self, offset: u64, value: u64) {
        let at = index(offset);
        self[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("memory fits usize")
}

/// A copy of all memory, and what the guest would do to it.
#[derive(Clone)]
pub struct Oracle {
    /// All regions, one after the other: first the boot area, then the window.
    bytes: Vec<u8>,
    regions: Vec<(u64, u64)>,
    vcpus: u8,
}

impl Debug for Oracle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Oracle").field("regions", &self.regions).finish_non_exhaustive()
    }
}

/// The window inside the copy.
struct Window<'a>(&'a mut Vec<u8>);

impl WindowWords for Window<'_> {
    fn read(&self, offset: u64) -> u64 {
        self.0.read(layout::BOOT_LEN + offset)
    }
    fn write(&mut self, offset: u64, value: u64) {
        self.0.write(layout::BOOT_LEN + offset, value);
    }
}

impl Oracle {
    /// Copies memory as it is now. Take it after the programs were written and before they start, or of a stopped
    /// guest.
    ///
    /// # Panics
    /// If memory can't be read.
    #[must_use]
    pub fn capture<B: Bitmap>(image: &GuestImage, memory: &Memory<B>) -> Oracle {
        let regions: Vec<(u64, u64)> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let mut bytes = vec![0; index(regions.iter().map(|&(_, len)| len).sum())];
        let mut rest = bytes.as_mut_slice();
        for &(start, len) in &regions {
            let (region, others) = rest.split_at_mut(index(len));
            memory.read_slice(region, GuestAddress(start)).expect("RAM can be read");
            rest = others;
        }
        Oracle { bytes, regions, vcpus: image.config().vcpus }
    }

    /// Does steps of `walker` on the copy, on behalf of `vcpu`, until its counter is `counter` or it is finished.
    pub fn advance(&mut self, vcpu: u8, walker: &mut Walker, counter: u64) {
        let mut window = Window(&mut self.bytes);
        while walker.counter < counter && walker.step(&mut window).is_some() {}
        let done = walker.finished();
        let page = layout::report_page(vcpu);
        let mut set = |word: usize, value: u64| self.bytes.write(page + 8 * word as u64, value);
        set(report::COUNTER, walker.counter);
        set(report::CHECKSUM, walker.checksum);
        set(report::STATE, 1 + u64::from(done));
        set(report::STAMPED, 1 + walker.signals + u64::from(done));
        if done {
            set(report::SSE, walker.program.seed);
            set(report::SSE + 1, !walker.program.seed);
        }
    }

    /// A vCPU gets other work, as [`GuestImage::write_program`] gives it.
    pub fn write_program(&mut self, vcpu: u8, program: &Program) {
        let at = index(layout::program_page(vcpu));
        let bytes: Vec<u8> = program.encode().into_iter().flat_map(u64::to_le_bytes).collect();
        self.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    /// Compares all memory with the copy, but for the guest's time stamps.
    ///
    /// # Errors
    /// With the first page that differs, and how many do.
    pub fn compare<B: Bitmap>(&self, memory: &Memory<B>) -> Result<(), String> {
        self.differences(memory, |address| {
            (0..self.vcpus).any(|vcpu| {
                let page = layout::report_page(vcpu);
                (page + 8 * report::STAMPS as u64..page + 0x1000).contains(&address)
            })
        })
    }

    /// Compares all memory with the copy, without exception.
    ///
    /// # Errors
    /// With the first page that differs, and how many do.
    pub fn compare_exactly<B: Bitmap>(&self, memory: &Memory<B>) -> Result<(), String> {
        self.differences(memory, |_| false)
    }

    fn differences<B: Bitmap>(&self, memory: &Memory<B>, excused: impl Fn(u64) -> bool) -> Result<(), String> {
        let mut page = [0; 4096];
        let mut expected = self.bytes.as_chunks::<4096>().0.iter();
        let mut first = None;
        let mut pages = 0u64;
        for &(start, len) in &self.regions {
            for address in (start..start + len).step_by(page.len()) {
                let expected = expected.next().expect("a copy of each page");
                memory.read_slice(&mut page, GuestAddress(address)).map_err(|error| error.to_string())?;
                if page == *expected {
                    continue;
                }
                let differs = (address..).zip(page.iter().zip(expected)).find(|(at, (a, b))| a != b && !excused(*at));
                if let Some((at, (got, expected))) = differs {
                    pages += 1;
                    first.get_or_insert_with(|| format!("{at:#x}: {got:#04x} instead of {expected:#04x}"));
                }
            }
        }
        first.map_or(Ok(()), |first| Err(format!("{pages} pages differ, the first at guest-physical {first}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visits(pattern: Pattern, units: u64) -> Vec<u64> {
        let program = Program {
            start: 0,
            unit_shift: 3,
            units,
            pattern,
            operation: Operation::Write { words: 1 },
            steps: units,
            report_every: 0,
            seed: 99,
        };
        let mut memory = vec![0; index(units * 8)];
        let mut walker = Walker::new(program);
        std::iter::from_fn(|| walker.step(&mut memory)).map(|step| step.offset / 8).collect()
    }

    #[test]
    fn each_pattern_visits_each_unit_once() {
        for (pattern, units) in [
            (Pattern::Stride(1), 100),
            (Pattern::Stride(7), 100),
            (Pattern::Random, 1),
            (Pattern::Random, 2),
            (Pattern::Random, 100),
            (Pattern::Random, 128),
            (Pattern::Random, 1 << 14),
        ] {
            let mut seen = visits(pattern, units);
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..units), "{pattern:?} over {units}: {seen:?}");
        }
        assert_ne!(visits(Pattern::Random, 128)[..3], [0, 1, 2]);
    }
}
