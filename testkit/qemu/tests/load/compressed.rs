//! Compressed snapshots load like plain ones: QEMU saves, `fastload compress` packs, and another QEMU goes on from it.

use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Setup};

use crate::MIB;
use crate::support::{How, Saved};

#[test]
fn a_guest_goes_on_from_a_compressed_snapshot_with_all_its_memory() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let mut saved = Saved::new(&setup, &Plan::check(setup.ram() - 4 * MIB), How::default());
    let plain = saved.file.clone();
    for codec in ["zstd", "lz4"] {
        let packed = plain.with_extension(codec);
        let (from, to) = (plain.display().to_string(), packed.display().to_string());
        let arguments = ["compress", &from, &to, "--codec", codec, "--frame", "16K"].map(str::to_owned);
        let ended = Fastload::start(arguments).unwrap().finish().unwrap();
        assert!(ended.status.success() && ended.stdout.contains("root "), "{ended:?}");
        saved.file = packed;
        saved.loads_into(&setup, &[]);
    }
}
