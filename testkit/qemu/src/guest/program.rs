//! The 64-bit program: fills memory, checks it, counts, and obeys the serial port.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::code::{LOAD, MAIN, MIX, SEED, TRAMPOLINE, TRAMPOLINE_AT, TRAMPOLINE_SIZE, parameter};
use super::status::{MAGIC, field};
use super::{Plan, STACKS, STATUS, Work, disk, ticks};

const COM1: i32 = 0x3f8;
const COM1_LINE_STATUS: i32 = 0x3fd;
const APIC_ICR: u32 = 0xfee0_0300;

/// A field of the status page.
pub(super) fn status(offset: usize) -> AsmMemoryOperand {
    qword_ptr(STATUS + offset as u64)
}

/// The 64-bit program. Every processor comes here; `rbx` is its number from then on.
pub(super) fn main(plan: &Plan) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut bodies = Routines::new(&mut a);
    let mut others = a.create_label();
    let mut pass = a.create_label();

    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(eax, 1)?;
    a.lock().xadd(status(field::ALIVE), rax)?;
    a.mov(rbx, rax)?;
    a.shl(rax, 12)?;
    a.lea(rsp, qword_ptr(rax + (STACKS + 0x1000)))?;
    a.test(rbx, rbx)?;
    a.jne(others)?;

    // The first processor fills the memory, then wakes the others.
    a.mov(rax, MAGIC)?;
    a.mov(status(field::MAGIC), rax)?;
    if plan.work == Work::Check {
        a.call(bodies.fill)?;
    }
    if plan.cpus > 1 {
        start_others(&mut a, plan.cpus)?;
    }
    if let Some(tables) = plan.ticks {
        ticks::start(&mut a, tables)?;
    }
    a.mov(status(field::READY), 1)?;
    a.mov(edi, i32::from(b'r'))?;
    a.call(bodies.answer)?;
    a.jmp(pass)?;

    a.set_label(&mut others)?;
    a.cmp(status(field::READY), 0)?;
    a.pause()?;
    a.je(others)?;

    a.set_label(&mut pass)?;
    match plan.work {
        Work::Check => a.call(bodies.check)?,
        Work::Generations => a.call(bodies.generation)?,
    }
    a.inc(qword_ptr(rbx * 8 + (STATUS + field::PASSES as u64)))?;
    a.call(bodies.obey)?;
    a.jmp(pass)?;

    bodies.write(&mut a, plan)?;
    let code = a.assemble(u64::from(MAIN))?;
    assert!(code.len() <= (TRAMPOLINE - MAIN) as usize, "{} bytes", code.len());
    Ok(code)
}

/// INIT and start-up interrupts to all but self, then waits for all of them.
fn start_others(a: &mut CodeAssembler, cpus: u64) -> Result<(), IcedError> {
    a.mov(rsi, u64::from(TRAMPOLINE))?;
    a.mov(rdi, u64::from(TRAMPOLINE_AT))?;
    a.mov(ecx, TRAMPOLINE_SIZE)?;
    a.rep().movsb()?;
    a.mov(rdx, u64::from(APIC_ICR))?;
    for order in [0x000c_4500u32, 0x000c_4600 | (TRAMPOLINE_AT >> 12)] {
        a.mov(dword_ptr(rdx), order)?;
        a.mov(ecx, 100_000)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jne(wait)?;
    }
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(status(field::ALIVE), i32::try_from(cpus).expect("a few"))?;
    a.jb(wait)
}

/// The program's subroutines.
struct Routines {
    fill: CodeLabel,
    check: CodeLabel,
    generation: CodeLabel,
    obey: CodeLabel,
    answer: CodeLabel,
    number: CodeLabel,
    send: CodeLabel,
}

impl Routines {
    fn new(a: &mut CodeAssembler) -> Routines {
        let mut label = || a.create_label();
        Routines {
            fill: label(),
            check: label(),
            generation: label(),
            obey: label(),
            answer: label(),
            number: label(),
            send: label(),
        }
    }

