//! What was promised to the user of this project: directories of known names, and packages that are really used.

use std::path::Path;

use super::metadata::Member;

/// The directories at the top, each a member of the workspace.
const TOP_LEVEL: [&str; 8] =
    ["mapped-ram", "uffd-engine", "page-source", "vmstate", "vmm-glue", "fastload", "testkit", "xtask"];

/// The packages that members depend on.
const PACKAGES: [&str; 10] = [
    "kvm-ioctls",
    "vm-memory",
    "userfaultfd",
    "nix",
    "parking_lot",
    "bitflags",
    "proptest",
    "criterion",
    "tempfile",
    "log",
];

/// Checks both.
pub(super) fn check(root: &Path, members: &[Member]) -> Vec<String> {
    let mut problems = Vec::new();
    for name in TOP_LEVEL {
        if !members.iter().any(|member| member.directory == root.join(name)) {
            problems.push(format!("{name}/: no member of the workspace"));
        }
    }
    for name in PACKAGES {
        if !members.iter().flat_map(|member| &member.dependencies).any(|dependency| dependency.name == name) {
            problems.push(format!("{name}: no member of the workspace depends on it"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::metadata::tests::example;
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let problems = check(Path::new("/root"), &[example("a", &["nix"], &["criterion"])]);
        assert_eq!(problems.len(), TOP_LEVEL.len() + PACKAGES.len() - 2);
        assert!(problems.iter().any(|problem| problem.starts_with("xtask/")));
        assert!(problems.iter().any(|problem| problem.starts_with("proptest")));
        assert!(!problems.iter().any(|problem| problem.starts_with("nix")));
    }
}
