//! `fastload compress` and `decompress`: a snapshot in frames that are found and checked one by one.

use std::fs::File;
use std::io::BufWriter;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use frame_file::{Codec, Cuts, FrameFile, FrameWriter, Summary, compress, decompress};
use mapped_ram::Snapshot;
use page_units::{ByteLen, FileOffset};
use serde_json::json;
use whole_file::WholeFile;

use crate::commands::Failure;
use crate::event::Event;
use crate::offset::Offset;
use crate::{contents, output, rewrite, screen};

/// How many bytes of holes LZ4 needs one byte for.
const LZ4_HOLES: u64 = 250;

/// Compress a snapshot so that it still loads page by page.
///
/// The result is a standard compressed file (zstd -d or lz4 -d gives back the identical snapshot), made of small
/// independent frames with an index and a digest for each. Every command takes it where it takes a plain snapshot. A
/// page that is touched costs the decoding of one frame, and is checked against the frame's digest before.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fastload compress vm.snap vm.snap.zst                    smallest files
  fastload compress vm.snap vm.snap.lz4 --codec lz4        fastest page faults
  fastload compress vm.snap vm.snap.zst --frame 16K        less to decode for one page, a little larger
  fastload load vm.snap.zst --qmp /run/vm.qmp              loads like the plain file

The last line is the root digest: who trusts it trusts every page (fastload inspect prints it again).")]
pub(crate) struct Compress {
    /// The snapshot to read, in QEMU's mapped-ram format.
    input: PathBuf,
    /// The file to write. It appears when it is complete, replacing what was there, or not at all.
    output: PathBuf,
    /// The format of the frames: zstd or lz4.
    #[arg(long, default_value_t)]
    codec: Codec,
    /// How hard zstd tries, from 1 (fast) to 19 (small). [default: 3]
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: Option<i32>,
    /// How much of the snapshot one frame holds, 4K to 1M.
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = frame_size)]
    frame: ByteLen,
    /// How many threads compress. [default: one for each CPU]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Print JSON lines, and no progress bar.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Turn a compressed snapshot back into the plain file that it was made from.
///
/// Every frame is checked against its digest. Holes stay holes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  fastload decompress vm.snap.zst vm.snap")]
pub(crate) struct Decompress {
    /// The compressed snapshot.
    input: PathBuf,
    /// The file to write. It appears when it is complete, replacing what was there, or not at all.
    output: PathBuf,
    /// How many threads decode. [default: one for each CPU]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Print JSON lines, and no progress bar.
    #[arg(long)]
    pub(crate) json: bool,
}

fn frame_size(text: &str) -> Result<ByteLen, String> {
    let size = crate::parse::bytes(text)?;
    if (4 << 10..=1 << 20).contains(&size) && size.is_multiple_of(4 << 10) {
        Ok(ByteLen(size))
    } else {
        Err("a frame holds 4K to 1M, in steps of 4K".to_owned())
    }
}

impl Compress {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        rewrite::refuse_same(&self.input, &self.output)?;
        let codec = match (self.codec, self.level) {
            (Codec::Lz4, Some(_)) => return Err("--level is for zstd, and LZ4 has none".into()),
            (_, Some(level)) => Codec::zstd(level),
            (codec, None) => codec,
        };
        let snapshot = Offset::default().open(&self.input)?;
        let begun = Instant::now();
        let summary = self.write(&snapshot, codec)?;
        if codec == Codec::Lz4 {
            advise(summary);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let ratio = summary.decoded.0 as f64 / summary.encoded.0 as f64;
        if self.json {
            let fields = json!({
                "codec": codec.name(),
                "bytes": summary.encoded.0,
                "snapshot_bytes": summary.decoded.0,
                "frames": summary.frames,
                "index_bytes": summary.index.0,
                "seconds": seconds,
                "root": summary.root.to_string(),
            });
            return Ok(Event::new("complete").path("output", &self.output).with(fields).print()?);
        }
        let text = format!(
            "{}: {}, {} for {} of snapshot (1/{ratio:.1}), {} frames, {:.0} MiB/s\nroot {}\n",
            self.output.display(),
            codec.name(),
            output::size(summary.encoded.0),
            output::size(summary.decoded.0),
            summary.frames,
            summary.decoded.0 as f64 / f64::from(1 << 20) / seconds,
            summary.root,
        );
        Ok(output::print(&text)?)
    }

