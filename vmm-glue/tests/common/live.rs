//! A guest that writes through all of its memory without end, and independent copies of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use mapped_ram::Snapshot;
use page_units::{BlockId, ByteLen, GuestAddr, PageCount};
use parking_lot::Mutex;
use testkit::guest::{GuestConfig, GuestImage, Operation, Oracle, Pattern, Privilege, Program, Signal, Walker};
use vmm_glue::{
    Backing, Bus, GuestRam, Host, LiveError, LiveOptions, LiveReport, LiveSnapshot, MachineConfig, NewVm, RamSpec,
    RestoreOptions, SavedVm, VcpuOptions, Vcpus, Vm, snapshot_live,
};

use super::{PATIENCE, Signals};

const PAGE: usize = 4096;
/// The last page of the window is no vCPU's: device models write there.
pub const DEVICE_PAGES: u64 = 1;

/// `mib` of memory in two blocks, one of them seen in two pieces. At least 8, and a multiple of 4.
pub fn specs(mib: u64) -> Vec<RamSpec> {
    let part = mib << 18;
    vec![
        RamSpec::new("ram").at(GuestAddr(0), ByteLen(2 * part)).at(GuestAddr(1 << 32), ByteLen(part)),
        RamSpec::new("more").at(GuestAddr(0x4000_0000), ByteLen(part)),
    ]
}

/// What kind of guest.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub privilege: Privilege,
    pub vcpus: u32,
    pub pattern: Pattern,
    pub backing: Backing,
    pub mib: u64,
    /// Percent of pages that exist from the start.
    pub filled: u64,
}

impl Kind {
    /// A small guest that writes to its memory at random.
    pub const SMALL: Kind = Kind {
        privilege: Privilege::User,
        vcpus: 1,
        pattern: Pattern::Random,
        backing: Backing::Anonymous,
        mib: 16,
        filled: 80,
    };
}

/// Writes generation numbers for ever; each vCPU its part.
pub fn programs(image: &GuestImage, pattern: Pattern) -> Vec<Program> {
    let vcpus = u64::from(image.config().vcpus);
    let pages = (image.window_len() >> 12) - DEVICE_PAGES;
    let part = pages / vcpus;
    (0..vcpus)
        .map(|vcpu| Program {
            start: (vcpu * part) << 12,
            unit_shift: 12,
            units: part,
            pattern,
            operation: Operation::Write { words: 8 },
            steps: u64::MAX,
            report_every: 0,
            seed: 1 + (vcpu << 40),
        })
        .collect()
}

fn prepare(ram: &GuestRam, kind: &Kind) -> (GuestImage, Vec<Program>) {
    let vcpus = u8::try_from(kind.vcpus).unwrap();
    let image = GuestImage::build(ram.memory(), GuestConfig { privilege: kind.privilege, vcpus });
    testkit::guest::fill_pages(ram.memory(), &image, kind.filled, 7);
    let programs = programs(&image, kind.pattern);
    for (vcpu, program) in (0..).zip(&programs) {
        image.write_program(ram.memory(), vcpu, program);
    }
    (image, programs)
}

/// The guest as plain Rust sees it. It is made from other memory: looking at the guest's own would make it exist.
pub fn oracle(kind: &Kind) -> (Oracle, Vec<Walker>) {
    let ram = GuestRam::allocate(&specs(kind.mib), Backing::Anonymous).unwrap();
    let (image, programs) = prepare(&ram, kind);
    (Oracle::capture(&image, ram.memory()), programs.into_iter().map(Walker::new).collect())
}

/// Boots it; it waits to be resumed.
pub fn boot(kind: &Kind, machine: MachineConfig) -> (Vcpus, GuestImage, Arc<Signals>) {
    let kvm = Kvm::new().unwrap();
    let ram = Arc::new(GuestRam::allocate(&specs(kind.mib), kind.backing).unwrap());
    let (image, _) = prepare(&ram, kind);
    let machine = NewVm::new(&kvm, ram, machine).unwrap();
    for (number, vcpu) in (0..).zip(machine.vcpus()) {
        image.boot_vcpu(&kvm, vcpu, number);
    }
    let bus = Arc::new(Signals::default());
    let options = VcpuOptions::default().paused();
    let vcpus = Vcpus::start(machine, Arc::clone(&bus) as Arc<dyn Bus>, options).unwrap();
    (vcpus, image, bus)
}

/// A copy of each block, of memory that is complete.
pub fn copy_of(ram: &GuestRam) -> Vec<Vec<u8>> {
    copy_over(ram, None)
}

