//! Puts the guest into memory and its vCPUs at the start.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, Program, Report, code, layout, tables};

/// Where the work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// At CPL 0.
    Kernel,
    /// At CPL 3. On a host whose KVM emulates CPL 0, this is what runs at full speed through KVM's MMU.
    User,
}

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct GuestConfig {
    /// Where the work runs.
    pub privilege: Privilege,
    /// How many vCPUs, at most [`layout::MAX_VCPUS`].
    pub vcpus: u8,
}

/// A guest that lies in memory, ready to start.
#[derive(Clone, Debug)]
pub struct GuestImage {
    config: GuestConfig,
    entry: u64,
    /// The window: guest-physical start and length.
    extents: Vec<(u64, u64)>,
}

/// A KVM call on a vCPU that must work.
fn must<T>(what: &str, result: Result<T, kvm_ioctls::Error>) -> T {
    result.unwrap_or_else(|error| panic!("{what}: {error}"))
}

impl GuestImage {
    /// Writes code and tables into `memory`, which is expected to be zero there.
    ///
    /// # Panics
    /// If the memory does not begin at 0 with 2 MiB, has regions that are not whole multiples of 2 MiB, or is larger
    /// than [`layout::MAX_WINDOW`].
    #[must_use]
    pub fn build<B: Bitmap>(memory: &Memory<B>, config: GuestConfig) -> GuestImage {
        assert!((1..=layout::MAX_VCPUS).contains(&config.vcpus), "{config:?}");
        let image = GuestImage { config, entry: layout::CODE, extents: window(memory) };
        assert!(image.window_len() <= layout::MAX_WINDOW, "{} bytes of RAM", image.window_len());
        let code = code::assemble().expect("the code assembles");
        assert_eq!(code.entry, image.entry);
        let mut pieces = tables::descriptors(&code);
        pieces.extend(tables::pages(&image.extents));
        pieces.push(tables::Piece { at: layout::CODE, bytes: code.bytes });
        for piece in pieces {
            memory.write_slice(&piece.bytes, GuestAddress(piece.at)).expect("the first 2 MiB are RAM");
        }
        image
    }

    /// The image that [`build`](GuestImage::build) made, for memory that holds it already (a restored guest).
    #[must_use]
    pub fn found<B: Bitmap>(memory: &Memory<B>, config: GuestConfig) -> GuestImage {
        GuestImage { config, entry: layout::CODE, extents: window(memory) }
    }

    /// How it was built.
    #[must_use]
    pub fn config(&self) -> GuestConfig {
        self.config
    }

    /// How long the window is, in bytes: all RAM but the first 2 MiB.
    #[must_use]
    pub fn window_len(&self) -> u64 {
        self.extents.iter().map(|&(_, len)| len).sum()
    }

    /// The guest-physical address of a byte of the window.
    ///
    /// # Panics
    /// If the window is shorter.
    #[must_use]
    pub fn window_to_physical(&self, mut offset: u64) -> u64 {
        for &(start, len) in &self.extents {
            if offset < len {
                return start + offset;
            }
            offset -= len;
        }
        panic!("the window ends {offset} bytes before");
    }

    /// Gives a vCPU its work. It takes effect when the vCPU starts, or goes on after
    /// [`Signal::Done`](super::Signal::Done).
    ///
    /// # Panics
    /// If the program's parameters are not as documented.
    pub fn write_program<B: Bitmap>(&self, memory: &Memory<B>, vcpu: u8, program: &Program) {
        let end = program.start + (program.units << program.unit_shift);
        assert!(vcpu < self.config.vcpus && end <= self.window_len(), "{program:?} on vCPU {vcpu}");
        let bytes: Vec<u8> = program.encode().into_iter().flat_map(u64::to_le_bytes).collect();
        memory.write_slice(&bytes, GuestAddress(layout::program_page(vcpu))).expect("the first 2 MiB are RAM");
    }

    /// Reads a vCPU's report page.
    ///
    /// # Panics
    /// If it can't be read.
    #[must_use]
    pub fn report<B: Bitmap>(&self, memory: &Memory<B>, vcpu: u8) -> Report {
        let mut page = [0; 4096];
        memory.read_slice(&mut page, GuestAddress(layout::report_page(vcpu))).expect("the first 2 MiB are RAM");
        Report::parse(&page)
    }

