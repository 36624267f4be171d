//! Measures, and shows each figure as a ratio to the floor measured in the same run.

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::process::ExitCode;

use bench::figure::table;
use bench::figures::{Bench, GROUPS, selected};
use bench::out;
use clap::Parser;
use testkit::scratch::Scratch;

#[derive(Debug, Parser)]
struct Cli {
    /// Only figures whose name begins so
    names: Vec<String>,
    /// Also write the figures to this file, as a JSON array
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only list the names
    #[arg(long)]
    list: bool,
    /// Where files to load from are made; several GiB
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all goals were reached.
fn run(cli: &Cli) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let groups: Vec<_> = GROUPS.iter().filter(|group| selected(group, &cli.names)).collect();
    let unknown = |name: &&String| !GROUPS.iter().any(|group| selected(group, std::slice::from_ref(*name)));
    if let Some(name) = cli.names.iter().find(unknown) {
        return Err(format!("there is no figure whose name begins with {name}; --list names them").into());
    }
    if cli.list {
        let names: String = groups.iter().flat_map(|group| group.names).map(|name| format!("{name}.*\n")).collect();
        out::print(&names)?;
        return Ok(true);
    }
    if let Some(path) = &cli.json {
        // Told now if it can't be written, and not when all is measured.
        let writable = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        writable.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let [near, far] = bench::sys::two_cores()?;
    let scratch = Scratch::new_in(&cli.directory).map_err(|error| format!("{}: {error}", cli.directory.display()))?;
    let bench = Bench { directory: scratch.path().to_owned(), near, far };
    let (mut figures, mut failed) = (Vec::new(), None);
    for group in groups {
        eprintln!("measuring {} ...", group.names.join(", "));
        match (group.measure)(&bench) {
            Ok(measured) => figures.extend(measured),
            // What was measured before is not lost.
            Err(error) => {
                failed = Some(format!("{}: {error}", group.names.join(", ")));
                break;
            }
        }
    }
    if !cli.names.is_empty() {
        figures.retain(|figure| cli.names.iter().any(|prefix| figure.name.starts_with(prefix.as_str())));
    }
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&figures)?;
        fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))?;
    }
    out::print(&table(&figures))?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if let Some(name) =
        cli.names.iter().find(|name| !figures.iter().any(|figure| figure.name.starts_with(name.as_str())))
    {
        return Err(format!("no figure whose name begins with {name} was measured").into());
    }
    Ok(figures.iter().all(|figure| figure.ok))
}
