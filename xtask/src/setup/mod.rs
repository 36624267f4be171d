//! `cargo xtask setup`: what the other tasks need on this machine, found, and installed where we may.

mod apt;
mod debian;
mod facts;
mod libclang;
mod plan;

use crate::run::{Done, in_ci};
use facts::Facts;
use plan::Plan;

/// Something that a task can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// libclang, with which the `userfaultfd` crate reads the kernel's header while it is built.
    Libclang,
    /// A C++ compiler, with which libFuzzer is built for the fuzz targets.
    Cxx,
    /// `cargo fmt`.
    Rustfmt,
    /// `cargo clippy`.
    Clippy,
    /// `qemu-system-x86_64`, version 10 or later.
    Qemu,
    /// `qemu-img` and the other tools of that QEMU.
    QemuTools,
    /// A QEMU of version 7, unpacked into the target directory.
    OlderQemu,
    /// The programs `zstd` and `lz4`, which decode what the tests compressed.
    Compressors,
    /// The programs `zsh` and `mandoc`, which read the completions and the man pages.
    Readers,
}

impl Need {
    const ALL: [Need; 9] = [
        Need::Libclang,
        Need::Cxx,
        Need::Rustfmt,
        Need::Clippy,
        Need::Qemu,
        Need::QemuTools,
        Need::OlderQemu,
        Need::Compressors,
        Need::Readers,
    ];

    fn name(self) -> &'static str {
        match self {
            Need::Libclang => "libclang (for the userfaultfd crate)",
            Need::Cxx => "a C++ compiler (for the fuzz targets)",
            Need::Rustfmt => "rustfmt",
            Need::Clippy => "clippy",
            Need::Qemu => "QEMU 10 or later (qemu-system-x86_64)",
            Need::Compressors => "zstd and lz4 (for the tests)",
            Need::Readers => "zsh and mandoc (for the tests of completions and man pages)",
            Need::QemuTools => "the tools of QEMU 10 or later (qemu-img, qemu-io, qemu-storage-daemon)",
            Need::OlderQemu => "QEMU 7 as well (unpacked into the target directory; or FASTLOAD_OLDER_QEMU)",
        }
    }
}

/// What `setup` takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask setup              install what is missing (root), or print the command to type
  cargo xtask setup --dry-run    only look")]
pub(crate) struct Args {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
}

/// Installs all that is missing, and says what else a user has to see to.
pub(crate) fn run(args: &Args) -> Done {
    let facts = Facts::gather();
    for need in Need::ALL {
        say!("{:9} {}", if facts.has(need) { "ok" } else { "missing" }, need.name());
    }
    for (device, problem, cure) in facts::devices() {
        match problem {
            None => say!("{:9} {device}", "ok"),
            Some(problem) => say!("{:9} {device} ({problem}): {cure}", "no access"),
        }
    }
    let plan = plan::make(&facts, &Need::ALL);
    if args.dry_run {
        if !plan.is_empty() {
            let who = if facts.root || !plan.needs_root() { "This would be done" } else { "To be typed by you" };
            say!("\n{who}:\n\n  {}", plan.shell(facts.root));
        }
        return left_over(&plan);
    }
    carry_out(&facts, &plan)
}

/// Makes sure that everything named is there.
///
/// # Errors
/// If something is missing and can't be installed from here: the error holds the command to type.
pub(crate) fn ensure(needs: &[Need]) -> Done {
    let facts = Facts::gather();
    let missing: Vec<Need> = needs.iter().copied().filter(|&need| !facts.has(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        eprintln!("Missing: {}", need.name());
    }
    carry_out(&facts, &plan::make(&facts, &missing))
}

/// As [`ensure`], but where it fails and this is not CI, says so and goes on: the tests that need it are then skipped.
pub(crate) fn ensure_or_skip(need: Need) -> Done {
    match ensure(&[need]) {
        Err(error) if !in_ci() => {
            eprintln!("Tests that need {} will be skipped: {error}", need.name());
            Ok(())
        }
        done => done,
    }
}

/// The place from which this machine takes Debian's packages, for `main` of another suite: the extension and the text of
/// a file for apt.
///
/// # Errors
/// If this is not a Debian, or apt has no source for its own suite.
pub(crate) fn apt_source(suite: &str) -> Done<(&'static str, String)> {
    let facts = Facts::gather();
    if !facts.os.is_debian() || !facts.apt_get {
        return Err("this is not a Debian with apt-get".into());
    }
    let own = &facts.os.codename;
    let entry = facts.sources.iter().find(|entry| entry.offers_main_of(own));
    let entry = entry
        .ok_or_else(|| format!("apt has no source for \"{own}\", from which the one for \"{suite}\" could be made"))?;
    Ok(entry.for_suite(suite))
}

fn carry_out(facts: &Facts, plan: &Plan) -> Done {
    if plan.needs_root() && !facts.root {
        let also: String = plan.by_hand().iter().map(|what| format!("\nBesides, {what}")).collect();
        let command = plan.shell(false);
        return Err(format!("not running as root, so please type this, then try again:\n\n  {command}\n{also}").into());
    }
    plan.execute().map_err(|error| format!("{error}\nThe whole set-up by hand:\n\n  {}\n", plan.shell(facts.root)))?;
    left_over(plan)
}

/// An error if something is left to the user.
fn left_over(plan: &Plan) -> Done {
    match plan.by_hand() {
        [] => Ok(()),
        left => Err(left.join("\n").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A user who may not install is told all of it at once: what to type, and what no command of ours brings.
    #[test]
    fn the_command_is_said_whatever_else_is_missing() {
        let os = debian::OsRelease { id: "debian".into(), codename: "trixie".into(), version: Some(13) };
        let facts = Facts { os, apt_get: true, ..Facts::default() };
        let said = carry_out(&facts, &plan::make(&facts, &Need::ALL)).unwrap_err().to_string();
        assert!(
            said.contains("sudo sh -c 'apt-get update && apt-get install") && said.contains("libclang-dev"),
            "{said}"
        );
        assert!(said.contains("rustfmt, clippy"), "{said}");
        let facts = Facts { apt_get: false, present: vec![Need::Rustfmt, Need::Clippy], ..facts };
        let said = carry_out(&facts, &plan::make(&facts, &Need::ALL)).unwrap_err().to_string();
        assert!(said.contains("please install with your package manager: libclang"), "{said}");
    }
}
