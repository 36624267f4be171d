//! The part of the demo that saves the guest while it runs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use testkit::guest::{Oracle, Walker};
use vmm_glue::{Bus, Host, LiveOptions, RestoreOptions, SavedVm, Vcpus, snapshot_live};

use super::report::Live;
use super::run::micros;
use crate::product::guest::{Done, PATIENCE, Port, Prepared, stopped};

/// Lets the stopped guest run on, and saves it meanwhile. It still runs at the end.
pub(super) fn snapshot(guest: &Prepared, vcpus: &Vcpus, port: &Port, host: &Host, path: &Path) -> Done<Live> {
    port.stop_after(None);
    vcpus.resume();
    let before = guest.report(&guest.ram).counter;
    // Nothing keeps free space for a guest that is mostly zero; should the disk fill up, that is an error all the same.
    let report = snapshot_live(vcpus, host, path, &LiveOptions::default().unchecked_space())?.wait()?;
    let steps_meanwhile = guest.report(&guest.ram).counter - before;
    let on_disk = fs::metadata(path)?.blocks() * 512;
    Ok(Live {
        blackout_us: micros(report.blackout.total),
        write_faults: report.stats.write_faults + report.stats.hole_faults,
        complete_us: micros(report.took),
        steps_meanwhile,
        file_ratio: on_disk as f64 / report.stored.to_bytes().0 as f64,
    })
}

/// Restores it, lets the guest finish the step in which it was frozen, and compares all memory with the oracle.
pub(super) fn problems(
    guest: &Prepared,
    oracle: &mut Oracle,
    walker: &mut Walker,
    path: &Path,
    kvm: &Kvm,
    host: &Host,
) -> Done<Vec<String>> {
    let port = Port::stopping_after(1);
    let bus = Arc::clone(&port) as Arc<dyn Bus>;
    let saved = SavedVm::open(path, kvm, host)?;
    let vm = saved.restore_on_demand(kvm, host, bus, &RestoreOptions::default(), |builder| builder)?;
    stopped(vm.vcpus())?;
    port.check()?;
    if !vm.wait_complete(PATIENCE)? {
        return Err(format!("its memory was not loaded within {PATIENCE:?}").into());
    }
    let ram = vm.vcpus().ram();
    let report = guest.report(ram);
    oracle.advance(0, walker, report.counter);
    let mut problems: Vec<String> = oracle.compare(ram.memory()).err().into_iter().collect();
    if report.checksum != walker.checksum() {
        problems.push(format!("the guest's checksum is {} instead of {}", report.checksum, walker.checksum()));
    }
    Ok(problems.into_iter().map(|problem| format!("saved while it ran: {problem}")).collect())
}