/// A copy of each block, page by page. Pages that do not exist are not touched: that would make them exist. They are
/// what `base` has, or else zero.
pub fn copy_over(ram: &GuestRam, base: Option<&Vec<Vec<u8>>>) -> Vec<Vec<u8>> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let zero = || ram.layout().blocks().iter().map(|block| vec![0; block.length().get()]).collect();
    let mut blocks: Vec<Vec<u8>> = base.map_or_else(zero, Vec::clone);
    for (number, piece) in ram.pieces().iter().enumerate() {
        let first = piece.run.first.byte_offset().get();
        let bytes = &mut blocks[piece.run.block.0 as usize][first..first + piece.run.len().get()];
        // What a file of huge pages holds it does not tell: all of it is data.
        if piece.shared && piece.backing != Backing::Hugetlb {
            let memory = vm_memory::GuestMemoryBackend::iter(ram.memory()).nth(number).unwrap();
            let offset = vm_memory::GuestMemoryRegion::file_offset(memory).unwrap();
            let (start, end) = (offset.start(), offset.start() + piece.run.len().0);
            let seek = |at: u64, whence| {
                let found = nix::unistd::lseek(offset.file(), i64::try_from(at).unwrap(), whence);
                found.map_or(end, |found| u64::try_from(found).unwrap().min(end))
            };
            let mut at = seek(start, nix::unistd::Whence::SeekData);
            while at < end {
                let hole = seek(at, nix::unistd::Whence::SeekHole);
                let range = usize::try_from(at - start).unwrap()..usize::try_from(hole - start).unwrap();
                offset.file().read_exact_at(&mut bytes[range], at).unwrap();
                at = seek(hole, nix::unistd::Whence::SeekData);
            }
            continue;
        }
        let mut entries = vec![0; bytes.len() / PAGE * 8];
        pagemap.read_exact_at(&mut entries, piece.host.0 / PAGE as u64 * 8).unwrap();
        for (page, (entry, to)) in entries.chunks_exact(8).zip(bytes.chunks_exact_mut(PAGE)).enumerate() {
            if entry[7] & 0xc0 != 0 {
                let at = vm_memory::GuestAddress(piece.guest.0 + (page * PAGE) as u64);
                vm_memory::Bytes::read_slice(ram.memory(), to, at).unwrap();
            }
        }
    }
    blocks
}

/// Reads a file as its format says, and nothing else: a stored page is at its place, and a zero page is a hole.
pub fn content_of(path: &Path) -> Vec<Vec<u8>> {
    let snapshot = Snapshot::open(path).unwrap();
    let file = File::open(path).unwrap();
    let blocks = (0..).zip(snapshot.layout().blocks()).map(|(id, ram)| {
        let at = snapshot.block(BlockId(id)).unwrap();
        let mut bitmap = vec![0; usize::try_from(ram.pages().0.div_ceil(8)).unwrap()];
        file.read_exact_at(&mut bitmap, at.bitmap_offset.0).unwrap();
        let mut bytes = vec![0; ram.length().get()];
        file.read_exact_at(&mut bytes, at.pages_offset.0).unwrap();
        for (page, bytes) in bytes.chunks_exact_mut(PAGE).enumerate() {
            let stored = bitmap[page / 8] >> (page % 8) & 1 == 1;
            let zero = bytes.iter().all(|&byte| byte == 0);
            assert!(
                stored != zero,
                "page {page} is {}",
                if zero { "stored, and zero" } else { "there, and not stored" }
            );
        }
        bytes
    });
    blocks.collect()
}

/// Compares two copies of all memory, byte for byte.
pub fn assert_same(found: &[Vec<u8>], expected: &[Vec<u8>]) {
    assert_eq!(found.len(), expected.len());
    for (block, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        if found == expected {
            continue;
        }
        let pages = found.chunks(PAGE).zip(expected.chunks(PAGE)).enumerate();
        let differ: Vec<usize> = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
        panic!("block {block}: {} pages differ, the first are {:?}", differ.len(), &differ[..differ.len().min(8)]);
    }
}

/// The test's own copy, taken while the guest stands still.
#[derive(Clone, Debug, Default)]
pub struct Copy(Arc<Mutex<Vec<Vec<u8>>>>, Option<Arc<Vec<Vec<u8>>>>);

impl Copy {
    /// Of memory that is still being loaded: what does not exist yet is what `base` has.
    pub fn over(base: Vec<Vec<u8>>) -> Copy {
        Copy(Arc::default(), Some(Arc::new(base)))
    }

