//! Where things are in the guest's memory.

/// The first 2 MiB of RAM, from guest-physical 0 on, hold the guest itself and are mapped one to one.
pub const BOOT_LEN: u64 = 2 << 20;
/// The guest-virtual address of the window: all other RAM, without gaps.
pub const WINDOW: u64 = 1 << 39;
/// How much RAM the page tables can map: 256 GiB.
pub const MAX_WINDOW: u64 = 256 << 30;
/// How many vCPUs there can be.
pub const MAX_VCPUS: u8 = 4;
/// The port for [`Signal`](super::Signal)s, one byte each.
pub const PORT: u16 = 0xe9;

pub(super) const GDT: u64 = 0x1000;
pub(super) const TSS: u64 = 0x2000;
pub(super) const IDT: u64 = 0x3000;
pub(super) const PML4: u64 = 0x4000;
pub(super) const LOW_PDPT: u64 = 0x5000;
pub(super) const LOW_PD: u64 = 0x6000;
pub(super) const WINDOW_PDPT: u64 = 0x7000;
pub(super) const CODE: u64 = 0x1_0000;
pub(super) const WINDOW_PDS: u64 = 0x4_0000;

const PROGRAMS: u64 = 0x2_0000;
const REPORTS: u64 = 0x2_8000;
const STACKS: u64 = 0x3_0000;

/// The page that holds a vCPU's program.
#[must_use]
pub fn program_page(vcpu: u8) -> u64 {
    PROGRAMS + u64::from(vcpu) * 0x1000
}

/// The page in which a vCPU reports.
#[must_use]
pub fn report_page(vcpu: u8) -> u64 {
    REPORTS + u64::from(vcpu) * 0x1000
}

/// One past the last byte of a vCPU's stack, which only exceptions use.
pub(super) fn stack_top(vcpu: u8) -> u64 {
    STACKS + u64::from(vcpu) * 0x1000 + 0x1000
}
