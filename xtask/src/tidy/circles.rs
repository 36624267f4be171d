//! The arrows between the modules of `uffd-engine`: downwards only, and no circle of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::run::Done;

/// The layers, from the bottom up. A file may use those of its own layer and of lower ones; `load` and `freeze` do not
/// use each other. Files that are not named here are the public face, on top.
const LAYERS: [&[&str]; 5] =
    [&["error", "options", "pause", "stats", "sys"], &["memory"], &["serve"], &["load", "freeze"], &[]];

/// The rules that the engine breaks, each as a line.
///
/// # Errors
/// If its files can't be read.
pub(crate) fn check(root: &Path) -> Done<Vec<String>> {
    let source = root.join("uffd-engine/src");
    let mut files = BTreeMap::new();
    read(&source, &source, &mut files)?;
    Ok(problems(&files))
}

/// Reads all modules below a directory, by their path: `["memory", "gate"]`.
fn read(source: &Path, directory: &Path, files: &mut BTreeMap<Vec<String>, String>) -> Done {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            read(source, &path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.insert(module(path.strip_prefix(source)?), fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// The module of a file, relative to `src`.
fn module(file: &Path) -> Vec<String> {
    let mut path: PathBuf = file.with_extension("");
    if path.ends_with("mod") || path.ends_with("lib") {
        path.pop();
    }
    path.iter().map(|part| part.to_string_lossy().into_owned()).collect()
}

fn problems(files: &BTreeMap<Vec<String>, String>) -> Vec<String> {
    let uses: BTreeMap<&Vec<String>, BTreeSet<&Vec<String>>> =
        files.iter().map(|(module, text)| (module, used(files, module, text))).collect();
    let mut problems = Vec::new();
    for (&from, to) in uses.iter().filter(|(from, _)| !from.is_empty()) {
        for &to in to {
            let (above, below) = (layer(from), layer(to));
            let side = above == below && from.first() != to.first() && LAYERS[above].len() > 1 && above > 0;
            if above < below || side {
                problems.push(format!("uffd-engine: {} uses {}, which is not below it", name(from), name(to)));
            }
        }
    }
    // What is left when modules that use nothing more are taken away again and again is in a circle, or uses one; what is
    // left of that when modules that nothing more uses are taken away is in a circle, or between two.
    let mut left = uses;
    loop {
        let before = left.len();
        let modules: BTreeSet<_> = left.keys().copied().collect();
        left.retain(|_, to| to.iter().any(|to| modules.contains(to)));
        let used: BTreeSet<_> = left.values().flatten().copied().collect();
        left.retain(|from, _| used.contains(from));
        if left.len() == before {
            break;
        }
    }
    if !left.is_empty() {
        let names: Vec<_> = left.keys().map(|module| name(module)).collect();
        problems.push(format!("uffd-engine: a circle of modules: {}", names.join(", ")));
    }
    problems
}

fn name(module: &[String]) -> String {
    if module.is_empty() { "lib".into() } else { module.join("::") }
}

fn layer(module: &[String]) -> usize {
    let is_in = |layer: &&[&str]| module.first().is_some_and(|first| layer.contains(&first.as_str()));
    LAYERS.iter().position(is_in).unwrap_or(LAYERS.len() - 1)
}

/// The modules of which a file uses something, where it is defined: not in tests, comments or re-exports.
fn used<'a>(files: &'a BTreeMap<Vec<String>, String>, module: &[String], text: &str) -> BTreeSet<&'a Vec<String>> {
    paths(text)
        .filter_map(|path| {
            let path = absolute(module, &path)?;
            defined(files, &path)
        })
        .filter(|to| *to != module)
        .collect()
}

/// Each path of a `use`, and each path in the code that begins with `crate` or `super`.
fn paths(text: &str) -> impl Iterator<Item = Vec<String>> {
    let code: Vec<&str> = text
        .lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .map(|line| line.split("//").next().unwrap_or_default().trim())
        .filter(|line| !line.starts_with("pub(crate) use ") && !line.starts_with("pub use "))
        .collect();
    let code = code.join(" ");
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == ':')) {
                tree(&code[at..], &[], &mut found);
            }
        }
    }
    found.into_iter()
}

