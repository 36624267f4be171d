//! A VMM that has its own vCPU threads, is saved while it runs, and is restored while its memory is still in the file.
//!
//! ```text
//! cargo run --release -p vmm-glue --example own_vmm
//! ```
#![expect(clippy::print_stdout, reason = "an example tells what it does")]

mod save;
mod vcpus;
mod vmm;

use std::time::Duration;

use kvm_ioctls::Kvm;
use testkit::guest::{GuestConfig, GuestImage, Privilege, Program, fill_pages};
use vm_memory::GuestAddress;
use vmm_glue::{Host, LiveOptions, snapshot_live};

use save::{Memory, adopt, restore};
use vmm::{Failed, Vmm};

fn main() -> Result<(), Failed> {
    let kvm = Kvm::new()?;
    let host = Host::probe(&kvm)?;

    // A guest that counts, of 64 MiB with a hole in the middle.
    let memory = Memory::from_ranges(&[(GuestAddress(0), 32 << 20), (GuestAddress(1 << 32), 32 << 20)])?;
    let ram = adopt(memory)?;
    let image = GuestImage::build(ram.memory(), GuestConfig { privilege: Privilege::User, vcpus: 1 });
    fill_pages(ram.memory(), &image, 30, 1);
    let program = Program { report_every: 1000, ..Program::write_all(image.window_len()) };
    image.write_program(ram.memory(), 0, &program);
    let vmm = Vmm::new(&kvm, ram, None, 1, |_, vcpus| {
        image.boot_vcpu(&kvm, &vcpus[0], 0);
        Ok(())
    })?;
    vmm.run();

    // While it runs.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("guest.mr");
    let options = LiveOptions::default().with_observer(|event| println!("{event}"));
    let saved = snapshot_live(&vmm, &host, &path, &options)?.wait()?;
    println!("saved: {} pages in {:?}", saved.stored, saved.took);

    // Its device goes on where it was, and its memory comes when it is touched.
    let again = restore(&path, &kvm, &host)?;
    println!("restored: {} bytes were on its console", again.shared.lock().console.len());
    again.run();
    again.shared.wait(|state| (state.off == 1).then_some(()));
    println!("it has come to its end: {} bytes", again.shared.lock().console.len());
    if let Some(engine) = &again.engine {
        while engine.wait_for(Duration::from_secs(1)).is_none() {}
        println!("{} pages came on demand", engine.stats().demand_pages);
    }
    Ok(())
}
