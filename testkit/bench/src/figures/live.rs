//! `live.*`: what a snapshot costs the guest that runs on, and how long it takes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use page_units::ByteLen;
use testkit::guest::{GuestConfig, GuestImage, Operation, Pattern, Privilege, Program, fill_pages};
use testkit::hugepages::Overcommit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_glue::{
    Backing, GuestRam, Host, LiveOptions, LiveReport, MachineConfig, NewVm, RamSpec, VcpuOptions, Vcpus, snapshot_live,
};

use super::{Bench, Measured};
use crate::figure::{Figure, Goal, median};
use crate::floor::freeze;
use crate::floor::kvm::slots;
use crate::pairs::interleave;
use crate::product::guest::{PATIENCE, Port};
use crate::sys::{PAGE, Uffd};

const GIB: u64 = 1 << 30;

/// A guest that writes generation numbers to its memory without end.
struct Busy {
    vcpus: Vcpus,
    image: GuestImage,
    kvm: Kvm,
    host: Host,
}

impl Busy {
    /// `ram` bytes, of which about `percent` of the first `populated` are not zero; there the guest writes.
    fn start(ram: u64, populated: u64, percent: u64, backing: Backing) -> Measured<Busy> {
        let kvm = Kvm::new()?;
        let host = Host::probe(&kvm)?;
        let ram = Arc::new(GuestRam::allocate(&[RamSpec::pc("ram", ByteLen(ram))], backing)?);
        let image = GuestImage::build(ram.memory(), GuestConfig { privilege: Privilege::User, vcpus: 1 });
        if percent < 100 {
            fill_pages(ram.memory(), &image, percent, 7);
        } else {
            let page: Vec<u8> = (1..=u8::MAX).cycle().take(PAGE).collect();
            for offset in (0..populated - (2 << 20)).step_by(PAGE) {
                ram.memory().write_slice(&page, GuestAddress(image.window_to_physical(offset)))?;
            }
        }
        let window = populated - (2 << 20);
        let program = Program {
            pattern: Pattern::Random,
            operation: Operation::Write { words: 8 },
            steps: u64::MAX,
            ..Program::write_all(window)
        };
        image.write_program(ram.memory(), 0, &program);
        let machine = NewVm::new(&kvm, ram, MachineConfig { vcpus: 1, irqchip: true, pit: false })?;
        for (number, vcpu) in (0..).zip(machine.vcpus()) {
            image.boot_vcpu(&kvm, vcpu, number);
        }
        let vcpus = Vcpus::start(machine, Port::stopping_after(u64::MAX), VcpuOptions::default())?;
        Ok(Busy { vcpus, image, kvm, host })
    }

    fn counter(&self) -> u64 {
        self.image.report(self.vcpus.ram().memory(), 0).counter
    }

    /// Lets the guest run for a while.
    fn run_on(&self) {
        let goal = self.counter() + 1000;
        while self.counter() < goal && self.vcpus.failure().is_none() {
            std::thread::yield_now();
        }
    }

    /// Measures a snapshot's blackout in milliseconds: all of it, and the part that is neither stopping nor state.
    fn blackout(&self, path: &Path) -> Measured<[f64; 2]> {
        self.run_on();
        let snapshot = snapshot_live(&self.vcpus, &self.host, path, &LiveOptions::default())?;
        let blackout = snapshot.blackout();
        snapshot.cancel();
        // The file does not matter; that its thread is gone does.
        while !snapshot.wait_for(PATIENCE) {}
        drop(snapshot);
        Ok([millis(blackout.total), millis(blackout.total - blackout.stop - blackout.state)])
    }

    /// The same with bare calls: stop, state, register and protect all memory.
    fn bare_blackout(&self, msrs: &mut Msrs) -> Measured<[f64; 2]> {
        self.run_on();
        let pieces = slots(self.vcpus.ram().memory());
        let shared = self.vcpus.ram().pieces().iter().any(|piece| piece.shared);
        let uffd = if shared { Uffd::of_writes_to_shared()? } else { Uffd::of_writes()? };
        let begun = Instant::now();
        self.vcpus.pause(PATIENCE)?;
        freeze::state(self.vcpus.vm(), &self.vcpus.vcpu(0), msrs)?;
        let state = begun.elapsed();
        pieces.iter().try_for_each(|&(_, start, len)| uffd.arm(start, len))?;
        self.vcpus.resume();
        let total = begun.elapsed();
        pieces.iter().try_for_each(|&(_, start, len)| uffd.forget(start, len))?;
        Ok([millis(total), millis(total - state)])
    }

