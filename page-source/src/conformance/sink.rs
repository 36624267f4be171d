//! Checking a sink.

use std::fs::File;
use std::sync::Arc;
use std::thread;

use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageIndex, PageRun};

use super::{Breach, Rule};
use crate::{End, PageBytes, PageSink, Reply, SourceError};

/// A sink to be checked, and whether it has made something whole of its flow: a file that can be published, memory that
/// is complete. The second is asked after the end.
pub type Made = (Arc<dyn PageSink>, Box<dyn Fn() -> bool>);

/// Checks a sink below which there is nothing. `make` makes a new one for a source with this layout, each time.
///
/// # Errors
/// The first rule that they break.
///
/// # Panics
/// If `layout` has no block of at least two pages.
pub fn sink(layout: &Layout, mut make: impl FnMut() -> Made) -> Result<(), Breach> {
    let runs: Vec<PageRun> = layout.runs().filter(|run| run.pages.0 > 1).collect();
    let first = *runs.first().unwrap_or_else(|| panic!("a layout with no block of two pages"));
    let page = PageRun::single(first.block, first.first);
    takes_everything(layout, make())?;
    refuses(&mut make, first)?;
    let unreadable = unreadable_file();
    let (sink, whole) = make();
    let nothing = PageBytes::from_mapped_file(std::ptr::null(), ByteLen(4096), &unreadable, FileOffset(0));
    match sink.data(page, nothing) {
        Reply::Taken => return Err(Rule::TakesUnreadable.breach("bytes that are gone were taken")),
        Reply::Unreadable(run) if run != page => {
            return Err(Rule::TakesUnreadable.breach(format_args!("{run} is said to be unreadable, of {page}")));
        }
        Reply::Unreadable(_) | Reply::Stop(_) => {}
    }
    let _ = sink.failed(page, SourceError::stopped("it could not be read"));
    sink.end(End::Complete);
    not_whole(&*whole, "a page had failed")?;
    let (sink, whole) = make();
    let reply = sink.absent(page);
    sink.end(End::Complete);
    if reply.is_taken() || whole() {
        return Err(Rule::AbsentAsZero.breach("there is no layer below, and an absent page was taken"));
    }
    for end in [End::Stopped, End::Broken(SourceError::stopped("injected"))] {
        let (sink, whole) = make();
        let said = format!("the end was {end:?}");
        sink.end(end);
        not_whole(&*whole, &said)?;
    }
    Ok(())
}

fn not_whole(whole: &dyn Fn() -> bool, why: &str) -> Result<(), Breach> {
    if whole() { Err(Rule::CompleteWithoutComplete.breach(format_args!("it made a whole, and {why}"))) } else { Ok(()) }
}

/// An empty file, of which no page can be read.
fn unreadable_file() -> File {
    // Only its descriptor is needed: the address is that of nothing.
    File::open("/dev/null").unwrap_or_else(|error| panic!("/dev/null: {error}"))
}

/// All pages, from two threads, some twice.
fn takes_everything(layout: &Layout, (sink, whole): Made) -> Result<(), Breach> {
    let content: Vec<u8> = (1..=251).cycle().take(4096).collect();
    let refused = thread::scope(|scope| {
        let give = |from: u64| {
            let (sink, content) = (&sink, &content);
            move || {
                for all in layout.runs() {
                    for one in all.pieces(PageCount(1)).filter(|one| one.first.0 % 4 >= from) {
                        let reply = if one.first.0.is_multiple_of(3) {
                            sink.zero(one)
                        } else {
                            sink.data(one, PageBytes::from_slice(content))
                        };
                        if !reply.is_taken() {
                            return Some((one, reply));
                        }
                    }
                }
                None
            }
        };
        let threads = [scope.spawn(give(0)), scope.spawn(give(2))];
        threads.map(|thread| thread.join())
    });
    for thread in refused {
        match thread {
            Err(_) => return Err(Rule::Panics.breach("it was given pages by two threads")),
            Ok(Some((run, reply))) => return Err(Rule::Refused.breach(format_args!("{run}: {reply:?}"))),
            Ok(None) => {}
        }
    }
    sink.end(End::Complete);
    if whole() { Ok(()) } else { Err(Rule::NotComplete.breach("every page came, and the end was Complete")) }
}

/// What is wrong is never taken, and never panics.
fn refuses(make: &mut impl FnMut() -> Made, inside: PageRun) -> Result<(), Breach> {
    let page = [7; 4096];
    let behind = PageRun::new(inside.block, inside.end(), PageCount(1));
    let wrong: [(&str, PageRun, usize); 5] = [
        ("too few bytes", inside.split_at(PageCount(2)).0, 1),
        ("too many bytes", inside.split_at(PageCount(1)).0, 2),
        ("a page behind its block", behind, 1),
        ("a block that there is not", PageRun::new(BlockId(u32::MAX), PageIndex(0), PageCount(1)), 1),
        ("a page beyond all numbers", PageRun::new(inside.block, PageIndex(u64::MAX / 4096), PageCount(1)), 1),
    ];
    for (what, run, pages) in wrong {
        let (sink, whole) = make();
        let bytes = page.repeat(pages);
        let reply =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sink.data(run, PageBytes::from_slice(&bytes))));
        match reply {
            Err(_) => return Err(Rule::Panics.breach(what)),
            Ok(reply) => {
                sink.end(End::Complete);
                if reply.is_taken() && whole() {
                    return Err(Rule::TakesWhatIsWrong.breach(what));
                }
            }
        }
    }
    Ok(())
}
