//! Files are compressed on several threads, and come back as they were.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use frame_file::{Codec, Cuts, EncodeError, FrameFile, FrameWriter, Input, compress, decompress};
use page_units::{ByteLen, FileOffset};
use proptest::prelude::*;

const FRAME: ByteLen = ByteLen(8 << 10);

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// A sparse file: `length` bytes, with data at some places.
fn sparse(length: u64, data: &[(u64, u8, usize)]) -> (File, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    let mut oracle = vec![0; usize::try_from(length).unwrap()];
    for &(at, value, count) in data {
        let at = usize::try_from(at % length).unwrap();
        let count = count.min(oracle.len() - at);
        // A step, so that not all of it is one byte.
        for (n, byte) in oracle[at..at + count].iter_mut().enumerate() {
            *byte = value.wrapping_add((n / 1000).to_le_bytes()[0]);
        }
        file.write_all_at(&oracle[at..at + count], at as u64).unwrap();
    }
    (file, oracle)
}

fn compressed(input: &impl Input, cuts: &Cuts, codec: Codec, count: usize) -> Result<Vec<u8>, EncodeError> {
    let mut writer = FrameWriter::new(Vec::new(), codec, FRAME);
    let mut last = ByteLen(0);
    compress(input, cuts, codec, threads(count), &mut writer, |done| {
        assert!(done >= last);
        last = done;
    })?;
    Ok(writer.finish()?.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_comes_back_is_what_went_in_whatever_the_cuts_and_the_threads(
        length in 1_u64..600_000,
        data in prop::collection::vec((any::<u64>(), any::<u8>(), 1_usize..40_000), 0..12),
        starts in prop::collection::vec(0_u64..600_000, 0..6),
        lz4 in any::<bool>(),
        count in 1_usize..4,
    ) {
        let (file, oracle) = sparse(length, &data);
        let codec = if lz4 { Codec::Lz4 } else { Codec::zstd(1) };
        let cuts = Cuts::every(FRAME, ByteLen(length)).with_starts(starts.iter().map(|start| FileOffset(*start)));
        let bytes = compressed(&file, &cuts, codec, count).unwrap();
        // The result does not depend on who was faster.
        prop_assert!(bytes == compressed(&file, &cuts, codec, 1).unwrap());
        let out = tempfile::tempfile().unwrap();
        out.write_all_at(&bytes, 0).unwrap();
        let frames = FrameFile::open(out).unwrap();
        let mut back = vec![1; oracle.len()];
        frames.read_exact_at(&mut back, FileOffset(0)).unwrap();
        prop_assert!(back == oracle);
        let decompressed = tempfile::tempfile().unwrap();
        decompressed.set_len(length).unwrap();
        decompress(&frames, &decompressed, threads(count), |_| {}).unwrap();
        decompressed.read_exact_at(&mut back, 0).unwrap();
        prop_assert!(back == oracle && decompressed.metadata().unwrap().len() == length);
        // A frame of content begins at each start, and none is longer than asked for.
        for start in starts.into_iter().filter(|start| *start < length) {
            let frame = frames.frame_at(FileOffset(start)).unwrap();
            prop_assert!(frame.is_zero() || frame.decoded().start == FileOffset(start));
        }
    }
}

#[derive(Debug)]
struct Unreadable;

impl Input for Unreadable {
    fn read_into(&self, _: &mut [u8], offset: FileOffset) -> std::io::Result<()> {
        if offset.0 < 5 * FRAME.0 { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    }

    fn zeros_at(&self, _: FileOffset) -> std::io::Result<ByteLen> {
        Ok(ByteLen(0))
    }
}

#[test]
fn an_input_that_breaks_off_is_an_error_with_its_place_and_nobody_hangs() {
    for count in 1..4 {
        let cuts = Cuts::every(FRAME, ByteLen(100 * FRAME.0));
        let error = compressed(&Unreadable, &cuts, Codec::Lz4, count).unwrap_err();
        let EncodeError::Input { at, .. } = error else { panic!("{error}") };
        assert!(at.0 >= 5 * FRAME.0, "{at}");
    }
}