    /// The MSRs that a state has.
    fn msrs(&self) -> Measured<Msrs> {
        self.vcpus.pause(PATIENCE)?;
        let vcpu = self.vcpus.vcpu(0);
        let mut known = Vec::new();
        for &index in self.kvm.get_msr_index_list()?.as_slice() {
            let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
            let mut one = Msrs::from_entries(&[entry])?;
            if vcpu.get_msrs(&mut one)? == 1 {
                known.push(entry);
            }
        }
        drop(vcpu);
        self.vcpus.resume();
        Ok(Msrs::from_entries(&known)?)
    }

    /// Takes a snapshot, and says how many steps the guest did meanwhile.
    fn snapshot(&self, path: &Path) -> Measured<(LiveReport, u64)> {
        let before = self.counter();
        let report = snapshot_live(&self.vcpus, &self.host, path, &LiveOptions::default())?.wait()?;
        Ok((report, self.counter() - before))
    }

    /// Writes all memory to a file while the guest runs, and makes it durable. Nobody could use it.
    fn plain_copy(&self, path: &Path) -> Measured<Duration> {
        let begun = Instant::now();
        let mut file = fs::File::create(path)?;
        for region in self.vcpus.ram().memory().iter() {
            let start = region.start_addr();
            for at in (0..region.len()).step_by(2 << 20) {
                let len = usize::try_from((region.len() - at).min(2 << 20))?;
                let at = GuestAddress(start.0 + at);
                self.vcpus.ram().memory().write_all_volatile_to(at, &mut file, len)?;
            }
        }
        file.sync_data()?;
        Ok(begun.elapsed())
    }
}

pub(super) fn blackout(bench: &Bench) -> Measured {
    let dir = tempfile::tempdir_in(&bench.directory)?;
    let path = dir.path().join("live.mr");
    let full = Busy::start(GIB, GIB, 100, Backing::Anonymous)?;
    let mut msrs = full.msrs()?;
    let pairs = interleave(|| full.blackout(&path), || full.bare_blackout(&mut msrs))?;
    let whole: Vec<_> = pairs.iter().map(|(product, floor)| (product[0], floor[0])).collect();
    let armed: Vec<_> = pairs.iter().map(|(product, floor)| (product[1], floor[1])).collect();
    drop(full);
    // Pages here and there: a look-up of each would take longer than all the rest.
    let shared = Busy::start(GIB, GIB, 50, Backing::Memfd)?;
    let mut msrs = shared.msrs()?;
    let pairs = interleave(|| shared.blackout(&path), || shared.bare_blackout(&mut msrs))?;
    let in_file: Vec<_> = pairs.iter().map(|(product, floor)| (product[0], floor[0])).collect();
    drop(shared);
    let populated = 64 << 20;
    let dense = Busy::start(GIB, populated, 100, Backing::Anonymous)?;
    let sparse = Busy::start(16 * GIB, populated, 100, Backing::Anonymous)?;
    // One guest at a time has the core.
    let alone = |runs: &Busy, stands: &Busy| -> Measured<[f64; 2]> {
        stands.vcpus.pause(PATIENCE)?;
        runs.vcpus.resume();
        // A millisecond is soon lost to somebody else on the machine: the middle one of several counts.
        let several = (0..5).map(|_| runs.blackout(&path)).collect::<Measured<Vec<_>>>()?;
        Ok([0, 1].map(|part| median(several.iter().map(|blackout| blackout[part]).collect())))
    };
    let pairs = interleave(|| alone(&sparse, &dense), || alone(&dense, &sparse))?;
    let sizes: Vec<_> = pairs.iter().map(|(sparse, dense)| (sparse[0], dense[0])).collect();
    let arms: Vec<_> = pairs.iter().map(|(sparse, dense)| (sparse[1], dense[1])).collect();
    let how = "1 GiB of populated 4 KiB pages, guest writes; floor: bare stop, state, register and write-protect";
    let half = "1 GiB of a memfd, of which half exists, page by page; floor: the same with bare calls";
    let thin = "16 GiB, of which 64 MiB are populated; floor: ours, 1 GiB with the same pages";
    Ok(vec![
        Figure::ratio("live.blackout", "ms", &whole, Goal::AtMost(1.15)).measured(how),
        Figure::ratio("live.blackout.arm", "ms", &armed, Goal::None).measured("of that, register and write-protect"),
        Figure::ratio("live.blackout.memfd", "ms", &in_file, Goal::AtMost(1.15)).measured(half),
        Figure::ratio("live.sparse", "ms", &sizes, Goal::AtMost(1.3)).measured(thin),
        Figure::ratio("live.sparse.arm", "ms", &arms, Goal::None).measured("of that, register and write-protect"),
    ])
}

