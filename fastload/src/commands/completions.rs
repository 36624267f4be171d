//! `fastload completions`: what a shell needs to complete our command lines.

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;

use crate::commands::Failure;
use crate::{Arguments, output};

/// Print a script that makes a shell complete the command lines of fastload.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fastload completions bash > /etc/bash_completion.d/fastload
  fastload completions zsh > /usr/share/zsh/site-functions/_fastload
  fastload completions fish > ~/.config/fish/completions/fastload.fish")]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut visible(), "fastload", &mut script);
        Ok(output::print(&String::from_utf8(script)?)?)
    }
}

/// Our command line, but for the commands that people don't type.
fn visible() -> Command {
    let all = Arguments::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    Command::new("fastload").version(env!("CARGO_PKG_VERSION")).args(all.get_arguments().cloned()).subcommands(shown)
}
