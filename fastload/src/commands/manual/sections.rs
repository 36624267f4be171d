//! What stands in the man pages and is too long for `--help`.

/// A section of one page, or of all.
pub(super) struct Section {
    pub(super) page: Option<&'static str>,
    pub(super) title: &'static str,
    /// Paragraphs, with an empty line between them.
    pub(super) text: &'static str,
}

const fn section(page: Option<&'static str>, title: &'static str, text: &'static str) -> Section {
    Section { page, title, text }
}

pub(super) const ALL: &[Section] = &[
    section(
        Some("fastload-load"),
        "RECOVERY",
        "If fastload load is killed after the guest was started, the guest waits for the pages that it misses, until the \
         same command is given again with --recover. That works although a guest that waits may hold up QEMU's main \
         thread, and its monitor with it: a second process of this program stands by meanwhile, and a note \
         (.fastload-*.json) lies next to the QMP socket.

If both were killed, it depends on the guest whether QEMU hears anybody. --recover says within seconds that it does not, and \
         who could help.",
    ),
    section(
        Some("fastload-load"),
        "SCRIPTS",
        "--check-only compares machine type, RAM, processors, devices and disks with the QEMU and changes nothing. \
         --timeout says how long QEMU may take to answer one command. It does not limit how long the pages take.",
    ),
    section(
        Some("fastload-capture"),
        "WHEN IT IS KILLED",
        "If fastload capture is killed by SIGKILL, the guest goes on, and no file is left behind. QEMU's capability \
         background-snapshot stays on until the next capture of it through the same QMP socket. The capability events, \
         which does no harm, stays on.",
    ),
    section(
        Some("fastload-convert"),
        "DIFFS AND HOLES",
        "A hole in a full memory file is zero memory. A hole in a diff, such as Firecracker's Diff snapshot, means that \
         the page did not change since the snapshot before. The file does not say which of the two it is. So convert \
         looks at the template: if that has content where the memory file has a hole, the file is refused.

With --base the missing pages are taken from the memory that the file is a diff of. Give the option several times for a \
         chain of diffs, the oldest first. With --holes-are-zero the holes are taken for what they are in a full file.

A diff that was copied by a program that fills holes with zeros can't be told from a full file. Copy diffs with \
         cp --sparse=auto, rsync --sparse or tar --sparse.",
    ),
    section(
        Some("fastload-check"),
        "WHAT --host CAN TELL",
        "A snapshot that was taken with the library vmm-glue has the whole state of its virtual processors in it. All \
         that the state needs is compared with what this host's processor and its KVM offer: each CPUID bit, each \
         model-specific register, each component of the extended state, the frequency of the time stamp counter.

A file that QEMU saved has no CPUID in it, since QEMU's command line says what processor there is. What can be told is \
         whether the QEMU that --qemu names knows the machine type and the virtio devices, whether KVM is there if it is \
         needed, and whether this host's processor has the features whose registers are in the file.",
    ),
    section(
        Some("fastload-view"),
        "READING THE MAP",
        "Each character stands for the same number of pages, which is said above the map. A dot is zero memory, which \
         the file does not store. Four shades tell how many of the pages are stored. An exclamation mark says that the \
         file has bytes for a page that is not marked as stored: they are stale, and no loader reads them. fastload \
         convert leaves them behind.",
    ),
    section(
        None,
        "EXIT STATUS",
        "0 if all was done, 1 if it failed (one line on standard error says why), 2 if the command line was wrong.",
    ),
    section(
        None,
        "ENVIRONMENT",
        "RUST_LOG chooses by module what is said on standard error, as in RUST_LOG=page_files=debug.

NO_COLOR, if it is set and not empty, switches colours off.",
    ),
    section(
        None,
        "JSON",
        "With --json every line of standard output is a JSON object with the fields schema (1), command, event and at_us \
         (microseconds since the program began). The last one is the event complete, or the event error with a message and the exit \
         code. A path that is not UTF-8 has its bytes in a second field whose name ends in _hex. The file \
         docs/json.md of the source describes every field, and docs/fastload-1.schema.json is a JSON Schema of them.",
    ),
];
