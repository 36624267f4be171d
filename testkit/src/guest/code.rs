//! The guest's machine code.
//!
//! Registers, all of which a restore must bring back: `rbp` the program page, `r12` the report page, `r8` the counter,
//! `r9` the checksum, `r10` the position in the pattern, `r13` steps until the next report, `xmm5` the seed.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::layout::{CODE, PORT};
use super::program::word as program;
use super::report::{Signal, word as report};

pub(super) const VECTORS: usize = 32;

/// The code, and where in it execution starts and exceptions go.
pub(super) struct Code {
    pub(super) bytes: Vec<u8>,
    pub(super) entry: u64,
    pub(super) vectors: [u64; VECTORS],
}

fn param(word: usize) -> AsmMemoryOperand {
    qword_ptr(rbp + word * 8)
}

fn shared(word: usize) -> AsmMemoryOperand {
    qword_ptr(r12 + word * 8)
}

pub(super) fn assemble() -> Result<Code, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut vectors = [CodeLabel::default(); VECTORS];
    for vector in &mut vectors {
        *vector = a.create_label();
    }
    let mut entry = a.create_label();
    walk(&mut a, &mut entry)?;
    exceptions(&mut a, &mut vectors)?;

    let done = a.assemble_options(CODE, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut at = [0; VECTORS];
    for (address, label) in at.iter_mut().zip(&vectors) {
        *address = done.label_ip(label)?;
    }
    Ok(Code { entry: done.label_ip(&entry)?, vectors: at, bytes: done.inner.code_buffer })
}

/// The loop: one round is one step.
fn walk(a: &mut CodeAssembler, entry: &mut CodeLabel) -> Result<(), IcedError> {
    let mut step = a.create_label();
    let mut random = a.create_label();
    let mut unit = a.create_label();
    let mut write = a.create_label();
    let mut add = a.create_label();
    let mut mix = a.create_label();
    let mut done = a.create_label();
    let mut mismatch = a.create_label();

    a.set_label(entry)?;
    a.xor(r8d, r8d)?;
    a.mov(r9, param(program::SEED))?;
    a.mov(r10, param(program::FIRST))?;
    a.mov(r13, param(program::REPORT_EVERY))?;
    a.movdqu(xmm5, xmmword_ptr(rbp + program::SEED * 8))?;
    a.mov(shared(report::COUNTER), r8)?;
    a.mov(shared(report::CHECKSUM), r9)?;
    a.mov(shared(report::STAMPED), r8)?;
    a.mov(shared(report::STATE), 1)?;
    stamp(a)?;

    a.set_label(&mut step)?;
    a.cmp(r8, param(program::STEPS))?;
    a.jae(done)?;
    a.cmp(shared(report::COUNTER), r8)?;
    a.jne(mismatch)?;
    a.cmp(shared(report::CHECKSUM), r9)?;
    a.jne(mismatch)?;
    a.cmp(param(program::PATTERN), 0)?;
    a.jne(random)?;
    a.mov(rax, r10)?;
    a.add(r10, param(program::INCREMENT))?;
    a.cmp(r10, param(program::UNITS))?;
    a.jb(unit)?;
    a.sub(r10, param(program::UNITS))?;
    a.jmp(unit)?;

    a.set_label(&mut random)?;
    a.imul_2(r10, param(program::MULTIPLIER))?;
    a.add(r10, param(program::INCREMENT))?;
    a.and(r10, param(program::MASK))?;
    a.mov(rax, r10)?;
    a.mov(rcx, param(program::FOLD))?;
    a.shr(rax, cl)?;
    a.xor(rax, r10)?;
    a.cmp(rax, param(program::UNITS))?;
    a.jae(random)?;

    a.set_label(&mut unit)?;
    a.mov(rcx, param(program::UNIT_SHIFT))?;
    a.shl(rax, cl)?;
    a.add(rax, param(program::BASE))?;
    a.mov(rdi, rax)?;
    a.cmp(param(program::OPERATION), 1)?;
    a.je(write)?;
    a.ja(add)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.jmp(mix)?;

    a.set_label(&mut write)?;
    a.lea(rax, qword_ptr(r8 + 1))?;
    a.add(rax, param(program::SEED))?;
    a.mov(rcx, param(program::WORDS))?;
    a.rep().stosq()?;
    a.jmp(mix)?;

    a.set_label(&mut add)?;
    a.lea(rax, qword_ptr(r8 + 1))?;
    a.lock().xadd(qword_ptr(rdi), rax)?;

    a.set_label(&mut mix)?;
    a.rol(r9, 5)?;
    a.xor(r9, rax)?;
    a.add(r9, r8)?;
    a.inc(r8)?;
    a.mov(shared(report::COUNTER), r8)?;
    a.mov(shared(report::CHECKSUM), r9)?;
    a.dec(r13)?;
    a.jne(step)?;
    stamp(a)?;
    a.mov(r13, param(program::REPORT_EVERY))?;
    signal(a, Signal::PROGRESS)?;
    a.jmp(step)?;

    a.set_label(&mut done)?;
    a.movdqu(xmmword_ptr(r12 + report::SSE * 8), xmm5)?;
    a.mov(shared(report::STATE), 2)?;
    stamp(a)?;
    signal(a, Signal::DONE)?;
    a.jmp(*entry)?;

    a.set_label(&mut mismatch)?;
    signal(a, Signal::MISMATCH)?;
    a.jmp(mismatch)
}

/// Notes the time. Uses rax, rcx, rdx.
fn stamp(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.mov(rcx, shared(report::STAMPED))?;
    a.and(ecx, u32::try_from(report::STAMPS_COUNT - 1).unwrap_or(0))?;
    a.mov(qword_ptr(r12 + rcx * 8 + report::STAMPS * 8), rax)?;
    a.inc(shared(report::STAMPED))
}

fn signal(a: &mut CodeAssembler, what: u32) -> Result<(), IcedError> {
    a.mov(eax, what)?;
    a.mov(edx, u32::from(PORT))?;
    a.out(dx, al)
}

/// A stub per vector, which tells its number for ever.
fn exceptions(a: &mut CodeAssembler, vectors: &mut [CodeLabel; VECTORS]) -> Result<(), IcedError> {
    let mut tell = a.create_label();
    for (vector, label) in (0..).zip(vectors.iter_mut()) {
        a.set_label(label)?;
        a.mov(eax, Signal::EXCEPTION + vector)?;
        a.jmp(tell)?;
    }
    a.set_label(&mut tell)?;
    a.mov(edx, u32::from(PORT))?;
    a.out(dx, al)?;
    a.jmp(tell)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_place() {
        let code = assemble().unwrap();
        assert!(code.bytes.len() < 0x1000, "{} bytes", code.bytes.len());
        assert_eq!(code.entry, CODE);
        assert!(code.vectors.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
