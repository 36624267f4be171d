//! All RAM of a stopped guest, compared byte for byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::blocks::Hidden;

/// The RAM of a guest at one moment, in files.
#[derive(Debug)]
pub struct RamDump {
    /// Guest-physical ranges and a file for each.
    pub(crate) ranges: Vec<((u64, u64), File)>,
    /// What the guest does not see there.
    pub(crate) hidden: Hidden,
}

impl RamDump {
    /// The content of the block whose name ends so, if it is one of those that the guest does not see in its RAM.
    #[must_use]
    pub fn block(&self, name: &str) -> Option<&[u8]> {
        self.hidden.block(name)
    }

    /// The bytes at `address`.
    ///
    /// # Errors
    /// If they are not all RAM, or the file can't be read.
    pub fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        let end = address + into.len() as u64;
        for ((first, last), file) in &self.ranges {
            if *first <= address && end <= *last {
                return file.read_exact_at(into, address - first);
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, format!("{address:#x} is not RAM")))
    }
}

/// The first block (or what is hidden of the main memory, outside of the `ignored` ranges) that differs: video memory, ROMs
/// of devices, firmware; blocks whose names end as one of `ignored_blocks` are left out. `None` if the dumps have the same.
#[must_use]
pub fn first_hidden_difference(
    a: &RamDump,
    b: &RamDump,
    ignored: &[(u64, u64)],
    ignored_blocks: &[&str],
) -> Option<String> {
    a.hidden.first_difference(&b.hidden, ignored, ignored_blocks)
}

/// Copies a file into another, at `offset`, and leaves holes there where it is zero.
pub(crate) fn copy_sparse(from: &File, to: &File, offset: u64) -> io::Result<()> {
    const CHUNK: usize = 64 << 10;
    let (mut chunk, zeros) = (vec![0; CHUNK], vec![0; CHUNK]);
    let length = from.metadata()?.len();
    for at in (0..length).step_by(CHUNK) {
        let n = usize::try_from(length - at).map_or(CHUNK, |left| left.min(CHUNK));
        from.read_exact_at(&mut chunk[..n], at)?;
        if chunk[..n] != zeros[..n] {
            to.write_all_at(&chunk[..n], offset + at)?;
        }
    }
    Ok(())
}

/// The first guest-physical address where the dumps differ, outside of the `ignored` ranges.
///
/// # Errors
/// If a file can't be read, or the dumps cover different ranges.
pub fn first_difference(a: &RamDump, b: &RamDump, ignored: &[(u64, u64)]) -> io::Result<Option<u64>> {
    const CHUNK: usize = 1 << 20;
    if a.ranges.len() != b.ranges.len() {
        return Err(io::Error::other("the dumps cover different ranges"));
    }
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    for (((first, last), file), (other, other_file)) in a.ranges.iter().zip(&b.ranges) {
        if (*first, *last) != *other {
            return Err(io::Error::other("the dumps cover different ranges"));
        }
        let mut at = *first;
        while at < *last {
            let n = usize::try_from(last - at).map_or(CHUNK, |left| left.min(CHUNK));
            file.read_exact_at(&mut left[..n], at - first)?;
            other_file.read_exact_at(&mut right[..n], at - first)?;
            if left[..n] != right[..n] {
                let differ = (0..n).filter(|i| left[*i] != right[*i]).map(|i| at + i as u64);
                let mut outside = differ.filter(|byte| !ignored.iter().any(|(from, to)| (from..to).contains(&byte)));
                if let Some(byte) = outside.next() {
                    return Ok(Some(byte));
                }
            }
            at += n as u64;
        }
    }
    Ok(None)
}
