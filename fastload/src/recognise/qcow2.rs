//! The saved states that are inside a qcow2 image (`savevm`).
//!
//! QEMU `docs/interop/qcow2.rst`, "Header" and "Snapshots". All numbers are big-endian.

/// The most that are named.
const MOST: u32 = 4;

/// Where the list of internal snapshots begins, if the file is a qcow2 image that has any.
pub(super) fn states_at(head: &[u8]) -> Option<u64> {
    (head.starts_with(b"QFI\xfb") && number32(head, 60)? > 0).then(|| number64(head, 64)).flatten()
}

/// How many internal snapshots the image has, and the names of those that hold the state of a VM, as far as they are in
/// the part of the list that was read.
pub(super) fn snapshots(header: &[u8], head: &[u8]) -> (u32, Vec<String>) {
    let count = number32(header, 60).unwrap_or(0);
    let mut at = Some(0);
    let mut names = Vec::new();
    for _ in 0..count.min(MOST) {
        let Some((name, next)) = at.and_then(|at| entry(head, at)) else { break };
        names.extend(name);
        at = Some(next);
    }
    (count, names)
}

/// The name of a snapshot that has VM state (if people can type it), and where the next entry begins.
fn entry(head: &[u8], at: usize) -> Option<(Option<String>, usize)> {
    let length16 = |offset: usize| number16(head, at.checked_add(offset)?).map(usize::from);
    let (id, name) = (length16(12)?, length16(14)?);
    let state = number32(head, at.checked_add(32)?)?;
    let extra = usize::try_from(number32(head, at.checked_add(36)?)?).ok()?;
    let begin = at.checked_add(40)?.checked_add(extra)?.checked_add(id)?;
    let end = begin.checked_add(name)?;
    let text = String::from_utf8_lossy(head.get(begin..end)?).into_owned();
    // From version 3 on the size is in the extra data as well, with 64 bits.
    let large = if extra >= 8 { number64(head, at.checked_add(40)?) } else { None };
    let has_state = state > 0 || large.unwrap_or(0) > 0;
    let typed = !text.chars().any(char::is_control);
    Some(((has_state && typed).then_some(text), end.checked_next_multiple_of(8)?))
}

fn number16(head: &[u8], at: usize) -> Option<u16> {
    head.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_be_bytes)
}

fn number32(head: &[u8], at: usize) -> Option<u32> {
    head.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}

fn number64(head: &[u8], at: usize) -> Option<u64> {
    head.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_be_bytes)
}
