//! An ELF file with the note that makes QEMU enter it (Xen public headers `elfnote.h` and `arch-x86/hvm/start_info.h`).

use super::code::{ENTRY, LOAD};

const HEADER: u32 = 52;
const PROGRAM_HEADER: u32 = 32;
const NOTE_AT: u32 = HEADER + 2 * PROGRAM_HEADER;
const CODE_AT: u32 = 0x1000;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// A 32-bit ELF file that loads `image` at [`LOAD`] and enters it at [`ENTRY`].
pub(super) fn wrap(image: &[u8]) -> Vec<u8> {
    let size = u32::try_from(image.len()).expect("a small image");
    let mut note = Vec::new();
    words(&mut note, &[4, 4, PHYS32_ENTRY]);
    note.extend_from_slice(b"Xen\0");
    words(&mut note, &[ENTRY]);
    let note_size = u32::try_from(note.len()).expect("a small note");

    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    halves(&mut file, &[2, 3]); // executable, 386
    words(&mut file, &[1, ENTRY, HEADER, 0, 0]);
    halves(&mut file, &[52, 32, 2, 40, 0, 0]); // two program headers, no sections
    words(&mut file, &[1, CODE_AT, LOAD, LOAD, size, size, 7, 0x1000]); // PT_LOAD
    words(&mut file, &[4, NOTE_AT, 0, 0, note_size, note_size, 4, 4]); // PT_NOTE
    file.extend_from_slice(&note);
    file.resize(CODE_AT as usize, 0);
    file.extend_from_slice(image);
    file
}

fn words(file: &mut Vec<u8>, values: &[u32]) {
    file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

fn halves(file: &mut Vec<u8>, values: &[u16]) {
    file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}
