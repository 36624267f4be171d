//! An unavailable page ends the guest with a clean error, in whatever way KVM shows it; it never becomes MMIO, and
//! never zeros.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PATIENCE, Rig, Signals};
use kvm_ioctls::Kvm;
use page_source::{End, Feed, PageBytes, PageSink, PageSource, Pages, Reply, SourceError, Span};
use page_units::{BlockId, GuestAddr, Layout, PageCount, PageIndex, PageRun};
use parking_lot::Mutex;
use testkit::faults::injected;
use testkit::guest::Privilege;
use testkit::require;
use uffd_engine::{Background, Event, FailurePolicy};
use vmm_glue::{
    Backing, FailedPage, Host, LiveError, LiveOptions, MachineConfig, RestoreOptions, SaveError, SaveOptions, SavedVm,
    StopError, VcpuError, Vm, VmStopError,
};

/// Another source without one of its pages.
#[derive(Debug)]
struct Without {
    inner: Arc<dyn PageSource>,
    page: (BlockId, PageIndex),
    /// Its file, which stays as it is while the guest runs from it.
    _dir: tempfile::TempDir,
}

#[derive(Debug)]
struct Gap {
    sink: Arc<dyn PageSink>,
    page: (BlockId, PageIndex),
}

impl Pages for Without {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }
    fn content(&self, run: PageRun) -> Span {
        self.inner.content(run)
    }
}

impl PageSource for Without {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        self.inner.start(Arc::new(Gap { sink, page: self.page }))
    }
}

impl PageSink for Gap {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        let bad = PageRun::single(self.page.0, self.page.1).intersect(run);
        if bad.is_empty() {
            return self.sink.data(run, bytes);
        }
        let (before, rest) = run.split_at(bad.first - run.first);
        let (bad, after) = rest.split_at(PageCount(1));
        let mut reply = Reply::Taken;
        if !before.is_empty() {
            reply = self.sink.data(before, bytes.slice(page_units::ByteLen(0), before.len()));
        }
        if reply.is_taken() {
            reply = self.sink.failed(bad, injected("the page is gone"));
        }
        if reply.is_taken() && !after.is_empty() {
            reply = self.sink.data(after, bytes.slice(before.len() + bad.len(), after.len()));
        }
        reply
    }
    fn zero(&self, run: PageRun) -> Reply {
        self.sink.zero(run)
    }
    fn absent(&self, run: PageRun) -> Reply {
        self.sink.absent(run)
    }
    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.sink.failed(run, error)
    }
    fn end(&self, end: End) {
        self.sink.end(end);
    }
}

/// A guest in the middle of its work, of which the page at `guest` is no longer available.
fn restored_without(
    privilege: Privilege,
    backing: Backing,
    policy: FailurePolicy,
    guest: impl FnOnce(&Rig) -> GuestAddr,
) -> (Vm, GuestAddr, Arc<Mutex<Vec<Event>>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = Rig::boot(privilege, MachineConfig::bare(1), Backing::Memfd, 250);
    rig.step();
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    vmm_glue::save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    let guest = guest(&rig);
    let piece =
        rig.ram.pieces().iter().find(|piece| piece.guest <= guest && (guest - piece.guest).0 < piece.run.len().0);
    let piece = piece.unwrap();
    let page = (piece.run.block, piece.run.first + PageCount((guest - piece.guest).0 >> 12));
    let saved = SavedVm::open(&path, &kvm, &host).unwrap();
    let saved = saved.with_source(|inner| Arc::new(Without { inner, page, _dir: dir }));
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let options = RestoreOptions::default()
        .with_backing(backing)
        .paused()
        .with_observer(move |event| seen.lock().push(event.clone()));
    let bus = Arc::new(Signals::default());
    let vm = saved
        .restore_on_demand(&kvm, &host, bus, &options, |engine| {
            engine.background(Background::default().paused()).on_failure(policy)
        })
        .unwrap();
    (vm, guest, events)
}

