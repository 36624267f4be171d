//! What the demo does.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use page_units::{ByteLen, PageCount};
use testkit::guest::{Oracle, Walker};
use uffd_engine::{Background, Discards, Engine, Handlers};
use vmm_glue::{Bus, Host, Mode, RestoreOptions, SavedVm, Step, VcpuOptions, Vm};

use super::live;
use super::report::{Report, Restore, time};
use super::timeline::Timeline;
use crate::product::guest::{Done, PATIENCE, Port, Prepared, prepare, save, stopped};
use crate::sys::two_cores;

/// Steps of the guest before it is saved, and after it was restored.
const STEPS: u64 = 20_000;
/// How many of a hundred pages hold something.
const FILLED: u64 = 75;

/// What the demo shows.
#[derive(Debug)]
pub struct Shown {
    /// The numbers.
    pub report: Report,
    /// What happened when, eagerly and on demand.
    pub timelines: [Timeline; 2],
    /// How long each step of resuming on demand took, in microseconds.
    pub steps: Vec<(String, u64)>,
    /// What was wrong, if something was.
    pub problems: Vec<String>,
}

/// Boots, saves, restores twice, and compares. `say` is told what is being done.
///
/// # Errors
/// If something can't be done at all. Wrong memory is no error but a problem.
pub fn demo(ram: ByteLen, directory: &Path, say: impl Fn(&str)) -> Done<Shown> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm can't be used: {error}"))?;
    let host = Host::probe(&kvm)?;
    let path = directory.join("snapshot");
    let mut problems = Vec::new();

    let guest = prepare(ram, FILLED, u64::MAX)?;
    let mut oracle = Oracle::capture(&guest.image, guest.ram.memory());
    let mut walker = Walker::new(guest.program);
    let begun = Instant::now();
    let (vcpus, port) = guest.run(&kvm, STEPS)?;
    say(&format!("A guest with {ram} bytes of RAM booted and did {STEPS} steps in {}.", since(begun)));

    let live_path = directory.join("live");
    let live = live::snapshot(&guest, &vcpus, &port, &host, &live_path)?;
    say(&format!("A snapshot was taken while it ran, in {}.", time(live.complete_us)));
    port.stop_after(Some(1));
    stopped(&vcpus)?;
    problems.extend(live::problems(&guest, &mut oracle, &mut walker, &live_path, &kvm, &host)?);
    std::fs::remove_file(&live_path)?;
    let done = guest.report(&guest.ram).counter;
    oracle.advance(0, &mut walker, done);
    if let Err(difference) = oracle.compare(guest.ram.memory()) {
        problems.push(format!("before it was saved: {difference}"));
    }
    let saved = save(&vcpus, &host, &path)?;
    say(&format!(
        "It was stopped after {done} steps and saved in {}: {} pages stored, {} zero, {} bytes of device state.",
        time(micros(saved.took)),
        saved.stored,
        saved.zero,
        saved.state
    ));
    drop(vcpus);
    oracle.advance(0, &mut walker, done + STEPS);

    let expected = Expected { guest: &guest, oracle: &oracle, walker: &walker };
    let mut both = [Restored::default(), Restored::default()];
    for (restored, way) in both.iter_mut().zip([Way::Eager, Way::OnDemand]) {
        *restored = restore(&path, &kvm, &host, way)?;
        say(&format!("Restored {}, and its memory compared.", way.name()));
        if let Some(vm) = restored.vm.take() {
            problems.extend(expected.problems(&vm).into_iter().map(|problem| format!("{}: {problem}", way.name())));
        }
    }
    let [eager, on_demand] = both;
    let verified = problems.is_empty();
    let report = Report { ram_bytes: ram.0, verified, eager: eager.numbers, on_demand: on_demand.numbers, live };
    let timelines = [eager.timeline, on_demand.timeline];
    Ok(Shown { report, timelines, steps: on_demand.steps, problems })
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Eager,
    OnDemand,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Eager => "eagerly",
            Way::OnDemand => "on demand",
        }
    }
}

/// A restored guest that has done its work, and what that took.
#[derive(Debug, Default)]
struct Restored {
    vm: Option<Vm>,
    numbers: Restore,
    timeline: Timeline,
    steps: Vec<(String, u64)>,
}

