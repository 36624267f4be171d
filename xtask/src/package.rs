//! Packing every published crate as a registry would get it, and building each from what was packed.
//!
//! `cargo package` can build what it has packed, but looks for crates that depend on each other in a registry of its own,
//! which it unpacks once: the next run would build against what the last one packed. So they are built here.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Done, cargo, cargo_path, run as run_command, show, succeeded};
use crate::tidy::metadata::{Member, members};

/// Packs all published crates together and checks that each can be built from its package, without a network.
///
/// # Errors
/// If one can't be packed, or lacks something that it needs to be built. What cargo says was printed then.
pub(crate) fn run(root: &Path) -> Done {
    let published: Vec<Member> = members(root)?.into_iter().filter(|member| member.published).collect();
    let target = target_directory(root);
    pack(&published, &target)?;
    let directory = target.join("from-packages");
    unpack(root, &published, &target, &directory)?;
    for member in &published {
        let mut command = Command::new(cargo_path());
        command.args(["check", "--quiet", "--offline", "--package", &member.name]).current_dir(&directory);
        // Most of what they need has been built there already.
        command.env("CARGO_TARGET_DIR", &target);
        run_command(&mut command).map_err(|error| format!("{}, from its package: {error}", member.name))?;
    }
    say!("   {} packages", published.len());
    Ok(())
}

fn target_directory(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |directory| root.join(directory))
}

/// Writes the packages to `package` in the target directory.
fn pack(published: &[Member], target: &Path) -> Done {
    let mut command = cargo("package");
    // What is not committed yet is packed as well: that is what is being tested.
    command.args(["--offline", "--allow-dirty", "--no-verify"]).arg("--target-dir").arg(target);
    for member in published {
        command.args(["--package", &member.name]);
    }
    say!("   {}", show(&command));
    // It names each test that it leaves out, which is of use only if it fails.
    let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
    let done = succeeded(&command, output.status);
    if done.is_err() {
        say!("{}", String::from_utf8_lossy(&output.stderr));
    }
    done
}

/// Makes a workspace of the packages, in which each finds the others, with the versions of this one's `Cargo.lock`.
fn unpack(root: &Path, published: &[Member], target: &Path, directory: &Path) -> Done {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    for member in published {
        let package = target.join("package").join(format!("{}.crate", member.package()));
        // Without the times in the packages, which are always the same: cargo would take what changed for built.
        run_command(Command::new("tar").arg("-xzmf").arg(package).arg("-C").arg(directory))?;
    }
    fs::write(directory.join("Cargo.toml"), workspace(published))?;
    fs::copy(root.join("Cargo.lock"), directory.join("Cargo.lock"))?;
    Ok(())
}

fn workspace(published: &[Member]) -> String {
    let packages: Vec<String> = published.iter().map(|member| format!("{:?}", member.package())).collect();
    let mut text = format!("[workspace]\nresolver = \"3\"\nmembers = [{}]\n\n[patch.crates-io]\n", packages.join(", "));
    for (member, package) in published.iter().zip(&packages) {
        // A string takes all that is written to it.
        let _ = writeln!(text, "{} = {{ path = {package} }}", member.name);
    }
    // As in ours: what is the same is not built again.
    text.push_str("\n[profile.dev]\nopt-level = 1\ndebug = \"line-tables-only\"\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::metadata::tests::example;

    #[test]
    fn packages_find_each_other_in_their_workspace() {
        let text = workspace(&[example("a", &[], &[]), example("b", &["a"], &[])]);
        assert!(text.contains("members = [\"a-0.1.0\", \"b-0.1.0\"]"), "{text}");
        assert!(text.contains("\na = { path = \"a-0.1.0\" }\nb = { path = \"b-0.1.0\" }\n"), "{text}");
    }
}
