//! Recorded conversations between real QEMUs.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use qemu_pages::wire::return_path::Message;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;

use crate::door::Door;
use crate::stub::{Habits, Stub};
use crate::{Running, check, codec, options, small};

/// What went over the wire, by connection: from the source, and from the destination.
#[derive(Default)]
pub(crate) struct Trace {
    pub(crate) there: HashMap<u8, Vec<u8>>,
    pub(crate) back: HashMap<u8, Vec<u8>>,
}

/// The traces next to the workspace by name; none if there is nothing next to it.
pub(crate) fn all() -> Option<Vec<(String, Trace)>> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/samples");
    if !dir.exists() {
        return None;
    }
    let entries = fs::read_dir(dir).unwrap();
    let traces = entries.map(|entry| entry.unwrap().path()).filter_map(|path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".trace.zst")?.to_owned();
        let bytes = zstd::decode_all(fs::File::open(&path).unwrap()).unwrap();
        Some((name, Trace::parse(&bytes)))
    });
    let mut traces: Vec<_> = traces.collect();
    traces.sort_by(|(one, _), (other, _)| one.cmp(other));
    Some(traces)
}

impl Trace {
    /// 8 bytes `PCTRACE1`, then records: kind, connection, time (8 bytes), length (4 bytes), little endian; data.
    pub(crate) fn parse(bytes: &[u8]) -> Trace {
        let mut rest = bytes.strip_prefix(b"PCTRACE1").unwrap();
        let mut trace = Trace::default();
        while !rest.is_empty() {
            let (head, after) = rest.split_at(14);
            let length = u32::from_le_bytes(head[10..14].try_into().unwrap());
            let (data, after) = after.split_at(usize::try_from(length).unwrap());
            match head[0] {
                0 => trace.there.entry(head[1]).or_default().extend_from_slice(data),
                1 => trace.back.entry(head[1]).or_default().extend_from_slice(data),
                _ => {}
            }
            rest = after;
        }
        trace
    }
}

/// Pages and zero pages on the main connection, the same on the second one, requests: counted by another program.
const TRACES: [(&str, [u64; 5]); 4] = [
    ("postcopy-trace-microvm-q10-slow", [9006, 7415, 0, 0, 121]),
    ("postcopy-trace-pc-q10-preempt-slow", [3529, 6639, 5554, 792, 6381]),
    ("postcopy-trace-pc-q10-slow", [9083, 7431, 0, 0, 161]),
    ("postcopy-trace-pc-q10-to-q11-slow", [9083, 7431, 0, 0, 95]),
];

#[test]
fn recorded_conversations_go_through_both_sides() {
    let Some(traces) = all() else {
        return testkit::require::without("traces", "no ../shared/samples next to the workspace");
    };
    // Where there are some, those that are known are all there.
    let names: Vec<&str> = traces.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, TRACES.map(|(name, _)| name));
    for (name, trace) in traces {
        let mut sent = codec::Sent::default();
        sent.main(&trace.there[&0]);
        let main = (sent.data, sent.zeros);
        assert_eq!(sent.packages, 1, "{name}");
        if let Some(fast) = trace.there.get(&1) {
            sent.fast(fast);
        }
        let messages = codec::back(&trace.back[&0]);
        let requests: Vec<&Message> = messages.iter().filter(|m| matches!(m, Message::Request { .. })).collect();
        let counts = [main.0, main.1, sent.data - main.0, sent.zeros - main.1, requests.len() as u64];
        let known = TRACES.iter().find(|(known, _)| *known == name);
        assert_eq!(known.map(|(_, counts)| *counts), Some(counts), "{name}");
        assert_eq!(messages.back(), Some(&Message::Shut(0)), "{name}");

        // The same requests to our server, which has the same pages.
        let pages = |(name, length): &(String, u64)| (name.clone(), length / 4096);
        let blocks: Vec<(String, u64)> = sent.blocks.iter().map(pages).collect();
        let blocks: Vec<(&str, u64)> = blocks.iter().map(|(name, pages)| (name.as_str(), *pages)).collect();
        let layout = small(&blocks);
        let mut content = Oracle::zero(layout.clone());
        for ((block, page), bytes) in &sent.pages {
            let at = usize::try_from(page * 4096).unwrap();
            content.block_mut(layout.find(block).unwrap().0)[at..at + 4096].copy_from_slice(bytes);
        }
        let oracle = Arc::new(content);
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let preempt = trace.there.contains_key(&1);
        let stub = Stub::open(door, Habits { preempt, ..Habits::default() });
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let server = Running::start(source, options(|options| options.preempt = preempt), address);
        stub.wait("the package", |state| state.loaded);
        let mut last = String::new();
        for request in requests {
            let Message::Request { block, start, length } = request else { continue };
            last = block.clone().unwrap_or(last);
            if stub.state().ended {
                break;
            }
            stub.request(&last, start / 4096, u64::from(*length) / 4096);
        }
        server.finish().unwrap();
        check(&stub.finish(), &oracle);
    }
}
