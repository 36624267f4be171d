//! The number of each pass on a disk: an ATA disk in PIO mode, without interrupts (ATA/ATAPI-6, "PIO data-in command
//! protocol", "PIO data-out command protocol").

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::program::status;
use super::status::field;
use super::{STATUS, status as page};

/// Ports of the first controller.
const DATA: i32 = 0x1f0;
const COUNT: i32 = 0x1f2;
const DRIVE: i32 = 0x1f6;
const COMMAND: i32 = 0x1f7;

const READ: i32 = 0x20;
const WRITE: i32 = 0x30;

const BUSY: i32 = 0x80;
const WANTS_DATA: i32 = 0x08;
/// The first drive, addressed by blocks.
const FIRST: i32 = 0xe0;

/// Words of a sector.
const WORDS: u32 = 256;

/// Compares what is on the disk with the number of the last pass, and writes that of the next, which is in `rax`. Keeps
/// `rax`, `rbx`.
pub(super) fn next(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut right = a.create_label();
    let buffer = STATUS + page::SECTOR as u64;
    a.push(rax)?;
    command(a, READ)?;
    a.mov(edx, DATA)?;
    a.mov(rdi, buffer)?;
    a.mov(ecx, WORDS)?;
    a.rep().insw()?;
    a.pop(rax)?;
    a.lea(rcx, qword_ptr(rax - 1))?;
    a.cmp(qword_ptr(buffer), rcx)?;
    a.je(right)?;
    a.lock().inc(status(field::ERRORS))?;
    a.set_label(&mut right)?;
    a.mov(qword_ptr(buffer), rax)?;
    a.push(rax)?;
    command(a, WRITE)?;
    a.mov(edx, DATA)?;
    a.mov(rsi, buffer)?;
    a.mov(ecx, WORDS)?;
    a.rep().outsw()?;
    wait(a, 0)?;
    a.pop(rax)
}

/// Gives a command for the first sector, and waits until the disk wants to give or take it. Changes rax, rdx.
fn command(a: &mut CodeAssembler, which: i32) -> Result<(), IcedError> {
    wait(a, 0)?;
    for (port, value) in [(DRIVE, FIRST), (COUNT, 1), (COUNT + 1, 0), (COUNT + 2, 0), (COUNT + 3, 0), (COMMAND, which)]
    {
        a.mov(edx, port)?;
        a.mov(eax, value)?;
        a.out(dx, al)?;
    }
    wait(a, WANTS_DATA)
}

/// Waits until the disk is not busy, and shows this.
fn wait(a: &mut CodeAssembler, shows: i32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(edx, COMMAND)?;
    a.set_label(&mut again)?;
    a.in_(al, dx)?;
    a.and(eax, BUSY | shows)?;
    a.cmp(eax, shows)?;
    a.jne(again)
}
