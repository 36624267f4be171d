//! Files that were written are read, by us and by other programs.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use frame_file::{Codec, Digest, Encoder, FrameFile, FrameWriter, OpenError, ReadError, Summary};
use page_units::{ByteLen, FileOffset};
use proptest::prelude::*;

const CODECS: [Codec; 2] = [Codec::Zstd { level: 1 }, Codec::Lz4];
const LIMIT: ByteLen = ByteLen(4096);

/// A part of the content: bytes of a frame, or a number of zeros.
#[derive(Clone, Debug)]
enum Part {
    Bytes(Vec<u8>),
    Zeros(u64),
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        3 => (1_usize..=4096, any::<u8>(), any::<bool>()).prop_map(|(len, seed, noise)| Part::Bytes(content(len, seed, noise))),
        1 => (1_u64..300_000).prop_map(Part::Zeros),
    ]
}

fn content(len: usize, seed: u8, noise: bool) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if noise { state.to_le_bytes()[3] } else { state.to_le_bytes()[3] & 1 }
    };
    (0..len).map(|_| next()).collect()
}

fn write(codec: Codec, parts: &[Part]) -> (Vec<u8>, Vec<u8>, Summary) {
    let mut encoder = Encoder::new(codec).unwrap();
    let mut writer = FrameWriter::new(Vec::new(), codec, LIMIT);
    let mut oracle = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(bytes) => {
                writer.push(&encoder.encode(bytes).unwrap()).unwrap();
                oracle.extend_from_slice(bytes);
            }
            Part::Zeros(count) => {
                writer.push_zeros(ByteLen(*count)).unwrap();
                oracle.resize(oracle.len() + usize::try_from(*count).unwrap(), 0);
            }
        }
    }
    let (bytes, summary) = writer.finish().unwrap();
    (bytes, oracle, summary)
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read_all(file: &FrameFile) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; file.len().get()];
    file.read_exact_at(&mut bytes, FileOffset(0))?;
    Ok(bytes)
}

