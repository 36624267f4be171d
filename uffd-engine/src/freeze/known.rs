//! Which pages shared memory had at the freeze point.
//!
//! The page table of this process does not tell (another process may have filled a page), only the file does, and to look
//! every page up takes long where there are many short runs. So the guest stands still for little: the page tables that
//! have data, and the number of pages that each file has. The pages themselves are looked up while the guest runs. That
//! number shows afterwards whether what was found is what was there: no page may have gone since the freeze point, nor
//! come, but for those that our own handlers have made.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_units::{ByteLen, PAGE_SIZE, PageCount, PageRun};
use parking_lot::{Mutex, RwLock};

use super::error::FrozenError;
use super::file::{Watched, held, watched};
use super::zone::Zone;
use crate::memory::region::Region;

#[derive(Debug)]
pub(super) struct Known {
    runs: RwLock<Vec<PageRun>>,
    /// Whether the runs are the pages that were there, and no others.
    exact: AtomicBool,
    files: Vec<Counted>,
    /// The zones of which everything was there that an engine had brought.
    whole: Mutex<Vec<usize>>,
    /// Held shared while a page is made and counted, alone while the files are.
    making: RwLock<()>,
}

#[derive(Debug)]
struct Counted {
    file: Watched,
    /// What it took at the freeze point.
    then: OnceLock<ByteLen>,
    /// Pages that our handlers have made since.
    made: AtomicU64,
}

impl Known {
    pub(super) fn new(regions: &[Region]) -> io::Result<Known> {
        let counted = |file| Counted { file, then: OnceLock::new(), made: AtomicU64::new(0) };
        let files = watched(regions)?.into_iter().map(counted).collect();
        Ok(Known {
            runs: RwLock::default(),
            exact: AtomicBool::new(false),
            files,
            whole: Mutex::default(),
            making: RwLock::default(),
        })
    }

    /// At the freeze point: at least the pages that there are, and how many.
    pub(super) fn freeze(&self, zones: &[Zone], runs: Vec<PageRun>) -> io::Result<()> {
        for counted in &self.files {
            let _ = counted.then.set(held(&counted.file.file)?);
        }
        self.set(runs);
        // Huge pages are looked up one by one.
        let all = zones.iter().all(|zone| !zone.region.is_shared_memfd());
        self.exact.store(all, Ordering::Release);
        Ok(())
    }

    fn set(&self, mut runs: Vec<PageRun>) {
        runs.sort_by_key(|run| (run.block, run.first));
        *self.runs.write() = runs;
    }

    /// The pages that there were, looked up since: those that our handlers have made meanwhile may be among them.
    ///
    /// # Errors
    /// If pages have gone since the freeze point, or come, of which the freeze knows nothing.
    pub(super) fn refine(&self, zones: &[Zone], runs: Vec<PageRun>) -> Result<(), FrozenError> {
        // Where there was no data then, there was nothing but zeros: a page that had only been allocated (fallocate) may have
        // been written to since, without a fault.
        let runs = runs.into_iter().flat_map(|run| self.within(run)).collect();
        // What is made after this is not counted.
        let _nothing_is_made = self.making.write();
        self.set(runs);
        for counted in &self.files {
            let (file, Some(then)) = (&counted.file.file, counted.then.get()) else { continue };
            let at = counted.file.regions.first().map_or_else(Default::default, |&number| zones[number].region.start);
            let now = held(file).map_err(|error| FrozenError::io("asking a file for its size", at, &error))?;
            let expected = PageCount(then.to_pages().0 + counted.made.load(Ordering::Relaxed));
            if now != expected.to_bytes() {
                return Err(FrozenError::FileChanged { start: at, expected, found: now.to_pages() });
            }
        }
        // Only now: from here on pages are made without being counted.
        self.exact.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn is_exact(&self) -> bool {
        self.exact.load(Ordering::SeqCst)
    }

    /// At the freeze point of memory that is being loaded: how much the engine has put into each zone.
    pub(super) fn freeze_loading(&self, present: &[ByteLen]) -> io::Result<()> {
        for counted in &self.files {
            let expected: u64 = counted.file.regions.iter().map(|&zone| present[zone].0).sum();
            if held(&counted.file.file)?.0 == expected {
                self.whole.lock().extend_from_slice(&counted.file.regions);
            }
        }
        Ok(())
    }

    /// Whether all that an engine had put into a zone was there at the freeze point, and nothing else.
    pub(super) fn was_whole(&self, zone: usize) -> bool {
        self.whole.lock().contains(&zone)
    }

    /// Makes a page of a zone, and counts it if `made` says that it came of it.
    pub(super) fn make<T>(&self, zone: usize, make: impl FnOnce() -> T, made: impl FnOnce(&T) -> bool) -> T {
        let counted = self.files.iter().find(|counted| counted.file.regions.contains(&zone));
        let Some(counted) = counted.filter(|_| !self.is_exact()) else { return make() };
        let not_while_counting = self.making.read();
        if self.is_exact() {
            drop(not_while_counting);
            return make();
        }
        let done = make();
        if made(&done) {
            counted.made.fetch_add(1, Ordering::Relaxed);
        }
        done
    }

    /// The parts of a run that are known.
    fn within(&self, run: PageRun) -> Vec<PageRun> {
        let runs = self.runs.read();
        // They are sorted and do not overlap: the first that may reach into it, and on.
        let from = runs.partition_point(|known| (known.block, known.end()) <= (run.block, run.first));
        let here = |known: &&PageRun| (known.block, known.first) < (run.block, run.end());
        runs.iter().skip(from).take_while(here).map(|known| known.intersect(run)).collect()
    }

    /// For each page of a run, whether there was one.
    pub(super) fn existed(&self, run: PageRun) -> Vec<bool> {
        let mut exists = vec![false; ByteLen(run.len().0 / PAGE_SIZE).get()];
        for page in self.within(run).iter().flat_map(|run| run.iter()) {
            exists[ByteLen((page - run.first).0).get()] = true;
        }
        exists
    }
}