/// A path, or a tree of them, at the beginning of some code.
fn tree<'a>(code: &'a str, before: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = before.to_vec();
    let mut rest = code.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            rest = group;
            while !rest.trim_start().starts_with('}') && !rest.is_empty() {
                let after = tree(rest, &path, found).trim_start();
                let after = after.split_once([',', '}']).map_or("", |(alias, _)| &after[alias.len()..]);
                rest = after.strip_prefix(',').unwrap_or(after);
            }
            return rest.trim_start().strip_prefix('}').unwrap_or_default();
        }
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        path.push(rest[..end].to_owned());
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(after) if after.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '{') => rest = after,
            _ => break,
        }
    }
    found.push(path);
    rest
}

fn absolute(module: &[String], path: &[String]) -> Option<Vec<String>> {
    let ups = path.iter().take_while(|part| *part == "super").count();
    let mut whole = match path.first()?.as_str() {
        "crate" => Vec::new(),
        _ => module[..module.len().checked_sub(ups)?].to_vec(),
    };
    whole.extend(path.iter().filter(|part| !matches!(part.as_str(), "crate" | "super" | "self")).cloned());
    Some(whole)
}

/// The module that defines what a path names: through re-exports, if it is one.
fn defined<'a>(files: &'a BTreeMap<Vec<String>, String>, path: &[String]) -> Option<&'a Vec<String>> {
    let (module, text) = (0..=path.len()).rev().find_map(|len| files.get_key_value(&path[..len]))?;
    let Some(item) = path.get(module.len()) else { return Some(module) };
    let exported = |line: &str| {
        let line = line.trim();
        let list = line.strip_prefix("pub use ").or_else(|| line.strip_prefix("pub(crate) use "))?;
        let mut found = Vec::new();
        tree(list, &[], &mut found);
        found.into_iter().find(|path| path.last() == Some(item))
    };
    match text.lines().find_map(exported) {
        Some(inner) => {
            let inner: Vec<String> = inner.into_iter().filter(|part| part != "crate").collect();
            defined(files, &[module.as_slice(), &inner].concat())
        }
        None => Some(module),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(files: &[(&str, &str)]) -> Vec<String> {
        let files = files.iter().map(|(path, text)| (module(Path::new(path)), (*text).to_owned())).collect();
        problems(&files)
    }

    #[test]
    fn an_arrow_upwards_is_found_also_through_a_re_export() {
        let found = engine(&[
            ("lib.rs", "pub use engine::Engine;"),
            ("engine.rs", "use crate::memory::Memory;"),
            ("memory/mod.rs", "pub(crate) mod memory;\npub(crate) use memory::Memory;"),
            ("memory/memory.rs", "use crate::{\n    Engine, EngineError};"),
            ("error.rs", ""),
        ]);
        assert!(found.iter().any(|line| line.contains("memory::memory uses engine")), "{found:?}");
        assert!(found.iter().any(|line| line.contains("a circle of modules: engine, memory::memory")), "{found:?}");
    }

    #[test]
    fn a_circle_of_files_in_one_layer_is_found() {
        let found = engine(&[
            ("memory/mod.rs", "pub(crate) use a::A;"),
            ("memory/a.rs", "use super::b::B;"),
            ("memory/b.rs", "fn f(a: &super::A) {}"),
            ("memory/c.rs", "use super::{a::A, b::B};"),
        ]);
        assert_eq!(found, ["uffd-engine: a circle of modules: memory::a, memory::b"]);
    }

    #[test]
    fn load_and_freeze_do_not_meet() {
        let found = engine(&[("load/a.rs", "use crate::freeze::b::B;"), ("freeze/b.rs", "")]);
        assert_eq!(found, ["uffd-engine: load::a uses freeze::b, which is not below it"]);
        assert!(engine(&[("freeze/b.rs", "// use crate::load::a::A;"), ("load/a.rs", "")]).is_empty());
    }

    #[test]
    fn what_tests_use_is_no_arrow() {
        assert!(
            engine(&[("sys/a.rs", "#[cfg(test)]\nmod tests { use crate::memory::B; }"), ("memory.rs", "")]).is_empty()
        );
    }
}
