//! `fastload completions`: what a shell needs to complete our command lines.

use clap::CommandFactory as _;
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
        clap_complete::generate(self.shell, &mut Arguments::command(), "fastload", &mut script);
        Ok(output::print(&String::from_utf8(script)?)?)
    }
}
