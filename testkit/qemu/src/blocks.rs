//! RAM that the guest does not see at its place: video memory, ROMs of devices, what lies under the firmware's windows.
//! Taken from the memory of the QEMU process, where QMP says that it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The guest-physical range below 1 MiB where the machine shows devices and firmware instead of its RAM, or either.
const WINDOWS: (u64, u64) = (0xa_0000, 0x10_0000);

/// The RAM blocks of a QEMU, but of the guest's main memory only what may be hidden.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Hidden {
    /// Name, guest-physical address where the block is main memory, and content.
    blocks: Vec<(String, Option<u64>, Vec<u8>)>,
}

impl Hidden {
    /// Reads them; nothing of a QEMU that does not say where they are (before 8.0). `table` is what QMP's `x-query-ramblock` says; `main` is the name of the main memory.
    pub(crate) fn read(process: u32, table: &str, main: &str) -> io::Result<Hidden> {
        if !table.lines().next().is_some_and(|head| head.contains("HVA")) {
            return Ok(Hidden::default());
        }
        let memory = File::open(format!("/proc/{process}/mem"))?;
        let mut blocks = Vec::new();
        for line in table.lines().skip(1) {
            let (name, used, address) = parse(line).ok_or_else(|| io::Error::other(format!("a block {line:?}")))?;
            let at = (name == main).then_some(WINDOWS.0);
            let (first, last) = if name == main { WINDOWS } else { (0, used) };
            let mut bytes = vec![0; usize::try_from(last - first).map_err(io::Error::other)?];
            memory.read_exact_at(&mut bytes, address + first)?;
            blocks.push((name, at, bytes));
        }
        blocks.sort();
        Ok(Hidden { blocks })
    }

    /// The block whose name ends so.
    pub(crate) fn block(&self, name: &str) -> Option<&[u8]> {
        self.blocks.iter().find(|(other, ..)| other.ends_with(name)).map(|(.., bytes)| bytes.as_slice())
    }

    /// The first block that differs, and where; `None` too if one of them does not say. Main memory only outside of the `ignored` ranges.
    pub(crate) fn first_difference(
        &self,
        other: &Hidden,
        ignored: &[(u64, u64)],
        ignored_blocks: &[&str],
    ) -> Option<String> {
        if self.blocks.is_empty() || other.blocks.is_empty() {
            return None;
        }
        let names = |of: &Hidden| of.blocks.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>();
        if names(self) != names(other) {
            return Some("other blocks".to_owned());
        }
        let compared = self.blocks.iter().zip(&other.blocks);
        let mut compared = compared.filter(|((name, ..), _)| !ignored_blocks.iter().any(|end| name.ends_with(end)));
        compared.find_map(|((name, address, a), (.., b))| {
            if a.len() != b.len() {
                return Some(format!("the length of {name}"));
            }
            let is_ignored = |at: u64| ignored.iter().any(|(first, last)| (*first..*last).contains(&at));
            let mut differ = (0..).zip(a.iter().zip(b)).filter(|(_, (a, b))| a != b);
            let at = differ.find(|(at, _)| !address.is_some_and(|address| is_ignored(address + at)))?.0;
            Some(format!("{name} at {at:#x} of what was taken"))
        })
    }
}

/// A line of the table (QEMU system/physmem.c, `ram_block_format`): name, size of pages, offset, used and total length,
/// address in QEMU, `rw` or `ro`.
fn parse(line: &str) -> Option<(String, u64, u64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let from_end = |n: usize| words.get(words.len().checked_sub(n)?).copied();
    let hex = |n: usize| u64::from_str_radix(from_end(n)?.strip_prefix("0x")?, 16).ok();
    let name = words.get(..words.len().checked_sub(7)?)?.join(" ");
    Some((name, hex(4)?, hex(2)?)).filter(|_| matches!(from_end(1), Some("rw" | "ro")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_is_parsed() {
        let line = "  0000:00:02.0/vga.vram    4 KiB  0x0000000008080000 0x0000000001000000 0x0000000001000000 0x00007f6f9ba00000  rw";
        assert_eq!(parse(line), Some(("0000:00:02.0/vga.vram".to_owned(), 0x100_0000, 0x7f6f_9ba0_0000)));
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn differences_are_named() {
        let blocks = |rom: &[u8], ram: &[u8]| Hidden {
            blocks: vec![("a/rom".into(), None, rom.to_vec()), ("pc.ram".into(), Some(0xa_0000), ram.to_vec())],
        };
        let one = blocks(&[1, 2], &[3, 4]);
        assert_eq!(one.block("rom"), Some(&[1, 2][..]));
        assert_eq!(one.first_difference(&blocks(&[1, 2], &[3, 4]), &[], &[]), None);
        let other = blocks(&[1, 2], &[3, 5]);
        assert!(one.first_difference(&other, &[(0, 0xa_0001)], &[]).unwrap().contains("pc.ram at 0x1"));
        assert_eq!(one.first_difference(&other, &[(0xa_0001, 0xa_0002)], &[]), None);
        // A ROM has no place there.
        assert!(
            one.first_difference(&blocks(&[1, 3], &[3, 4]), &[(0, 1 << 32)], &[]).unwrap().contains("a/rom at 0x1")
        );
        assert_eq!(one.first_difference(&blocks(&[1, 3], &[3, 4]), &[], &["rom"]), None);
        assert!(one.first_difference(&blocks(&[1], &[3, 4]), &[], &[]).unwrap().contains("length of a/rom"));
        assert!(one.first_difference(&Hidden { blocks: one.blocks[1..].to_vec() }, &[], &[]).is_some());
        assert_eq!(one.first_difference(&Hidden::default(), &[], &[]), None);
    }
}
