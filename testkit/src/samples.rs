//! Real files made with unmodified QEMU, packed; and the facts about them.
//!
//! The ones in `testkit/samples` have patterns in place of RAM content. Where the full ones lie next to the workspace
//! (`../shared/samples`), the tests use them as well.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A packed file.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The name of the unpacked file, e.g. `q10-pc-32-plain.mr`.
    pub name: String,
    /// What is known about it: the entry of `golden.json`.
    pub golden: serde_json::Value,
    packed: PathBuf,
}

impl Sample {
    /// Whether it is a mapped-ram file (and not a plain stream).
    #[must_use]
    pub fn is_mapped_ram(&self) -> bool {
        self.golden.get("blocks").is_some()
    }

    /// Unpacks it into a directory; zeros become holes.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn unpack(&self, directory: &Path) -> io::Result<PathBuf> {
        let path = directory.join(&self.name);
        let out = File::create(&path)?;
        let mut from = zstd::Decoder::new(File::open(&self.packed)?)?;
        let mut buffer = vec![0; 64 << 10];
        let mut at = 0;
        loop {
            let mut filled = 0;
            while filled < buffer.len() {
                match from.read(&mut buffer[filled..])? {
                    0 => break,
                    n => filled += n,
                }
            }
            if filled == 0 {
                out.set_len(at)?;
                return Ok(path);
            }
            let bytes = &buffer[..filled];
            if bytes.iter().any(|byte| *byte != 0) {
                out.write_all_at(bytes, at)?;
            }
            at += filled as u64;
        }
    }

    /// Unpacks it into memory.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        zstd::decode_all(File::open(&self.packed)?)
    }
}

/// The samples of the repository.
///
/// # Panics
/// If they are not there.
#[must_use]
pub fn stripped() -> Vec<Sample> {
    let samples = load(&root().join("testkit/samples"));
    assert!(!samples.is_empty(), "testkit/samples is empty");
    samples
}

/// The full samples, if they lie next to the workspace; otherwise none.
#[must_use]
pub fn full() -> Vec<Sample> {
    load(&root().join("../shared/samples"))
}

/// Unpacks what `testkit/samples/libvirt` has under this name into a directory: files of a real libvirt.
///
/// # Errors
/// If a file can't be read or written.
pub fn libvirt(name: &str, directory: &Path) -> io::Result<PathBuf> {
    let packed = root().join("testkit/samples/libvirt").join(format!("{name}.zst"));
    Sample { name: name.to_owned(), golden: serde_json::Value::Null, packed }.unpack(directory)
}

fn root() -> PathBuf {
    let mut at = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    while !at.join("testkit/samples").is_dir() {
        assert!(at.pop(), "no testkit/samples above {}", env!("CARGO_MANIFEST_DIR"));
    }
    at
}

fn load(directory: &Path) -> Vec<Sample> {
    let Ok(text) = std::fs::read(directory.join("golden.json")) else {
        return Vec::new();
    };
    let golden: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&text).expect("golden.json is an object");
    let samples = golden.into_iter().map(|(name, golden)| {
        let packed = directory.join(format!("{name}.zst"));
        Sample { name, golden, packed }
    });
    samples.filter(|sample| sample.packed.exists()).collect()
}
