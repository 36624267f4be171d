//! The least that freezing a guest takes: its state read from KVM, and its memory write-protected; and the least that
//! a write to frozen memory takes.

use std::io;
use std::sync::Barrier;
use std::time::Instant;

use kvm_bindings::{Msrs, kvm_irqchip};
use kvm_ioctls::{Error, VcpuFd, VmFd};

use super::fault::{Cores, scattered};
use crate::sys::{Map, PAGE, Uffd, pin};

/// Reads all state of a VM with interrupt controllers and one vCPU; of `msrs` those that are listed.
///
/// # Errors
/// If KVM refuses.
pub fn state(vm: &VmFd, vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<(), Error> {
    vcpu.get_regs()?;
    vcpu.get_sregs()?;
    vcpu.get_xsave()?;
    vcpu.get_xcrs()?;
    vcpu.get_debug_regs()?;
    vcpu.get_vcpu_events()?;
    vcpu.get_mp_state()?;
    vcpu.get_lapic()?;
    vcpu.get_msrs(msrs)?;
    for chip_id in 0..3 {
        vm.get_irqchip(&mut kvm_irqchip { chip_id, ..kvm_irqchip::default() })?;
    }
    vm.get_clock()?;
    Ok(())
}

/// How long each first write takes, in nanoseconds, when each page of protected memory is written once in
/// [`scattered`] order, and copied to a pool before its writer goes on.
///
/// # Errors
/// If a call fails.
///
/// # Panics
/// If the handler does.
pub fn latencies(memory: &Map, pool: &Map, cores: Cores) -> io::Result<Vec<f64>> {
    let pages = memory.len() / PAGE;
    let uffd = Uffd::of_writes()?;
    uffd.arm(memory.address(0), memory.len() as u64)?;
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| {
            let pinned = pin(cores.handler);
            ready.wait();
            for slot in 0..pages {
                let page = uffd.next_fault()? & !(PAGE as u64 - 1);
                let at = usize::try_from(page - memory.address(0)).map_err(io::Error::other)?;
                memory.copy_page(at, pool, slot * PAGE);
                uffd.release(page, PAGE as u64)?;
            }
            pinned
        });
        let writer = scope.spawn(|| {
            let pinned = pin(cores.faulter);
            ready.wait();
            let latencies = write_all(memory);
            pinned.map(|()| latencies)
        });
        let latencies = writer.join().expect("writing memory does not panic")?;
        handler.join().expect("the handler does not panic")?;
        Ok(latencies)
    })
}

/// Writes to each page, and returns how long that took, in nanoseconds.
#[must_use]
pub fn write_all(memory: &Map) -> Vec<f64> {
    let pages = memory.len() / PAGE;
    let mut latencies = Vec::with_capacity(pages);
    for page in scattered(pages) {
        let start = Instant::now();
        memory.put(page * PAGE, 1);
        latencies.push(start.elapsed().as_secs_f64() * 1e9);
    }
    latencies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_was_copied_before() {
        testkit::require!(Userfaultfd, TwoCpus);
        let (memory, pool) = (Map::anonymous(16 * PAGE).unwrap(), Map::anonymous(16 * PAGE).unwrap());
        (0..16).for_each(|page| memory.put(page * PAGE, 9));
        let latencies = latencies(&memory, &pool, Cores { faulter: 0, handler: 1 }).unwrap();
        assert!(latencies.len() == 16 && latencies.iter().all(|&nanoseconds| nanoseconds > 100.0), "{latencies:?}");
        assert!((0..16).all(|page| memory.touch(page * PAGE) == 1 && pool.touch(page * PAGE) == 9));
    }
}
