//! A guest at work, for all tests here.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

pub mod live;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use kvm_ioctls::Kvm;
use page_units::{ByteLen, GuestAddr};
use parking_lot::Mutex;
use testkit::guest::{GuestConfig, GuestImage, Oracle, Pattern, Privilege, Program, Signal, Walker, layout};
use userfaultfd::{Event, Uffd, UffdBuilder};
use vmm_glue::{
    Backing, Bus, GuestRam, MachineConfig, MachineState, NewVm, Next, Piece, RamSpec, VcpuOptions, VcpuState, Vcpus,
};

/// Long enough for anything here, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Two blocks; the first is seen in two pieces, with gaps between all of them.
pub fn specs() -> Vec<RamSpec> {
    vec![
        RamSpec::new("ram").at(GuestAddr(0), ByteLen(4 << 20)).at(GuestAddr(1 << 32), ByteLen(6 << 20)),
        RamSpec::new("more").at(GuestAddr(0x4000_0000), ByteLen(2 << 20)),
    ]
}

/// All signals of all vCPUs, in order; a vCPU stops at each.
#[derive(Debug, Default)]
pub struct Signals(pub Mutex<Vec<(u32, Signal)>>);

impl Bus for Signals {
    fn io_out(&self, vcpu: u32, port: u16, data: &[u8]) -> Next {
        assert_eq!(port, layout::PORT);
        self.0.lock().push((vcpu, Signal::of(data[0])));
        Next::Stop
    }
}

impl Signals {
    pub fn take(&self) -> Vec<(u32, Signal)> {
        std::mem::take(&mut self.0.lock())
    }
}

/// A guest, its oracle, and the walkers of its vCPUs.
pub struct Rig {
    pub image: GuestImage,
    pub ram: Arc<GuestRam>,
    pub bus: Arc<Signals>,
    pub vcpus: Vcpus,
    pub oracle: Oracle,
    pub walkers: Vec<Walker>,
}

/// The work of each vCPU: a part of the window of its own.
pub fn programs(image: &GuestImage, progress: u64, seed: u64) -> Vec<Program> {
    let vcpus = u64::from(image.config().vcpus);
    let part = ((image.window_len() >> 12) / vcpus) << 12;
    (0..vcpus)
        .map(|vcpu| Program {
            start: vcpu * part,
            pattern: if vcpu == 0 { Pattern::Random } else { Pattern::Stride(7) },
            seed: seed + vcpu,
            report_every: progress,
            ..Program::write_all(part)
        })
        .collect()
}

impl Rig {
    /// A guest that has its program and waits to be resumed.
    pub fn boot(privilege: Privilege, machine: MachineConfig, backing: Backing, progress: u64) -> Rig {
        let kvm = Kvm::new().unwrap();
        let ram = Arc::new(GuestRam::allocate(&specs(), backing).unwrap());
        let config = GuestConfig { privilege, vcpus: u8::try_from(machine.vcpus).unwrap() };
        let image = GuestImage::build(ram.memory(), config);
        testkit::guest::fill_pages(ram.memory(), &image, 25, 7);
        let programs = programs(&image, progress, 1000);
        for (vcpu, program) in (0..).zip(&programs) {
            image.write_program(ram.memory(), vcpu, program);
        }
        let oracle = Oracle::capture(&image, ram.memory());
        let machine = NewVm::new(&kvm, Arc::clone(&ram), machine).unwrap();
        for (number, vcpu) in (0..).zip(machine.vcpus()) {
            image.boot_vcpu(&kvm, vcpu, number);
        }
        let bus = Arc::new(Signals::default());
        let options = VcpuOptions::default().paused();
        let vcpus = Vcpus::start(machine, Arc::clone(&bus) as Arc<dyn Bus>, options).unwrap();
        let walkers = programs.into_iter().map(Walker::new).collect();
        Rig { image, ram, bus, vcpus, oracle, walkers }
    }

    /// Lets all vCPUs run until each has stopped at its next signal.
    pub fn step(&self) -> Vec<(u32, Signal)> {
        self.vcpus.resume();
        self.vcpus.wait_stopped(PATIENCE).unwrap();
        let mut signals = self.bus.take();
        signals.sort_by_key(|(vcpu, _)| *vcpu);
        signals
    }

