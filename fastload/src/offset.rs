//! Where a snapshot begins in its file, and by what a change of it is noticed: arguments of all commands that read one.

use std::path::Path;

use mapped_ram::{OpenErrorKind, Options, Snapshot, Watch};
use page_units::FileOffset;

use crate::commands::Failure;
use crate::commands::serving::quoted;
use crate::parse;
use crate::recognise::{self, Known};

/// The argument, and what it means for opening the file.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Offset {
    /// Where the snapshot begins in its file, in bytes, as in QEMU's `file:...,offset=N`: decimal or 0x, with an
    /// optional suffix k, M or G. Not needed if that is in the first MiB, where it is looked for.
    #[arg(long, value_name = "N", value_parser = parse::bytes)]
    offset: Option<u64>,

    /// By what a change of the file is noticed while it is in use
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    watch: WatchArg,
}

/// What [`Watch`] is on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum WatchArg {
    /// Its size and its modification time; not a link, a new name, other rights
    #[default]
    Content,
    /// Its change time (ctime) besides, which all of those move
    Strict,
    /// Its size alone: for file systems that move times by themselves, as FUSE and network file systems may
    Size,
}

impl Offset {
    /// Opens a file that has to be complete.
    pub(crate) fn open(&self, path: &Path) -> Result<Snapshot, Failure> {
        self.open_with(path, false)
    }

    /// Opens a file to look into it, also if it is damaged.
    pub(crate) fn open_damaged(&self, path: &Path) -> Result<Snapshot, Failure> {
        self.open_with(path, true)
    }

    fn open_with(&self, path: &Path, damaged: bool) -> Result<Snapshot, Failure> {
        let known = recognise::at(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let base = match (self.offset, &known) {
            // Who names an offset knows what is in front of it.
            (Some(offset), _) => Some(FileOffset(offset)),
            (None, Known::Libvirt(_, stream)) => Some(*stream),
            (None, Known::Other(what)) => return Err(format!("{}: {what}", path.display()).into()),
            (None, Known::Perhaps) => None,
        };
        let opened = Snapshot::open_with(
            path,
            &Options::default().with_base(base).with_damaged(damaged).with_watch(self.watch()),
        );
        if let Ok(snapshot) = &opened {
            let (machine, base) = (&snapshot.configuration().machine, snapshot.base());
            log::debug!("{}: opened, the snapshot of a {machine} that begins at {base}", path.display());
        }
        opened.map_err(|error| match (&error.kind, known) {
            (OpenErrorKind::NotAStream { .. }, Known::Libvirt(..)) if self.offset.is_none() => {
                format!("{error}, where the header of this image of libvirt's says that it begins: it is damaged")
                    .into()
            }
            (OpenErrorKind::NotAStream { .. }, Known::Other(what)) => format!("{error}; {what}").into(),
            (OpenErrorKind::NotAStream { .. }, Known::Perhaps) => format!("{error}{}", recognise::unknown(path)).into(),
            (OpenErrorKind::PlainStream { .. }, _) => {
                let file = format!("file:{}", path.display());
                format!(
                    "{error}; or start QEMU with -incoming {}, then: fastload capture --qmp SOCKET OUT",
                    quoted(file.as_ref())
                )
                .into()
            }
            _ => error.into(),
        })
    }

    fn watch(&self) -> Watch {
        match self.watch {
            WatchArg::Content => Watch::Content,
            WatchArg::Strict => Watch::Strict,
            WatchArg::Size => Watch::Size,
        }
    }

    /// The words of a command line that say the same, after a space; nothing if there is nothing to say.
    pub(crate) fn words(&self) -> String {
        let offset = self.offset.map(|offset| format!(" --offset {offset:#x}")).unwrap_or_default();
        let watch = match self.watch {
            WatchArg::Content => "",
            WatchArg::Strict => " --watch strict",
            WatchArg::Size => " --watch size",
        };
        offset + watch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_mean_the_same_offset() {
        assert_eq!(Offset::default().words(), "");
        let words = Offset { offset: Some(0x20_1234), ..Offset::default() }.words();
        let number = words.strip_prefix(" --offset ").unwrap();
        assert_eq!(parse::bytes(number), Ok(0x20_1234));
    }
}
