//! What `serve` and `load` have in common: cutting a snapshot into a stream, and watching a server at work.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastload_qmp::QmpAddress;
use mapped_ram::Snapshot;
use page_files::MappedRam;
use page_units::PageSize;
use qemu_pages::serve::{Address, Control, Opening, Options, Phase, Report, ServeError, Server, Started};
use serde_json::{Value, json};
use vmstate::{IGNORE_SHARED, SectionKind};

use super::Failure;
use crate::contents;
use crate::offset::Offset;
use crate::screen;
pub(crate) use crate::screen::note;

/// How often the progress bar moves.
const TICK: Duration = Duration::from_millis(50);

/// How long to wait for something that is about to happen, before looking elsewhere.
pub(crate) const MOMENT: Duration = Duration::from_millis(10);

/// A snapshot that can be served.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) source: Arc<MappedRam>,
    pub(crate) opening: Opening,
}

impl Image {
    pub(crate) fn open(path: &Path, offset: &Offset) -> Result<Image, Failure> {
        let snapshot = Arc::new(offset.open(path)?);
        let configuration = snapshot.configuration().clone();
        if configuration.has_capability(IGNORE_SHARED) {
            let path = path.display();
            return Err(format!("{path}: it was saved with x-ignore-shared: the guest's shared memory is not in it, so it can't be served").into());
        }
        let mut early = Vec::new();
        let before_ram = snapshot.sections().iter().take_while(|section| section.name != "ram");
        for section in before_ram.filter(|section| section.kind == SectionKind::Full) {
            early.extend(contents::read(&snapshot, section.range.clone())?);
        }
        let devices = contents::read(&snapshot, snapshot.device_state())?;
        let source = Arc::new(MappedRam::new(Arc::clone(&snapshot))?);
        Ok(Image { snapshot, source, opening: Opening { configuration, early, devices } })
    }

    pub(crate) fn server(&self, page_sizes: &HashMap<String, PageSize>, options: Options) -> Result<Server, Failure> {
        let source: Arc<MappedRam> = Arc::clone(&self.source);
        Ok(Server::new(source, page_sizes, options)?)
    }

    fn stored_pages(&self) -> u64 {
        // Only for the length of a progress bar.
        let pages = |(id, _)| self.snapshot.stored_pages(id).map_or(0, |pages| pages.0);
        self.snapshot.layout().iter().map(pages).sum()
    }
}

/// Runs a server to its end, with a progress bar. Meanwhile `look` is called until it has seen enough; it waits for a
/// moment itself. The server's own error is a [`ServeError`], for [`explain`].
pub(crate) fn attend(
    image: &Image,
    server: Server,
    to: &Address,
    resume: bool,
    json: bool,
    mut look: impl FnMut(&Control) -> Result<bool, Failure>,
) -> Result<Report, Failure> {
    let control = server.control();
    let me = std::thread::current();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let served = if resume { server.resume(to) } else { server.start(to, &image.opening) };
            me.unpark();
            served
        });
        let mut bar: Option<screen::Progress> = None;
        let mut looked = Ok(true);
        while !serving.is_finished() {
            match looked {
                Ok(true) => looked = look(&control),
                _ => std::thread::park_timeout(TICK),
            }
            let progress = control.progress();
            if progress.phase >= Phase::Started {
                let bar = bar.get_or_insert_with(|| screen::Progress::new(image.stored_pages() * 4096, json));
                let done = progress.demand.0 + progress.background.0 + progress.received_before.0;
                bar.set(done * 4096);
                bar.message(&format!("{} pages on demand", progress.demand.0));
            }
        }
        drop(bar);
        let served = serving.join().map_err(|_| Failure::from("the server failed in an unforeseen way"))?;
        looked.and(served.map_err(Failure::from))
    })
}

/// The first Ctrl-C, SIGTERM or SIGHUP sends the rest, if the guest may have been started; the second leaves.
pub(crate) fn interrupts(control: Control, recover: String) -> Result<(), Failure> {
    let before = AtomicBool::new(false);
    let handler = move || {
        if before.swap(true, Ordering::SeqCst) {
            control.stop();
        } else if control.cancel() {
            note("stopping, before the guest gets anything");
        } else {
            // QEMU has all that it takes to start the guest, and may have done so.
            control.drain();
            note(&format!("sending the rest; Ctrl-C again (or SIGTERM) leaves the guest waiting, until: {recover}"));
        }
    };
    Ok(ctrlc::set_handler(handler)?)
}

/// What has become of a QEMU whose connection is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nobody can be asked.
    Unknown,
    /// There is no such process any more.
    Ended,
    /// It waits for another server.
    Waits,
    /// Its guest needs nothing more.
    Complete,
    /// The state of its migration is this, and why, if it says so.
    Other(String),
}

