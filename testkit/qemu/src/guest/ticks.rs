//! Interrupts of the first processor's own timer, each of which is looked up in another page.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::STATUS;
use super::code::HANDLER;
use super::program::status;
use super::status::field;

/// Nanoseconds: QEMU's timer counts with 1 GHz (QEMU include/hw/i386/apic_internal.h, hw/intc/apic.c).
const PERIOD: u32 = 2_000_000;
const VECTOR: u32 = 0x20;
/// A table of all 256 vectors fills a page.
const TABLE: u64 = 4096;

/// Registers of the local APIC (Intel SDM volume 3, "Local APIC Register Address Map").
mod apic {
    pub(super) const END_OF_INTERRUPT: u64 = 0xfee0_00b0;
    pub(super) const SPURIOUS: u64 = 0xfee0_00f0;
    pub(super) const TIMER: u64 = 0xfee0_0320;
    pub(super) const INITIAL_COUNT: u64 = 0xfee0_0380;
    pub(super) const DIVIDE: u64 = 0xfee0_03e0;
}

/// Fills the tables and starts the timer.
pub(super) fn start(a: &mut CodeAssembler, (first, end): (u64, u64)) -> Result<(), IcedError> {
    // Present, an interrupt gate, code segment 8.
    let gate = u64::from(HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | u64::from(HANDLER >> 16) << 48;
    let mut next = a.create_label();
    a.mov(rdi, first)?;
    a.mov(rax, gate)?;
    a.set_label(&mut next)?;
    a.mov(qword_ptr(rdi + VECTOR * 16), rax)?;
    a.mov(qword_ptr(rdi + (VECTOR * 16 + 8)), 0)?;
    a.add(rdi, i32::try_from(TABLE).expect("a page"))?;
    a.cmp(rdi, i32::try_from(end).expect("below 2 GiB"))?;
    a.jb(next)?;

    a.mov(word_ptr(STATUS + field::TABLE_LIMIT as u64), i32::try_from(TABLE - 1).expect("a page"))?;
    a.mov(status(field::TABLE), i32::try_from(first).expect("below 2 GiB"))?;
    a.lidt(tbyte_ptr(STATUS + field::TABLE_LIMIT as u64))?;
    // Nothing from the old interrupt controllers.
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;
    // The APIC is on; the timer counts undivided, again and again.
    let registers =
        [(apic::SPURIOUS, 0x1ff), (apic::DIVIDE, 0xb), (apic::TIMER, 0x2_0000 | VECTOR), (apic::INITIAL_COUNT, PERIOD)];
    for (register, value) in registers {
        a.mov(rdx, register)?;
        a.mov(dword_ptr(rdx), value)?;
    }
    a.sti()
}

/// Counts, and lets the next interrupt be looked up in the next page.
pub(super) fn handler((first, end): (u64, u64)) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut inside = a.create_label();
    a.push(rax)?;
    a.inc(status(field::TICKS))?;
    a.mov(rax, status(field::TABLE))?;
    a.add(rax, i32::try_from(TABLE).expect("a page"))?;
    a.cmp(rax, i32::try_from(end).expect("below 2 GiB"))?;
    a.jb(inside)?;
    a.mov(eax, u32::try_from(first).expect("below 2 GiB"))?;
    a.set_label(&mut inside)?;
    a.mov(status(field::TABLE), rax)?;
    a.lidt(tbyte_ptr(STATUS + field::TABLE_LIMIT as u64))?;
    a.mov(rax, apic::END_OF_INTERRUPT)?;
    a.mov(dword_ptr(rax), 0)?;
    a.pop(rax)?;
    a.iretq()?;
    a.assemble(u64::from(HANDLER))
}
