//! Which Debian this is.

/// What `/etc/os-release` says (`os-release(5)`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OsRelease {
    /// Lower-case name, such as `debian`.
    pub(crate) id: String,
    /// Such as `bookworm`; empty where there is none.
    pub(crate) codename: String,
    /// Such as 12; none for testing and unstable.
    pub(crate) version: Option<u32>,
}

impl OsRelease {
    /// Reads the file's text.
    pub(crate) fn parse(text: &str) -> OsRelease {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
            Some(line.trim_matches(['"', '\'']).to_owned())
        };
        OsRelease {
            id: value("ID").unwrap_or_default(),
            codename: value("VERSION_CODENAME").unwrap_or_default(),
            version: value("VERSION_ID").and_then(|version| version.parse().ok()),
        }
    }

    /// Whether it is Debian itself.
    pub(crate) fn is_debian(&self) -> bool {
        self.id == "debian"
    }

    /// Whether its own suite has QEMU 10: since Debian 13. Debian 12 has 7.2, and 10 in its backports.
    pub(crate) fn has_own_qemu(&self) -> bool {
        self.version.is_none_or(|version| version >= 13)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_recognised() {
        let text =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let release = OsRelease::parse(text);
        assert_eq!(release, OsRelease { id: "debian".into(), codename: "bookworm".into(), version: Some(12) });
        assert!(release.is_debian() && !release.has_own_qemu());
        assert!(OsRelease::parse("ID=debian\nVERSION_CODENAME=forky\n").has_own_qemu());
        assert!(OsRelease::parse("ID=debian\nVERSION_ID=13\n").has_own_qemu());
        assert!(!OsRelease::parse("ID=fedora\nVERSION_ID=42\n").is_debian());
        assert_eq!(OsRelease::parse(""), OsRelease::default());
    }
}
