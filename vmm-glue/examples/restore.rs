//! Restores a guest from a snapshot file while its memory is still in the file: what another VMM can copy.
//!
//! ```text
//! cargo run --release -p vmm-glue --example restore [SNAPSHOT]
//! ```
//!
//! Without an argument it makes a snapshot first, of a small guest that counts (see [`snapshot`]; that part is only
//! for show). Everything else is the real thing.
#![expect(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use page_units::{ByteLen, GuestAddr};
use testkit::guest::{GuestConfig, GuestImage, Privilege, Program, Signal, fill_pages, layout};
use uffd_engine::{Background, Event, Handlers};
use vmm_glue::{
    Backing, Bus, GuestRam, Host, MachineConfig, NewVm, Next, RamSpec, RestoreOptions, SaveOptions, SavedVm,
    VcpuOptions, Vcpus, save,
};

/// The devices of this VMM: one port.
#[derive(Debug)]
struct Devices;

impl Bus for Devices {
    fn io_out(&self, vcpu: u32, port: u16, data: &[u8]) -> Next {
        match (port, data) {
            (layout::PORT, [byte]) => {
                println!("  vCPU {vcpu}: {:?}", Signal::of(*byte));
                Next::Stop
            }
            _ => Next::Run,
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => snapshot(dir.path())?,
    };

    // Once per process: what this host can do.
    let kvm = Kvm::new()?;
    let host = Host::probe(&kvm)?;

    // Reads metadata and device state, and refuses what this host can't continue. Independent of the size of memory.
    let saved = SavedVm::open(&path, &kvm, &host)?;

    // The engine's events come on a thread of their own.
    let options = RestoreOptions::default().with_backing(Backing::Memfd).with_observer(|event| match event {
        Event::FirstFault { after } => println!("  first fault after {after:?}"),
        Event::Complete { after } => println!("  all memory is there after {after:?}"),
        Event::Failed(error) => println!("  memory can't be loaded: {error}"),
        _ => {}
    });

    // Memory is registered and served, then the machine is made, its state loaded, and the guest runs.
    let vm = saved.restore_on_demand(&kvm, &host, Arc::new(Devices), &options, |engine| {
        engine.handlers(Handlers::threads(1)).background(Background::default())
    })?;
    println!("the guest runs after {:?}:", vm.report().took);
    for (step, took) in &vm.report().steps {
        println!("  {step:?}: {took:?}");
    }

    // A guest that can't go on (an unavailable page, a crash) is an error here, with the address if it is known.
    vm.wait_stopped(Duration::from_secs(60))?;
    while !vm.wait_complete(Duration::from_secs(60))? {}
    if let Some(engine) = vm.engine() {
        println!("{:#?}", engine.stats());
    }
    // Now that all memory is there it can be saved again.
    let again = vm.save(&host, &dir.path().join("again.mr"), &SaveOptions::default())?;
    println!("saved again: {} stored pages in {:?}", again.stored, again.took);
    Ok(())
}

/// Boots a small guest, lets it work a little, and saves it.
fn snapshot(dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let host = Host::probe(&kvm)?;

    // 64 MiB with a hole in the middle, as PCs have one.
    let memory = RamSpec::new("ram").at(GuestAddr(0), ByteLen(32 << 20)).at(GuestAddr(4 << 30), ByteLen(32 << 20));
    let ram = Arc::new(GuestRam::allocate(&[memory], Backing::Memfd)?);
    let image = GuestImage::build(ram.memory(), GuestConfig { privilege: Privilege::User, vcpus: 1 });
    fill_pages(ram.memory(), &image, 30, 1);
    let program = Program { report_every: 5000, ..Program::write_all(image.window_len()) };
    image.write_program(ram.memory(), 0, &program);

    let machine = NewVm::new(&kvm, ram, MachineConfig::full(1))?;
    for (number, vcpu) in (0..).zip(machine.vcpus()) {
        image.boot_vcpu(&kvm, vcpu, number);
    }
    let vcpus = Vcpus::start(machine, Arc::new(Devices), VcpuOptions::default())?;
    vcpus.wait_stopped(Duration::from_secs(60))?;

    let path = dir.join("guest.mr");
    let saved = save(&vcpus, &host, &path, &SaveOptions::default())?;
    println!("saved: {} stored pages, {} zero pages, in {:?}", saved.stored, saved.zero, saved.took);
    Ok(path)
}
