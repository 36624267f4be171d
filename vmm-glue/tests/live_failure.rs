//! Live snapshots that do not come to their end: the guest goes on as if nothing had been, and nothing half-written is
//! ever taken for a snapshot.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::live::{self, Kind};
use common::{PATIENCE, Signals};
use kvm_ioctls::Kvm;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, setrlimit};
use page_units::PageCount;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use testkit::require;
use vm_memory::Bytes;
use vm_memory::GuestMemoryMmap;
use vmm_glue::{Backing, GuestRam, Host, LiveError, LiveOptions, MachineConfig, Vcpus, snapshot_live};

fn host() -> Host {
    Host::probe(&Kvm::new().unwrap()).unwrap()
}

#[test]
fn cancelled_at_any_moment() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let kind = Kind { backing, vcpus: 2, ..Kind::SMALL };
        let (vcpus, image, bus) = live::running(&kind);
        let pages = vcpus.ram().layout().total().to_pages().0;
        for step in 0..9 {
            // Cancelled in words, and by being dropped.
            let snapshot = snapshot_live(&vcpus, &host(), &path, &LiveOptions::default()).unwrap();
            assert_eq!(snapshot.progress().total, PageCount(pages));
            live::saved(&snapshot, random.random_range(0..=pages));
            snapshot.cancel();
            match snapshot.wait() {
                Err(LiveError::Cancelled) => assert_eq!(live::names(dir.path()), [""; 0], "step {step}"),
                Ok(_) => std::fs::remove_file(&path).unwrap(),
                Err(other) => panic!("{other}"),
            }
            let snapshot = snapshot_live(&vcpus, &host(), &path, &LiveOptions::default()).unwrap();
            live::saved(&snapshot, random.random_range(0..=pages));
            drop(snapshot);
            let _ = std::fs::remove_file(&path);
            assert_eq!(live::names(dir.path()), [""; 0], "step {step}");
            live::progress(&vcpus, &image, 10);
        }
        // One at once is always before the end.
        let snapshot = snapshot_live(&vcpus, &host(), &path, &LiveOptions::default()).unwrap();
        let busy = snapshot_live(&vcpus, &host(), &dir.path().join("second"), &LiveOptions::default());
        assert!(matches!(busy, Err(LiveError::Busy)) || snapshot.wait_for(Duration::ZERO), "{busy:?}");
        drop((busy, snapshot));
        live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
        std::fs::remove_file(&path).unwrap();
        live::finish(&vcpus, &image, &bus, &kind);
    }
}

#[test]
fn whatever_fails_leaves_the_guest_and_the_last_file_alone() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    std::fs::write(&path, "the one before").unwrap();
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    let refused = |options: &LiveOptions| snapshot_live(&vcpus, &host(), &path, options).unwrap_err();

    let stubborn = LiveOptions::default().with_drain(|_| Err("a disk has direct I/O in flight".into()));
    let error = refused(&stubborn);
    assert!(matches!(&error, LiveError::Drain(why) if why.contains("direct I/O")), "{error}");

    let nowhere = dir.path().join("no/such/directory/live.mr");
    let error = snapshot_live(&vcpus, &host(), &nowhere, &LiveOptions::default()).unwrap_err();
    assert!(matches!(error, LiveError::Create(_)), "{error}");

    live::progress(&vcpus, &image, 10);
    assert_eq!(std::fs::read(&path).unwrap(), b"the one before");
    assert_eq!(live::names(dir.path()), ["live.mr"]);
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}

/// A guest that is restored from a file is saved under the same name again: replacing the file would take away what is
/// still missing.
#[test]
fn the_file_that_memory_is_loaded_from_is_not_replaced_before_that_is_complete() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let [path, symlink, link] = ["live.mr", "symlink", "link"].map(|name| dir.path().join(name));
    let (vcpus, image, _) = live::running(&Kind::SMALL);
    live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
    drop(vcpus);
    std::os::unix::fs::symlink("live.mr", &symlink).unwrap();
    std::fs::hard_link(&path, &link).unwrap();
    let before = live::content_of(&path);

    let (vm, bus) = live::loading(&path, Backing::Anonymous);
    for name in [&path, &symlink, &link] {
        let stopped = LiveOptions::default().with_drain(|_| panic!("it is refused before anything stops"));
        let error = vm.snapshot_live(&host(), name, &stopped).unwrap_err();
        assert!(matches!(&error, LiveError::Source { path } if path == name), "{error}");
        assert!(error.to_string().contains(name.to_str().unwrap()), "{error}");
    }
    live::assert_same(&live::content_of(&path), &before);
    // What was missing comes all the same, and then nothing speaks against it.
    vm.engine().unwrap().resume_background();
    assert!(vm.wait_complete(PATIENCE).unwrap());
    let copy = live::Copy::default();
    vm.snapshot_live(&host(), &path, &copy.options(LiveOptions::default())).unwrap().wait().unwrap();
    live::assert_same(&live::content_of(&path), &copy.take());
    live::finish(vm.vcpus(), &image, &bus, &Kind::SMALL);
}

