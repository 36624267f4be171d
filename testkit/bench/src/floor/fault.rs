//! A bare loop that serves page faults from a mapped file, one page each.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::sync::Barrier;
use std::time::Instant;

use crate::sys::{Map, PAGE, Uffd, pin};

/// Where the two threads run.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// Who touches the pages.
    pub faulter: usize,
    /// Who serves them.
    pub handler: usize,
}

/// In what order pages are touched: each once, none next to the one before.
pub fn scattered(pages: usize) -> impl Iterator<Item = usize> {
    // A prime larger than any number of pages here has no divisor in common with it.
    (0..pages).map(move |k| k * 2_654_435_761 % pages)
}

/// How long each fault takes, in nanoseconds, when all pages of fresh memory are touched once in [`scattered`] order and
/// served from the same place of the file.
///
/// # Errors
/// If a call fails.
///
/// # Panics
/// If the handler does.
pub fn latencies(file: &File, len: usize, cores: Cores) -> io::Result<Vec<f64>> {
    let pages = len / PAGE;
    let memory = Map::anonymous(len)?;
    let source = Map::file(file, len)?;
    let uffd = Uffd::register(&memory)?;
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| {
            let pinned = pin(cores.handler);
            ready.wait();
            for _ in 0..pages {
                let page = uffd.next_fault()? & !(PAGE as u64 - 1);
                uffd.copy(page, source.address(0) + (page - memory.address(0)), PAGE)?;
            }
            pinned
        });
        let toucher = scope.spawn(|| {
            let pinned = pin(cores.faulter);
            ready.wait();
            let latencies = touch_all(&memory, pages);
            pinned.map(|()| latencies)
        });
        let latencies = toucher.join().expect("touching memory does not panic")?;
        handler.join().expect("the handler does not panic")?;
        Ok(latencies)
    })
}

/// Touches each page, and returns how long that took, in nanoseconds.
#[must_use]
pub fn touch_all(memory: &Map, pages: usize) -> Vec<f64> {
    let mut latencies = Vec::with_capacity(pages);
    for page in scattered(pages) {
        let start = Instant::now();
        black_box(memory.touch(page * PAGE));
        latencies.push(start.elapsed().as_secs_f64() * 1e9);
    }
    latencies
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn each_page_is_touched_once() {
        let mut order: Vec<usize> = scattered(1000).collect();
        assert!(order.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 1));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }

    #[test]
    fn faults_are_served_on_one_core_and_on_two() {
        testkit::require!(Userfaultfd, TwoCpus);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![3; 64 * PAGE]).unwrap();
        for handler in [0, 1] {
            let latencies = latencies(&file, 64 * PAGE, Cores { faulter: 0, handler }).unwrap();
            assert_eq!(latencies.len(), 64);
            assert!(latencies.iter().all(|&nanoseconds| nanoseconds > 100.0), "{latencies:?}");
        }
    }
}