fn decode_with(program: &str, file: &Path) -> Vec<u8> {
    let output = Command::new(program).arg("-dc").arg(file).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn sample() -> Vec<Part> {
    let mut parts = vec![Part::Bytes(content(100, 1, true)), Part::Zeros(300 << 20)];
    // More than one leaf, and more than one piece of leaves.
    parts.extend((0..9000_u32).map(|n| Part::Bytes(content(10 + (n % 50) as usize, n.to_le_bytes()[0], n % 2 == 0))));
    parts.push(Part::Zeros(1));
    parts.push(Part::Bytes(content(4096, 9, false)));
    parts
}

#[test]
fn the_real_programs_decode_the_same_bytes() {
    testkit::require!(Zstd, Lz4);
    let dir = tempfile::tempdir().unwrap();
    for (codec, program) in CODECS.into_iter().zip(["zstd", "lz4"]) {
        let (bytes, oracle, summary) = write(codec, &sample());
        assert_eq!(summary.encoded, ByteLen::of(bytes.len()));
        let path = dir.path().join(program);
        std::fs::write(&path, &bytes).unwrap();
        assert!(decode_with(program, &path) == oracle, "{program} decodes something else");
        let file = FrameFile::open(File::open(&path).unwrap()).unwrap();
        assert_eq!((file.root(), file.frames(), file.len()), (summary.root, summary.frames, summary.decoded));
        assert!(read_all(&file).unwrap() == oracle);
    }
}

#[test]
fn another_reader_of_the_seekable_format_finds_the_same_bytes() {
    let parts = &sample()[2..];
    let (bytes, oracle, _) = write(CODECS[0], parts);
    let mut decoder = zeekstd::Decoder::new(std::io::Cursor::new(bytes)).unwrap();
    let mut decoded = Vec::new();
    decoder.read_to_end(&mut decoded).unwrap();
    assert!(decoded == oracle);
    for at in [0, 1, oracle.len() / 3, oracle.len() - 7] {
        decoder.set_offset(at as u64).unwrap();
        let mut few = [0; 7];
        decoder.read_exact(&mut few).unwrap();
        assert_eq!(few, oracle[at..at + 7]);
    }
}

#[test]
fn a_run_of_zeros_costs_next_to_nothing() {
    let of = |codec| write(codec, &[Part::Zeros(1 << 30)]).0.len() as u64;
    assert!(of(CODECS[0]) < (1 << 30) / 30_000, "zstd: {}", of(CODECS[0]));
    assert!(of(CODECS[1]) < (1 << 30) / 250, "lz4: {}", of(CODECS[1]));
}

#[test]
fn what_is_no_frame_file_is_refused_by_kind() {
    let open = |bytes: &[u8]| FrameFile::open(file_of(bytes)).unwrap_err();
    assert!(matches!(open(b""), OpenError::NoSeekTable));
    assert!(matches!(open(&[7; 5000]), OpenError::NoSeekTable));
    let (bytes, _, _) = write(CODECS[0], &sample()[2..20]);
    assert!(matches!(open(&bytes[..bytes.len() - 1]), OpenError::NoSeekTable));
    assert!(FrameFile::is_frame_file(&file_of(&bytes)).unwrap());
    assert!(!FrameFile::is_frame_file(&file_of(&bytes[1..bytes.len() - 1])).unwrap());
    // A seek table of somebody else.
    let mut theirs = Vec::new();
    let mut encoder = zeekstd::Encoder::new(&mut theirs).unwrap();
    encoder.write_all(&content(100_000, 3, true)).unwrap();
    encoder.finish().unwrap();
    assert!(matches!(open(&theirs), OpenError::NoIndex), "{:?}", open(&theirs));
}

#[test]
fn a_frame_is_never_longer_than_the_file_allows() {
    let mut encoder = Encoder::new(Codec::Lz4).unwrap();
    let mut writer = FrameWriter::new(Vec::new(), Codec::Lz4, ByteLen(10));
    assert!(writer.push(&encoder.encode(&[1; 11]).unwrap()).is_err());
    assert!(encoder.encode(&[]).is_err());
    assert!(encoder.encode(&vec![1; (1 << 20) + 1]).is_err());
}

/// Everything that a file holds, and all of its metadata.
fn look_at_all(bytes: &[u8]) -> Result<(Vec<u8>, Digest), String> {
    let file = FrameFile::open(file_of(bytes)).map_err(|error| error.to_string())?;
    // A lie about the length is found when the index is read, so no memory is taken for it beforehand.
    let mut content = Vec::new();
    let mut decoder = file.decoder();
    let mut at = FileOffset(0);
    let mut frame_bytes = Vec::new();
    while at.0 < file.len().0 {
        let frame = file.frame_at(at).map_err(|error| error.to_string())?;
        if frame.is_zero() {
            content.resize(content.len() + frame.decoded_len().get(), 0);
        } else {
            file.decode(&frame, &mut decoder, &mut frame_bytes).map_err(|error| error.to_string())?;
            content.extend_from_slice(&frame_bytes);
        }
        at = frame.decoded().end;
    }
    Ok((content, file.root()))
}

#[test]
fn no_flipped_bit_gives_a_wrong_byte() {
    for codec in CODECS {
        let parts = [
            Part::Bytes(content(300, 1, true)),
            Part::Zeros(5000),
            Part::Bytes(content(200, 2, false)),
            Part::Bytes(content(64, 3, true)),
        ];
        let (bytes, oracle, summary) = write(codec, &parts);
        let mut unnoticed = 0;
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok((content, root)) = look_at_all(&flipped) {
                assert!(content == oracle, "{codec}, bit {bit}: wrong bytes");
                assert_eq!(root, summary.root);
                unnoticed += 1;
            }
        }
        // The encoded form of a run of zeros is not looked at: that it is zero stands in the index.
        let zeros = write(codec, &parts[1..2]);
        assert!(unnoticed <= zeros.0.len() * 8, "{codec}: {unnoticed} bits");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_part_is_read_as_it_was_written(
        lz4 in any::<bool>(),
        parts in prop::collection::vec(part(), 0..300),
        looks in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..20_000), 8),
    ) {
        let codec = CODECS[usize::from(lz4)];
        let (bytes, oracle, summary) = write(codec, &parts);
        let file = FrameFile::open(file_of(&bytes)).unwrap();
        prop_assert_eq!(file.root(), summary.root);
        prop_assert_eq!(file.codec().name(), codec.name());
        for (at, len) in looks {
            let at = at.index(oracle.len() + 1);
            let len = len.min(oracle.len() - at);
            let mut found = vec![1; len];
            file.read_exact_at(&mut found, FileOffset(at as u64)).unwrap();
            prop_assert!(found == oracle[at..at + len]);
        }
        let mut beyond = [0];
        let end = FileOffset(oracle.len() as u64);
        let beyond_end = matches!(file.read_exact_at(&mut beyond, end), Err(ReadError::BeyondEnd { .. }));
        prop_assert!(beyond_end);
    }

    #[test]
    fn damaged_files_never_panic_nor_give_wrong_bytes(
        lz4 in any::<bool>(),
        parts in prop::collection::vec(part(), 1..200),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
        from_the_end in any::<bool>(),
    ) {
        let (mut bytes, oracle, _) = write(CODECS[usize::from(lz4)], &parts);
        let len = bytes.len();
        for (at, value) in damage {
            let at = if from_the_end { len - 1 - at.index(len.min(300)) } else { at.index(len) };
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(len));
        }
        if let Ok((content, _)) = look_at_all(&bytes) {
            prop_assert!(content == oracle);
        }
    }
}
