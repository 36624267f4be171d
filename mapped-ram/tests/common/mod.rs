//! What the tests of this crate share.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

#[path = "../../../testkit/src/samples.rs"]
pub mod samples;

use std::path::PathBuf;

use mapped_ram::Snapshot;
use samples::Sample;
use sha2::{Digest, Sha256};

/// Stripped and, where they are, full samples in mapped-ram format.
pub fn mapped_samples() -> Vec<Sample> {
    let all = samples::stripped().into_iter().chain(samples::full());
    all.filter(Sample::is_mapped_ram).collect()
}

/// An unpacked sample, open.
pub fn open(sample: &Sample) -> (tempfile::TempDir, PathBuf, Snapshot) {
    let directory = tempfile::tempdir().unwrap();
    let path = sample.unpack(directory.path()).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    (directory, path, snapshot)
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
