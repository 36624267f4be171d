//! Compresses a file into frames of 64 KiB, and reads a few bytes from its middle.
//!
//! ```text
//! cargo run -p frame-file --example frames -- IN OUT.zst
//! zstd -dc OUT.zst | cmp - IN
//! ```

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Read};

use frame_file::{Codec, Encoder, FrameFile, FrameWriter};
use page_units::{ByteLen, FileOffset};

const FRAME: ByteLen = ByteLen(64 << 10);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(from), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("usage: frames IN OUT".into());
    };
    let codec = Codec::zstd(3);
    let mut encoder = Encoder::new(codec)?;
    let mut writer = FrameWriter::new(BufWriter::new(File::create(&to)?), codec, FRAME);
    let mut input = File::open(&from)?;
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        Read::by_ref(&mut input).take(FRAME.0).read_to_end(&mut bytes)?;
        if bytes.is_empty() {
            break;
        }
        if bytes.iter().all(|byte| *byte == 0) {
            writer.push_zeros(ByteLen::of(bytes.len()))?;
        } else {
            writer.push(&encoder.encode(&bytes)?)?;
        }
    }
    let (_, summary) = writer.finish()?;
    println!("{} bytes became {} in {} frames", summary.decoded, summary.encoded, summary.frames);

    let file = FrameFile::open(File::open(&to)?)?;
    assert_eq!(file.root(), summary.root);
    let mut few = vec![0; file.len().get().min(16)];
    let middle = FileOffset((file.len().0 / 2).min(file.len().0 - few.len() as u64));
    file.read_exact_at(&mut few, middle)?;
    println!("16 bytes at {middle}: {few:02x?}");
    println!("root {}", file.root());
    Ok(())
}