    /// Runs all programs to their end, and compares everything with the oracle.
    pub fn finish(&mut self) {
        for vcpu in 0..self.image.config().vcpus {
            while self.image.report(self.ram.memory(), vcpu).state != 2 {
                for (vcpu, signal) in self.step() {
                    assert!(matches!(signal, Signal::Progress | Signal::Done), "{signal:?} on vCPU {vcpu}");
                }
            }
        }
        for (vcpu, walker) in (0..).zip(&mut self.walkers) {
            self.oracle.advance(vcpu, walker, u64::MAX);
            let report = self.image.report(self.ram.memory(), vcpu);
            assert_eq!((report.counter, report.checksum), (walker.counter(), walker.checksum()), "vCPU {vcpu}");
        }
        self.oracle.compare(self.ram.memory()).unwrap();
    }
}

/// What is tried everywhere: privilege and number of vCPUs.
pub const VARIANTS: [(Privilege, u32); 4] =
    [(Privilege::Kernel, 1), (Privilege::User, 1), (Privilege::Kernel, 2), (Privilege::User, 2)];

/// Compares states, but for what the passing of time changes: the time stamp counter, kvmclock, the timers' counts.
pub fn assert_same_state(a: &MachineState, b: &MachineState) {
    let timeless = |state: &MachineState| {
        let mut state = state.clone();
        (state.vm.clock, state.vm.realtime) = (None, None);
        for channel in state.vm.pit.iter_mut().flat_map(|pit| &mut pit.channels) {
            channel.count_load_time = 0;
        }
        for vcpu in &mut state.vcpus {
            vcpu.tsc_offset = None;
            vcpu.msrs.retain(|(index, _)| *index != 0x10);
            if let Some(lapic) = &mut vcpu.lapic {
                // The current count of the APIC's timer.
                lapic.regs[0x390..0x394].fill(0);
            }
        }
        state
    };
    let (a, b) = (timeless(a), timeless(b));
    assert_eq!(a.vm, b.vm);
    for (a, b) in a.vcpus.iter().zip(&b.vcpus) {
        assert_eq!(a.regs, b.regs);
        assert_eq!(a.sregs, b.sregs);
        assert_eq!(a.sregs2, b.sregs2);
        assert_eq!(a.events, b.events);
        assert_eq!(a.debug, b.debug);
        assert_eq!(a.xcrs.xcrs, b.xcrs.xcrs);
        assert_eq!(a.xsave, b.xsave);
        assert_eq!(a.mp_state, b.mp_state);
        assert_eq!(a.msrs, b.msrs);
        let regs = |state: &VcpuState| state.lapic.iter().flat_map(|lapic| lapic.regs).collect::<Vec<_>>();
        let differs = regs(a).into_iter().zip(regs(b)).enumerate().find(|(_, (a, b))| a != b);
        assert_eq!(differs, None, "byte of the local APIC");
    }
    assert_eq!(a, b);
}

/// Memory of a guest registered with userfaultfd.
pub struct Registered {
    uffd: Uffd,
    piece: Piece,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.uffd.unregister(address(&self.piece), self.piece.run.len().get()).unwrap();
    }
}

fn address(piece: &Piece) -> *mut std::ffi::c_void {
    std::ptr::without_provenance_mut(usize::try_from(piece.host.0).unwrap())
}

fn register(piece: &Piece, user_mode_only: bool) -> Registered {
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(false).user_mode_only(user_mode_only).create();
    let uffd = uffd.unwrap();
    discard(piece);
    uffd.register(address(piece), piece.run.len().get()).unwrap();
    Registered { uffd, piece: piece.clone() }
}

#[expect(unsafe_code, reason = "giving memory back has no safe wrapper")]
fn discard(piece: &Piece) {
    // SAFETY: the memory is a guest's, to which there are no references; it reads as zero afterwards.
    unsafe { libc::madvise(address(piece), piece.run.len().get(), libc::MADV_DONTNEED) };
}

/// Makes a piece missing, in a way that the kernel may not wait for.
pub fn unserved(piece: &Piece) -> Registered {
    register(piece, true)
}

/// Makes a piece missing, tells of the first fault, and serves zeros once the second value is dropped.
pub fn held(piece: &Piece) -> (Receiver<u64>, Sender<()>) {
    let (tell, told) = channel();
    let (hold, released) = channel::<()>();
    let registered = register(piece, false);
    std::thread::spawn(move || {
        if let Ok(Some(Event::Pagefault { addr, .. })) = registered.uffd.read_event() {
            tell.send(addr.addr() as u64).unwrap();
        }
        // Until the other end is dropped; unregistering then lets everybody go on.
        assert!(released.recv().is_err());
        drop(registered);
    });
    (told, hold)
}