#[test]
fn memory_given_back_meanwhile_is_an_error() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    // The guest stands still, so what is given back was not written to since.
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    vcpus.pause(PATIENCE).unwrap();
    let page = image.window_to_physical(image.window_len() - 4096);
    let last = vcpus.ram().to_host(page_units::GuestAddr(page)).unwrap();
    // It exists, since it is written to.
    let mut content = [0; 4096];
    let page = vm_memory::GuestAddress(page);
    vcpus.ram().memory().read_slice(&mut content, page).unwrap();
    vcpus.ram().memory().write_slice(&content, page).unwrap();
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let told = parking_lot::Mutex::new(told);
    // The pages of the second block are saved after the first: the snapshot waits for the discard before it begins.
    let options = LiveOptions::default().with_observer(move |_| told.lock().recv().unwrap());
    let result = std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| snapshot_live(&vcpus, &host(), &path, &options).unwrap().wait());
        // Waits until it is seen that the memory is frozen: before that the kernel tells nobody.
        while !frozen(last.0) {
            std::thread::yield_now();
        }
        discard(last.0);
        tell.send(()).unwrap();
        snapshot.join().unwrap()
    });
    let error = result.unwrap_err();
    assert!(matches!(error, LiveError::Frozen(uffd_engine::FrozenError::Discarded { .. })), "{error}");
    assert_eq!(live::names(dir.path()), [""; 0]);
    vcpus.ram().memory().write_slice(&content, page).unwrap();
    vcpus.resume();
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}

/// Whether a page is write-protected: bit 57 of its entry (Linux Documentation/admin-guide/mm/pagemap.rst).
fn frozen(at: u64) -> bool {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, at / 4096 * 8).unwrap();
    entry[7] & 2 != 0
}

#[expect(unsafe_code, reason = "giving memory back has no safe wrapper")]
fn discard(at: u64) {
    let page = std::ptr::without_provenance_mut(usize::try_from(at).unwrap());
    // SAFETY: the memory is a guest's, to which there are no references; it reads as zero afterwards.
    assert_eq!(unsafe { libc::madvise(page, 4096, libc::MADV_DONTNEED) }, 0);
}

#[test]
fn memory_whose_writes_can_not_be_caught_is_refused_by_name() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let file = || {
        let file = tempfile::tempfile_in(dir.path()).unwrap();
        file.set_len(4 << 20).unwrap();
        vm_memory::FileOffset::new(file, 0)
    };
    let length = 4 << 20;
    let in_memory = || {
        let file = memfd_create("twice", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, 4 << 20).unwrap();
        vm_memory::FileOffset::new(file.into(), 0)
    };
    for (flags, file, mappings, what) in [
        (libc::MAP_PRIVATE, Some(file()), 1, "a private mapping of a file"),
        (libc::MAP_SHARED, Some(on_disk(file())), 1, "a mapping of a file on a disk"),
        (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 1, "shared memory without a file"),
        (libc::MAP_SHARED, Some(in_memory()), 2, "a second mapping of the same part of a file"),
    ] {
        let region = |number: u64| {
            let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(length, ());
            let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_mmap_flags(flags);
            let builder = match &file {
                Some(file) => builder.with_file_offset(file.clone()),
                None => builder,
            };
            let guest = vm_memory::GuestAddress(number << 24);
            vm_memory::GuestRegionMmap::new(builder.build().unwrap(), guest).unwrap()
        };
        let memory = GuestMemoryMmap::from_regions((0..mappings).map(region).collect()).unwrap();
        let ram = Arc::new(GuestRam::adopt(memory, |guest| format!("ram{guest}")).unwrap());
        let machine = vmm_glue::NewVm::new(&Kvm::new().unwrap(), ram, MachineConfig::bare(1)).unwrap();
        let options = vmm_glue::VcpuOptions::default().paused();
        let vcpus = Vcpus::start(machine, Arc::new(Signals::default()), options).unwrap();
        let error = snapshot_live(&vcpus, &host(), &dir.path().join("live.mr"), &LiveOptions::default()).unwrap_err();
        assert!(matches!(error, LiveError::Memory { what: found, .. } if found == what), "{error}");
    }
}

