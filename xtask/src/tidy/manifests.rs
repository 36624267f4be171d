//! What a registry, and somebody who looks into it, wants to know of each published crate.

use super::metadata::Member;

/// The fields of `[package]` that must be filled in.
const FIELDS: [&str; 8] =
    ["description", "license", "repository", "readme", "keywords", "categories", "rust_version", "metadata"];

/// The texts that the licence demands to be passed on.
const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Checks the published members.
pub(super) fn check(members: &[Member]) -> Vec<String> {
    let mut problems = Vec::new();
    for member in members.iter().filter(|member| member.published) {
        let missing = FIELDS.iter().filter(|field| !member.has(field));
        problems.extend(missing.map(|field| format!("{}: its Cargo.toml has no {field}", member.name)));
        let missing = LICENCES.iter().filter(|name| !member.directory.join(name).exists());
        problems.extend(missing.map(|name| format!("{}: no {name} in its directory", member.name)));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::metadata::tests::example;
    use super::*;

    #[test]
    fn an_empty_manifest_lacks_everything() {
        assert_eq!(check(&[example("a", &[], &[])]).len(), FIELDS.len() + LICENCES.len());
    }
}