    fn write(&self, snapshot: &Snapshot, codec: Codec) -> Result<Summary, Failure> {
        let whole = WholeFile::create(&self.output)?;
        let length = snapshot.length();
        let cuts = Cuts::every(self.frame, length).with_starts(starts(snapshot));
        let mut writer = FrameWriter::new(BufWriter::with_capacity(1 << 20, whole.file()), codec, self.frame);
        let bar = screen::Progress::new(length.0, self.json);
        let Some(file) = snapshot.plain_file() else {
            return Err(format!("{} is compressed already: decompress it first", self.input.display()).into());
        };
        compress(file, &cuts, codec, threads(self.threads), &mut writer, |done| bar.set(done.0))
            .map_err(|error| format!("{} into {}: {error}", self.input.display(), self.output.display()))?;
        let (_, summary) = writer.finish().map_err(|error| format!("{}: {error}", self.output.display()))?;
        if let Some(what) = contents::changed(snapshot)? {
            return Err(format!("{}: {what} changed while it was read", self.input.display()).into());
        }
        whole.publish()?;
        Ok(summary)
    }
}

/// Where frames have to begin, so that none holds pages of two blocks, or pages and metadata.
fn starts(snapshot: &Snapshot) -> Vec<FileOffset> {
    let mut starts = Vec::new();
    for (id, ram) in snapshot.layout().iter() {
        if let Some(block) = snapshot.block(id).filter(|block| block.in_file) {
            let end = FileOffset(block.pages_offset.0.saturating_add(ram.length().0));
            starts.extend([block.header_offset, block.pages_offset, end]);
        }
    }
    starts
}

/// Proposes zstd where LZ4 spends much on holes.
fn advise(summary: Summary) {
    let holes = summary.zeros.0 / LZ4_HOLES;
    if holes > summary.encoded.0 / 10 {
        let holes = output::size(holes);
        screen::note(&format!(
            "{holes} of the file are holes, for which LZ4 needs a byte for 250: --codec zstd needs none"
        ));
    }
}

fn threads(given: Option<NonZeroUsize>) -> NonZeroUsize {
    given.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN)
}

impl Decompress {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        rewrite::refuse_same(&self.input, &self.output)?;
        let frames = open(&self.input)?;
        let begun = Instant::now();
        let whole = WholeFile::create(&self.output)?;
        let length = frames.len();
        let writing = |error: std::io::Error| format!("{}: {error}", self.output.display());
        whole.file().set_len(length.0).map_err(writing)?;
        let bar = screen::Progress::new(length.0, self.json);
        decompress(&frames, whole.file(), threads(self.threads), |done| bar.set(done.0))
            .map_err(|error| format!("{} into {}: {error}", self.input.display(), self.output.display()))?;
        drop(bar);
        whole.publish()?;
        let seconds = begun.elapsed().as_secs_f64();
        if self.json {
            let fields = json!({ "snapshot_bytes": length.0, "seconds": seconds, "root": frames.root().to_string() });
            return Ok(Event::new("complete").path("output", &self.output).with(fields).print()?);
        }
        let speed = length.0 as f64 / f64::from(1 << 20) / seconds;
        let text = format!("{}: {} of snapshot, {speed:.0} MiB/s\n", self.output.display(), output::size(length.0));
        Ok(output::print(&text)?)
    }
}

fn open(path: &Path) -> Result<FrameFile, Failure> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    FrameFile::open(file).map_err(|error| {
        let known = match crate::recognise::at(path) {
            Ok(crate::recognise::Known::Other(what)) => format!(" ({what})"),
            _ => String::new(),
        };
        Failure::from(format!("{}: {error}{known}", path.display()))
    })
}