/// Runs until it can't go on.
fn run_to_failure(vm: &Vm) -> vmm_glue::VmError {
    let begun = Instant::now();
    loop {
        vm.resume();
        match vm.wait_stopped(PATIENCE) {
            Ok(()) => assert!(begun.elapsed() < PATIENCE, "the guest did not notice"),
            Err(VmStopError::Failed(error)) => return *error,
            Err(other) => panic!("{other}"),
        }
    }
}

/// A page of the window that has content and was not visited yet.
fn data_page(rig: &Rig) -> GuestAddr {
    let mut walker = rig.walkers[0].clone();
    let mut nothing = vec![0; usize::try_from(rig.image.window_len()).unwrap()];
    for _ in 0..400 {
        walker.step(&mut nothing);
    }
    // The guest writes its number there before it is saved only if it comes earlier: pick one that lies ahead and
    // was filled beforehand.
    loop {
        let step = walker.step(&mut nothing).expect("some page ahead has content");
        let guest = rig.image.window_to_physical(step.offset);
        let mut page = [0; 4096];
        vm_memory::Bytes::read_slice(rig.ram.memory(), &mut page, vm_memory::GuestAddress(guest)).unwrap();
        if page.iter().any(|byte| *byte != 0) {
            return GuestAddr(guest);
        }
    }
}

fn how(error: &vmm_glue::VmError) -> FailedPage {
    match error.vcpu.as_deref() {
        Some(VcpuError::PageFailed { how, .. }) => *how,
        other => panic!("{other:?}: {error}"),
    }
}

#[test]
fn data_that_is_gone_is_told_with_its_address() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let (vm, guest, events) = restored_without(privilege, backing, FailurePolicy::PoisonFailed, data_page);
            let error = run_to_failure(&vm);
            assert_eq!(error.guest, Some(guest), "{error}");
            assert!(matches!(how(&error), FailedPage::BusError | FailedPage::Mmio), "{error}");
            assert!(error.to_string().contains(&format!("{guest}")), "{error}");
            assert!(events.lock().iter().any(|event| matches!(event, Event::PagesFailed(_))));
            // What has no content is not saved, as zeros least of all.
            let host = Host::probe(&Kvm::new().unwrap()).unwrap();
            let path = std::env::temp_dir().join("never.mr");
            let saved = vm.save(&host, &path, &SaveOptions::default());
            assert!(matches!(saved, Err(SaveError::Poisoned(PageCount(1)))), "{saved:?}");
            let live = vm.snapshot_live(&host, &path, &LiveOptions::default());
            assert!(matches!(live, Err(LiveError::Poisoned(PageCount(1)))), "{live:?}");
            // It is not run again.
            vm.resume();
            assert!(matches!(vm.wait_stopped(PATIENCE), Err(VmStopError::Failed(_))));
        }
    }
}

#[test]
fn code_that_is_gone_is_told_with_its_address() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let code = |_: &Rig| GuestAddr(0x1_0000);
        let (vm, guest, _) = restored_without(privilege, Backing::Anonymous, FailurePolicy::PoisonFailed, code);
        let error = run_to_failure(&vm);
        assert_eq!(error.guest.map(|guest| guest.0 >> 12), Some(guest.0 >> 12), "{error}");
        assert!(matches!(how(&error), FailedPage::BusError | FailedPage::Fetch), "{error}");
    }
}

/// A page table is read by KVM itself, which makes a page fault of the guest's out of it: the engine's event is what
/// tells, so the guest is stopped then.
#[test]
fn a_page_table_that_is_gone_is_told_by_the_engine() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let table = |_: &Rig| GuestAddr(0x4_0000);
        let (vm, guest, _) = restored_without(privilege, Backing::Anonymous, FailurePolicy::PoisonMissing, table);
        let error = run_to_failure(&vm);
        assert_eq!(error.guest.map(|guest| guest.0 >> 12), Some(guest.0 >> 12), "{error}");
        assert!(error.engine.is_some(), "{error}");
    }
}

