//! What a test needs from the machine, really tried, and what happens where it is missing.
//!
//! ```no_run
//! # fn a_test() {
//! testkit::require!(Kvm, Userfaultfd);
//! // from here on both work
//! # }
//! ```
//!
//! A test that lacks something prints `SKIPPED <test>: <what>: <reason>`, adds that line to the file that the
//! environment variable `TESTKIT_SKIPS` names, and returns. Where `CI=true` is set it fails instead: a machine that is
//! meant to prove something must not pass by skipping. What no machine needs to have ([`without`]) is recorded alike, and
//! never a failure; nor is what the kernel is too old for.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{hugepages, sys};

/// Something a test can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prerequisite {
    /// `/dev/kvm` opens, and a VM can be created.
    Kvm,
    /// A userfaultfd that also handles faults taken inside the kernel can be created.
    Userfaultfd,
    /// `qemu-system-x86_64` runs.
    Qemu,
    /// An [older QEMU](older_qemu) runs.
    OlderQemu,
    /// `qemu-img`, `qemu-io` and `qemu-storage-daemon` run.
    QemuTools,
    /// A 2 MiB huge page is available (through overcommit, see [`hugepages::Overcommit`]).
    Hugepages,
    /// The test runs as root.
    Root,
    /// At least two CPUs may be used.
    TwoCpus,
    /// `/dev/fuse` opens.
    Fuse,
    /// The program `zstd` runs.
    Zstd,
    /// The program `lz4` runs.
    Lz4,
    /// The program `zsh` runs.
    Zsh,
    /// The program `mandoc` runs.
    Mandoc,
    /// Missing pages can be poisoned (`UFFDIO_POISON`): Linux 6.6.
    Poison,
    /// Pages of shared memory can be mapped write-protected (`UFFDIO_CONTINUE_MODE_WP`): Linux 6.4.
    ProtectedContinue,
}

