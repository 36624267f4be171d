//! The testkit's guest as the demo and the benchmarks use it: one vCPU that tells of each step.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use page_units::ByteLen;
use std::sync::{Mutex, OnceLock};
use testkit::guest::{GuestConfig, GuestImage, Pattern, Privilege, Program, Report, Signal, fill_pages};
use vmm_glue::{
    Backing, Bus, GuestRam, Host, MachineConfig, NewVm, Next, RamSpec, SaveOptions, Saved, VcpuOptions, Vcpus,
};

/// What things here end with.
pub type Done<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Long enough for anything here.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's configuration.
pub const CONFIG: GuestConfig = GuestConfig { privilege: Privilege::Kernel, vcpus: 1 };

/// Notes when the guest first speaks, and stops it after a number of steps, when it is done, or when it complains.
#[derive(Debug)]
pub struct Port {
    steps: AtomicU64,
    stop_after: AtomicU64,
    first: OnceLock<Instant>,
    complaint: Mutex<Option<Signal>>,
}

impl Port {
    /// A port that stops the guest after a number of steps.
    #[must_use]
    pub fn stopping_after(steps: u64) -> Arc<Port> {
        Arc::new(Port {
            steps: AtomicU64::new(0),
            stop_after: steps.into(),
            first: OnceLock::new(),
            complaint: Mutex::default(),
        })
    }

    /// Lets the guest do a number of further steps, or any number.
    pub fn stop_after(&self, more: Option<u64>) {
        let done = self.steps.load(Ordering::Relaxed);
        self.stop_after.store(more.map_or(u64::MAX, |more| done + more), Ordering::Relaxed);
    }

    /// When the guest did its first step.
    #[must_use]
    pub fn first(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// An error if the guest said anything but that it goes on, or has not said anything.
    ///
    /// # Errors
    /// With what it said.
    pub fn check(&self) -> Done<Instant> {
        let complaint = self.complaint.lock().map_err(|_| "a vCPU's thread has panicked")?;
        match *complaint {
            Some(signal) => Err(format!("the guest says {signal:?}").into()),
            None => self.first().ok_or_else(|| "the guest did not run".into()),
        }
    }
}

impl Bus for Port {
    fn io_out(&self, _: u32, _: u16, data: &[u8]) -> Next {
        self.first.get_or_init(Instant::now);
        let signal = Signal::of(data.first().copied().unwrap_or_default());
        let steps = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        match signal {
            Signal::Progress if steps < self.stop_after.load(Ordering::Relaxed) => Next::Run,
            Signal::Progress | Signal::Done => Next::Stop,
            Signal::Mismatch | Signal::Exception(_) | Signal::Unknown(_) => {
                if let Ok(mut complaint) = self.complaint.lock() {
                    complaint.get_or_insert(signal);
                }
                Next::Stop
            }
        }
    }
}

/// What the guest does: it writes to pages all over its memory and tells of each.
#[must_use]
pub fn program(image: &GuestImage, steps: u64) -> Program {
    Program { pattern: Pattern::Random, steps, report_every: 1, seed: 2026, ..Program::write_all(image.window_len()) }
}

/// A guest that lies in memory with its program, and has not started.
#[derive(Debug)]
pub struct Prepared {
    /// Its code.
    pub image: GuestImage,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Its work.
    pub program: Program,
}

/// Makes a guest with `ram` bytes of RAM, of which the host fills about `percent`.
///
/// # Errors
/// If there is no such memory.
///
/// # Panics
/// If the amount is not whole 2 MiB, or below 4 MiB.
pub fn prepare(ram: ByteLen, percent: u64, steps: u64) -> Done<Prepared> {
    let ram = Arc::new(GuestRam::allocate(&[RamSpec::pc("ram", ram)], Backing::Anonymous)?);
    let image = GuestImage::build(ram.memory(), CONFIG);
    if percent > 0 {
        fill_pages(ram.memory(), &image, percent, 7);
    }
    let program = program(&image, steps);
    image.write_program(ram.memory(), 0, &program);
    Ok(Prepared { image, ram, program })
}

impl Prepared {
    /// Runs the guest for a number of steps, and leaves it stopped.
    ///
    /// # Errors
    /// If KVM refuses, or the guest does something else.
    pub fn run(&self, kvm: &Kvm, steps: u64) -> Done<(Vcpus, Arc<Port>)> {
        let machine = MachineConfig { vcpus: 1, irqchip: true, pit: false };
        let machine = NewVm::new(kvm, Arc::clone(&self.ram), machine)?;
        for (number, vcpu) in (0..).zip(machine.vcpus()) {
            self.image.boot_vcpu(kvm, vcpu, number);
        }
        let port = Port::stopping_after(steps);
        let vcpus = Vcpus::start(machine, Arc::clone(&port) as Arc<dyn Bus>, VcpuOptions::default())?;
        stopped(&vcpus)?;
        port.check()?;
        Ok((vcpus, port))
    }

    /// The guest's own report.
    #[must_use]
    pub fn report(&self, ram: &GuestRam) -> Report {
        self.image.report(ram.memory(), 0)
    }
}

/// Waits until the guest has stopped by itself.
///
/// # Errors
/// If it does not, or fails.
pub fn stopped(vcpus: &Vcpus) -> Done<()> {
    Ok(vcpus.wait_stopped(PATIENCE)?)
}

/// Saves a stopped guest.
///
/// # Errors
/// If it can't be saved.
pub fn save(vcpus: &Vcpus, host: &Host, path: &Path) -> Done<Saved> {
    Ok(vmm_glue::save(vcpus, host, path, &SaveOptions::default())?)
}
