//! What `cargo metadata` tells about the members of the workspace.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::run::{Done, cargo, show, succeeded};

/// A member of the workspace.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    version: String,
    /// Where its `Cargo.toml` is.
    pub(crate) directory: PathBuf,
    /// Whether it is going to a registry.
    pub(crate) published: bool,
    pub(crate) dependencies: Vec<Dependency>,
    manifest: Value,
}

/// What a member depends on.
#[derive(Debug)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// Whether only tests, examples and benchmarks need it.
    pub(crate) for_tests: bool,
}

impl Member {
    /// The name of its package, and of the directory in it.
    pub(crate) fn package(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Whether a field of `[package]` has something in it.
    pub(super) fn has(&self, field: &str) -> bool {
        match &self.manifest[field] {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        }
    }
}

/// Reads the members, without a network.
///
/// # Errors
/// If cargo refuses a manifest.
pub(crate) fn members(root: &Path) -> Done<Vec<Member>> {
    let mut command = cargo("metadata");
    command.args(["--no-deps", "--offline", "--format-version", "1"]).current_dir(root);
    let output = command.output().map_err(|error| format!("{}: {error}", show(&command)))?;
    if let Err(error) = succeeded(&command, output.status) {
        return Err(format!("{error}: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata names no packages")?;
    packages.iter().map(member).collect()
}

/// One entry of `packages`.
fn member(package: &Value) -> Done<Member> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = text(&package["name"]);
    let version = text(&package["version"]);
    let manifest = PathBuf::from(text(&package["manifest_path"]));
    let directory = manifest.parent().ok_or_else(|| format!("{name}: no manifest"))?.to_owned();
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    let dependencies = dependencies.map(|dependency| Dependency {
        name: text(&dependency["name"]),
        for_tests: dependency["kind"].as_str() == Some("dev"),
    });
    // `publish = false` is an empty list of registries.
    let published = package["publish"].as_array().is_none_or(|registries| !registries.is_empty());
    Ok(Member { name, version, directory, published, dependencies: dependencies.collect(), manifest: package.clone() })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A member with normal dependencies, and with some for tests alone.
    pub(crate) fn example(name: &str, normal: &[&str], for_tests: &[&str]) -> Member {
        let kind = |names: &[&str], for_tests| {
            names.iter().map(move |name| Dependency { name: (*name).into(), for_tests }).collect::<Vec<_>>()
        };
        let dependencies = kind(normal, false).into_iter().chain(kind(for_tests, true)).collect();
        let directory = PathBuf::from("/nonexistent");
        Member {
            name: name.into(),
            version: "0.1.0".into(),
            directory,
            published: true,
            dependencies,
            manifest: Value::Null,
        }
    }

    #[test]
    fn an_entry_of_cargo_is_understood() {
        let package = serde_json::json!({
            "name": "a", "manifest_path": "/x/a/Cargo.toml", "publish": [], "keywords": [], "license": "MIT",
            "dependencies": [{"name": "b", "kind": null}, {"name": "c", "kind": "dev"}],
        });
        let member = member(&package).unwrap();
        assert_eq!((member.name.as_str(), member.directory.as_path()), ("a", Path::new("/x/a")));
        assert!(!member.published && member.has("license") && !member.has("keywords") && !member.has("readme"));
        let for_tests: Vec<_> = member.dependencies.iter().map(|d| (d.name.as_str(), d.for_tests)).collect();
        assert_eq!(for_tests, [("b", false), ("c", true)]);
    }
}
