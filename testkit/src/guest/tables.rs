//! Descriptor and page tables (Intel SDM volume 3, chapters 3, 5 and 9).
//!
//! All accessed, dirty and busy bits are set from the start: the processor then never writes to the tables, and memory
//! changes only where the program changes it.

use super::code::{Code, VECTORS};
use super::layout;

/// A number of bytes at a guest-physical address.
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) bytes: Vec<u8>,
}

pub(super) const KERNEL_CODE: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
pub(super) const USER_CODE: u16 = 0x1b;
pub(super) const USER_DATA: u16 = 0x23;
/// The selector of vCPU 0's task state; each descriptor takes two places.
pub(super) const TASK: u16 = 0x28;
/// The task state, with the I/O permission bitmap for ports up to 0xff and the byte of ones that must follow it.
pub(super) const TSS_LEN: u64 = 104 + 33;
pub(super) const GDT_LEN: u64 = 0x28 + 16 * layout::MAX_VCPUS as u64;
pub(super) const IDT_LEN: u64 = 16 * VECTORS as u64;

/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same for a 2 MiB page, and dirty.
const LARGE: u64 = 0xe7;

fn words(at: u64, words: impl IntoIterator<Item = u64>) -> Piece {
    Piece { at, bytes: words.into_iter().flat_map(u64::to_le_bytes).collect() }
}

/// Where the task state of a vCPU is.
pub(super) fn task_state(vcpu: u8) -> u64 {
    layout::TSS + u64::from(vcpu) * 256
}

/// GDT, task states and IDT.
pub(super) fn descriptors(code: &Code) -> Vec<Piece> {
    let mut gdt = vec![0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];
    let mut pieces = Vec::new();
    for vcpu in 0..layout::MAX_VCPUS {
        let base = task_state(vcpu);
        gdt.push((TSS_LEN - 1) | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56);
        gdt.push(base >> 32);
        let mut task = vec![0; 104];
        // rsp0 at offset 4; at 102 where the I/O permission bitmap begins, in which a clear bit permits.
        task[4..12].copy_from_slice(&layout::stack_top(vcpu).to_le_bytes());
        task[102..104].copy_from_slice(&104u16.to_le_bytes());
        task.extend([0xff; 33]);
        task[104 + usize::from(layout::PORT / 8)] ^= 1 << (layout::PORT % 8);
        pieces.push(Piece { at: base, bytes: task });
    }
    pieces.push(words(layout::GDT, gdt));
    let gates = code.vectors.iter().flat_map(|&to| {
        let gate = (to & 0xffff) | u64::from(KERNEL_CODE) << 16 | 0x8e << 40 | (to >> 16 & 0xffff) << 48;
        [gate, to >> 32]
    });
    pieces.push(words(layout::IDT, gates));
    pieces
}

/// Page tables: the first 2 MiB one to one, and `extents` (guest-physical start and length, multiples of 2 MiB) one
/// after the other from [`layout::WINDOW`] on.
pub(super) fn pages(extents: &[(u64, u64)]) -> Vec<Piece> {
    let large = extents.iter().flat_map(|&(start, len)| (start..start + len).step_by(1 << 21));
    let large: Vec<u64> = large.map(|at| at | LARGE).collect();
    let directories = (0u64..).zip(large.chunks(512));
    let mut pieces: Vec<Piece> =
        directories.clone().map(|(n, entries)| words(layout::WINDOW_PDS + n * 0x1000, entries.to_vec())).collect();
    pieces.push(words(layout::WINDOW_PDPT, directories.map(|(n, _)| (layout::WINDOW_PDS + n * 0x1000) | TABLE)));
    pieces.push(words(layout::LOW_PD, [LARGE]));
    pieces.push(words(layout::LOW_PDPT, [layout::LOW_PD | TABLE]));
    pieces.push(words(layout::PML4, [layout::LOW_PDPT | TABLE, layout::WINDOW_PDPT | TABLE]));
    pieces
}
