//! `cargo xtask dist`: what a release has: a static program, its man pages and completions, and a Debian package.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Done, cargo, root, run as run_command, show, succeeded};

/// The target whose C library is linked into the program: glibc, since a musl target may not be there.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The shells that get completions, with what their file is called and where Debian keeps it.
const SHELLS: [(&str, &str, &str); 3] = [
    ("bash", "fastload", "usr/share/bash-completion/completions"),
    ("zsh", "_fastload", "usr/share/zsh/vendor-completions"),
    ("fish", "fastload.fish", "usr/share/fish/vendor_completions.d"),
];

/// What it takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask dist
  cargo xtask dist --binary target/debug/fastload --to /tmp/dist
      Pack a program that is there already")]
pub(crate) struct Args {
    /// Where to, instead of target/dist
    #[arg(long, value_name = "DIRECTORY")]
    to: Option<PathBuf>,
    /// Pack this program, and build none
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// Builds everything anew.
///
/// # Errors
/// If a step fails; the error names the command or the file.
pub(crate) fn run(args: &Args) -> Done {
    let to = args.to.clone().unwrap_or_else(|| root().join("target/dist"));
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => build()?,
    };
    if to.exists() {
        fs::remove_dir_all(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    }
    let dist = Dist { to };
    let program = dist.copy(&binary, "bin/fastload")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    fs::create_dir_all(dist.to.join("man"))?;
    run_command(Command::new(&program).arg("manual").arg(dist.to.join("man")))?;
    for (shell, file, _) in SHELLS {
        dist.write(&format!("completions/{file}"), &output(Command::new(&program).args(["completions", shell]))?)?;
    }
    for name in ["json.md", "fastload-1.schema.json"] {
        dist.copy(&root().join("fastload/docs").join(name), &format!("doc/{name}"))?;
    }
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        dist.copy(&root().join(name), &format!("doc/{name}"))?;
    }
    dist.copy(&root().join("fastload/systemd/fastload@.service"), "systemd/fastload@.service")?;
    let package = dist.debian()?;
    for path in [&program, &package] {
        say!("{:>12}  {}", fs::metadata(path)?.len(), path.display());
    }
    Ok(())
}

/// Builds the program for machines that have nothing but a kernel.
fn build() -> Done<PathBuf> {
    let mut command = cargo("build");
    command.args(["--release", "--locked", "-p", "fastload", "--target", TARGET]);
    // Only what is built for the target gets these flags, not the build scripts.
    run_command(command.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols"))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(TARGET).join("release/fastload"))
}

/// The directory that is filled.
#[derive(Debug)]
struct Dist {
    to: PathBuf,
}

impl Dist {
    fn write(&self, name: &str, content: &[u8]) -> Done<PathBuf> {
        let path = self.to.join(name);
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&self.to)).map_err(failed)?;
        fs::write(&path, content).map_err(failed)?;
        Ok(path)
    }

    fn copy(&self, from: &Path, name: &str) -> Done<PathBuf> {
        self.write(name, &fs::read(from).map_err(|error| format!("{}: {error}", from.display()))?)
    }

    /// The Debian package: `deb(5)`, with the fields of `deb-control(5)`.
    fn debian(&self) -> Done<PathBuf> {
        let version = env!("CARGO_PKG_VERSION");
        let tree = Dist { to: self.to.join("debian") };
        let program = tree.copy(&self.to.join("bin/fastload"), "usr/bin/fastload")?;
        fs::set_permissions(program, fs::Permissions::from_mode(0o755))?;
        for page in entries(&self.to.join("man"))? {
            let packed = output(Command::new("gzip").args(["-9nc"]).arg(&page))?;
            tree.write(&format!("usr/share/man/man1/{}.gz", name(&page)), &packed)?;
        }
        for (_, file, directory) in SHELLS {
            tree.copy(&self.to.join("completions").join(file), &format!("{directory}/{file}"))?;
        }
        for file in entries(&self.to.join("doc"))? {
            tree.copy(&file, &format!("usr/share/doc/fastload/{}", name(&file)))?;
        }
        tree.copy(&self.to.join("systemd/fastload@.service"), "usr/share/doc/fastload/examples/fastload@.service")?;
        tree.write("usr/share/doc/fastload/copyright", COPYRIGHT.as_bytes())?;
        let kilobytes = size(&tree.to)?.div_ceil(1024);
        let control = format!(
            "Package: fastload\nVersion: {version}\nArchitecture: amd64\nMaintainer: the maintainers of fastload\n\
             Installed-Size: {kilobytes}\nSection: admin\nPriority: optional\nSuggests: qemu-system-x86\n\
             Description: fast snapshot load for virtual machines\n \
             Loads a snapshot into an unmodified QEMU in milliseconds: its guest runs at\n \
             once and gets its memory as it needs it. Also captures a running guest, and\n \
             checks, converts and repairs snapshot files.\n"
        );
        tree.write("DEBIAN/control", control.as_bytes())?;
        let package = self.to.join(format!("fastload_{version}_amd64.deb"));
        let mut command = Command::new("dpkg-deb");
        command.args(["--root-owner-group", "--build"]).arg(&tree.to).arg(&package);
        output(&mut command)?;
        fs::remove_dir_all(&tree.to)?;
        Ok(package)
    }
}

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: fastload

Files: *
Copyright: the maintainers of fastload
License: Apache-2.0 or MIT
 The texts of both are next to this file: LICENSE-APACHE and LICENSE-MIT.
";

/// What a command prints, if it succeeds.
fn output(command: &mut Command) -> Done<Vec<u8>> {
    let output = command.output().map_err(|error| format!("{}: {error}", show(command)))?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
    }
    succeeded(command, output.status)?;
    Ok(output.stdout)
}

fn entries(directory: &Path) -> Done<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn size(directory: &Path) -> Done<u64> {
    let mut sum = 0;
    for path in entries(directory)? {
        let meta = fs::metadata(&path)?;
        sum += if meta.is_dir() { size(&path)? } else { meta.len() };
    }
    Ok(sum)
}
