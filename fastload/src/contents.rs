//! Reading parts of a snapshot into memory: errors name the file, and a length that the file made up costs nothing.

use std::io;
use std::ops::Range;

use mapped_ram::{Device, Snapshot, Warning};
use page_units::{ByteLen, FileOffset};
use vmstate::SectionEntry;

use crate::commands::Failure;

/// The most that is read into memory at once. Device state is a few MiB; a sparse file can claim any length.
const MOST: ByteLen = ByteLen(1 << 30);

/// The most state of one device that is decoded: as bytes, and again as text.
pub(crate) const MOST_OF_A_DEVICE: ByteLen = ByteLen(256 << 20);

/// Reads a part of a snapshot that is not RAM.
pub(crate) fn read(snapshot: &Snapshot, range: Range<FileOffset>) -> Result<Vec<u8>, Failure> {
    let (name, at) = (snapshot.path().display(), range.start);
    within(snapshot, at, range.end.0.saturating_sub(at.0), MOST)?;
    snapshot.read(range).map_err(|error| format!("{name}: reading device state at offset {at} failed: {error}").into())
}

/// That the state of these devices together is no more than can be decoded.
pub(crate) fn check_total(snapshot: &Snapshot, entries: &[&SectionEntry]) -> Result<(), Failure> {
    let length = |entry: &&SectionEntry| entry.body.end.0.saturating_sub(entry.body.start.0);
    let total = entries.iter().map(length).fold(0, u64::saturating_add);
    let at = entries.first().map(|entry| entry.body.start).unwrap_or_default();
    within(snapshot, at, total, MOST_OF_A_DEVICE)
}

/// [`Snapshot::device`], and the file's name if that fails.
pub(crate) fn device<'a>(snapshot: &'a Snapshot, entry: &SectionEntry) -> Result<Option<Device<'a>>, Failure> {
    snapshot.device(&entry.name, entry.instance).map_err(|error| unreadable(snapshot, &error))
}

/// [`Snapshot::diagnose`], and the file's name if that fails.
pub(crate) fn diagnose(snapshot: &Snapshot) -> Result<Vec<Warning>, Failure> {
    snapshot.diagnose().map_err(|error| unreadable(snapshot, &error))
}

/// [`Snapshot::changed`], and the file's name if that fails.
pub(crate) fn changed(snapshot: &Snapshot) -> Result<Option<&'static str>, Failure> {
    snapshot.changed().map_err(|error| unreadable(snapshot, &error))
}

fn within(snapshot: &Snapshot, at: FileOffset, length: u64, most: ByteLen) -> Result<(), Failure> {
    if length <= most.0 {
        return Ok(());
    }
    let name = snapshot.path().display();
    Err(format!("{name}: at offset {at}: {length} bytes of device state, more than the limit of {most}").into())
}

fn unreadable(snapshot: &Snapshot, error: &io::Error) -> Failure {
    format!("{}: it can't be read: {error}", snapshot.path().display()).into()
}

#[cfg(test)]
mod tests {
    use testkit::samples;

    use super::*;

    #[test]
    fn errors_name_the_file_and_nothing_large_is_allocated() {
        let dir = tempfile::tempdir().unwrap();
        let sample = samples::stripped().into_iter().find(|sample| sample.name.contains("pc-32-plain")).unwrap();
        let path = sample.unpack(dir.path()).unwrap();
        // Sparse: a terabyte that takes no space.
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        let Ok(snapshot) = Snapshot::open_with(&path, &mapped_ram::Options::default().with_damaged(true)) else {
            panic!("it opens: it is whole, with zeros behind");
        };
        let name = path.display().to_string();
        let claimed = read(&snapshot, FileOffset(4096)..FileOffset(1 << 39)).unwrap_err().to_string();
        assert!(
            claimed.starts_with(&name) && claimed.contains("offset 0x1000") && claimed.contains("limit"),
            "{claimed}"
        );
        let beyond = read(&snapshot, FileOffset(1 << 40)..FileOffset((1 << 40) + 1)).unwrap_err().to_string();
        assert!(beyond.starts_with(&name) && beyond.contains("0x10000000000"), "{beyond}");
        assert_eq!(read(&snapshot, FileOffset(0)..FileOffset(4)).unwrap(), b"QEVM");
    }
}
