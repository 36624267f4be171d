//! `cargo xtask kernels`: the tests of what we ask of the kernel, on the kernels that users have.
//!
//! Each kernel is Debian's own, taken from its packages, and boots in QEMU without KVM (TCG), from an initramfs that
//! holds nothing but the test programs, the libraries they are linked to, and this program as its init.

mod boot;
mod debian;
mod guest;
mod initramfs;
mod programs;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use crate::results::Counts;
use crate::run::{Done, in_ci, root};
use crate::setup::{self, Need};
use boot::Machine;
use debian::Kernel;
use programs::Selection;
use report::Report;

pub(crate) use guest::Args as GuestArgs;
pub(crate) use guest::run as run_guest;

/// What it takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask kernels                   every kernel, every test program
  cargo xtask kernels --kernel 6.1      one kernel
  cargo xtask kernels --program freeze --program freeze_loading
                                        two test programs only
  cargo xtask kernels protected         tests with that word in their name
  cargo xtask kernels --update          fetch the kernels anew

Kernels come from the mirror in this machine's apt configuration; they are unpacked below target/kernels, not
installed. It takes some 120 MB and QEMU, and no rights.")]
pub(crate) struct Args {
    /// Only this kernel; may be given several times
    #[arg(long, value_name = "NAME", value_parser = names())]
    kernel: Vec<String>,
    /// Only this test program of uffd-engine ("lib": the unit tests); may be given several times
    #[arg(long, value_name = "NAME")]
    program: Vec<String>,
    /// Fetch the kernels anew, also those that are there
    #[arg(long)]
    update: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// How long a kernel may take, with its boot and all programs. A slow machine takes three times what this one does.
const LIMIT: Duration = Duration::from_secs(45 * 60);

fn names() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(debian::KERNELS.iter().map(|kernel| kernel.name))
}

/// Boots them one after the other.
///
/// # Errors
/// If a kernel can't be fetched, does not boot, or a test fails on it.
pub(crate) fn run(args: &Args) -> Done {
    setup::ensure(&[Need::Libclang, Need::Qemu])?;
    let chosen = |kernel: &&Kernel| args.kernel.is_empty() || args.kernel.iter().any(|name| name == kernel.name);
    let kernels: Vec<&Kernel> = debian::KERNELS.iter().filter(chosen).collect();
    let selection = Selection { workspace: false, names: args.program.clone(), filter: args.filter.clone() };
    let mut report = Report::default();
    let done = on(&kernels, &selection, args.update, &mut report);
    say!("\n{report}");
    let counts = report.counts();
    if done.is_ok() && args.filter.is_some() && counts == Counts::default() {
        return Err("no test has that word in its name".into());
    }
    done
}

/// For the gate: the oldest kernel alone, or all. Where this is not CI, a kernel that can't be fetched is said and left
/// out.
///
/// # Errors
/// As [`run`].
pub(crate) fn in_gate(full: bool, counts: &mut Counts) -> Done {
    if let Err(error) = setup::ensure(&[Need::Qemu]) {
        return skip(&*error);
    }
    let kernels: Vec<&Kernel> = debian::KERNELS.iter().take(if full { debian::KERNELS.len() } else { 1 }).collect();
    if let Err(error) = kernels.iter().try_for_each(|kernel| debian::fetch(kernel, false).map(drop)) {
        return skip(&*error);
    }
    let names = if full { Vec::new() } else { programs::IN_GATE.map(str::to_owned).into() };
    let selection = Selection { workspace: true, names, filter: None };
    let mut report = Report::default();
    let done = on(&kernels, &selection, false, &mut report);
    say!("\n{}", report.summary());
    counts.add(report.counts());
    if done.is_err() && report.counts().failed == 0 {
        counts.failed += 1;
    }
    done
}

fn skip(error: &dyn std::error::Error) -> Done {
    if in_ci() {
        return Err(format!("{error}; CI=true allows no skips").into());
    }
    say!("   SKIPPED: no other kernel could be tried: {error}");
    Ok(())
}

fn on(kernels: &[&Kernel], selection: &Selection, update: bool, report: &mut Report) -> Done {
    let programs = programs::build(selection)?;
    let initramfs = directory().join("initramfs.cpio");
    initramfs::write(&initramfs, &programs, selection.filter.as_deref())?;
    let mut failed = Vec::new();
    for kernel in kernels {
        let fetched = debian::fetch(kernel, update)?;
        say!("   {}: {}", kernel.name, fetched.package);
        let console = directory().join(format!("{}.console", kernel.name));
        let log = directory().join(format!("{}.log", kernel.name));
        let machine =
            Machine { kernel: &fetched.image, initramfs: &initramfs, console: &console, log: &log, limit: LIMIT };
        let column = report.column(kernel.name, &fetched.package);
        if let Err(error) = boot::run(&machine, column) {
            column.problem = Some(error.to_string());
            failed.push(format!("{}: {error}", kernel.name));
        } else if column.counts().failed > 0 {
            failed.push(format!("{}: {}", kernel.name, column.counts()));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ").into()) }
}

/// Where kernels and what is made for them lie.
fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("kernels")
}
