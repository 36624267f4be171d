//! Recorded conversations between real QEMUs.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

/// What went over the wire, by connection: from the source, and from the destination.
#[derive(Default)]
pub(crate) struct Trace {
    pub(crate) there: HashMap<u8, Vec<u8>>,
    pub(crate) back: HashMap<u8, Vec<u8>>,
}

/// The traces beside the workspace, if they are there.
pub(crate) fn all() -> Vec<(String, Trace)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/samples");
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let traces = entries.map(|entry| entry.unwrap().path()).filter_map(|path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".trace.zst")?.to_owned();
        let bytes = zstd::decode_all(fs::File::open(&path).unwrap()).unwrap();
        Some((name, Trace::parse(&bytes)))
    });
    traces.collect()
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
