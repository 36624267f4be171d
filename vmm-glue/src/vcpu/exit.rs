//! What an exit from `KVM_RUN` means, above all when a page is unavailable.
//!
//! Linux shows a page whose content is poisoned (`UFFDIO_POISON`), or that never comes, in several ways, depending
//! on how KVM came to need it: `KVM_RUN` fails with `EFAULT`; it is interrupted by a `SIGBUS` to the thread; an access
//! that KVM emulates becomes an MMIO exit with an address inside RAM; an instruction that can't be fetched becomes an
//! internal error. All of them end here in [`VcpuError::PageFailed`].

use std::fmt;
use std::io;

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::{VcpuExit, VcpuFd};
use page_units::GuestAddr;

use super::{Bus, Next};
use crate::{GuestRam, sys};

/// How it showed that a page is unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailedPage {
    /// `KVM_RUN` failed with `EFAULT`.
    Fault,
    /// The thread got a `SIGBUS`.
    BusError,
    /// An access inside RAM came out as MMIO.
    Mmio,
    /// An instruction could not be fetched.
    Fetch,
}

impl fmt::Display for FailedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailedPage::Fault => "KVM_RUN failed with EFAULT",
            FailedPage::BusError => "KVM raised SIGBUS",
            FailedPage::Mmio => "KVM reported MMIO inside RAM",
            FailedPage::Fetch => "KVM could not fetch an instruction",
        })
    }
}

/// Why a vCPU can't go on. It is not run again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The guest needs a page of RAM whose content is unavailable.
    #[error("vCPU {vcpu} needs a page that could not be loaded, at {} ({how})", place(*guest))]
    PageFailed {
        /// The vCPU.
        vcpu: u32,
        /// The guest-physical address, where it is known.
        guest: Option<GuestAddr>,
        /// How it showed.
        how: FailedPage,
    },
    /// The guest has crashed: a triple fault.
    #[error("the guest on vCPU {vcpu} has shut down (a triple fault)")]
    Shutdown {
        /// The vCPU.
        vcpu: u32,
    },
    /// KVM can't go on with the guest.
    #[error("KVM can't go on with vCPU {vcpu}: {what}")]
    Internal {
        /// The vCPU.
        vcpu: u32,
        /// The kind of the exit, and what KVM told of it.
        what: String,
    },
    /// A device of the bus panicked in the vCPU's thread.
    #[error("the thread of vCPU {vcpu} has panicked")]
    Panicked {
        /// The vCPU.
        vcpu: u32,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN on vCPU {vcpu} failed: {error}")]
    Run {
        /// The vCPU.
        vcpu: u32,
        /// What KVM said.
        #[source]
        error: io::Error,
    },
}

fn place(guest: Option<GuestAddr>) -> String {
    guest.map_or_else(|| "an unknown guest-physical address".into(), |guest| format!("guest-physical {guest}"))
}

/// What the thread does next.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Enter `KVM_RUN` again.
    Run,
    /// A signal has interrupted it: see which.
    Interrupted,
    /// A device asked to stop; the access is not completed yet.
    Stop,
    /// The guest has halted, and no interrupt can wake it.
    Halted,
    /// It can't go on.
    Failed(VcpuError),
}

impl From<Next> for Outcome {
    fn from(next: Next) -> Outcome {
        match next {
            Next::Run => Outcome::Run,
            Next::Stop => Outcome::Stop,
        }
    }
}

/// Runs a vCPU until it exits.
pub(super) fn run_once(fd: &mut VcpuFd, vcpu: u32, ram: &GuestRam, bus: &dyn Bus) -> Outcome {
    let mmio = |address: u64, access: &mut dyn FnMut() -> Next| match ram.contains(GuestAddr(address)) {
        true => failed_page(vcpu, Some(GuestAddr(address)), FailedPage::Mmio),
        false => access().into(),
    };
    match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => bus.io_out(vcpu, port, data).into(),
        Ok(VcpuExit::IoIn(port, data)) => bus.io_in(vcpu, port, data).into(),
        Ok(VcpuExit::MmioRead(address, data)) => mmio(address, &mut || bus.mmio_read(vcpu, address, data)),
        Ok(VcpuExit::MmioWrite(address, data)) => mmio(address, &mut || bus.mmio_write(vcpu, address, data)),
        Ok(VcpuExit::MemoryFault { gpa, .. }) => failed_page(vcpu, Some(GuestAddr(gpa)), FailedPage::Fault),
        Ok(VcpuExit::Hlt) => Outcome::Halted,
        Ok(VcpuExit::Intr) => Outcome::Interrupted,
        Ok(VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_)) => Outcome::Run,
        Ok(VcpuExit::Shutdown) => Outcome::Failed(VcpuError::Shutdown { vcpu }),
        Ok(VcpuExit::InternalError) => internal_error(fd, vcpu, ram),
        Ok(other) => {
            let what = format!("{other:?}");
            Outcome::Failed(VcpuError::Internal { vcpu, what })
        }
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Outcome::Interrupted,
            libc::EFAULT | libc::EHWPOISON => failed_page(vcpu, None, FailedPage::Fault),
            _ => Outcome::Failed(VcpuError::Run { vcpu, error: error.into() }),
        },
    }
}

pub(super) fn failed_page(vcpu: u32, guest: Option<GuestAddr>, how: FailedPage) -> Outcome {
    Outcome::Failed(VcpuError::PageFailed { vcpu, guest, how })
}

/// An internal error is a failed page if the instruction lies in a page that can't be read; otherwise it is KVM's own.
fn internal_error(fd: &mut VcpuFd, vcpu: u32, ram: &GuestRam) -> Outcome {
    let suberror = sys::internal_suberror(fd);
    let rip = fd.get_regs().map(|regs| regs.rip).unwrap_or(0);
    // The longest instruction has 15 bytes, so it may reach into the next page.
    for address in [rip, rip.saturating_add(14)] {
        let translated = fd.translate_gva(address).ok().filter(|translation| translation.valid != 0);
        let guest = translated.map(|translation| GuestAddr(translation.physical_address));
        let Some((guest, host)) = guest.and_then(|guest| Some((guest, ram.to_host(guest)?))) else { continue };
        if !sys::readable(host) {
            return failed_page(vcpu, Some(guest), FailedPage::Fetch);
        }
    }
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => format!("it can't emulate the instruction at {rip:#x}"),
        other => format!("internal error {other} at {rip:#x}"),
    };
    Outcome::Failed(VcpuError::Internal { vcpu, what })
}
