//! A user who may have no userfaultfd is told what was tried, what each said, and what would help.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use common::collector::layout;
use common::{Kind, Memory};
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Descriptor, OpenError, StartError};

const TEST: &str = "the_reasons_of_both_ways_are_told";
const CHILD: &str = "UFFD_ENGINE_TEST_AS_NOBODY";
/// The user "nobody", who has no rights and no capabilities.
const NOBODY: u32 = 65534;

#[test]
fn the_reasons_of_both_ways_are_told() {
    if std::env::var_os(CHILD).is_some() {
        return as_nobody();
    }
    testkit::require!(Root, Userfaultfd);
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let open_to_all = fs::metadata("/dev/userfaultfd").is_ok_and(|node| node.mode() & 0o006 == 0o006);
    if sysctl.trim() == "1" || open_to_all {
        return testkit::require::without("a userfaultfd for root alone", "every user may have one here");
    }
    // This program again, where that user can reach it.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut child = Command::new(&program);
    child.args(["--exact", TEST]).env(CHILD, "1").uid(NOBODY).gid(NOBODY).current_dir("/");
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn as_nobody() {
    let oracle = Arc::new(Oracle::random(1, layout(&[8]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let started = memory.engine(Arc::new(MemorySource::new(oracle))).start();
    let Err(StartError::Open(of_engine)) = started else { panic!("{started:?}") };
    for error in [of_engine, Descriptor::kernel_features().unwrap_err()] {
        let OpenError::NotPermitted { device, syscall } = &error else { panic!("{error}") };
        assert!(matches!(device.raw_os_error(), Some(libc::EACCES | libc::ENOENT)), "{device}");
        assert_eq!(syscall.raw_os_error(), Some(libc::EPERM), "{syscall}");
        let line = error.to_string();
        for part in [&*device.to_string(), &syscall.to_string(), "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"] {
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
    }
}
