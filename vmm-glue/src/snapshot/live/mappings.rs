//! How this process maps the guest's memory: no write protection catches what is written through another mapping.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::{major, minor};
use page_units::{ByteLen, GuestAddr, HostAddr};

use crate::ram::GuestRam;

/// A file as `/proc/self/maps` names it: device and inode.
type FileId = (u64, u64, u64);

/// The part of a file that the guest sees, and where.
#[derive(Debug)]
struct Part {
    file: FileId,
    offsets: Range<u64>,
    guest: GuestAddr,
}

/// Memory of the guest that something in this process can write to besides.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Other {
    /// The first of the guest's addresses there.
    pub(super) guest: GuestAddr,
    /// Where it is mapped.
    pub(super) mapped: Range<HostAddr>,
}

/// Looks for a mapping of the guest's shared memory that is neither the guest's own nor known to be written only while
/// pages are missing. About 0.1 ms for a thousand mappings.
pub(super) fn other(ram: &GuestRam) -> io::Result<Option<Other>> {
    let mut parts = Vec::new();
    for (number, piece) in ram.pieces().iter().enumerate() {
        if let Some((file, offset)) = ram.file_of(number).filter(|_| piece.shared) {
            let of = file.metadata()?;
            let offsets = offset..offset.saturating_add(piece.run.len().0);
            parts.push(Part { file: (major(of.dev()), minor(of.dev()), of.ino()), offsets, guest: piece.guest });
        }
    }
    if parts.is_empty() {
        return Ok(None);
    }
    let maps = std::fs::read("/proc/self/maps")?;
    find(&String::from_utf8_lossy(&maps), &parts, ram.mapped())
}

fn find(maps: &str, parts: &[Part], mut own: Vec<Range<HostAddr>>) -> io::Result<Option<Other>> {
    own.sort_unstable_by_key(|range| range.start);
    for line in maps.lines() {
        let mapping = Mapping::parse(line).ok_or(io::ErrorKind::InvalidData)?;
        if !mapping.writes_to_file {
            continue;
        }
        // The kernel shows mappings side by side as one if the file goes on there: what is left between ours counts.
        for left in without(mapping.range.clone(), &own) {
            let from = mapping.offset + (left.start - mapping.range.start).0;
            let to = from + (left.end - left.start).0;
            for part in parts.iter().filter(|part| part.file == mapping.file) {
                let (first, end) = (from.max(part.offsets.start), to.min(part.offsets.end));
                if first < end {
                    let at = |offset: u64| left.start + ByteLen(offset - from);
                    let guest = part.guest + ByteLen(first - part.offsets.start);
                    return Ok(Some(Other { guest, mapped: at(first)..at(end) }));
                }
            }
        }
    }
    Ok(None)
}

/// The parts of a range that are in none of the others, which are sorted.
fn without(range: Range<HostAddr>, others: &[Range<HostAddr>]) -> Vec<Range<HostAddr>> {
    let mut left = Vec::new();
    let mut at = range.start;
    for other in others.iter().filter(|other| other.start < range.end && other.end > range.start) {
        if at < other.start {
            left.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// A line of `/proc/self/maps` (proc_pid_maps(5)).
struct Mapping {
    range: Range<HostAddr>,
    /// Writable and shared: what is written there is written to the file.
    writes_to_file: bool,
    offset: u64,
    file: FileId,
}

impl Mapping {
    fn parse(line: &str) -> Option<Mapping> {
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let rights = fields.next()?.as_bytes();
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        Some(Mapping {
            range: HostAddr(hex(start)?)..HostAddr(hex(end)?),
            writes_to_file: rights.get(1)? == &b'w' && rights.get(3)? == &b's',
            offset,
            file: (hex(major)?, hex(minor)?, inode),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "7f0000000000-7f0000400000 rw-s 00000000 00:01 77   /memfd:ram (deleted)";

    /// Four MiB of a memfd from its first MiB on, which the guest sees at 16 MiB, and what is mapped besides.
    fn found(lines: &[&str]) -> Option<Other> {
        let part = Part { file: (0, 1, 77), offsets: 1 << 20..5 << 20, guest: GuestAddr(16 << 20) };
        let own = vec![HostAddr(0x7f00_0000_0000)..HostAddr(0x7f00_0040_0000)];
        find(&lines.join("\n"), &[part], own).unwrap()
    }

    #[test]
    fn only_what_can_write_to_the_guest_counts() {
        let harmless = [
            OURS,
            // Read only, private, another file, another device, the first MiB, and what is behind the guest's part.
            "7f0000500000-7f0000600000 r--s 00100000 00:01 77   /memfd:ram (deleted)",
            "7f0000600000-7f0000700000 rw-p 00100000 00:01 77   /memfd:ram (deleted)",
            "7f0000700000-7f0000800000 rw-s 00100000 00:01 78   /memfd:ram (deleted)",
            "7f0000800000-7f0000900000 rw-s 00100000 08:01 77   /a disk's name",
            "7f0000900000-7f0000a00000 rw-s 00000000 00:01 77   /memfd:ram (deleted)",
            "7f0000a00000-7f0000b00000 rw-s 00500000 00:01 77   /memfd:ram (deleted)",
            "7ffd1c5e4000-7ffd1c605000 rw-p 00000000 00:00 0    [stack]",
            "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]",
        ];
        assert_eq!(found(&harmless), None);
        let mut lines = harmless.to_vec();
        lines.push("7f0000c00000-7f0000e00000 -w-s 00000000 00:01 77   /memfd:ram (deleted)");
        // The second MiB of that is the guest's.
        let mapped = HostAddr(0x7f00_00d0_0000)..HostAddr(0x7f00_00e0_0000);
        assert_eq!(found(&lines), Some(Other { guest: GuestAddr(16 << 20), mapped }));
        assert!(find("7f00 rw-s", &[], Vec::new()).is_err());
    }

    #[test]
    fn what_lies_beside_the_guests_mapping_is_not_the_guests() {
        // As the kernel shows a second mapping that begins where ours ends, and goes on with the file; and before it.
        let behind = ["7f0000000000-7f0000500000 rw-s 00000000 00:01 77 /memfd:ram (deleted)"];
        let mapped = HostAddr(0x7f00_0040_0000)..HostAddr(0x7f00_0050_0000);
        assert_eq!(found(&behind), Some(Other { guest: GuestAddr(19 << 20), mapped }));
        let before = ["7effffe00000-7f0000400000 rw-s 00000000 00:01 77 /memfd:ram (deleted)"];
        let mapped = HostAddr(0x7eff_fff0_0000)..HostAddr(0x7f00_0000_0000);
        assert_eq!(found(&before), Some(Other { guest: GuestAddr(16 << 20), mapped }));
        // Ours, in the pieces that other rights or other advice make of it.
        let pieces = [
            "7f0000000000-7f0000200000 rw-s 00100000 00:01 77 /memfd:ram (deleted)",
            "7f0000200000-7f0000400000 rw-s 00300000 00:01 77 /memfd:ram (deleted)",
        ];
        assert_eq!(found(&pieces), None);
    }
}
