//! Whether the build of the `userfaultfd` crate will find a libclang, looked for where clang-sys does (its
//! `build/common.rs` and `build/dynamic.rs`, 1.9).
//!
//! The compiler's own headers, which come in another package, don't matter: `linux/userfaultfd.h` includes none of them.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether there is one: where `LIBCLANG_PATH` says, if it does, and otherwise in any of the usual places.
pub(crate) fn found() -> bool {
    if let Some(path) = env::var_os("LIBCLANG_PATH") {
        let path = Path::new(&path);
        return is_libclang(path) || holds_libclang(path);
    }
    let listed = ["LD_LIBRARY_PATH", "LIBRARY_PATH"].into_iter().filter_map(env::var_os);
    let listed = listed.flat_map(|list| env::split_paths(&list).collect::<Vec<_>>());
    let of_llvm = llvm_prefix().into_iter().flat_map(|prefix| ["bin", "lib", "lib64"].map(|name| prefix.join(name)));
    of_llvm.chain(listed).any(|directory| holds_libclang(&directory)) || in_system(Path::new("/"))
}

/// What `llvm-config` says, if there is one.
fn llvm_prefix() -> Option<PathBuf> {
    let program = env::var_os("LLVM_CONFIG_PATH").unwrap_or_else(|| OsString::from("llvm-config"));
    let output = Command::new(program).arg("--prefix").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let said = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    said.lines().next().map(PathBuf::from)
}

/// `/usr/lib*` and `/usr/local/lib*`, two levels deep, and `/usr/local/llvm*/lib*`, below `root`.
fn in_system(root: &Path) -> bool {
    let usr = root.join("usr");
    let local = usr.join("local");
    let libraries = named(&usr, "lib").into_iter().chain(named(&local, "lib"));
    let deep = libraries.flat_map(|top| {
        let below = named(&top, "");
        let deeper: Vec<PathBuf> = below.iter().flat_map(|directory| named(directory, "")).collect();
        [top].into_iter().chain(below).chain(deeper)
    });
    let of_llvm = named(&local, "llvm").into_iter().flat_map(|llvm| named(&llvm, "lib"));
    deep.chain(of_llvm).any(|directory| holds_libclang(&directory))
}

/// The directories in a directory whose names begin so.
fn named(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let wanted = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)));
    wanted.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn holds_libclang(directory: &Path) -> bool {
    fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| is_libclang(&entry.path()))
}

/// Whether it is a shared library of that name, for 64 bits. (A symlink may lead nowhere.)
fn is_libclang(path: &Path) -> bool {
    let mut start = [0; 5];
    path.file_name().and_then(|name| name.to_str()).is_some_and(is_its_name)
        && File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
        && start == *b"\x7fELF\x02"
}

fn is_its_name(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("libclang") else { return false };
    let Some((version, _)) = rest.split_once(".so") else { return false };
    version.is_empty()
        || version.starts_with('-') && version[1..].bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_libclang() {
        for name in ["libclang.so", "libclang-14.so.1", "libclang-14.so", "libclang.so.14.0.6"] {
            assert!(is_its_name(name), "{name}");
        }
        for name in ["libclang-cpp.so.14", "libclang.a", "libclang_rt.so", "clang.so"] {
            assert!(!is_its_name(name), "{name}");
        }
    }

    #[test]
    fn it_is_looked_for_where_the_build_looks() {
        for directory in [
            "usr/lib",
            "usr/lib64",
            "usr/lib/x86_64-linux-gnu",
            "usr/lib/llvm-19/lib",
            "usr/lib64/llvm/lib64",
            "usr/local/lib",
            "usr/local/lib/llvm/lib",
            "usr/local/llvm-19/lib64",
        ] {
            let root = tempfile::tempdir().unwrap();
            assert!(!in_system(root.path()));
            let directory = root.path().join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("libclang.so.1"), b"not a library").unwrap();
            std::os::unix::fs::symlink("gone", directory.join("libclang.so")).unwrap();
            assert!(!in_system(root.path()), "{}", directory.display());
            fs::write(directory.join("libclang-19.so.1"), b"\x7fELF\x02\x01").unwrap();
            assert!(in_system(root.path()), "{}", directory.display());
            assert!(is_libclang(&directory.join("libclang-19.so.1")));
        }
        let root = tempfile::tempdir().unwrap();
        let elsewhere = root.path().join("usr/share/llvm/lib");
        fs::create_dir_all(&elsewhere).unwrap();
        fs::write(elsewhere.join("libclang.so"), b"\x7fELF\x02\x01").unwrap();
        assert!(!in_system(root.path()));
    }
}
