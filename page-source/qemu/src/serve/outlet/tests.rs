//! A source whose pages go away while they are sent.

use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::os::unix::net::UnixStream;

use page_source::{PageSink, Reply};
use page_units::{ByteLen, FileOffset, Layout, PageIndex, PageSize, RamBlock};
use vm_memory::MmapRegion;

use super::super::address::Socket;
use super::super::options::Control;
use super::*;
use crate::wire::record::{Reader, Record};

const PAGES: u64 = 16;

fn channel() -> (Channel, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    (Channel::new(Socket::Unix(near)), far)
}

fn outlet() -> (Outlet, UnixStream) {
    let block = RamBlock::new("ram", ByteLen(PAGES * 4096), PageSize::SMALL).unwrap();
    let pages = Pages::new(&Layout::new(vec![block]).unwrap());
    let ((main, far), shared) = (channel(), Control::new().unwrap().shared);
    (Outlet::new("a test".to_owned(), Options::default(), shared, pages, main), far)
}

/// Pages of a file, of which all behind the first `left` are gone.
struct Truncated(File, MmapRegion);

impl Truncated {
    fn new(left: u64) -> Truncated {
        let length = usize::try_from(PAGES * 4096).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; length]).unwrap();
        let backing = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(backing, length).unwrap();
        file.set_len(left * 4096).unwrap();
        Truncated(file, map)
    }

    /// The first pages.
    fn bytes(&self, pages: u64) -> PageBytes<'_> {
        let start = FileOffset(0);
        PageBytes::from_mapped_file(self.1.as_ptr(), ByteLen(pages * 4096), &self.0, start)
    }
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

/// The pages that came, each after a head of `head` bytes, before an end mark or the end.
fn received(mut far: UnixStream, head: usize) -> Vec<u64> {
    far.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    // It ends because there is nothing more.
    let _ = far.read_to_end(&mut bytes);
    let (mut from, mut records, mut page) = (Cursor::new(bytes), Reader::new(), [0; 4096]);
    let mut all = Vec::new();
    loop {
        from.set_position(from.position() + head as u64);
        loop {
            match records.next(&mut from, &mut page) {
                Err(_) => return all,
                Ok(Record::End) => break,
                Ok(Record::Page(index) | Record::Zero(index)) => all.push(index.0),
            }
        }
        // A footer.
        from.set_position(from.position() + 5);
    }
}

#[test]
fn what_another_thread_has_sent_is_not_sent_again_when_a_run_can_not_be_read() {
    let (outlet, far) = outlet();
    let (gone, page) = (Truncated::new(0), [1; 4096]);
    assert!(outlet.data(run(3, 1), PageBytes::from_slice(&page)).is_taken());
    let flow = outlet.data(run(0, 8), gone.bytes(8));
    assert!(matches!(flow, Reply::Unreadable(which) if which == run(0, 8)), "{flow:?}");
    // From another source, as it were.
    assert!(outlet.data(run(3, 1), PageBytes::from_slice(&page)).is_taken());
    assert!(outlet.data(run(5, 1), PageBytes::from_slice(&page)).is_taken());
    let block = outlet.pages.block(BlockId(0)).unwrap();
    assert_eq!((0..PAGES).filter(|at| block.sent.get(*at)).collect::<Vec<_>>(), [3, 5]);
    assert_eq!(received(far, 5), [3, 5]);
}

#[test]
fn what_went_on_the_second_connection_is_not_sent_again_either() {
    let (outlet, far) = outlet();
    let (fast, fast_far) = channel();
    outlet.fast.set(fast).unwrap();
    let half = Truncated::new(4);
    outlet.pages.block(BlockId(0)).unwrap().wanted.set(2);
    let flow = outlet.data(run(0, 8), half.bytes(8));
    assert!(matches!(flow, Reply::Unreadable(which) if which == run(0, 8)), "{flow:?}");
    let page = [1; 4096];
    assert!(outlet.data(run(2, 1), PageBytes::from_slice(&page)).is_taken());
    assert_eq!(received(fast_far, 0), [2]);
    drop(far);
}

#[test]
fn a_server_is_a_sink_that_keeps_to_the_contract() {
    let block = RamBlock::new("ram", ByteLen(PAGES * 4096), PageSize::SMALL).unwrap();
    page_source::conformance::sink(&Layout::new(vec![block]).unwrap(), || {
        let (outlet, far) = outlet();
        let outlet = Arc::new(outlet);
        let whole = Arc::clone(&outlet);
        let complete = move || {
            // The destination is there all the time.
            let _far = &far;
            whole.is_source_complete() && whole.failure().is_none()
        };
        (outlet as Arc<dyn PageSink>, Box::new(complete) as Box<dyn Fn() -> bool>)
    })
    .unwrap();
}
