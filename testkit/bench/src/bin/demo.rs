//! One guest, saved once and restored twice: eagerly, and on demand.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::demo::report::time;
use bench::demo::run::{Shown, demo};
use bench::out;
use clap::Parser;
use page_units::ByteLen;
use testkit::scratch::Scratch;

#[derive(Debug, Parser)]
struct Cli {
    /// Guest memory, such as 256M or 1G
    #[arg(long, default_value = "1G", value_name = "SIZE", value_parser = size)]
    ram: ByteLen,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Where the snapshot is put; as large as the guest
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(shown) => {
            shown.problems.iter().for_each(|problem| eprintln!("demo: {problem}"));
            if shown.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) }
        }
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Shown, Box<dyn std::error::Error + Send + Sync>> {
    let directory = Scratch::new_in(&cli.directory).map_err(|error| format!("{}: {error}", cli.directory.display()))?;
    let shown = demo(cli.ram, directory.path(), |what| {
        if !cli.json {
            // What it comes to is said at the end, or nobody listens.
            let _ = out::print(&format!("{what}\n"));
        }
    })?;
    if cli.json {
        out::print(&format!("{}\n", serde_json::to_string(&shown.report)?))?;
    } else {
        let [eager, on_demand] = &shown.timelines;
        let steps: Vec<_> = shown.steps.iter().map(|(step, took)| format!("{step} {}", time(*took))).collect();
        let table = shown.report.table(eager, on_demand);
        out::print(&format!("\n{table}On demand, step by step: {}.\n", steps.join(", ")))?;
    }
    Ok(shown)
}

/// A number of bytes, with K, M or G; whole 2 MiB, as the guest's page tables need.
fn size(text: &str) -> Result<ByteLen, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "a number, with K, M or G behind it".to_owned())?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| bytes <= 64 << 30).ok_or("at most 64G")?;
    if bytes < 4 << 20 || !bytes.is_multiple_of(2 << 20) {
        return Err("at least 4M, and whole 2M".into());
    }
    Ok(ByteLen(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(size("1G"), Ok(ByteLen(1 << 30)));
        assert_eq!(size("64M"), Ok(ByteLen(64 << 20)));
        assert_eq!(size("4194304"), Ok(ByteLen(4 << 20)));
        for bad in ["", "G", "1T", "1M", "5M", "-1G", "99999999999G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