    fn write(&mut self, a: &mut CodeAssembler, plan: &Plan) -> Result<(), IcedError> {
        a.set_label(&mut self.fill)?;
        each_page(a, plan, false, |a| {
            let (mut zero, mut next, mut word) = (a.create_label(), a.create_label(), a.create_label());
            skip_unless_stored(a, plan, zero)?;
            a.lea(rdx, qword_ptr(rsi + 4096))?;
            a.mov(rdi, rsi)?;
            a.set_label(&mut word)?;
            pattern(a)?;
            a.mov(qword_ptr(rdi), rax)?;
            a.add(rdi, 8)?;
            a.cmp(rdi, rdx)?;
            a.jb(word)?;
            a.jmp(next)?;
            // The firmware may have left something there.
            a.set_label(&mut zero)?;
            a.mov(rdi, rsi)?;
            a.mov(ecx, 512)?;
            a.xor(eax, eax)?;
            a.rep().stosq()?;
            a.set_label(&mut next)?;
            a.nop()
        })?;

        a.set_label(&mut self.check)?;
        each_page(a, plan, true, |a| {
            let (mut zero, mut next) = (a.create_label(), a.create_label());
            a.lea(r11, qword_ptr(rsi + 4096))?;
            a.mov(rdi, rsi)?;
            skip_unless_stored(a, plan, zero)?;
            compare(a, plan, true)?;
            a.jmp(next)?;
            a.set_label(&mut zero)?;
            a.nop()?;
            compare(a, plan, false)?;
            a.set_label(&mut next)?;
            a.nop()
        })?;

        a.set_label(&mut self.generation)?;
        a.mov(rax, status(field::GENERATION))?;
        a.inc(rax)?;
        if plan.disk {
            disk::next(a)?;
        }
        a.mov(status(field::GENERATION), rax)?;
        each_page(a, plan, false, |a| {
            a.mov(rax, status(field::GENERATION))?;
            a.mov(qword_ptr(rsi), rax)
        })?;

        self.write_obey(a, plan)?;
        self.write_answer(a)
    }

    /// The first processor does what the serial port says; the others stand still while it does.
    fn write_obey(&mut self, a: &mut CodeAssembler, plan: &Plan) -> Result<(), IcedError> {
        let (mut follow, mut nothing, mut still, mut question) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        let (mut halt, mut halted) = (a.create_label(), a.create_label());
        a.set_label(&mut self.obey)?;
        a.test(rbx, rbx)?;
        a.jne(follow)?;
        received(a, nothing)?;
        a.cmp(al, i32::from(b'h'))?;
        a.je(halt)?;
        a.cmp(al, i32::from(b's'))?;
        a.jne(question)?;
        a.mov(status(field::HOLD), 1)?;
        for cpu in 1..plan.cpus {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(qword_ptr(STATUS + field::HELD as u64 + 8 * cpu), 1)?;
            a.jne(wait)?;
        }
        a.mov(edi, i32::from(b's'))?;
        a.call(self.answer)?;
        a.set_label(&mut still)?;
        received(a, still)?;
        a.cmp(al, i32::from(b'g'))?;
        a.jne(still)?;
        a.mov(status(field::HOLD), 0)?;
        a.mov(edi, i32::from(b'g'))?;
        a.call(self.answer)?;
        a.jmp(nothing)?;
        a.set_label(&mut halt)?;
        a.mov(edi, i32::from(b'h'))?;
        a.call(self.answer)?;
        // Nothing else ends it: interrupts are off, or go back to it.
        a.set_label(&mut halted)?;
        a.hlt()?;
        a.jmp(halted)?;
        a.set_label(&mut question)?;
        a.mov(edi, i32::from(b'?'))?;
        a.call(self.answer)?;
        a.set_label(&mut nothing)?;
        a.ret()?;

        let (mut held, mut free) = (a.create_label(), a.create_label());
        let own = || qword_ptr(rbx * 8 + (STATUS + field::HELD as u64));
        a.set_label(&mut follow)?;
        a.cmp(status(field::HOLD), 1)?;
        a.jne(free)?;
        a.mov(own(), 1)?;
        a.set_label(&mut held)?;
        a.pause()?;
        a.cmp(status(field::HOLD), 1)?;
        a.je(held)?;
        a.mov(own(), 0)?;
        a.set_label(&mut free)?;
        a.ret()
    }