    /// Gives a fresh vCPU its CPUID and puts it at the beginning of its program.
    ///
    /// # Panics
    /// If KVM refuses.
    pub fn boot_vcpu(&self, kvm: &Kvm, vcpu: &VcpuFd, number: u8) {
        must("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid(kvm, number)));
        self.rewind_vcpu(vcpu, number);
    }

    /// Puts a vCPU (back) at the beginning of its program.
    ///
    /// # Panics
    /// If KVM refuses.
    pub fn rewind_vcpu(&self, vcpu: &VcpuFd, number: u8) {
        let user = self.config.privilege == Privilege::User;
        let segment = |selector: u16, type_: u8| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            dpl: if user { 3 } else { 0 },
            s: 1,
            l: u8::from(type_ == 11),
            db: u8::from(type_ == 3),
            g: 1,
            ..kvm_segment::default()
        };
        let mut sregs = must("KVM_GET_SREGS", vcpu.get_sregs());
        sregs.cs = segment(if user { tables::USER_CODE } else { tables::KERNEL_CODE }, 11);
        let data = segment(if user { tables::USER_DATA } else { tables::KERNEL_DATA }, 3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            base: tables::task_state(number),
            limit: u32::try_from(tables::TSS_LEN).unwrap_or(0) - 1,
            selector: tables::TASK + 16 * u16::from(number),
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, u16::try_from(tables::GDT_LEN - 1).unwrap_or(0));
        (sregs.idt.base, sregs.idt.limit) = (layout::IDT, u16::try_from(tables::IDT_LEN - 1).unwrap_or(0));
        sregs.cr3 = layout::PML4;
        sregs.cr4 = 0x620; // PAE, SSE with exceptions
        sregs.cr0 = 0x8005_0033;
        sregs.efer = 0x500; // long mode, enabled and active
        must("KVM_SET_SREGS", vcpu.set_sregs(&sregs));
        let regs = kvm_regs {
            rip: self.entry,
            rflags: 2,
            rbp: layout::program_page(number),
            r12: layout::report_page(number),
            rsp: layout::stack_top(number),
            ..kvm_regs::default()
        };
        must("KVM_SET_REGS", vcpu.set_regs(&regs));
        must("KVM_SET_MP_STATE", vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }));
    }
}

/// All that KVM supports, with the vCPU's APIC number.
fn cpuid(kvm: &Kvm, number: u8) -> CpuId {
    let mut cpuid = must("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES));
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | u32::from(number) << 24,
            0xb | 0x1f => entry.edx = u32::from(number),
            _ => {}
        }
    }
    cpuid
}

fn window<B: Bitmap>(memory: &Memory<B>) -> Vec<(u64, u64)> {
    let mut extents: Vec<(u64, u64)> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
    let whole = |&(start, len): &(u64, u64)| (start | len).is_multiple_of(layout::BOOT_LEN);
    assert!(extents.iter().all(whole) && extents[0].0 == 0, "unfit for the guest: {extents:x?}");
    extents[0].0 += layout::BOOT_LEN;
    extents[0].1 -= layout::BOOT_LEN;
    extents.retain(|&(_, len)| len > 0);
    extents
}

/// Fills about `percent` of the window's pages with content that depends on `seed`, and leaves the others alone.
/// Returns how many were filled.
///
/// # Panics
/// If memory can't be written.
pub fn fill_pages<B: Bitmap>(memory: &Memory<B>, image: &GuestImage, percent: u64, seed: u64) -> u64 {
    let mut page = [0; 4096];
    let mut filled = 0;
    for offset in (0..image.window_len()).step_by(page.len()) {
        let mut state = mix(seed ^ offset);
        if state % 100 >= percent {
            continue;
        }
        filled += 1;
        for word in page.as_chunks_mut::<8>().0 {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            *word = (state ^ (state >> 29)).to_le_bytes();
        }
        memory.write_slice(&page, GuestAddress(image.window_to_physical(offset))).expect("the window is RAM");
    }
    filled
}

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
