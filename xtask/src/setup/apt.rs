//! The machine's own apt configuration (`sources.list(5)`): where it takes packages from, so that a further suite can
//! be taken from the same place, with the same key.

use std::fs;
use std::path::{Path, PathBuf};

/// One enabled source of binary packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A stanza of a `.sources` file: fields in order, continuation lines included in the value.
    Deb822(Vec<(String, String)>),
    /// A line of a `.list` file.
    OneLine {
        /// The text between the brackets, if there are any.
        options: Option<String>,
        uri: String,
        suite: String,
        components: Vec<String>,
    },
}

impl Entry {
    /// Whether packages of that suite's `main` come from here.
    pub(crate) fn offers_main_of(&self, suite: &str) -> bool {
        match self {
            Entry::Deb822(_) => {
                self.words("Suites").any(|word| word == suite) && self.words("Components").any(|word| word == "main")
            }
            Entry::OneLine { suite: own, components, .. } => {
                own == suite && components.iter().any(|name| name == "main")
            }
        }
    }

    /// The same place and key, for `main` of another suite: the file's extension and its text.
    pub(crate) fn for_suite(&self, suite: &str) -> (&'static str, String) {
        match self {
            Entry::Deb822(fields) => {
                let mut text = String::new();
                for (name, value) in fields {
                    let value = match name.to_ascii_lowercase().as_str() {
                        "types" => "deb",
                        "suites" => suite,
                        "components" => "main",
                        _ => value,
                    };
                    text += &format!("{name}: {value}\n");
                }
                ("sources", text)
            }
            Entry::OneLine { options, uri, .. } => {
                let options = options.as_ref().map(|options| format!("[{options}] ")).unwrap_or_default();
                ("list", format!("deb {options}{uri} {suite} main\n"))
            }
        }
    }

    fn field(&self, wanted: &str) -> Option<&str> {
        let Entry::Deb822(fields) = self else { return None };
        fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.as_str())
    }

    fn words(&self, field: &str) -> impl Iterator<Item = &str> {
        self.field(field).unwrap_or_default().split_ascii_whitespace()
    }
}

/// All enabled sources below `/etc/apt` (or what stands for it).
pub(crate) fn read_all(etc: &Path) -> Vec<Entry> {
    let mut files: Vec<PathBuf> = vec![etc.join("sources.list")];
    let parts = fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files.sort();
    let mut entries = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => entries.extend(parse_list(&text)),
            Some("sources") => entries.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    entries
}

fn parse_list(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '[']))?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (options, rest) = rest.split_once(']')?;
            (Some(options.trim().to_owned()), rest)
        }
        None => (None, rest),
    };
    let mut words = rest.split_ascii_whitespace().map(str::to_owned);
    Some(Entry::OneLine { options, uri: words.next()?, suite: words.next()?, components: words.collect() })
}

fn parse_deb822(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            let entry = Entry::Deb822(std::mem::take(&mut fields));
            let off = entry.field("Enabled").is_some_and(|value| matches!(value.trim(), "no" | "false" | "off" | "0"));
            let binary = entry.words("Types").any(|word| word == "deb");
            if binary && !off {
                entries.push(entry);
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "\
# a comment
Types: deb deb-src
# one inside
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://mirror.test/security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.test/debian
Suites: bookworm-backports
Components: main
";

    #[test]
    fn stanzas_are_parsed() {
        let entries = parse_deb822(SOURCES);
        assert_eq!(entries.len(), 2);
        assert!(entries[0].offers_main_of("bookworm") && entries[0].offers_main_of("bookworm-updates"));
        assert!(!entries[0].offers_main_of("bookworm-backports"));
        let (kind, text) = entries[0].for_suite("bookworm-backports");
        assert_eq!(kind, "sources");
        assert_eq!(
            text,
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/some.gpg\n"
        );
        assert!(parse_deb822(&text)[0].offers_main_of("bookworm-backports"));
        let (_, text) = entries[1].for_suite("other");
        assert!(text.contains("\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"), "{text}");
        assert_eq!(parse_deb822(&text).len(), 1);
    }

    #[test]
    fn one_line_entries_are_parsed() {
        let entries = parse_list(
            "# deb http://commented.test/debian bookworm main\n\
             deb-src http://mirror.test/debian bookworm main\n\
             deb [signed-by=/usr/share/keyrings/some.gpg arch=amd64] http://mirror.test/debian bookworm main contrib # end\n\
             deb\thttp://mirror.test/debian bookworm-updates main\n\
             deb\n",
        );
        assert_eq!(entries.len(), 2);
        assert!(entries[0].offers_main_of("bookworm") && !entries[0].offers_main_of("bookworm-updates"));
        assert_eq!(
            entries[0].for_suite("bookworm-backports"),
            (
                "list",
                "deb [signed-by=/usr/share/keyrings/some.gpg arch=amd64] http://mirror.test/debian bookworm-backports main\n".into()
            )
        );
        assert_eq!(entries[1].for_suite("x").1, "deb http://mirror.test/debian x main\n");
    }

    #[test]
    fn both_kinds_of_file_are_read() {
        let etc = tempfile::tempdir().unwrap();
        fs::create_dir(etc.path().join("sources.list.d")).unwrap();
        fs::write(etc.path().join("sources.list"), "deb http://a.test/debian sid main\n").unwrap();
        fs::write(etc.path().join("sources.list.d/debian.sources"), SOURCES).unwrap();
        fs::write(etc.path().join("sources.list.d/other.list.disabled"), "deb http://b.test/debian sid main\n")
            .unwrap();
        assert_eq!(read_all(etc.path()).len(), 3);
        assert_eq!(read_all(Path::new("/nonexistent")), []);
    }
}