    /// The letter in `edi`, the passes of the first processor and the errors.
    fn write_answer(&mut self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        a.set_label(&mut self.answer)?;
        a.call(self.send)?;
        for value in [field::PASSES, field::ERRORS] {
            a.mov(edi, i32::from(b' '))?;
            a.call(self.send)?;
            a.mov(rsi, status(value))?;
            a.call(self.number)?;
        }
        a.mov(edi, i32::from(b'\n'))?;
        a.call(self.send)?;
        a.ret()?;

        // rsi in hexadecimal.
        let (mut digit, mut decimal) = (a.create_label(), a.create_label());
        a.set_label(&mut self.number)?;
        a.mov(ecx, 16)?;
        a.set_label(&mut digit)?;
        a.rol(rsi, 4)?;
        a.mov(edi, esi)?;
        a.and(edi, 15)?;
        a.add(edi, i32::from(b'0'))?;
        a.cmp(edi, i32::from(b'9'))?;
        a.jbe(decimal)?;
        a.add(edi, i32::from(b'a' - b'9') - 1)?;
        a.set_label(&mut decimal)?;
        a.call(self.send)?;
        a.dec(ecx)?;
        a.jne(digit)?;
        a.ret()?;

        // The byte in edi, when the transmitter is empty.
        let mut full = a.create_label();
        a.set_label(&mut self.send)?;
        a.mov(edx, COM1_LINE_STATUS)?;
        a.set_label(&mut full)?;
        a.in_(al, dx)?;
        a.test(al, 0x20)?;
        a.je(full)?;
        a.mov(edx, COM1)?;
        a.mov(eax, edi)?;
        a.out(dx, al)?;
        a.ret()
    }
}

/// A loop over the pages of all ranges, the page's address in `rsi`; with `shared`, only over those whose number, modulo
/// the number of processors, is the processor's own. Ends with `ret`.
fn each_page(
    a: &mut CodeAssembler,
    plan: &Plan,
    shared: bool,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let (mut range, mut page, mut range_end, mut done) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(r8, u64::from(LOAD + parameter::RANGE_LIST))?;
    a.mov(r9, qword_ptr(u64::from(LOAD + parameter::RANGES)))?;
    a.set_label(&mut range)?;
    a.test(r9, r9)?;
    a.je(done)?;
    a.mov(rsi, qword_ptr(r8))?;
    a.mov(r10, qword_ptr(r8 + 8))?;
    let cpus = if shared { plan.cpus } else { 1 };
    if cpus > 1 {
        a.mov(rax, rbx)?;
        a.shl(rax, 12)?;
        a.add(rsi, rax)?;
    }
    a.set_label(&mut page)?;
    a.cmp(rsi, r10)?;
    a.jae(range_end)?;
    body(a)?;
    a.add(rsi, i32::try_from(4096 * cpus).expect("a few pages"))?;
    a.jmp(page)?;
    a.set_label(&mut range_end)?;
    a.add(r8, 16)?;
    a.dec(r9)?;
    a.jmp(range)?;
    a.set_label(&mut done)?;
    a.ret()
}

/// Jumps to `zero` if the page at `rsi` has no content. Changes rax, rcx and rdx.
fn skip_unless_stored(a: &mut CodeAssembler, plan: &Plan, zero: CodeLabel) -> Result<(), IcedError> {
    a.mov(rax, rsi)?;
    a.shr(rax, 12)?;
    a.xor(edx, edx)?;
    a.mov(ecx, u32::try_from(plan.stride).expect("a small stride"))?;
    a.div(rcx)?;
    a.cmp(rdx, i32::try_from(plan.stored).expect("a small count"))?;
    a.jae(zero)
}

/// Compares the words from `rdi` to `r11`, and counts those that are wrong.
fn compare(a: &mut CodeAssembler, plan: &Plan, stored: bool) -> Result<(), IcedError> {
    let (mut word, mut right) = (a.create_label(), a.create_label());
    a.set_label(&mut word)?;
    if stored {
        pattern(a)?;
    } else {
        a.xor(eax, eax)?;
    }
    a.cmp(rax, qword_ptr(rdi))?;
    a.je(right)?;
    a.lock().inc(status(field::ERRORS))?;
    a.mov(status(field::WRONG_AT), rdi)?;
    a.set_label(&mut right)?;
    a.add(rdi, i32::try_from(plan.step).expect("within a page"))?;
    a.cmp(rdi, r11)?;
    a.jb(word)
}

/// The word that belongs at `rdi`, in `rax`. Changes rcx.
fn pattern(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, MIX)?;
    a.imul_2(rax, rdi)?;
    a.mov(rcx, SEED)?;
    a.xor(rax, rcx)
}

/// The next byte from the serial port in `al`; jumps to `nothing` if there is none.
fn received(a: &mut CodeAssembler, nothing: CodeLabel) -> Result<(), IcedError> {
    a.mov(edx, COM1_LINE_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.je(nothing)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)
}
