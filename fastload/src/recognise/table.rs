//! Every format that is told by its bytes, in the order in which they are tried.

use super::{Sight, qcow2};
use crate::commands::serving::quoted;

/// One format.
#[derive(Debug)]
pub(super) struct Entry {
    /// What it is, with its article.
    what: &'static str,
    mark: Mark,
    help: Help,
}

/// How a format is told.
#[derive(Debug)]
enum Mark {
    /// These bytes at this offset.
    At(usize, &'static [u8]),
    /// One of these.
    Any(&'static [(usize, &'static [u8])]),
    /// These bytes at the beginning of the last sector.
    Footer(&'static [u8]),
    /// In another way.
    Test(fn(&Sight<'_>) -> bool),
}

/// What helps.
#[derive(Clone, Copy, Debug)]
enum Help {
    /// A program that makes the file inside.
    Unpack(&'static str),
    /// It has no memory in it.
    Disk,
    /// It may have memory in it.
    Qcow2,
    /// Memory without the devices.
    Core,
    /// A snapshot that another hypervisor loads.
    Foreign(&'static str),
    /// One file of several; this one has no memory.
    Firecracker,
    /// The same of Cloud Hypervisor.
    CloudHypervisor,
    /// A program for people who look into it.
    Nothing,
}

const fn entry(what: &'static str, mark: Mark, help: Help) -> Entry {
    Entry { what, mark, help }
}

/// The table. Sources: each format's own document, `file(1)`, and for disks QEMU's `block/*.c`.
pub(super) static TABLE: &[Entry] = &[
    // Compressed files.
    entry("a file compressed with zstd", Mark::At(0, b"\x28\xb5\x2f\xfd"), Help::Unpack("zstd -d")),
    entry("a file compressed with gzip", Mark::At(0, b"\x1f\x8b"), Help::Unpack("gzip -dk")),
    entry("a file compressed with xz", Mark::At(0, b"\xfd7zXZ\0"), Help::Unpack("xz -dk")),
    entry("a file compressed with bzip2", Mark::Test(bzip2), Help::Unpack("bzip2 -dk")),
    entry("a file compressed with lz4", Mark::At(0, b"\x04\x22\x4d\x18"), Help::Unpack("lz4 -dm")),
    entry("a file compressed with lzop", Mark::At(0, b"\x89LZO\0\r\n\x1a\n"), Help::Unpack("lzop -d")),
    entry("a file compressed with lzip", Mark::At(0, b"LZIP"), Help::Unpack("lzip -dk")),
    entry("a zip archive", Mark::At(0, b"PK\x03\x04"), Help::Unpack("unzip")),
    entry("a 7z archive", Mark::At(0, b"7z\xbc\xaf\x27\x1c"), Help::Unpack("7z x")),
    entry("a tar archive", Mark::At(257, b"ustar"), Help::Unpack("tar xSf")),
    // Disk images.
    entry("a qcow2 disk image", Mark::At(0, b"QFI\xfb"), Help::Qcow2),
    entry("a VMDK disk image", Mark::Any(&[(0, b"KDMV"), (0, b"COWD"), (0, b"# Disk DescriptorFile")]), Help::Disk),
    entry("a VDI disk image", Mark::At(64, b"\x7f\x10\xda\xbe"), Help::Disk),
    entry("a VHDX disk image", Mark::At(0, b"vhdxfile"), Help::Disk),
    entry("a VHD disk image", Mark::At(0, b"conectix"), Help::Disk),
    entry("a VHD disk image", Mark::Footer(b"conectix"), Help::Disk),
    entry("a QED disk image", Mark::At(0, b"QED\0"), Help::Disk),
    entry("a Parallels disk image", Mark::Any(&[(0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")]), Help::Disk),
    entry("an encrypted disk (LUKS)", Mark::At(0, b"LUKS\xba\xbe"), Help::Disk),
    // Memory dumps.
    entry("an ELF core (QEMU's dump-guest-memory, virsh dump --memory-only)", Mark::Test(elf_core), Help::Core),
    entry("an ELF program (a kernel, perhaps)", Mark::At(0, b"\x7fELF"), Help::Nothing),
    entry(
        "a kdump core (QEMU's dump-guest-memory with compression)",
        Mark::Any(&[(0, b"KDUMP   "), (0, b"makedumpfile")]),
        Help::Core,
    ),
    entry("a crash dump for Windows' debugger", Mark::Any(&[(0, b"PAGEDUMP"), (0, b"PAGEDU64")]), Help::Core),
    // Other hypervisors.
    entry("the VM state of a Firecracker snapshot", Mark::Test(firecracker), Help::Firecracker),
    entry("the device state of a Cloud Hypervisor snapshot", Mark::Test(cloud_state), Help::CloudHypervisor),
    entry("the VM configuration of Cloud Hypervisor", Mark::Test(cloud_config), Help::CloudHypervisor),
    entry("a saved state of VirtualBox", Mark::At(0, b"\x7fVirtualBox SavedState V"), Help::Foreign("VirtualBox")),
    entry(
        "a suspended VM of VMware",
        Mark::Any(&[(0, b"\xd0\xbe\xd2\xbe"), (0, b"\xd1\xba\xd1\xba"), (0, b"\xd2\xbe\xd2\xbe")]),
        Help::Foreign("VMware"),
    ),
    entry(
        "a saved domain of Xen",
        Mark::Any(&[(0, b"Xen saved domain"), (0, b"LinuxGuestRecord"), (0, b"LibxlFmt")]),
        Help::Foreign("Xen"),
    ),
    // File systems and raw disks, last: their marks are short, or far in.
    entry("a raw disk image (with a GPT)", Mark::Any(&[(512, b"EFI PART"), (4096, b"EFI PART")]), Help::Disk),
    entry("a CD image (ISO 9660)", Mark::At(32769, b"CD001"), Help::Disk),
    entry("a file system image (XFS)", Mark::At(0, b"XFSB"), Help::Disk),
    entry("a file system image (Btrfs)", Mark::At(65600, b"_BHRfS_M"), Help::Disk),
    entry("a file system image (SquashFS)", Mark::At(0, b"hsqs"), Help::Disk),
    entry("a file system image (ext2, ext3 or ext4)", Mark::Test(ext), Help::Disk),
    entry("a raw disk image (with an MBR)", Mark::Test(boot_record), Help::Disk),
];

impl Entry {
    pub(super) fn fits(&self, sight: &Sight<'_>) -> bool {
        let there = |(at, bytes): &(usize, &[u8])| sight.head.get(*at..).is_some_and(|head| head.starts_with(bytes));
        match self.mark {
            Mark::At(at, bytes) => there(&(at, bytes)),
            Mark::Any(marks) => marks.iter().any(there),
            Mark::Footer(bytes) => sight.size.is_multiple_of(512) && sight.tail.starts_with(bytes),
            Mark::Test(test) => test(sight),
        }
    }

    pub(super) fn text(&self, sight: &Sight<'_>) -> String {
        const CAPTURE: &str = "a snapshot of a running VM is taken with: fastload capture --qmp SOCKET OUT";
        let (what, file) = (self.what, quoted(sight.path));
        match self.help {
            Help::Unpack(with) => format!("{what}; unpack it first: {with} {file}"),
            Help::Disk => format!("{what}, and has no memory in it; {CAPTURE}"),
            Help::Qcow2 => qcow2_text(what, sight, CAPTURE),
            Help::Core => {
                format!("{what}: memory without device state, for crash and gdb; no VM starts from it; {CAPTURE}")
            }
            Help::Foreign(who) => format!("{what}: only {who} can load it"),
            Help::Firecracker => format!(
                "{what}: only Firecracker can load it (PUT /snapshot/load), and it has no memory in it; the memory \
                 file next to it is flat: fastload convert MEMORY OUT --template SNAPSHOT"
            ),
            Help::CloudHypervisor => format!(
                "{what}: only Cloud Hypervisor can load it (--restore), and it has no memory in it; memory-ranges \
                 next to it is flat: fastload convert memory-ranges OUT --template SNAPSHOT"
            ),
            Help::Nothing => format!("{what}, and no snapshot; {CAPTURE}"),
        }
    }
}

fn qcow2_text(what: &str, sight: &Sight<'_>, capture: &str) -> String {
    let (count, names) = qcow2::snapshots(sight.head, sight.states);
    if count == 0 {
        return format!("{what}, and has no memory in it; {capture}");
    }
    let name = names.first().map_or_else(|| "NAME".to_owned(), |name| quoted(name.as_ref()));
    let listed = if names.is_empty() { String::new() } else { format!(": {}", names.join(", ")) };
    format!(
        "{what} with {count} internal snapshot{} (savevm){listed}; start QEMU with it and -loadvm {name}, then: \
         fastload capture --qmp SOCKET OUT",
        if count == 1 { "" } else { "s" }
    )
}

/// `BZh`, a digit, and the mark of the first block or of the end.
fn bzip2(sight: &Sight<'_>) -> bool {
    let rest = sight.head.strip_prefix(b"BZh").and_then(<[u8]>::split_first);
    rest.is_some_and(|(level, rest)| {
        level.is_ascii_digit() && (rest.starts_with(b"1AY&SY") || rest.starts_with(b"\x17\x72\x45\x38\x50\x90"))
    })
}

/// `e_type` is `ET_CORE`, in the file's own byte order.
fn elf_core(sight: &Sight<'_>) -> bool {
    let head = sight.head;
    head.starts_with(b"\x7fELF")
        && match head.get(5) {
            Some(2) => head.get(16..18) == Some(&[0, 4]),
            _ => head.get(16..18) == Some(&[4, 0]),
        }
}

/// Firecracker `src/vmm/src/snapshot/mod.rs`: the magic number 0x0710_1984_8664_0000 (x86_64) or ..AAAA_0000 (aarch64),
/// little-endian, in the first field; what is in front of it depends on the encoding. The file is 10 MiB at most.
fn firecracker(sight: &Sight<'_>) -> bool {
    let start = sight.head.get(..64).unwrap_or(sight.head);
    let magic = |window: &[u8]| {
        window.ends_with(b"\x84\x19\x10\x07") && (window.starts_with(b"\x64\x86") || window.starts_with(b"\xaa\xaa"))
    };
    sight.size <= 10 << 20 && start.windows(6).any(magic)
}

/// Cloud Hypervisor `vm-migration/src/lib.rs`, `Snapshot`.
fn cloud_state(sight: &Sight<'_>) -> bool {
    is_json(sight) && has(sight, b"\"snapshots\"") && has(sight, b"\"snapshot_data\"")
}

/// Cloud Hypervisor `vmm/src/vm_config.rs`, `VmConfig`.
fn cloud_config(sight: &Sight<'_>) -> bool {
    is_json(sight) && has(sight, b"\"cpus\"") && has(sight, b"\"memory\"") && has(sight, b"\"payload\"")
}

fn is_json(sight: &Sight<'_>) -> bool {
    sight.head.trim_ascii_start().starts_with(b"{")
}

fn has(sight: &Sight<'_>, text: &[u8]) -> bool {
    sight.head.windows(text.len()).any(|window| window == text)
}

/// The superblock's magic number, and a block size that exists.
fn ext(sight: &Sight<'_>) -> bool {
    let block = sight.head.get(1048..1052);
    sight.head.get(1080..1082) == Some(b"\x53\xef") && block.is_some_and(|block| block[0] <= 6 && block[1..] == [0; 3])
}

/// A boot sector with a partition table: the mark at its end, and in each entry a flag that exists.
fn boot_record(sight: &Sight<'_>) -> bool {
    let Some(table) = sight.head.get(446..510) else { return false };
    let mut partitions = table.chunks_exact(16);
    sight.size.is_multiple_of(512)
        && sight.head.get(510..512) == Some(b"\x55\xaa")
        && partitions.all(|partition| partition[0] & 0x7f == 0)
        && table.chunks_exact(16).any(|partition| partition[4] != 0)
}

#[cfg(test)]
impl Entry {
    /// Writes the format's mark, so far as it consists of bytes.
    pub(super) fn stamp(&self, head: &mut [u8]) {
        let mut put = |(at, bytes): &(usize, &[u8])| head[*at..at + bytes.len()].copy_from_slice(bytes);
        match self.mark {
            Mark::At(at, bytes) => put(&(at, bytes)),
            Mark::Any(marks) => marks.iter().for_each(put),
            Mark::Footer(_) | Mark::Test(_) => put(&(0, b"\x7fELF\x02\x01\x01")),
        }
    }
}