pub(super) fn huge(bench: &Bench) -> Measured {
    let dir = tempfile::tempdir_in(&bench.directory)?;
    let path = dir.path().join("live.mr");
    let _room = match Overcommit::reserve(GIB >> 21) {
        Ok(room) => room,
        Err(error) => {
            eprintln!("bench: no huge pages, so live.huge is not measured: {error}");
            return Ok(Vec::new());
        }
    };
    let guest = Busy::start(GIB, GIB, 100, Backing::Hugetlb)?;
    guest.blackout(&path)?;
    let all = (0..7).map(|_| guest.blackout(&path)).collect::<Measured<Vec<_>>>()?;
    let own: Vec<f64> = all.iter().map(|blackout| blackout[1]).collect();
    let whole: Vec<f64> = all.iter().map(|blackout| blackout[0]).collect();
    let how = "1 GiB of populated 2 MiB pages; our own part: all but stopping the vCPU and its state";
    Ok(vec![
        Figure::absolute("live.huge.own", "ms", &own, Goal::AtMost(1.0)).measured(how),
        Figure::absolute("live.huge.blackout", "ms", &whole, Goal::None).measured("all of it"),
    ])
}

pub(super) fn whole(bench: &Bench) -> Measured {
    let dir = tempfile::tempdir_in(&bench.directory)?;
    let (path, plain) = (dir.path().join("live.mr"), dir.path().join("plain"));
    let len = 256 << 20;
    let guest = Busy::start(len, len, 100, Backing::Anonymous)?;
    // So that everything exists, the zero pages of the guest's own part aside.
    guest.run_on();
    let mut rates = Vec::new();
    let product = || -> Measured<f64> {
        let (before, begun) = (guest.counter(), Instant::now());
        while begun.elapsed() < Duration::from_millis(100) {
            std::thread::yield_now();
        }
        let alone = (guest.counter() - before) as f64 / begun.elapsed().as_secs_f64();
        let (report, steps) = guest.snapshot(&path)?;
        rates.push((steps as f64 / report.took.as_secs_f64(), alone));
        fs::remove_file(&path)?;
        Ok(millis(report.took))
    };
    let floor = || -> Measured<f64> {
        let took = guest.plain_copy(&plain)?;
        fs::remove_file(&plain)?;
        Ok(millis(took))
    };
    let times = interleave(product, floor)?;
    drop(guest);

    let half = Busy::start(len, len / 4, 50, Backing::Anonymous)?;
    half.run_on();
    let (report, _) = half.snapshot(&path)?;
    let allocated = fs::metadata(&path)?.blocks() * 512;
    let stored = non_zero(&path)?;
    if stored != report.stored.to_bytes().0 {
        return Err(io::Error::other(format!("{stored} non-zero bytes, {} pages stored", report.stored.0)).into());
    }
    let sizes = [(allocated as f64 / 1e6, stored as f64 / 1e6)];
    let how = "256 MiB under load, to the same disk; floor: plain copy, both made durable";
    let progress = "steps of the guest a second while it is saved; floor: before";
    Ok(vec![
        Figure::ratio("live.total", "ms", &times, Goal::AtMost(1.3)).measured(how),
        Figure::ratio("live.file", "MB", &sizes, Goal::AtMost(1.02)).measured("allocated; floor: non-zero pages"),
        Figure::ratio("live.guest", "1/s", &rates, Goal::None).measured(progress),
    ])
}

/// How many bytes of a file are in pages that are not zero, from its first block of pages on.
fn non_zero(path: &Path) -> Measured<u64> {
    let snapshot = mapped_ram::Snapshot::open(path)?;
    let mut bytes = 0;
    let mut page = vec![0; PAGE];
    for (block, ram) in (0..).zip(snapshot.layout().blocks()) {
        let file = snapshot.block(page_units::BlockId(block)).ok_or("a block without a place")?;
        for offset in (0..ram.length().0).step_by(PAGE) {
            snapshot.read_exact_at(&mut page, page_units::FileOffset(file.pages_offset.0 + offset))?;
            bytes += if page.iter().any(|&byte| byte != 0) { PAGE as u64 } else { 0 };
        }
    }
    Ok(bytes)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
