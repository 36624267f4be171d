//! A source that is another process: pages come over a socket, late, in its own order.
//!
//! ```text
//! cargo run -p page-source --example network
//! ```
//!
//! [`Remote`] is all that it takes: it asks with the number of a page, and a thread hands on what comes. The other side,
//! and the memory that is loaded from it, are below.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use page_source::{
    Answer, Collect, Content, End, EndGuard, Feed, OneShot, PageBytes, PageSink, Pages, Reply, SourceError,
    SourceErrorKind, Span, Subject, Urgency,
};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};

/// Pages of one block, from the other end of a socket.
#[derive(Debug)]
struct Remote(UnixStream, Layout);

impl OneShot for Remote {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::new(Unknown(self.1.clone()))
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let lost = |error| SourceError::new(SourceErrorKind::PeerGone, Subject::peer("remote"), "").with_cause(error);
        let mut from = self.0.try_clone().map_err(lost)?;
        let (end, stopped) = (EndGuard::new(sink), Arc::new(AtomicBool::new(false)));
        let by_us = Arc::clone(&stopped);
        let thread = thread::spawn(move || {
            let mut message = [0; 8 + 4096];
            // Ends when the other side does, and when the feed hangs up.
            while from.read_exact(&mut message).is_ok() {
                let (number, content) = message.split_at(8);
                let number = number.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
                let page = PageRun::single(BlockId(0), PageIndex(number));
                if let Reply::Stop(_) = end.sink().data(page, PageBytes::from_slice(content)) {
                    return end.end(End::Stopped);
                }
            }
            let gone = || SourceError::new(SourceErrorKind::PeerGone, Subject::peer("remote"), "it hung up");
            end.end(if by_us.load(Ordering::Acquire) { End::Stopped } else { End::Broken(gone()) });
        });
        Ok(Box::new(RemoteFeed(self.0, stopped, Some(thread))))
    }
}

#[derive(Debug)]
struct RemoteFeed(UnixStream, Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Feed for RemoteFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        // If it can't be sent, the thread that reads finds the same, and says so.
        let asked = run.iter().try_for_each(|page| (&self.0).write_all(&page.0.to_le_bytes()));
        asked.map_or(Answer::Later, |()| Answer::Later)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

impl Drop for RemoteFeed {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Release);
        let _ = self.0.shutdown(Shutdown::Both);
        self.2.take().map(JoinHandle::join);
    }
}

/// Nothing is known of a page before it comes.
#[derive(Debug)]
struct Unknown(Layout);

impl Pages for Unknown {
    fn layout(&self) -> &Layout {
        &self.0
    }

    fn content(&self, run: PageRun) -> Span {
        Span::new(Content::Unknown, self.0.clip(run).pages)
    }
}

/// The other side: page N is full of the byte N. It answers in pairs, the later one first.
fn serve(mut socket: UnixStream) -> std::io::Result<()> {
    let mut pair = [[0; 8]; 2];
    loop {
        for number in &mut pair {
            socket.read_exact(number)?;
        }
        for number in pair.iter().rev() {
            socket.write_all(&[&number[..], &[number[0]; 4096]].concat())?;
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(64 << 12), PageSize::SMALL)?])?;
    let (ours, theirs) = UnixStream::pair()?;
    // It ends with the connection.
    thread::spawn(move || serve(theirs));
    let memory = Collect::new(&layout);
    let feed = Box::new(Remote(ours, layout.clone())).start(Arc::clone(&memory) as Arc<dyn PageSink>)?;
    let all = PageRun::new(BlockId(0), PageIndex(0), PageCount(64));
    feed.request(all, Urgency::Background);
    if !memory.wait(all) {
        return Err("a page did not come".into());
    }
    feed.finish()?;
    let right = (0..64).all(|page| {
        memory.bytes(PageRun::single(BlockId(0), PageIndex(page))).is_some_and(|bytes| u64::from(bytes[9]) == page)
    });
    println!("64 pages came over the socket, {}", if right { "each as it should be" } else { "and some are wrong" });
    if right { Ok(()) } else { Err("other bytes came than those that were sent".into()) }
}