/// The temporary directory may be in memory; the directory of the program is not.
fn on_disk(otherwise: vm_memory::FileOffset) -> vm_memory::FileOffset {
    let here = std::env::current_exe().unwrap();
    match tempfile::tempfile_in(here.parent().unwrap()) {
        Ok(file) => {
            file.set_len(4 << 20).unwrap();
            vm_memory::FileOffset::new(file, 0)
        }
        Err(_) => otherwise,
    }
}

/// A small file system, for as long as this lives.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(kib: u64) -> SmallDisk {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "live-test"]).arg(dir.path()).status();
        assert!(mount.unwrap().success());
        SmallDisk(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

#[test]
fn a_full_disk_leaves_the_guest_running_and_no_file() {
    require!(Kvm, Userfaultfd, Root);
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    for kib in [64, 1024, 8000] {
        let disk = SmallDisk::mount(kib);
        let path = disk.0.path().join("live.mr");
        let error = snapshot_live(&vcpus, &host(), &path, &LiveOptions::default()).unwrap_err();
        assert!(matches!(error, LiveError::Space { .. }), "{error}");
        let unchecked = LiveOptions::default().unchecked_space();
        let error = snapshot_live(&vcpus, &host(), &path, &unchecked).unwrap().wait().unwrap_err();
        let LiveError::Write(page_source::SinkError::Write { offset, error: why, .. }) = &error else {
            panic!("{error}");
        };
        assert_eq!(why.raw_os_error(), Some(libc::ENOSPC), "{error}");
        assert!(offset.0 > 0 && error.to_string().contains(&offset.to_string()), "{error}");
        assert_eq!(live::names(disk.0.path()), [""; 0]);
        live::progress(&vcpus, &image, 10);
        // A symlink from a disk with space to this one, and the other way round.
        let roomy = tempfile::tempdir().unwrap();
        let [here, there] = [roomy.path().join("to-small"), disk.0.path().join("to-roomy")];
        std::os::unix::fs::symlink(&path, &here).unwrap();
        std::os::unix::fs::symlink(roomy.path().join("live.mr"), &there).unwrap();
        let error = snapshot_live(&vcpus, &host(), &here, &LiveOptions::default()).unwrap_err();
        assert!(matches!(&error, LiveError::Space { path, .. } if *path == here), "{error}");
        live::snapshot(&vcpus, &there, &LiveOptions::default()).unwrap();
        assert!(here.is_symlink() && there.is_symlink() && roomy.path().join("live.mr").is_file());
    }
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}

/// The same without a file system of one's own: a process that may not write files beyond a length.
#[test]
fn a_limit_on_the_length_of_files() {
    require!(Kvm, Userfaultfd);
    for role in ["limited", "limited at the end"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live.mr");
        // The signal would end the process.
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap - XFSZ; exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
        let output = child(&mut shell, role, &path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(live::names(dir.path()), [""; 0]);
    }
}

/// Beyond the headers, but not beyond all pages; or beyond all pages, but not beyond the device state.
fn limited(path: &Path, at_the_end: bool) {
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    snapshot_live(&vcpus, &host(), path, &LiveOptions::default()).unwrap().wait().unwrap();
    let state = mapped_ram::Snapshot::open(path).unwrap().device_state().start.0;
    std::fs::remove_file(path).unwrap();
    let limit = if at_the_end { state + 100 } else { state - (2 << 20) };
    setrlimit(Resource::RLIMIT_FSIZE, limit, limit).unwrap();
    let error = snapshot_live(&vcpus, &host(), path, &LiveOptions::default()).unwrap().wait().unwrap_err();
    let LiveError::Write(page_source::SinkError::Write { offset, error: why, .. }) = &error else {
        panic!("{error}");
    };
    assert_eq!(why.raw_os_error(), Some(libc::EFBIG), "{error}");
    let there = if at_the_end { state..state + 1 } else { 1..state };
    assert!(there.contains(&offset.0) && error.to_string().contains(&offset.to_string()), "{error}");
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}

/// This program again, to be the victim of a test: see [`victim`].
fn child<'a>(command: &'a mut Command, role: &str, path: &Path) -> &'a mut Command {
    command.args(["--exact", "victim", "--nocapture"]).env("LIVE_ROLE", role).env("LIVE_PATH", path)
}

/// Does nothing by itself: other tests start this program again with a role for it.
#[test]
fn victim() {
    let Ok(role) = std::env::var("LIVE_ROLE") else { return };
    let path = PathBuf::from(std::env::var_os("LIVE_PATH").unwrap());
    match role.as_str() {
        "limited" => limited(&path, false),
        "limited at the end" => limited(&path, true),
        other => panic!("{other}"),
    }
}
