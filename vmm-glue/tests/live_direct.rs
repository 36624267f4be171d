//! Live snapshots while direct I/O fills guest memory: the kernel has its pages pinned, and no write protection stops
//! what is in flight. It is drained, or the snapshot is refused by name.

mod common;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use common::live::{self, Kind};
use kvm_ioctls::Kvm;
use parking_lot::{Condvar, Mutex};
use testkit::guest::{GuestImage, Pattern, Privilege, Program};
use testkit::hugepages::Overcommit;
use testkit::require;
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{Backing, GuestRam, Host, LiveError, LiveOptions, MachineConfig, Vcpus, snapshot_live};

const PAGE: u64 = 4096;
/// What one request reads.
const REQUEST: u64 = 16 << 10;
/// Requests at a time.
const DEPTH: u64 = 4;
/// The pages of the file, each filled with its number.
const PAGES: u64 = 1024;

/// A disk that is read without a cache.
struct Disk {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Nothing new is begun.
    still: bool,
    end: bool,
    in_flight: u64,
    done: u64,
}

impl Disk {
    /// Whether a request may begin: waits for it.
    fn begin(&self) -> bool {
        let mut queue = self.queue.lock();
        self.changed.wait_while(&mut queue, |queue| queue.still && !queue.end);
        queue.in_flight += 1;
        !queue.end
    }

    fn done(&self) {
        let mut queue = self.queue.lock();
        queue.in_flight -= 1;
        queue.done += 1;
        self.changed.notify_all();
    }

    /// Begins nothing any more, and waits for what is in flight: answers how much that was.
    fn drain(&self) -> u64 {
        let mut queue = self.queue.lock();
        queue.still = true;
        let found = queue.in_flight;
        self.changed.wait_while(&mut queue, |queue| queue.in_flight > 0);
        found
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        change(&mut self.queue.lock());
        self.changed.notify_all();
    }

    /// Waits until a number of further requests are done.
    fn progress(&self, requests: u64) {
        let mut queue = self.queue.lock();
        let goal = queue.done + requests;
        self.changed.wait_while(&mut queue, |queue| queue.done < goal);
    }

    /// One of the requests after the other: parts of the file, to places in the second half of the window.
    fn run(&self, mut file: File, ram: &GuestRam, image: &GuestImage, seed: u64) {
        let half = image.window_len() / 2 / REQUEST;
        let mut random = seed;
        while self.begin() {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let from = (random >> 40) % (PAGES * PAGE / REQUEST);
            let to = image.window_to_physical((half + (random >> 20) % (half - 1)) * REQUEST);
            file.seek(SeekFrom::Start(from * REQUEST)).unwrap();
            // One read(2) into the guest's memory itself.
            let count = usize::try_from(REQUEST).unwrap();
            let read = ram.memory().read_volatile_from(GuestAddress(to), &mut file, count).unwrap();
            assert_eq!(read, count);
            self.done();
        }
    }
}

/// Ends the requests, also when the test fails.
struct Ending<'a>(&'a Disk);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.change(|queue| queue.end = true);
    }
}

/// A file on a disk: where the program is, since the temporary directory may be in memory.
fn image_of_a_disk() -> tempfile::NamedTempFile {
    let here = std::env::current_exe().unwrap();
    let mut file = tempfile::NamedTempFile::new_in(here.parent().unwrap()).unwrap();
    for page in 1..=PAGES {
        file.write_all(&page.to_le_bytes().repeat(512)).unwrap();
    }
    file.as_file().sync_all().unwrap();
    file
}

fn direct(path: &Path) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// A guest at work in the first half of its window.
fn boot(backing: Backing) -> (Vcpus, GuestImage) {
    let kind = Kind { privilege: Privilege::User, vcpus: 1, pattern: Pattern::Random, backing, mib: 16, filled: 50 };
    let (vcpus, image, _) = live::boot(&kind, MachineConfig::bare(1));
    let units = (image.window_len() / PAGE) / 2 - 8;
    let program = Program { units, ..live::programs(&image, kind.pattern)[0] };
    image.write_program(vcpus.ram().memory(), 0, &program);
    vcpus.resume();
    (vcpus, image)
}

#[test]
fn direct_reads_in_flight_are_drained_or_refused() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = Overcommit::reserve(16).unwrap();
    let source = image_of_a_disk();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let in_flight = Arc::new(Mutex::new(0));
    for backing in [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb] {
        let (vcpus, image) = boot(backing);
        let disk = Arc::new(Disk { queue: Mutex::default(), changed: Condvar::new() });
        std::thread::scope(|scope| {
            let _ending = Ending(&disk);
            for seed in 0..DEPTH {
                let (disk, ram, image, file) = (&disk, vcpus.ram(), &image, direct(source.path()));
                scope.spawn(move || disk.run(file, ram, image, seed));
            }
            for _ in 0..10 {
                live::progress(&vcpus, &image, 100);
                disk.progress(DEPTH);
                let copy = Arc::new(Mutex::new(Vec::new()));
                let (found, taken) = (Arc::clone(&in_flight), Arc::clone(&copy));
                let (stop, go) = (Arc::clone(&disk), Arc::clone(&disk));
                let options = LiveOptions::default()
                    .with_drain(move |ram| {
                        *found.lock() += stop.drain();
                        *taken.lock() = live::copy_of(ram);
                        Ok(())
                    })
                    // What is begun from here on has its pages pinned when they are saved, by the fault that this is.
                    .with_observer(move |_| {
                        go.change(|queue| queue.still = false);
                        go.progress(1);
                    });
                let report = snapshot_live(&vcpus, &host, &path, &options).unwrap().wait().unwrap();
                assert!(report.stats.write_faults + report.stats.hole_faults > 0, "{report:?}");
                let found = live::content_of(&path);
                live::assert_same(&found, &copy.lock());
                whole(&found, &image, vcpus.ram());
            }
            // A device model that can't wait says so, and nothing has happened.
            std::fs::remove_file(&path).unwrap();
            let busy = Arc::clone(&disk);
            let options = LiveOptions::default().with_drain(move |_| {
                let queue = busy.queue.lock();
                Err(format!("{} direct reads may be in flight", queue.in_flight.max(1)))
            });
            let error = snapshot_live(&vcpus, &host, &path, &options).unwrap_err();
            assert!(matches!(&error, LiveError::Drain(why) if why.contains("direct reads")), "{error}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            live::progress(&vcpus, &image, 100);
            disk.progress(DEPTH);
        });
    }
    assert!(*in_flight.lock() > 0, "nothing was in flight at any freeze point");
}

/// What is in the second half of the window is, page by page, what was there from the start or a page of the file.
fn whole(content: &[Vec<u8>], image: &GuestImage, ram: &GuestRam) {
    let half = image.window_len() / 2 / REQUEST * REQUEST;
    let mut pages = 0;
    for at in (half..image.window_len() - REQUEST).step_by(4096) {
        let guest = page_units::GuestAddr(image.window_to_physical(at));
        let piece =
            ram.pieces().iter().find(|piece| piece.guest <= guest && guest - piece.guest < piece.run.len()).unwrap();
        let offset = (piece.run.first.byte_offset() + (guest - piece.guest)).get();
        let page = &content[piece.run.block.0 as usize][offset..offset + 4096];
        let number = u64::from_le_bytes(page[..8].try_into().unwrap());
        if (1..=PAGES).contains(&number) {
            assert!(page.chunks_exact(8).all(|word| word == number.to_le_bytes()), "page {number} of the file is torn");
            pages += 1;
        }
    }
    assert!(pages > 0, "no page of the file is in guest memory");
}
