//! Debian's kernels, from its packages: fetched with apt from the mirror that this machine uses, with the same key, and
//! unpacked. Nothing is installed, and apt's own state is not touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::directory;
use crate::run::{Done, show};
use crate::setup;

/// A kernel that users have.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What it is called here.
    pub(crate) name: &'static str,
    /// The suite whose newest kernel it is.
    suite: &'static str,
}

/// From the oldest to the newest.
pub(crate) const KERNELS: [Kernel; 3] = [
    Kernel { name: "6.1", suite: "bookworm" },
    Kernel { name: "6.12", suite: "trixie" },
    Kernel { name: "newest", suite: "sid" },
];

/// The package that depends on the newest kernel of its suite. The one for clouds: its memory management is that of the
/// others, and it has fewer drivers.
const NEWEST: &str = "linux-image-cloud-amd64";

/// A kernel that is here.
#[derive(Debug)]
pub(crate) struct Fetched {
    /// The file that boots.
    pub(crate) image: PathBuf,
    /// Name and version of the package it is from.
    pub(crate) package: String,
}

/// Brings a kernel, unless it is there already.
///
/// # Errors
/// If this is not a Debian, or apt fails.
pub(crate) fn fetch(kernel: &Kernel, update: bool) -> Done<Fetched> {
    let place = directory().join(kernel.suite);
    let (image, package) = (place.join("vmlinuz"), place.join("package"));
    if !update && let (true, Ok(package)) = (image.exists(), fs::read_to_string(&package)) {
        return Ok(Fetched { image, package: package.trim().to_owned() });
    }
    let found = bring(kernel, &place, &image).map_err(|error| format!("Linux {}: {error}", kernel.name))?;
    // Written last: with it all is there.
    fs::write(&package, format!("{found}\n"))?;
    Ok(Fetched { image, package: found })
}

fn bring(kernel: &Kernel, place: &Path, image: &Path) -> Done<String> {
    let (extension, source) = setup::apt_source(kernel.suite)?;
    if place.exists() {
        fs::remove_dir_all(place)?;
    }
    let apt = Apt { place };
    for part in ["lists/lists/partial", "cache/archives/partial", "sources", "packages"] {
        fs::create_dir_all(place.join(part))?;
    }
    fs::write(place.join("sources").join(format!("debian.{extension}")), source)?;
    quietly(apt.get().args(["-q", "update"]))?;
    let version_of = apt.depends(NEWEST)?;
    let newest = version_of.into_iter().find(|name| name.starts_with("linux-image-"));
    let newest = newest.ok_or_else(|| format!("{NEWEST} of {} depends on no kernel", kernel.suite))?;
    // Since 2026 the file itself is in a package of another name, on which that one depends.
    let parts = apt.depends(&newest)?.into_iter().filter(|name| name.starts_with("linux-binary-"));
    let wanted: Vec<String> = [newest.clone()].into_iter().chain(parts).collect();
    quietly(apt.get().args(["-q", "download"]).args(&wanted).current_dir(place.join("packages")))?;
    let unpacked = place.join("unpacked");
    let mut name = String::new();
    for entry in fs::read_dir(place.join("packages"))? {
        let file = entry?.path();
        quietly(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&unpacked))?;
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if stem.starts_with(&newest) {
            name = stem;
        }
    }
    let kernel_file = find(&unpacked, &|name| name.starts_with("vmlinuz"));
    fs::rename(kernel_file.ok_or_else(|| format!("{} hold no vmlinuz", wanted.join(", ")))?, image)?;
    for part in ["unpacked", "packages", "cache", "lists"] {
        fs::remove_dir_all(place.join(part))?;
    }
    Ok(name)
}

/// apt with a state, a cache and a list of sources of its own, and the rest of this machine's configuration.
#[derive(Debug)]
struct Apt<'a> {
    place: &'a Path,
}

impl Apt<'_> {
    fn with(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |part: &str| self.place.join(part).display().to_string();
        for option in [
            format!("Dir::State={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            "Dir::Etc::sourcelist=/dev/null".into(),
            format!("Dir::Etc::sourceparts={}", at("sources")),
            "Acquire::Languages=none".into(),
            // The user that apt would become may not write here.
            "APT::Sandbox::User=root".into(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C");
        command
    }

    fn get(&self) -> Command {
        self.with("apt-get")
    }

    /// The packages that one depends on.
    fn depends(&self, package: &str) -> Done<Vec<String>> {
        let mut command = self.with("apt-cache");
        command.args(["depends", "--important", package]);
        let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
        if !output.status.success() {
            return Err(format!("{}: {}", show(&command), String::from_utf8_lossy(&output.stderr).trim()).into());
        }
        Ok(parse_depends(&String::from_utf8_lossy(&output.stdout)))
    }
}

fn parse_depends(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.trim_start_matches([' ', '|']).strip_prefix("Depends: "));
    lines.map(str::to_owned).collect()
}

/// Runs a command whose output matters only if it fails.
fn quietly(command: &mut Command) -> Done {
    let output = command.output().map_err(|error| format!("{}: {error}", show(command)))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{}: {}\n{}", show(command), output.status, String::from_utf8_lossy(&said).trim()).into())
}

fn find(directory: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.flatten();
    entries.map(|entry| entry.path()).find_map(|path| {
        if path.is_symlink() {
            None
        } else if path.is_dir() {
            find(&path, wanted)
        } else {
            path.file_name()?.to_str().filter(|name| wanted(name)).map(|_| path.clone())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let text = "linux-image-6.1.0-50-cloud-amd64\n  Depends: kmod\n |Depends: initramfs-tools\n  Depends: <x>\n  Conflicts: y\n";
        assert_eq!(parse_depends(text), ["kmod", "initramfs-tools", "<x>"]);
    }

    #[test]
    fn the_kernel_file_is_found_below() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("usr/lib/modules/7")).unwrap();
        assert_eq!(find(root.path(), &|name| name.starts_with("vmlinuz")), None);
        let file = root.path().join("usr/lib/modules/7/vmlinuz");
        fs::write(&file, "").unwrap();
        assert_eq!(find(root.path(), &|name| name.starts_with("vmlinuz")), Some(file));
    }
}
