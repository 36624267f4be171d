//! The archive that a kernel unpacks into its first file system.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::NewcBuilder;
use cpio::newc::{ModeFileType, trailer};

use super::programs::Program;
use crate::run::{Done, show};

/// Where the list of what the guest runs lies.
pub(crate) const PLAN: &str = "/tests/plan";

/// Writes the archive: init, the programs without debug information, what init itself runs (`mount`, and `sh` to end a
/// program that hangs), and the libraries of all.
///
/// # Errors
/// If a file can't be read or written, or a tool (`strip`, `ldd`) is missing.
pub(crate) fn write(archive: &Path, programs: &[Program], filter: Option<&str>) -> Done {
    let work = archive.with_extension("work");
    fs::create_dir_all(&work)?;
    // The tests may have built this program anew: then its file has no name any more, and is only reached so.
    let init = work.join("init");
    fs::copy("/proc/self/exe", &init)?;
    let mut files = vec![("/init".to_owned(), init)];
    for name in ["mount", "sh"] {
        files.push((format!("/bin/{name}"), tool(name)?));
    }
    let mut plan = String::new();
    for Program { name, path } in programs {
        files.push((format!("/tests/{name}"), path.clone()));
        plan += &format!("{name} {}\n", filter.unwrap_or_default());
    }
    let mut out = Archive::create(archive)?;
    let mut libraries = BTreeSet::new();
    for (name, path) in &files {
        libraries.extend(libraries_of(path)?);
        let stripped = work.join("stripped");
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(&stripped).arg(path);
        let status = strip.status().map_err(|error| format!("{}: {error}", show(&strip)))?;
        out.file(name, &fs::read(if status.success() { &stripped } else { path })?, 0o755)?;
    }
    for library in &libraries {
        let Some(name) = library.to_str() else { continue };
        out.file(name, &fs::read(library)?, 0o755)?;
    }
    out.file(PLAN, plan.as_bytes(), 0o644)?;
    out.file("/etc/passwd", b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n", 0o644)?;
    for directory in ["/proc", "/sys", "/dev", "/tmp", "/root", "/var/tmp"] {
        out.directory(directory)?;
    }
    out.finish()?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// Where a program is that the guest needs.
fn tool(name: &str) -> Done<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates =
        std::env::split_paths(&path).chain(["/bin".into(), "/sbin".into()]).map(|directory| directory.join(name));
    candidates.find(|path| path.is_file()).ok_or_else(|| format!("there is no program {name}").into())
}

/// The shared libraries that a program is linked to, at the paths at which its loader looks for them.
fn libraries_of(program: &Path) -> Done<Vec<PathBuf>> {
    let mut command = Command::new("ldd");
    command.arg(program).env("LC_ALL", "C");
    let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        // A program that is linked to none is a failure for it.
        let said = text + &String::from_utf8_lossy(&output.stderr);
        return if said.contains("not a dynamic executable") {
            Ok(Vec::new())
        } else {
            Err(format!("{}: {said}", show(&command)).into())
        };
    }
    parse_ldd(&text)
}

fn parse_ldd(text: &str) -> Done<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("=> not found") {
            return Err(format!("a library is missing: {line}").into());
        }
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        let path = path.split_once(" (0x").map_or(path, |(path, _)| path);
        // The one that is not a file is the kernel's own (`linux-vdso.so.1`).
        if path.starts_with('/') {
            libraries.push(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

/// An archive in the format that kernels take: "newc" (`Documentation/driver-api/early-userspace/buffer-format.rst`).
#[derive(Debug)]
struct Archive {
    out: BufWriter<File>,
    directories: BTreeSet<String>,
    number: u32,
}

impl Archive {
    fn create(path: &Path) -> Done<Archive> {
        let file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Archive { out: BufWriter::new(file), directories: BTreeSet::new(), number: 0 })
    }

    fn file(&mut self, name: &str, bytes: &[u8], mode: u32) -> Done {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.directory(parent)?;
        }
        self.entry(name, bytes, mode, ModeFileType::Regular)
    }

    /// With those above it, each once.
    fn directory(&mut self, name: &str) -> Done {
        if name.is_empty() || !self.directories.insert(name.to_owned()) {
            return Ok(());
        }
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.directory(parent)?;
        }
        self.entry(name, &[], 0o755, ModeFileType::Directory)
    }

    fn entry(&mut self, name: &str, bytes: &[u8], mode: u32, kind: ModeFileType) -> Done {
        self.number += 1;
        let size = u32::try_from(bytes.len()).map_err(|_| format!("{name}: too large for an initramfs"))?;
        let entry = NewcBuilder::new(name.trim_start_matches('/')).ino(self.number).mode(mode).set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.out, size);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }

    fn finish(mut self) -> Done {
        trailer(&mut self.out)?;
        self.out.flush()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ldd_says_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text).unwrap(), expected);
        assert!(parse_ldd("\tlibx.so => not found\n").unwrap_err().to_string().contains("libx.so"));
    }

    #[test]
    fn an_archive_has_each_directory_once_and_before_its_files() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.cpio");
        let mut archive = Archive::create(&path).unwrap();
        archive.file("/a/b/one", b"1", 0o644).unwrap();
        archive.file("/a/b/two", b"22", 0o755).unwrap();
        archive.directory("/a").unwrap();
        archive.finish().unwrap();
        let mut rest = File::open(&path).unwrap();
        let mut seen = Vec::new();
        loop {
            let reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            seen.push((reader.entry().name().to_owned(), reader.entry().mode(), reader.entry().file_size()));
            rest = reader.finish().unwrap();
        }
        let expected =
            [("a", 0o040_755, 0), ("a/b", 0o040_755, 0), ("a/b/one", 0o100_644, 1), ("a/b/two", 0o100_755, 2)];
        assert_eq!(seen, expected.map(|(name, mode, size)| (name.to_owned(), mode, size)));
    }
}