/// `UFFD_FEATURE_WP_UNPOPULATED`, which came with `UFFDIO_CONTINUE_MODE_WP`; that has no bit of its own.
const WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_POISON`
const POISON: u64 = 1 << 14;

impl Prerequisite {
    /// Tries it.
    ///
    /// # Errors
    /// With the exact reason why it is missing.
    pub fn check(self) -> Result<(), String> {
        match self {
            Prerequisite::Kvm => {
                let kvm = kvm_ioctls::Kvm::new().map_err(|error| format!("/dev/kvm can't be opened: {error}"))?;
                kvm.create_vm().map_err(|error| format!("no VM can be created: {error}"))?;
                Ok(())
            }
            Prerequisite::Userfaultfd => userfaultfd(),
            Prerequisite::Qemu => runs("qemu-system-x86_64"),
            Prerequisite::OlderQemu => match older_qemu() {
                Some(program) => runs(program),
                None => Err("there is no older QEMU: cargo xtask setup, or set FASTLOAD_OLDER_QEMU".to_owned()),
            },
            Prerequisite::QemuTools => ["qemu-img", "qemu-io", "qemu-storage-daemon"].into_iter().try_for_each(runs),
            Prerequisite::Zstd => runs("zstd"),
            Prerequisite::Lz4 => runs("lz4"),
            Prerequisite::Zsh => runs("zsh"),
            // It has no option that only tells its version.
            Prerequisite::Mandoc => match Command::new("mandoc").stdin(Stdio::null()).stdout(Stdio::null()).status() {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("mandoc: {error}")),
            },
            Prerequisite::Hugepages => {
                let _one_more = hugepages::Overcommit::reserve(1)
                    .map_err(|error| format!("nr_overcommit_hugepages can't be raised: {error}"))?;
                sys::try_huge_page().map_err(|error| format!("no 2 MiB page is available: {error}"))
            }
            Prerequisite::Root if nix::unistd::geteuid().is_root() => Ok(()),
            Prerequisite::Root => Err(format!("running as user {}", nix::unistd::geteuid())),
            Prerequisite::Fuse => {
                let opened = OpenOptions::new().read(true).write(true).open("/dev/fuse");
                opened.map(drop).map_err(|error| format!("/dev/fuse can't be opened: {error}"))
            }
            Prerequisite::TwoCpus => match std::thread::available_parallelism() {
                Ok(cpus) if cpus.get() >= 2 => Ok(()),
                Ok(cpus) => Err(format!("{cpus} CPU")),
                Err(error) => Err(error.to_string()),
            },
            Prerequisite::Poison => userfaultfd_has(POISON, self),
            Prerequisite::ProtectedContinue => userfaultfd_has(WP_UNPOPULATED, self),
        }
    }

    /// The Linux that brought it, where it is something that older ones lack.
    fn since(self) -> Option<(u32, u32)> {
        match self {
            Prerequisite::Poison => Some((6, 6)),
            Prerequisite::ProtectedContinue => Some((6, 4)),
            _ => None,
        }
    }
}

fn userfaultfd_has(bit: u64, what: Prerequisite) -> Result<(), String> {
    let device = File::open("/dev/userfaultfd").and_then(|device| sys::userfaultfd_from_device(&device));
    let uffd = device.or_else(|_| sys::userfaultfd_from_syscall()).map_err(|error| error.to_string())?;
    let features = sys::userfaultfd_features(&uffd).map_err(|error| format!("UFFDIO_API: {error}"))?;
    let (major, minor) = what.since().unwrap_or_default();
    if features & bit != 0 { Ok(()) } else { Err(format!("it came with Linux {major}.{minor}")) }
}

/// The version of the kernel that runs: the first two numbers.
///
/// # Panics
/// If it says none.
#[must_use]
pub fn kernel_version() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    parse_version(&release).unwrap_or_else(|| panic!("no version in {release:?}"))
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether all of `needed` is there; records what is not. For the [`require!`](crate::require!) macro.
///
/// # Panics
/// If something is missing and `CI=true`, unless it came with a later kernel.
#[must_use]
pub fn have(needed: &[Prerequisite]) -> bool {
    let Some((what, reason)) = needed.iter().find_map(|&what| what.check().err().map(|reason| (what, reason))) else {
        return true;
    };
    let line = line(&format!("{what:?}"), &reason);
    if what.since().is_some_and(|since| kernel_version() < since) {
        record(&line);
        return false;
    }
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "{line}, and CI=true allows no skips");
    record(&line);
    false
}

/// Records that the test which calls it proves nothing, for lack of something that no machine needs to have: `CI=true`
/// does not forbid that.
///
/// # Panics
/// If it can't be recorded.
pub fn without(what: &str, reason: &str) {
    record(&line(what, reason));
}

fn line(what: &str, reason: &str) -> String {
    let thread = std::thread::current();
    format!("SKIPPED {}: {what}: {reason}", thread.name().unwrap_or("(unnamed thread)"))
}

fn record(line: &str) {
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("TESTKIT_SKIPS") {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        written.unwrap_or_else(|error| panic!("{line}, but recording that in {path:?} failed: {error}"));
    }
}

/// Returns from the test, after recording why, unless everything named is there.
///
/// The names are those of [`Prerequisite`]. In a function that returns something, give the value after a semicolon:
/// `require!(Kvm; Ok(()))`.
#[macro_export]
macro_rules! require {
    ($($what:ident),+ $(,)?) => {
        $crate::require!($($what),+; ())
    };
    ($($what:ident),+; $value:expr) => {
        if !$crate::require::have(&[$($crate::require::Prerequisite::$what),+]) {
            return $value;
        }
    };
}

fn userfaultfd() -> Result<(), String> {
    let device = match File::open("/dev/userfaultfd") {
        Ok(device) => match sys::userfaultfd_from_device(&device) {
            Ok(_) => return Ok(()),
            Err(error) => format!("/dev/userfaultfd: {error}"),
        },
        Err(error) => format!("/dev/userfaultfd: {error}"),
    };
    match sys::userfaultfd_from_syscall() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{device}; userfaultfd(2): {error} (see /proc/sys/vm/unprivileged_userfaultfd)")),
    }
}

fn runs(program: impl AsRef<OsStr>) -> Result<(), String> {
    let name = program.as_ref().display();
    let status = Command::new(&program).arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{name} --version: {status}")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

/// The program of a QEMU that is older than the installed one: what `FASTLOAD_OLDER_QEMU` names, or what
/// `cargo xtask setup` has unpacked into the target directory.
#[must_use]
pub fn older_qemu() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("FASTLOAD_OLDER_QEMU") {
        return Some(named.into());
    }
    let this = std::env::current_exe().ok()?;
    let mut programs = this.ancestors().map(|directory| directory.join("older-qemu/usr/bin/qemu-system-x86_64"));
    programs.find(|program| program.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found() {
        assert_eq!(Prerequisite::Root.check().is_ok(), nix::unistd::geteuid().is_root());
        assert!(have(&[]));
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(parse_version("6.1.0-50-cloud-amd64\n"), Some((6, 1)));
        assert_eq!(parse_version("6.12.117+deb13-cloud-amd64"), Some((6, 12)));
        assert!(parse_version("6.12.1") > parse_version("6.4.0"));
        assert_eq!(parse_version("six"), None);
    }

    #[test]
    fn what_came_with_a_kernel_is_in_a_later_one() {
        require!(Userfaultfd);
        for what in [Prerequisite::Poison, Prerequisite::ProtectedContinue] {
            if kernel_version() >= what.since().unwrap() {
                what.check().unwrap();
            }
        }
    }

    #[test]
    fn skipping_returns_the_value() {
        fn needs_root() -> u32 {
            require!(Root; 7);
            8
        }
        if !nix::unistd::geteuid().is_root() && std::env::var("CI").as_deref() != Ok("true") {
            assert_eq!(needs_root(), 7);
        } else if nix::unistd::geteuid().is_root() {
            assert_eq!(needs_root(), 8);
        }
    }
}
