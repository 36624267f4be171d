//! Running other programs.

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::LazyLock;

/// What a task ends with.
pub(crate) type Done<T = ()> = Result<T, Box<dyn Error>>;

/// The workspace's root. What `cargo run` says when we run counts, not where we were built: clones may share a target
/// directory.
pub(crate) fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let own =
            std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        own.parent().map(Path::to_owned).unwrap_or(own)
    });
    &ROOT
}

/// The cargo that runs us.
pub(crate) fn cargo_path() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// `cargo <subcommand> --manifest-path <the workspace's>`, in the directory that the user is in.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(cargo_path());
    command.arg(subcommand).arg("--manifest-path").arg(root().join("Cargo.toml"));
    command
}

/// Whether `CI=true`: then nothing may be missing.
pub(crate) fn in_ci() -> bool {
    std::env::var("CI").as_deref() == Ok("true")
}

/// Runs a command to its end.
///
/// # Errors
/// If it can't be started, or fails.
pub(crate) fn run(command: &mut Command) -> Done {
    let status = command.status().map_err(|error| format!("{}: {error}", show(command)))?;
    succeeded(command, status)
}

/// Whether a command that has ended did what it should.
pub(crate) fn succeeded(command: &Command, status: ExitStatus) -> Done {
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", show(command)).into()) }
}

/// A command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let manifest = root().join("Cargo.toml");
    let mut words = vec![program];
    let mut arguments = command.get_args().peekable();
    while let Some(argument) = arguments.next() {
        if argument == "--manifest-path" && arguments.peek().is_some_and(|next| *next == manifest) {
            arguments.next();
            continue;
        }
        words.push(quote(&argument.to_string_lossy()));
    }
    words.join(" ")
}

/// A word for a POSIX shell.
pub(crate) fn quote(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = cargo("test");
        command.args(["--workspace", "--", "a b"]);
        assert!(show(&command).ends_with("test --workspace -- 'a b'"), "{}", show(&command));
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