fn restore(path: &Path, kvm: &Kvm, host: &Host, way: Way) -> Done<Restored> {
    let [near, far] = two_cores()?;
    let port = Port::stopping_after(STEPS);
    let bus = Arc::clone(&port) as Arc<dyn Bus>;
    let options = RestoreOptions::default().with_vcpus(VcpuOptions::default().with_cores(vec![near]));
    let called = Instant::now();
    let saved = SavedVm::open(path, kvm, host)?;
    let mut engine_at = called;
    let vm = match way {
        Way::Eager => saved.restore_eager(kvm, host, bus, &options)?,
        Way::OnDemand => saved.restore_on_demand(kvm, host, bus, &options, |builder| {
            engine_at = Instant::now();
            builder
                .handlers(Handlers::on_cores([near]))
                .background(Background::default().on_cores([far]))
                // The guest has no balloon, and nobody else takes memory from it.
                .discards(Discards::Announced)
        })?,
    };
    if !vm.wait_complete(PATIENCE)? {
        return Err(format!("its memory was not loaded within {PATIENCE:?}").into());
    }
    stopped(vm.vcpus())?;
    let resumed = port.check()?.duration_since(called);
    let numbers = match vm.engine() {
        Some(engine) => {
            let pages = saved.source().layout().total().to_pages();
            on_demand(engine, pages, resumed, engine_at.duration_since(called))
        }
        None => eager(&vm, resumed),
    };
    let timeline = Timeline { resumed: numbers.resume_us, complete: numbers.complete_us };
    let steps = vm.report().steps.iter().map(|(step, took)| (format!("{step:?}").to_lowercase(), micros(*took)));
    Ok(Restored { numbers, timeline, steps: steps.collect(), vm: Some(vm) })
}

fn eager(vm: &Vm, resumed: Duration) -> Restore {
    let report = vm.report();
    let loaded = [Step::Open, Step::State, Step::Memory, Step::Pages].map(|step| report.step(step)).iter().sum();
    let (stored, zero) = match report.mode {
        Mode::Eager { stored, zero } => (stored.0, zero.0),
        _ => (0, 0),
    };
    Restore {
        resume_us: micros(resumed),
        first_fault_us: 0,
        complete_us: micros(loaded),
        demand_faults: 0,
        background_pages: stored,
        zero_pages: zero,
    }
}

fn on_demand(engine: &Engine, pages: PageCount, resumed: Duration, engine_after: Duration) -> Restore {
    let stats = engine.stats();
    let after_call = |time: Option<Duration>| time.map_or(0, |time| micros(engine_after + time));
    Restore {
        resume_us: micros(resumed),
        first_fault_us: after_call(stats.time_to_first_fault),
        complete_us: after_call(stats.time_to_complete),
        demand_faults: stats.demand_faults,
        background_pages: stats.background_pages,
        zero_pages: pages.0 - stats.demand_pages - stats.background_pages,
    }
}

/// What a restored guest must have become.
struct Expected<'a> {
    guest: &'a Prepared,
    oracle: &'a Oracle,
    walker: &'a Walker,
}

impl Expected<'_> {
    fn problems(&self, vm: &Vm) -> Vec<String> {
        let mut problems = Vec::new();
        let report = self.guest.report(vm.vcpus().ram());
        let (found, expected) = ((report.counter, report.checksum), (self.walker.counter(), self.walker.checksum()));
        if found != expected {
            problems.push(format!("the guest's counter and checksum are {found:?} instead of {expected:?}"));
        }
        problems.extend(self.oracle.compare(vm.vcpus().ram().memory()).err());
        problems
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn since(begun: Instant) -> String {
    time(micros(begun.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_guest_is_verified() {
        testkit::require!(Kvm, Userfaultfd);
        let directory = tempfile::tempdir().unwrap();
        let shown = demo(ByteLen(64 << 20), directory.path(), |_| ()).unwrap();
        assert_eq!(shown.problems, Vec::<String>::new());
        let report = shown.report;
        assert!(report.verified && report.ram_bytes == 64 << 20);
        let pages = (64 << 20) / 4096;
        assert_eq!(report.eager.background_pages + report.eager.zero_pages, pages);
        assert_eq!(report.on_demand.zero_pages, report.eager.zero_pages, "{report:?}");
        // (On a busy machine all may be loaded before the guest gets to its first page.)
        assert_eq!(report.on_demand.demand_faults > 0, report.on_demand.first_fault_us > 0, "{report:?}");
        assert!(report.live.blackout_us > 0 && report.live.file_ratio < 1.1, "{report:?}");
        for restored in [&report.eager, &report.on_demand] {
            assert!(restored.resume_us > 0 && restored.complete_us > 0, "{report:?}");
        }
    }

    #[test]
    fn wrong_memory_is_found() {
        testkit::require!(Kvm);
        let kvm = Kvm::new().unwrap();
        let guest = prepare(ByteLen(4 << 20), FILLED, 100).unwrap();
        let mut oracle = Oracle::capture(&guest.image, guest.ram.memory());
        let mut walker = Walker::new(guest.program);
        drop(guest.run(&kvm, 50).unwrap().0);
        oracle.advance(0, &mut walker, 50);
        oracle.compare(guest.ram.memory()).unwrap();
        oracle.advance(0, &mut walker, 51);
        oracle.compare(guest.ram.memory()).unwrap_err();
    }
}