    pub fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.0.lock())
    }

    /// Options that take it.
    pub fn options(&self, options: LiveOptions) -> LiveOptions {
        let copy = self.clone();
        options.with_drain(move |ram| {
            *copy.0.lock() = copy_over(ram, copy.1.as_deref());
            Ok(())
        })
    }
}

/// Takes a live snapshot, waits for it, and compares it with the test's own copy.
pub fn snapshot(vcpus: &Vcpus, path: &Path, options: &LiveOptions) -> Result<LiveReport, LiveError> {
    let copy = Copy::default();
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let live = snapshot_live(vcpus, &host, path, &copy.options(options.clone()))?;
    let report = live.wait()?;
    assert_same(&content_of(path), &copy.take());
    Ok(report)
}

/// Waits until the guest has done `steps` more.
pub fn progress(vcpus: &Vcpus, image: &GuestImage, steps: u64) {
    let of = |vcpu| image.report(vcpus.ram().memory(), vcpu).counter;
    for vcpu in 0..image.config().vcpus {
        let goal = of(vcpu) + steps;
        while of(vcpu) < goal {
            assert!(vcpus.failure().is_none(), "{:?}", vcpus.failure());
            std::thread::yield_now();
        }
    }
}

/// Restores it; it waits to be resumed.
pub fn restore(path: &Path, backing: Backing, config: GuestConfig, on_demand: bool) -> (Vm, GuestImage, Arc<Signals>) {
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let saved = SavedVm::open(path, &kvm, &host).unwrap();
    let bus = Arc::new(Signals::default());
    let options = RestoreOptions::default().with_backing(backing).paused();
    let vm = if on_demand {
        saved.restore_on_demand(&kvm, &host, Arc::clone(&bus) as _, &options, |engine| engine).unwrap()
    } else {
        saved.restore_eager(&kvm, &host, Arc::clone(&bus) as _, &options).unwrap()
    };
    let image = GuestImage::found(vm.vcpus().ram().memory(), config);
    (vm, image, bus)
}

/// Loads it, and the guest does nothing but what it does; the background waits.
pub fn loading(path: &Path, backing: Backing) -> (Vm, Arc<Signals>) {
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let saved = SavedVm::open(path, &kvm, &host).unwrap();
    let bus = Arc::new(Signals::default());
    let options = RestoreOptions::default().with_backing(backing);
    let paused = uffd_engine::Background::default().paused();
    let vm = saved.restore_on_demand(&kvm, &host, Arc::clone(&bus) as _, &options, |e| e.background(paused));
    (vm.unwrap(), bus)
}

/// Lets the guest come to an end soon, and compares everything with what plain Rust says it should be.
pub fn finish(vcpus: &Vcpus, image: &GuestImage, bus: &Signals, kind: &Kind) {
    vcpus.pause(PATIENCE).unwrap();
    let (mut oracle, walkers) = oracle(kind);
    let memory = vcpus.ram().memory();
    let mut programs = Vec::new();
    for (vcpu, walker) in (0..).zip(&walkers) {
        let steps = image.report(memory, vcpu).counter + 1000;
        let program = Program { steps, ..*walker.program() };
        image.write_program(memory, vcpu, &program);
        oracle.write_program(vcpu, &program);
        programs.push(program);
    }
    vcpus.resume();
    vcpus.wait_stopped(PATIENCE).unwrap();
    let mut signals = bus.take();
    signals.sort_by_key(|(vcpu, _)| *vcpu);
    let done: Vec<_> = (0..u32::from(image.config().vcpus)).map(|vcpu| (vcpu, Signal::Done)).collect();
    assert_eq!(signals, done, "neither a mismatch nor an exception");
    for (vcpu, program) in (0..).zip(programs) {
        oracle.advance(vcpu, &mut Walker::new(program), u64::MAX);
    }
    oracle.compare(memory).unwrap();
}

/// A guest that runs.
pub fn running(kind: &Kind) -> (Vcpus, GuestImage, Arc<Signals>) {
    let (vcpus, image, bus) = boot(kind, MachineConfig::bare(kind.vcpus));
    vcpus.resume();
    progress(&vcpus, &image, 100);
    (vcpus, image, bus)
}

/// What is in a directory.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits until a number of pages are saved.
pub fn saved(snapshot: &LiveSnapshot, pages: u64) {
    while snapshot.progress().saved < PageCount(pages) && !snapshot.wait_for(Duration::ZERO) {
        std::thread::yield_now();
    }
}
