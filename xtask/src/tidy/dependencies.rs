//! Which crate may use which: the dependency rules of ARCHITECTURE.md.

use super::metadata::Member;

/// What each published crate may use of the workspace, from the bottom up. Tests may use anything.
const MAY_USE: &[(&str, &[&str])] = &[
    ("page-units", &[]),
    ("whole-file", &[]),
    ("vmstate", &["page-units"]),
    ("frame-file", &["page-units"]),
    ("mapped-ram", &["frame-file", "page-units", "vmstate", "whole-file"]),
    ("page-source", &["page-units"]),
    ("page-files", &["frame-file", "mapped-ram", "page-source", "page-units", "whole-file"]),
    ("qemu-pages", &["page-source", "page-units", "vmstate"]),
    ("uffd-engine", &["page-source", "page-units"]),
    (
        "vmm-glue",
        &[
            "mapped-ram",
            "page-files",
            "page-source",
            "page-units",
            "qemu-pages",
            "uffd-engine",
            "vmstate",
            "whole-file",
        ],
    ),
    ("fastload-qmp", &[]),
    (
        "fastload",
        &[
            "fastload-qmp",
            "frame-file",
            "mapped-ram",
            "page-files",
            "page-source",
            "page-units",
            "qemu-pages",
            "uffd-engine",
            "vmm-glue",
            "vmstate",
            "whole-file",
        ],
    ),
];

/// What a crate must not use of others, whatever it may use here.
const MUST_NOT_USE: &[(&str, &[&str])] = &[
    ("page-units", &["libc", "nix"]),
    ("vmstate", &["libc", "nix"]),
    ("page-source", &["kvm-bindings", "kvm-ioctls", "tempfile", "userfaultfd", "vm-memory"]),
    ("page-files", &["kvm-bindings", "kvm-ioctls", "userfaultfd", "vm-memory"]),
    ("qemu-pages", &["kvm-bindings", "kvm-ioctls", "userfaultfd", "vm-memory"]),
    ("uffd-engine", &["kvm-bindings", "kvm-ioctls", "serde_json", "tempfile", "vm-memory"]),
    ("xtask", &["libc", "nix", "userfaultfd", "zstd"]),
];

/// Checks all members.
pub(super) fn check(members: &[Member]) -> Vec<String> {
    let mut problems = Vec::new();
    for member in members {
        let used = member.dependencies.iter().filter(|dependency| !dependency.for_tests).map(|used| &used.name);
        for used in used {
            let ours = members.iter().find(|other| other.name == *used);
            let allowed = MAY_USE.iter().find(|(name, _)| *name == member.name);
            let forbidden = MUST_NOT_USE.iter().filter(|(name, _)| *name == member.name).flat_map(|(_, names)| *names);
            let wrong = match (ours, allowed) {
                (Some(_), Some((_, allowed))) => !allowed.contains(&used.as_str()),
                (Some(ours), None) => member.published && !ours.published,
                (None, _) => forbidden.copied().any(|name| name == used),
            };
            if wrong {
                problems.push(format!("{}: it must not depend on {used} (see ARCHITECTURE.md)", member.name));
            }
        }
        if member.published && !MAY_USE.iter().any(|(name, _)| *name == member.name) {
            problems
                .push(format!("{}: no rule says what it may depend on (xtask/src/tidy/dependencies.rs)", member.name));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::metadata::tests::example;
    use super::*;

    #[test]
    fn an_arrow_that_points_up_is_found() {
        let tree = |engine: &[&str], for_tests: &[&str]| {
            let lower = ["page-source", "page-units", "mapped-ram"].map(|name| example(name, &[], &[]));
            let engine = example("uffd-engine", engine, for_tests);
            check(&lower.into_iter().chain([engine]).collect::<Vec<_>>())
        };
        assert_eq!(tree(&["page-source", "nix"], &["mapped-ram"]), Vec::<String>::new());
        assert_eq!(tree(&["mapped-ram"], &[]).len(), 1);
        assert_eq!(tree(&["kvm-ioctls"], &[]).len(), 1);
    }

    #[test]
    fn a_published_crate_without_a_rule_is_found() {
        assert_eq!(check(&[example("something-new", &[], &[])]).len(), 1);
    }
}
