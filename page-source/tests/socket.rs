//! A sink that is a socket: what a late source sends in any order is put together again on the other side.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use page_source::{End, PageBytes, PageSink, PumpOptions, Reply, SinkError, SourceError, pump};
use page_units::{BlockId, FileOffset, Layout, PageCount, PageIndex, PageRun};
use parking_lot::Mutex;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;

/// Per run: kind, block, first page, number of pages, content.
#[derive(Debug)]
struct SocketSink(Mutex<UnixStream>);

impl SocketSink {
    fn send(&self, kind: u8, run: PageRun, content: &[u8]) -> Reply {
        let header = [u64::from(run.block.0), run.first.0, run.pages.0].map(u64::to_le_bytes).concat();
        let mut socket = self.0.lock();
        let sent = socket.write_all(&[kind]).and_then(|()| socket.write_all(&header));
        match sent.and_then(|()| socket.write_all(content)) {
            Ok(()) => Reply::Taken,
            Err(error) => {
                SinkError::Write { target: "peer".into(), offset: FileOffset(0), error: Arc::new(error) }.into()
            }
        }
    }
}

impl PageSink for SocketSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        let mut content = vec![0; bytes.len().get()];
        if bytes.copy_to(&mut content).is_err() {
            return Reply::Unreadable(run);
        }
        self.send(b'D', run, &content)
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.send(b'Z', run, &[])
    }

    fn absent(&self, run: PageRun) -> Reply {
        SinkError::Absent(run).into()
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Reply {
        SinkError::Source { error }.into()
    }

    fn end(&self, end: End) {
        let kind = if matches!(end, End::Complete) { b'E' } else { b'B' };
        drop(self.0.lock().write_all(&[kind]));
    }
}

/// Everything up to the end; the last byte says which.
fn receive(mut socket: UnixStream, layout: Layout) -> io::Result<(Oracle, u8)> {
    let mut ram = Oracle::zero(layout);
    loop {
        let mut kind = [0];
        socket.read_exact(&mut kind)?;
        if kind[0] != b'D' && kind[0] != b'Z' {
            return Ok((ram, kind[0]));
        }
        let mut numbers = [0; 3];
        for number in &mut numbers {
            let mut bytes = [0; 8];
            socket.read_exact(&mut bytes)?;
            *number = u64::from_le_bytes(bytes);
        }
        let block = BlockId(u32::try_from(numbers[0]).unwrap());
        let run = PageRun::new(block, PageIndex(numbers[1]), PageCount(numbers[2]));
        let range = run.first.byte_offset().get()..run.end().byte_offset().get();
        match kind[0] {
            b'D' => socket.read_exact(&mut ram.block_mut(block)[range])?,
            _ => ram.block_mut(block)[range].fill(0),
        }
    }
}

#[test]
fn a_late_source_fills_a_peer_over_a_socket() {
    for (_, seed) in seeds(4) {
        let oracle = Arc::new(Oracle::random(seed, Oracle::random_layout(seed, 1500), 120));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let layout = oracle.layout().clone();
        let peer = std::thread::spawn(move || receive(theirs, layout));
        let sink = Arc::new(SocketSink(Mutex::new(ours)));
        let source = LateSource::new(Arc::clone(&oracle), seed).with_threads(2);
        let options = PumpOptions { window: PageCount(300), piece: PageCount(64), ..PumpOptions::default() };
        pump(Arc::new(source), sink, &options).unwrap();
        let (received, end) = peer.join().unwrap().unwrap();
        assert!(received == *oracle && end == b'E', "seed {seed}");
    }
}

#[test]
fn a_peer_that_goes_away_ends_the_pump() {
    let oracle = Arc::new(Oracle::random(1, Oracle::random_layout(1, 1500), 255));
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let sink = Arc::new(SocketSink(Mutex::new(ours)));
    let error = pump(Arc::new(LateSource::new(oracle, 1)), sink, &PumpOptions::default()).unwrap_err();
    assert!(error.to_string().starts_with("peer: writing"), "{error}");
}
