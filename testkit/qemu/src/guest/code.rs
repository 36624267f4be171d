//! The guest's machine code: the image, and how the processors come to its 64-bit program.
//!
//! The image, loaded at [`LOAD`]: the parameters, the descriptor table, the 32-bit entry that turns on long mode with
//! the first 16 GiB mapped one to one, the 64-bit program, what the other processors run in real mode, and what an
//! interrupt runs.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{Plan, program, ticks};

/// Where the image lies in guest-physical memory.
pub(super) const LOAD: u32 = 0x10_0000;
/// Where it is entered, in 32-bit protected mode without paging.
pub(super) const ENTRY: u32 = LOAD + 0x200;
const GDT: u32 = LOAD + 0x180;
const GDT_POINTER: u32 = LOAD + 0x1a0;
pub(super) const MAIN: u32 = LOAD + 0x400;
pub(super) const TRAMPOLINE: u32 = LOAD + 0xc00;
/// Where the other processors begin, in real mode.
pub(super) const TRAMPOLINE_AT: u32 = 0x8000;
const TRAMPOLINE_GDT_POINTER: u32 = 0x80;
pub(super) const TRAMPOLINE_SIZE: u32 = 0x100;
/// What an interrupt runs.
pub(super) const HANDLER: u32 = LOAD + 0xd00;

const TABLES: u32 = 0x11_0000;
const GIGABYTES: u32 = 16;

/// The pattern: address times this, xor the seed.
pub(super) const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
pub(super) const SEED: u64 = 0x5bd1_e995_27d4_eb2f;

const EFER: u32 = 0xc000_0080;

/// Offsets in the parameters, at the start of the image: the ranges follow.
pub(super) mod parameter {
    pub(in super::super) const RANGES: u32 = 0;
    pub(in super::super) const RANGE_LIST: u32 = 8;
}

/// The image.
pub(super) fn image(plan: &Plan) -> Vec<u8> {
    let mut image = (plan.ranges.len() as u64).to_le_bytes().to_vec();
    for (start, end) in &plan.ranges {
        image.extend_from_slice(&start.to_le_bytes());
        image.extend_from_slice(&end.to_le_bytes());
    }
    place(&mut image, GDT, &gdt());
    place(&mut image, GDT_POINTER, &gdt_pointer());
    place(&mut image, ENTRY, &enter().expect("the 32-bit code assembles"));
    place(&mut image, MAIN, &program::main(plan).expect("the 64-bit code assembles"));
    place(&mut image, TRAMPOLINE, &trampoline().expect("the 16-bit code assembles"));
    if let Some(tables) = plan.ticks {
        place(&mut image, HANDLER, &ticks::handler(tables).expect("the handler assembles"));
    }
    image
}

fn place(image: &mut Vec<u8>, address: u32, bytes: &[u8]) {
    let at = (address - LOAD) as usize;
    assert!(image.len() <= at, "the part before {address:#x} is too long");
    image.resize(at, 0);
    image.extend_from_slice(bytes);
}

fn gdt() -> Vec<u8> {
    let null_code_data = [0u64, 0x00af_9a00_0000_ffff, 0x00cf_9200_0000_ffff];
    null_code_data.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn gdt_pointer() -> Vec<u8> {
    let mut pointer = 23u16.to_le_bytes().to_vec();
    pointer.extend_from_slice(&GDT.to_le_bytes());
    pointer
}

/// The 32-bit part: page tables, long mode, and on to [`MAIN`].
fn enter() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (directories, first_directory) = (TABLES + 0x1000, TABLES + 0x2000);
    a.cli()?;
    a.cld()?;
    a.mov(edi, TABLES)?;
    a.mov(ecx, (2 + GIGABYTES) * 1024)?;
    a.xor(eax, eax)?;
    a.rep().stosd()?;
    a.mov(dword_ptr(TABLES), directories | 3)?;
    a.mov(edi, directories)?;
    a.mov(eax, first_directory | 3)?;
    a.mov(ecx, GIGABYTES)?;
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    a.mov(dword_ptr(edi), eax)?;
    a.add(eax, 0x1000)?;
    a.add(edi, 8)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.mov(edi, first_directory)?;
    a.mov(eax, 0x83)?; // present, writable, 2 MiB
    a.xor(edx, edx)?;
    a.mov(ecx, GIGABYTES * 512)?;
    let mut next = a.create_label();
    a.set_label(&mut next)?;
    a.mov(dword_ptr(edi), eax)?;
    a.mov(dword_ptr(edi + 4), edx)?;
    a.add(eax, 0x20_0000)?;
    a.adc(edx, 0)?;
    a.add(edi, 8)?;
    a.dec(ecx)?;
    a.jne(next)?;
    a.lgdt(fword_ptr(GDT_POINTER))?;
    long_mode(&mut a)?;
    far_jump(&mut a, false)?;
    a.assemble(u64::from(ENTRY))
}

/// PAE, the page tables, long mode, paging.
fn long_mode(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, 0x20)?;
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, 0x100)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0001u32)?;
    a.mov(cr0, eax)
}

/// `jmp 8:MAIN`, with a 32-bit offset.
fn far_jump(a: &mut CodeAssembler, from_16_bit: bool) -> Result<(), IcedError> {
    let mut bytes = if from_16_bit { vec![0x66] } else { Vec::new() };
    bytes.push(0xea);
    bytes.extend_from_slice(&MAIN.to_le_bytes());
    bytes.extend_from_slice(&8u16.to_le_bytes());
    a.db(&bytes)
}

/// What the other processors run: from real mode to [`MAIN`] in one step.
fn trampoline() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    let pointer = u16::try_from(TRAMPOLINE_AT + TRAMPOLINE_GDT_POINTER).expect("below 64 KiB").to_le_bytes();
    a.db(&[0x66, 0x0f, 0x01, 0x16, pointer[0], pointer[1]])?; // lgdt with a 32-bit base
    long_mode(&mut a)?;
    far_jump(&mut a, true)?;
    let mut code = a.assemble(u64::from(TRAMPOLINE_AT))?;
    assert!(code.len() <= TRAMPOLINE_GDT_POINTER as usize);
    code.resize(TRAMPOLINE_GDT_POINTER as usize, 0);
    code.extend_from_slice(&gdt_pointer());
    code.resize(TRAMPOLINE_SIZE as usize, 0);
    Ok(code)
}
