//! What people see in addition to the result: notes, warnings and progress, all on standard error.
//!
//! A terminal is one for a whole process, and so is this: every line goes through it, so that none is written into the
//! middle of a bar, and no bar stays behind.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use clap::ColorChoice;
use env_logger::{Builder, Target, WriteStyle};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use log::LevelFilter;
use serde_json::json;

use crate::commands::serving::micros;
use crate::event::{self, Event};

/// The log target of what is told without being asked.
const NOTE: &str = "fastload::note";

/// How often a `progress` event is sent.
const PROGRESS: Duration = Duration::from_secs(1);

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
static PROGRESS_IS_SHOWN: OnceLock<bool> = OnceLock::new();

/// How much is said, and how.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Messages")]
pub(crate) struct Manner {
    /// Say nothing but the result and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more; twice: everything. The variable RUST_LOG chooses by module.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Show no progress bar, and send no `progress` events.
    #[arg(long, global = true)]
    no_progress: bool,
    /// Use colours: `auto` means on a terminal, unless NO_COLOR is set.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", hide_possible_values = true)]
    color: ColorChoice,
}

impl Manner {
    /// From here on it is so.
    pub(crate) fn begin(&self, json: bool) {
        let colors = match self.color {
            ColorChoice::Auto => anstream::ColorChoice::Auto,
            ColorChoice::Always => anstream::ColorChoice::Always,
            ColorChoice::Never => anstream::ColorChoice::Never,
        };
        colors.write_global();
        if self.quiet || self.no_progress || json {
            BARS.set_draw_target(ProgressDrawTarget::hidden());
        }
        // It is the first call.
        let _ = PROGRESS_IS_SHOWN.set(!self.quiet && !self.no_progress);
        self.log();
    }

    fn log(&self) {
        let (ours, all) = match self.verbose {
            _ if self.quiet => (LevelFilter::Off, LevelFilter::Off),
            0 => (LevelFilter::Info, LevelFilter::Warn),
            1 => (LevelFilter::Info, LevelFilter::Debug),
            _ => (LevelFilter::Info, LevelFilter::Trace),
        };
        let color = anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never;
        let mut builder = Builder::new();
        builder.filter_level(all).parse_env("RUST_LOG").filter_module(NOTE, ours);
        builder.target(Target::Pipe(Box::new(Lines))).write_style(if color {
            WriteStyle::Always
        } else {
            WriteStyle::Never
        });
        builder.format(|out, record| {
            if record.target() == NOTE {
                return writeln!(out, "fastload: {}", record.args());
            }
            let style = out.default_level_style(record.level());
            let after = event::now().as_secs_f64();
            writeln!(
                out,
                "fastload: {after:.6} {style}{}{style:#} {}: {}",
                record.level(),
                record.target(),
                record.args()
            )
        });
        builder.init();
    }
}

/// Whole lines, above the bars.
#[derive(Debug)]
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // If nobody can hear it, as after a hangup, the work goes on.
        BARS.suspend(|| drop(io::stderr().write_all(line)));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Something that people want to know, in addition to the result.
pub(crate) fn note(text: &str) {
    log::info!(target: NOTE, "{text}");
}

/// Why it failed: the last line.
pub(crate) fn error(text: &str) {
    let style = clap::builder::Styles::styled().get_error().to_owned();
    let line = format!("{style}fastload{style:#}: {text}\n");
    BARS.suspend(|| drop(anstream::stderr().write_all(line.as_bytes())));
}

/// How far some work is, for people and for programs.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// When programs were told last, in microseconds; `None` if they are not.
    told: Option<AtomicU64>,
}

impl Progress {
    /// Of `total` bytes of work. `json`: for programs.
    pub(crate) fn new(total: u64, json: bool) -> Progress {
        let bar = BARS.add(ProgressBar::new(total));
        let narrow = console::Term::stderr().size_checked().is_some_and(|(_, width)| width < 80);
        let template = if narrow {
            "{wide_bar} {percent:>3}% {eta:>4}"
        } else {
            "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left{msg}"
        };
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        let told = json && PROGRESS_IS_SHOWN.get().copied().unwrap_or(false);
        Progress { bar, told: told.then(|| AtomicU64::new(micros(event::now()))) }
    }

    /// `done` bytes are done.
    pub(crate) fn set(&self, done: u64) {
        self.bar.set_position(done);
        let Some(told) = &self.told else { return };
        let (last, now) = (told.load(Ordering::Relaxed), micros(event::now()));
        let due = now.saturating_sub(last) >= micros(PROGRESS);
        // Of several threads one tells.
        if !due || told.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        let total = self.bar.length().unwrap_or(done);
        // A reader that went away does not stop the work.
        let _ = Event::new("progress").with(json!({ "done_bytes": done, "total_bytes": total })).print();
    }

    /// What is said behind the figures.
    pub(crate) fn message(&self, text: &str) {
        self.bar.set_message(format!(", {text}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }
}