/// With a huge page goes all that the guest has to handle exceptions with: it crashes, though the engine goes on.
#[test]
fn a_guest_that_crashes_for_want_of_a_page_is_told_which() {
    require!(Kvm, Userfaultfd);
    let _room = testkit::hugepages::Overcommit::reserve(32).unwrap();
    for privilege in [Privilege::Kernel, Privilege::User] {
        let table = |_: &Rig| GuestAddr(0x4_0000);
        let (vm, guest, _) = restored_without(privilege, Backing::Hugetlb, FailurePolicy::PoisonFailed, table);
        let error = run_to_failure(&vm);
        match error.vcpu.as_deref() {
            Some(VcpuError::Shutdown { .. }) => {
                assert_eq!(error.guest, Some(guest), "{error}");
                assert!(error.engine.is_some() && error.to_string().contains("the page is gone"), "{error}");
            }
            // Where the processor itself walks the guest's page tables.
            Some(VcpuError::PageFailed { guest: Some(at), .. }) => assert_eq!(at.0 >> 21, guest.0 >> 21, "{error}"),
            other => panic!("{other:?}: {error}"),
        }
        assert!(vm.engine().unwrap().outcome().is_none());
    }
}

#[test]
fn an_engine_that_fails_stops_the_guest_and_says_why() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let (vm, guest, events) = restored_without(privilege, Backing::Memfd, FailurePolicy::PoisonMissing, data_page);
        let error = run_to_failure(&vm);
        assert!(error.engine.is_some(), "{error}");
        assert!(error.to_string().contains("the page is gone"), "{error}");
        assert_eq!(error.guest.map(|guest| guest.0 >> 12), Some(guest.0 >> 12), "{error}");
        // Joins the thread that tells.
        drop(vm);
        assert!(events.lock().iter().any(|event| matches!(event, Event::Failed(_))));
    }
}

/// Where nobody serves kernel faults, `KVM_RUN` fails with `EFAULT` and no address.
#[test]
fn a_fault_that_nobody_may_serve_is_no_mmio() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let rig = Rig::boot(privilege, MachineConfig::bare(1), Backing::Anonymous, 0);
        let piece = rig.ram.pieces().last().unwrap();
        let unserved = common::unserved(piece);
        rig.vcpus.resume();
        let error = rig.vcpus.wait_stopped(PATIENCE).unwrap_err();
        let StopError::Failed(error) = error else { panic!("{error}") };
        let VcpuError::PageFailed { how, guest, .. } = &*error else { panic!("{error}") };
        match privilege {
            Privilege::User => assert_eq!((*how, *guest), (FailedPage::Fault, None)),
            Privilege::Kernel => {
                let guest = guest.expect("MMIO has an address");
                assert!(*how == FailedPage::Mmio && piece.guest <= guest, "{error}");
            }
        }
        drop(unserved);
    }
}

/// A vCPU that waits for a page does not stop, and says so in time; it stops as soon as the page is there.
#[test]
fn stopping_has_a_time_limit() {
    require!(Kvm, Userfaultfd);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let rig = Rig::boot(privilege, MachineConfig::bare(1), Backing::Anonymous, 0);
        let piece = rig.ram.pieces().last().unwrap().clone();
        let (fault, held) = common::held(&piece);
        rig.vcpus.resume();
        let at = fault.recv_timeout(PATIENCE).expect("the guest comes to the missing piece");
        assert!(piece.host.0 <= at);
        let begun = Instant::now();
        let limit = Duration::from_millis(20);
        let stopped = rig.vcpus.pause(limit);
        match stopped {
            // Some hosts interrupt the fault.
            Ok(()) => {}
            Err(StopError::Timeout { vcpus, .. }) => assert_eq!(vcpus, [0]),
            Err(other) => panic!("{other}"),
        }
        assert!(begun.elapsed() >= limit || rig.vcpus.pause(PATIENCE).is_ok());
        assert!(begun.elapsed() < PATIENCE);
        drop(held);
        rig.vcpus.wait_stopped(PATIENCE).unwrap();
        rig.vcpus.resume();
        rig.vcpus.wait_stopped(PATIENCE).unwrap();
    }
}
