use proptest::prelude::*;

use super::*;

fn look(head: &[u8], size: u64) -> Known {
    let tail = &head[head.len().saturating_sub(TAIL)..];
    let at = qcow2::states_at(head).and_then(|at| usize::try_from(at).ok());
    let states = at.and_then(|at| head.get(at..)).unwrap_or_default();
    seen(&Sight { head, tail, states, size, path: Path::new("it's") })
}

/// A file that begins so.
fn of(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; parts.iter().map(|(at, part)| at + part.len()).max().unwrap_or(0).next_multiple_of(512)];
    for (at, part) in parts {
        bytes[*at..at + part.len()].copy_from_slice(part);
    }
    bytes
}

fn other(parts: &[(usize, &[u8])]) -> String {
    let bytes = of(parts);
    match look(&bytes, bytes.len() as u64) {
        Known::Other(what) => what,
        known => panic!("{known:?}"),
    }
}

fn libvirt(magic: &[u8; 16], words: [u32; 5]) -> Vec<u8> {
    let mut header = magic.to_vec();
    header.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    header.resize(libvirt::LENGTH, 0);
    header
}

/// The marks as they stand in each format's own document, made byte by byte.
#[test]
fn every_format_is_named_with_what_helps() {
    type Parts = &'static [(usize, &'static [u8])];
    let cases: &[(Parts, &str, &str)] = &[
        (&[(0, b"\x28\xb5\x2f\xfd\x04")], "compressed with zstd", "zstd -d 'it'\\''s'"),
        (&[(0, b"\x1f\x8b\x08")], "compressed with gzip", "gzip -dk"),
        (&[(0, b"\xfd7zXZ\0\0\x04")], "compressed with xz", "xz -dk"),
        (&[(0, b"BZh91AY&SY")], "compressed with bzip2", "bzip2 -dk"),
        (&[(0, b"\x04\x22\x4d\x18")], "compressed with lz4", "lz4 -dm"),
        (&[(0, b"PK\x03\x04")], "zip archive", "unzip"),
        (&[(0, b"vm.snap"), (257, b"ustar")], "tar archive", "tar xSf"),
        (&[(0, b"QFI\xfb\0\0\0\x03")], "a qcow2 disk image, and has no memory", "fastload capture"),
        (&[(0, b"KDMV\x01")], "VMDK", "fastload capture"),
        (&[(0, b"# Disk DescriptorFile\n")], "VMDK", "fastload capture"),
        (&[(0, b"<<< QEMU VM"), (64, b"\x7f\x10\xda\xbe")], "VDI", "fastload capture"),
        (&[(0, b"vhdxfile")], "VHDX", "fastload capture"),
        (&[(0, b"conectix")], "VHD", "fastload capture"),
        (&[(2048, b"conectix")], "VHD", "fastload capture"),
        (&[(0, b"QED\0")], "QED", "fastload capture"),
        (&[(0, b"LUKS\xba\xbe")], "LUKS", "fastload capture"),
        (&[(510, b"\x55\xaa"), (512, b"EFI PART")], "GPT", "fastload capture"),
        (&[(446, b"\x80\0\0\0\x83"), (510, b"\x55\xaa")], "MBR", "fastload capture"),
        (&[(1080, b"\x53\xef"), (1048, b"\x02\0\0\0")], "ext4", "fastload capture"),
        (&[(0, b"XFSB")], "XFS", "fastload capture"),
        (&[(32769, b"CD001")], "CD image", "fastload capture"),
        (&[(0, b"\x7fELF\x02\x01\x01"), (16, b"\x04\0")], "ELF core", "fastload capture"),
        (&[(0, b"\x7fELF\x02\x02\x01"), (16, b"\0\x04")], "ELF core", "fastload capture"),
        (&[(0, b"\x7fELF\x02\x01\x01"), (16, b"\x02\0")], "ELF program", "fastload capture"),
        (&[(0, b"KDUMP   ")], "kdump", "fastload capture"),
        (&[(0, b"\0\0\x64\x86\x84\x19\x10\x07")], "Firecracker", "fastload convert MEMORY OUT --template"),
        (&[(0, b"\x01\0\0\xaa\xaa\x84\x19\x10\x07")], "Firecracker", "PUT /snapshot/load"),
        (&[(0, b"{\"id\":\"vm\",\"snapshots\":{},\"snapshot_data\":{}}")], "Cloud Hypervisor", "memory-ranges"),
        (&[(0, b"{\"cpus\":{},\"memory\":{},\"payload\":{}}")], "Cloud Hypervisor", "--restore"),
        (&[(0, b"\x7fVirtualBox SavedState V2.0\n")], "VirtualBox", "only VirtualBox"),
        (&[(0, b"\xd2\xbe\xd2\xbe")], "VMware", "only VMware"),
        (&[(0, b"LibxlFmt")], "Xen", "only Xen"),
    ];
    for (parts, what, help) in cases {
        let said = other(parts);
        assert!(said.contains(what) && said.contains(help), "{what}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
    assert!(matches!(look(&[], 0), Known::Other(what) if what.contains("empty")));
    let none: [&[(usize, &[u8])]; 3] = [&[(0, b"QEVM\0\0\0\x03")], &[(4096, b"x")], &[(510, b"\x55\xaa")]];
    for none in none {
        let bytes = of(none);
        assert_eq!(look(&bytes, bytes.len() as u64), Known::Perhaps, "{none:?}");
    }
}

#[test]
fn saved_states_inside_a_qcow2_image_are_named() {
    let mut entry = vec![0; 40];
    entry[12..14].copy_from_slice(&1u16.to_be_bytes());
    entry[14..16].copy_from_slice(&6u16.to_be_bytes());
    entry[32..36].copy_from_slice(&4096u32.to_be_bytes());
    entry[36..40].copy_from_slice(&16u32.to_be_bytes());
    entry.extend([0; 16]);
    entry.extend(b"1one 's");
    entry.push(0);
    let mut second = entry.clone();
    second[32..36].fill(0);
    let (count, at) = (2u32.to_be_bytes(), 65536u64.to_be_bytes());
    let table = [entry.as_slice(), &second].concat();
    let said = other(&[(0, b"QFI\xfb\0\0\0\x03"), (60, &count), (64, &at), (65536, &table)]);
    assert!(said.contains("with 2 internal snapshots (savevm): one 's;"), "{said}");
    assert!(said.contains("-loadvm 'one '\\''s'"), "{said}");
    // The table is farther in than anybody reads, or its numbers are wild.
    for at in [1u64 << 40, u64::MAX, 65536 + 1] {
        let said = other(&[(0, b"QFI\xfb\0\0\0\x03"), (60, &[0xff; 4]), (64, &at.to_be_bytes()), (65536, &table)]);
        assert!(said.contains("internal snapshots (savevm)"), "{said}");
    }
}

#[test]
fn images_of_libvirts_are_named_with_their_format() {
    let words = |was_running, format| [2, 4096, was_running, format, 512];
    let sparse = libvirt(libvirt::SAVE, words(1, 6));
    let Known::Libvirt(header, at) = look(&sparse, 1 << 20) else { panic!("it is sparse") };
    assert!(header.was_running);
    assert_eq!(at, FileOffset(92 + 4096));
    assert!(matches!(look(&libvirt(libvirt::SAVE, words(0, 6)), 1 << 20), Known::Libvirt(h, _) if !h.was_running));
    // Written on a big-endian host.
    let mut swapped = libvirt::SAVE.to_vec();
    swapped.extend(words(1, 6).iter().flat_map(|word| word.to_be_bytes()));
    swapped.resize(libvirt::LENGTH, 0);
    assert!(matches!(look(&swapped, 1 << 20), Known::Libvirt(_, FileOffset(4188))));
    let formats =
        [(0, "format raw"), (1, "gzip"), (2, "bzip2"), (3, "xz"), (4, "lzop"), (5, "zstd"), (99, "number 99")];
    for (number, name) in formats {
        let Known::Other(said) = look(&libvirt(libvirt::SAVE, words(1, number)), 1 << 20) else { panic!("{name}") };
        assert!(said.contains(name) && said.contains("virsh save DOMAIN OUT --image-format sparse"), "{said}");
    }
    let Known::Other(said) = look(&libvirt(libvirt::PART, words(1, 6)), 1 << 20) else { panic!("unfinished") };
    assert!(said.contains("not finished"), "{said}");
    let Known::Other(said) = look(&sparse, 4188) else { panic!("truncated") };
    assert!(said.contains("truncated"), "{said}");
}

proptest! {
    /// Whatever the bytes are, and wherever they were cut off, there is an answer of one line.
    #[test]
    fn any_bytes_have_an_answer(
        mark in 0..table::TABLE.len() + 2,
        noise in proptest::collection::vec(any::<u8>(), 0..2048),
        cut in 0..70_000usize,
        size in any::<u64>(),
        flips in proptest::collection::vec((0..70_000usize, any::<u8>()), 0..8),
    ) {
        let mut head = vec![0; 70_000];
        head[..noise.len()].copy_from_slice(&noise);
        match table::TABLE.get(mark) {
            Some(entry) => entry.stamp(&mut head),
            None => head[..16].copy_from_slice(if mark.is_multiple_of(2) { libvirt::SAVE } else { libvirt::PART }),
        }
        for (at, byte) in flips {
            head[at] ^= byte;
        }
        head.truncate(cut);
        if let Known::Other(said) = look(&head, size) {
            prop_assert!(!said.is_empty() && said.lines().count() == 1 && said.len() < 100_000, "{said}");
        }
    }
}
