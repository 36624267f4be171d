//! Packing every published crate as a registry would get it, and building each from what was packed.

use std::path::Path;

use crate::run::{Done, cargo, show, succeeded};
use crate::tidy::metadata::members;

/// Packs and builds all published crates together, without a network.
///
/// # Errors
/// If one can't be packed, or lacks something that it needs to be built. What cargo says was printed then.
pub(crate) fn run(root: &Path) -> Done {
    let mut command = cargo("package");
    // What is not committed yet is packed as well: that is what is being tested.
    command.args(["--offline", "--allow-dirty"]);
    let published = members(root)?.into_iter().filter(|member| member.published);
    for member in published {
        command.args(["--package", &member.name]);
    }
    // The packages know no profile of this workspace. With its own, most of what they need has been built already.
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
    say!("   {}", show(&command));
    // It names each test that it leaves out, which is of use only if it fails.
    let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
    let done = succeeded(&command, output.status);
    if done.is_err() {
        say!("{}", String::from_utf8_lossy(&output.stderr));
    }
    done
}
