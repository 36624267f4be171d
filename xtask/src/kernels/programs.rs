//! The test programs that run on other kernels.

use std::path::PathBuf;
use std::process::Stdio;

use crate::e2e;
use crate::run::{Done, cargo, root, show, succeeded};

/// The crate that talks to the kernel about memory.
const PACKAGE: &str = "uffd-engine";

/// What the gate runs on the oldest kernel: what there is to lose on one, in two minutes.
pub(crate) const IN_GATE: [&str; 6] = ["kernel", "freeze", "dying", "cached", "many_mappings", "permission"];

/// Which of them.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Built as the gate builds everything: with the whole workspace, so that it is built once.
    pub(crate) workspace: bool,
    /// Their names; all, if there are none.
    pub(crate) names: Vec<String>,
    /// Of the tests in them.
    pub(crate) filter: Option<String>,
}

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// Builds them.
///
/// # Errors
/// If they don't build, or a name is none of theirs.
pub(crate) fn build(selection: &Selection) -> Done<Vec<Program>> {
    let mut command = cargo("test");
    command.args(["--no-run", "--quiet", "--message-format=json-render-diagnostics"]);
    if selection.workspace {
        command.args(["--workspace", "--lib", "--bins"]);
        e2e::select(&mut command, &e2e::test_targets(root()).other);
    } else {
        command.args(["--package", PACKAGE, "--lib", "--tests"]);
    }
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| format!("{}: {error}", show(&command)))?;
    succeeded(&command, output.status)?;
    let mut programs: Vec<Program> = String::from_utf8(output.stdout)?.lines().filter_map(program).collect();
    if let Some(name) = selection.names.iter().find(|name| !programs.iter().any(|program| program.name == **name)) {
        let names: Vec<&str> = programs.iter().map(|program| program.name.as_str()).collect();
        return Err(format!("{PACKAGE} has no test program \"{name}\"; it has {}", names.join(", ")).into());
    }
    programs.retain(|program| selection.names.is_empty() || selection.names.contains(&program.name));
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(programs)
}

/// The test program of our crate that a line of cargo's JSON tells of, if it does.
fn program(line: &str) -> Option<Program> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let ours = root().join(PACKAGE).join("Cargo.toml");
    if message["reason"] != "compiler-artifact" || message["manifest_path"].as_str()? != ours.to_str()? {
        return None;
    }
    let path = PathBuf::from(message["executable"].as_str()?);
    let is = |wanted: &str| {
        message["target"]["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == wanted))
    };
    let name = match message["target"]["name"].as_str()? {
        _ if is("lib") => "lib",
        name if is("test") => name,
        _ => return None,
    };
    Some(Program { name: name.to_owned(), path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_test_programs_are_taken() {
        let line = |package: &str, kind: &str| {
            let manifest = root().join(package).join("Cargo.toml");
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":{manifest:?},"target":{{"kind":["{kind}"],"name":"x"}},"executable":"/t/x-1"}}"#
            )
        };
        let named = |name: &str| Some(Program { name: name.into(), path: "/t/x-1".into() });
        assert_eq!(program(&line(PACKAGE, "test")), named("x"));
        assert_eq!(program(&line(PACKAGE, "lib")), named("lib"));
        assert_eq!(program(&line(PACKAGE, "example")), None);
        assert_eq!(program(&line("vmm-glue", "test")), None);
        assert_eq!(program("not JSON"), None);
    }
}
