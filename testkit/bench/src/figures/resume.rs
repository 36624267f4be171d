//! `resume.*`: how long until the guest runs.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use mapped_ram::Snapshot;
use page_units::{BlockId, ByteLen};
use testkit::guest::layout;
use uffd_engine::{Background, Discards, Handlers};
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{Bus, Host, RestoreOptions, Step, VcpuOptions, resume_on_demand};

use super::{Bench, Measured};
use crate::figure::{Figure, Goal, median};
use crate::floor::{eager, kvm as bare};
use crate::pairs::interleave;
use crate::product::guest::{Port, Prepared, prepare, save, stopped};
use crate::sys::{Map, pin, unpin};

/// Steps the guest would do, of which it does one before it is saved and one when it is resumed.
const STEPS: u64 = 1000;

/// How often each size has its pairs: a resume is so short that a disturbance could last through all pairs of one round.
const SPARSE_ROUNDS: usize = 5;

/// A stopped guest twice: in memory with its bare state, and as a snapshot file.
struct Subject {
    guest: Prepared,
    report: Vec<u8>,
    state: bare::State,
}

impl Subject {
    fn make(kvm: &Kvm, host: &Host, ram: ByteLen, percent: u64, path: &Path) -> Measured<Subject> {
        let saved = prepare(ram, percent, STEPS)?;
        save(&saved.run(kvm, 1)?.0, host, path)?;
        drop(saved);
        let guest = prepare(ram, 0, STEPS)?;
        let state = bare::boot_and_take(kvm, &guest.image, &bare::slots(guest.ram.memory()))?;
        let mut report = vec![0; 4096];
        guest.ram.memory().read_slice(&mut report, GuestAddress(layout::report_page(0)))?;
        Ok(Subject { guest, report, state })
    }

    /// The bare sequence over memory that is there, in milliseconds.
    fn bare(&self, kvm: &Kvm) -> Measured<f64> {
        // The guest compares its counter with that in memory, so the one it has advanced is put back.
        self.guest.ram.memory().write_slice(&self.report, GuestAddress(layout::report_page(0)))?;
        Ok(millis(bare::resume(kvm, &self.state, &bare::slots(self.guest.ram.memory()))?))
    }

    /// The same on the vCPU's core, as nothing but a floor.
    fn bare_near(&self, bench: &Bench, kvm: &Kvm) -> Measured<Resumed> {
        pin(bench.near)?;
        let took = self.bare(kvm);
        unpin()?;
        Ok(Resumed { whole: took?, ..Resumed::default() })
    }
}

/// What a resume on demand took, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Resumed {
    whole: f64,
    /// Those of [`LIBRARY`].
    steps: [f64; LIBRARY.len()],
}

/// The steps of a restore that are the library's own: no KVM calls, but for those that check the state.
const LIBRARY: [(Step, &str); 5] = [
    (Step::Open, "open"),
    (Step::State, "read state"),
    (Step::Memory, "map"),
    (Step::Pages, "engine"),
    (Step::Threads, "vCPU threads"),
];

fn on_demand(bench: &Bench, kvm: &Kvm, host: &Host, path: &Path) -> Measured<Resumed> {
    let port = Port::stopping_after(1);
    let bus = Arc::clone(&port) as Arc<dyn Bus>;
    let options = RestoreOptions::default().with_vcpus(VcpuOptions::default().with_cores(vec![bench.near]));
    let called = Instant::now();
    let vm = resume_on_demand(path, kvm, host, bus, &options, |builder| {
        builder
            .handlers(Handlers::on_cores([bench.near]))
            .background(Background::default().on_cores([bench.far]))
            .discards(Discards::Announced)
    })?;
    stopped(vm.vcpus())?;
    let whole = millis(port.check()?.duration_since(called));
    Ok(Resumed { whole, steps: LIBRARY.map(|(step, _)| millis(vm.report().step(step))) })
}

pub(super) fn sparse(bench: &Bench) -> Measured {
    let kvm = Kvm::new()?;
    let host = Host::probe(&kvm)?;
    let directory = tempfile::tempdir_in(&bench.directory)?;
    let mut sizes = Vec::new();
    for (size, name) in [(256 << 20, "256MiB"), (1 << 30, "1GiB"), (4 << 30, "4GiB"), (16 << 30, "16GiB")] {
        let path = directory.path().join(name);
        sizes.push((name, Subject::make(&kvm, &host, ByteLen(size), 0, &path)?, path, Vec::new()));
    }
    for _ in 0..SPARSE_ROUNDS {
        for (_, subject, path, pairs) in &mut sizes {
            pairs.extend(interleave(|| on_demand(bench, &kvm, &host, path), || subject.bare_near(bench, &kvm))?);
        }
    }
    let how = format!("vCPU and handler on core {}, background on core {}", bench.near, bench.far);
    let mut figures = Vec::new();
    let mut library = Vec::new();
    for (name, _, _, pairs) in &sizes {
        let whole: Vec<_> = pairs.iter().map(|(product, floor)| (product.whole, floor.whole)).collect();
        figures.push(Figure::ratio(format!("resume.sparse.{name}"), "ms", &whole, Goal::AtMost(1.3)).measured(&how));
        let own: Vec<f64> = pairs.iter().map(|(product, _)| product.steps.iter().sum()).collect();
        let step = |at: usize| median(pairs.iter().map(|(product, _)| product.steps[at]).collect());
        let detail: Vec<_> = (0..).zip(LIBRARY).map(|(at, (_, name))| format!("{name} {:.3}", step(at))).collect();
        figures.push(
            Figure::absolute(format!("resume.library.{name}"), "ms", &own, Goal::AtMost(2.0))
                .measured(detail.join(", ")),
        );
        library.push(own);
    }
    if let (Some(small), Some(large)) = (library.first(), library.last()) {
        let growth: Vec<f64> = small.iter().zip(large).map(|(small, large)| large - small).collect();
        figures.push(
            Figure::absolute("resume.library.growth", "ms", &growth, Goal::AtMost(0.3)).measured("16 GiB - 256 MiB"),
        );
    }
    Ok(figures)
}

pub(super) fn eager(bench: &Bench) -> Measured {
    const LEN: usize = 1 << 30;
    let kvm = Kvm::new()?;
    let host = Host::probe(&kvm)?;
    let directory = tempfile::tempdir_in(&bench.directory)?;
    let path = directory.path().join("snapshot");
    let subject = Subject::make(&kvm, &host, ByteLen::of(LEN), 100, &path)?;
    let snapshot = Snapshot::open(&path)?;
    let pages = snapshot.block(BlockId(0)).ok_or("the snapshot has no RAM block")?.pages_offset;
    let file = File::open(&path)?;
    let load_all = || -> Measured<f64> {
        pin(bench.near)?;
        let memory = Map::anonymous(LEN)?;
        let begun = Instant::now();
        eager::load(&memory, 0, &file, pages.0, LEN)?;
        let loaded = begun.elapsed();
        let took = bare::resume(&kvm, &subject.state, &[(0, memory.address(0), LEN as u64)]);
        unpin()?;
        Ok(millis(loaded + took?))
    };
    let pairs = interleave(load_all, || Ok(on_demand(bench, &kvm, &host, &path)?.whole))?;
    let how = "1 GiB, all stored, warm; value: bare reads of 1 MiB and resume, one thread; floor: ours on demand";
    Ok(vec![Figure::ratio("resume.eager", "ms", &pairs, Goal::AtLeast(100.0)).measured(how)])
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