/// What a failure means for the guest. What became of QEMU is asked only if it is in doubt.
pub(crate) fn explain(failure: Failure, recover: &str, fate: impl FnOnce() -> Fate) -> Failure {
    let error = match failure.downcast::<ServeError>() {
        Ok(error) => error,
        Err(failure) => return failure,
    };
    let not_lost = format!("guest is not lost: it waits for the pages it misses, until: {recover}");
    let started = error.started();
    let ends = "QEMU ends then, and its standard error says more";
    let in_doubt = match started {
        Started::No => format!("{error}. {ends}"),
        Started::Perhaps => format!("{error}. If its guest runs already, the {not_lost}. If not, {ends}"),
        Started::Yes => format!("{error}. If QEMU has not ended, its {not_lost}"),
    };
    match *error {
        // QEMU has not heard from us.
        ServeError::Connect { .. } | ServeError::Encode { .. } if started == Started::No => error.to_string().into(),
        // It was QEMU that ended it, or the system for it. Or else whether it runs is not known.
        ServeError::Broken { .. } | ServeError::Refused { .. } | ServeError::Silent { .. } => {
            told(&error, &not_lost, in_doubt, fate())
        }
        _ if started == Started::Perhaps => told(&error, &not_lost, in_doubt, fate()),
        _ if started == Started::Yes => format!("{error}. The {not_lost}").into(),
        _ => in_doubt.into(),
    }
}

/// What QEMU says itself.
fn told(error: &ServeError, not_lost: &str, in_doubt: String, fate: Fate) -> Failure {
    match fate {
        Fate::Ended => {
            format!("QEMU has ended, and its guest with it; its standard error may say why ({error})").into()
        }
        Fate::Waits => format!("{error}. The {not_lost}").into(),
        Fate::Unknown => in_doubt.into(),
        Fate::Complete => format!("{error}. QEMU says that its guest has all of its memory").into(),
        Fate::Other(says) => format!("{error}. QEMU says: {says}").into(),
    }
}

/// The figures of a report, for `--json`.
pub(crate) fn figures(report: &Report) -> Value {
    let progress = &report.progress;
    json!({
        "complete_us": micros(report.to_complete),
        "requested_pages": progress.requested.0,
        "demand_pages": progress.demand.0,
        "background_pages": progress.background.0,
        "zero_pages": progress.zero.0,
        "received_before_pages": progress.received_before.0,
        "sent_bytes": report.sent.0,
    })
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The same figures for people. All was over `complete` after the program had begun.
pub(crate) fn summary(report: &Report, complete: Duration) -> String {
    let progress = &report.progress;
    format!(
        "complete after {:.1} ms: {} pages on demand, {} in the background, {} zero pages asked for; {} sent\n",
        complete.as_secs_f64() * 1e3,
        progress.demand.0,
        progress.background.0,
        progress.zero.0,
        indicatif::HumanBytes(report.sent.0),
    )
}

/// A word of a command line, quoted if a shell would cut it.
pub(crate) fn quoted(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let Ok(text) = std::str::from_utf8(bytes) else { return escaped(bytes) };
    if text.chars().any(char::is_control) {
        return escaped(bytes);
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// As bash, zsh and ksh understand bytes that are no text.
fn escaped(bytes: &[u8]) -> String {
    let byte = |byte: &u8| match byte {
        b'\'' | b'\\' => format!("\\{}", char::from(*byte)),
        b' '..=b'~' => char::from(*byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    };
    format!("$'{}'", bytes.iter().map(byte).collect::<String>())
}

/// The address of a QMP monitor as a word of a command line.
pub(crate) fn address(qmp: &QmpAddress) -> String {
    match qmp.path() {
        // One that looks like another kind of address.
        Some(path) if ["unix:", "tcp:"].iter().any(|kind| path.as_os_str().as_bytes().starts_with(kind.as_bytes())) => {
            quoted(&Path::new(".").join(path))
        }
        Some(path) => quoted(path),
        None => quoted(Path::new(&qmp.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(error: ServeError, fate: Fate) -> String {
        explain(error.into(), "RECOVER", || fate).to_string()
    }

    fn silent(started: Started) -> ServeError {
        ServeError::Silent { to: "unix:x".into(), what: "which pages it has", patience: TICK, started }
    }

    #[test]
    fn a_guest_that_may_run_is_not_given_up() {
        let connect = |started| {
            let error = Arc::new(std::io::ErrorKind::TimedOut.into());
            ServeError::Connect { to: "unix:x".into(), error, started }
        };
        let refused = |started| ServeError::Refused { to: "unix:x".into(), code: 5, started };
        for of in [silent, connect, refused, |started| ServeError::Stopped { started }] {
            let (no, perhaps, yes) = (of(Started::No), of(Started::Perhaps), of(Started::Yes));
            let no = explained(no, Fate::Unknown);
            assert!(!no.contains("RECOVER"), "{no}");
            let perhaps = explained(perhaps, Fate::Unknown);
            assert!(perhaps.contains("RECOVER") || perhaps.contains("connecting"), "{perhaps}");
            let yes = explained(yes, Fate::Unknown);
            assert!(yes.contains("RECOVER") && !yes.contains("QEMU ends"), "{yes}");
        }
        // A command that can ask QEMU does so.
        for started in [Started::Perhaps, Started::Yes] {
            assert!(explained(silent(started), Fate::Waits).contains("The guest is not lost"));
            assert!(!explained(silent(started), Fate::Ended).contains("RECOVER"));
        }
        assert!(
            explained(ServeError::Stopped { started: Started::Perhaps }, Fate::Waits).contains("The guest is not lost")
        );
    }
}
