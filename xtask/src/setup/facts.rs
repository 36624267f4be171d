//! What is there.

use std::env;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Need;
use super::apt::{self, Entry};
use super::debian::OsRelease;
use super::libclang;
use crate::run::cargo_path;

/// Everything that the plan depends on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Whether we may install system packages.
    pub(crate) root: bool,
    /// The distribution.
    pub(crate) os: OsRelease,
    /// Whether `apt-get` is there.
    pub(crate) apt_get: bool,
    /// Whether `rustup` is there.
    pub(crate) rustup: bool,
    /// Where the build looks for libclang instead of the usual places: what `LIBCLANG_PATH` says.
    pub(crate) libclang_path: Option<OsString>,
    /// Where apt takes packages from.
    pub(crate) sources: Vec<Entry>,
    /// What is there already.
    pub(crate) present: Vec<Need>,
}

impl Facts {
    /// Looks around.
    pub(crate) fn gather() -> Facts {
        let mut present = Vec::new();
        let mut note = |need, there| {
            if there {
                present.push(need);
            }
        };
        note(Need::Libclang, libclang::found());
        note(Need::Cxx, runs(Command::new("c++").arg("--version")));
        note(Need::Rustfmt, runs(Command::new(cargo_path()).args(["fmt", "--version"])));
        note(Need::Clippy, runs(Command::new(cargo_path()).args(["clippy", "--version"])));
        let compressor = |name: &str| runs(Command::new(name).arg("--version"));
        note(Need::Compressors, compressor("zstd") && compressor("lz4"));
        // mandoc has no option that only tells its version.
        let readers = ["zsh --version", "echo | mandoc -T utf8"];
        note(Need::Readers, readers.iter().all(|line| runs(Command::new("sh").args(["-c", line]))));
        note(Need::Qemu, qemu_major("qemu-system-x86_64".as_ref()).is_some_and(|major| major >= 10));
        let tools = ["qemu-img", "qemu-io", "qemu-storage-daemon"];
        note(Need::QemuTools, tools.iter().all(|tool| runs(Command::new(tool).arg("--version"))));
        let older = env::var_os("FASTLOAD_OLDER_QEMU")
            .map_or_else(|| older_qemu().join("usr/bin/qemu-system-x86_64"), PathBuf::from);
        note(Need::OlderQemu, qemu_major(&older).is_some());
        Facts {
            root: effective_user() == Some(0),
            os: OsRelease::parse(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
            apt_get: runs(Command::new("apt-get").arg("--version")),
            rustup: runs(Command::new("rustup").arg("--version")),
            libclang_path: env::var_os("LIBCLANG_PATH"),
            sources: apt::read_all(Path::new("/etc/apt")),
            present,
        }
    }

    /// Whether it is there.
    pub(crate) fn has(&self, need: Need) -> bool {
        self.present.contains(&need)
    }
}

/// The devices that the product needs at run time: path, what is wrong, how to cure it.
pub(crate) fn devices() -> impl Iterator<Item = (&'static str, Option<String>, &'static str)> {
    [
        ("/dev/kvm", "add yourself to its group (usually kvm), or on a virtual machine turn nested virtualisation on"),
        ("/dev/userfaultfd", "give yourself access (chgrp, setfacl), or set vm.unprivileged_userfaultfd=1 by sysctl"),
    ]
    .into_iter()
    .map(|(path, cure)| {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        (path, opened.err().map(|error| error.to_string()), cure)
    })
}

fn runs(command: &mut Command) -> bool {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn effective_user() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Where the older QEMU is unpacked: in the target directory from which we run, where the tests look for it.
pub(crate) fn older_qemu() -> PathBuf {
    let this = env::current_exe().unwrap_or_default();
    this.ancestors().nth(2).unwrap_or(Path::new("target")).join("older-qemu")
}

fn qemu_major(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    parse_qemu_major(&String::from_utf8_lossy(&output.stdout))
}

fn parse_qemu_major(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("version ")?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu() {
        assert_eq!(parse_qemu_major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(parse_qemu_major("QEMU emulator version 7.2.19"), Some(7));
        assert_eq!(parse_qemu_major("something else"), None);
    }

    #[test]
    fn this_process_has_a_user() {
        assert!(effective_user().is_some());
    }
}
