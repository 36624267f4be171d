//! What makes the VMM one that can be saved while it runs, and restored while its memory is still in the file.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kvm_ioctls::Kvm;
use uffd_engine::Engine;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_glue::{ClockPolicy, GuestRam, Held, Host, Machine, MachineState, SavedVm, StateError, StopError};
use vmstate::Section;

use super::vmm::{Failed, Vmm};

/// Memory as VMMs have it that migrate.
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;
/// The section of the device.
const CONSOLE: &str = "tiny-console";

/// Each region is a RAM block of its own.
pub(crate) fn adopt(memory: Memory) -> Result<Arc<GuestRam>, Failed> {
    Ok(Arc::new(GuestRam::adopt(memory, |guest| format!("ram@{guest}"))?))
}

impl Machine for Vmm {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn hold(&self, limit: Duration) -> Result<Box<dyn Held + '_>, StopError> {
        let held = Standing { vmm: self, ran: self.shared.lock().run };
        // If it fails, they run again.
        self.stop(limit)?;
        Ok(Box::new(held))
    }
}

/// vCPUs that stand still.
struct Standing<'a> {
    vmm: &'a Vmm,
    ran: bool,
}

impl Held for Standing<'_> {
    fn sections(&mut self, host: &Host) -> Result<Vec<Section>, StateError> {
        let vcpus: Vec<_> =
            self.vmm.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let vcpus: Vec<_> = vcpus.iter().map(|vcpu| &**vcpu).collect();
        let mut sections = MachineState::save(&self.vmm.vm, &vcpus, host, true, false)?.sections()?;
        let console = self.vmm.shared.lock().console.clone();
        sections.push(Section::builder(CONSOLE, 0, 1).buffer("written", &console).build()?);
        Ok(sections)
    }

    fn keep(mut self: Box<Self>) {
        self.ran = false;
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if self.ran {
            self.vmm.run();
        }
    }
}

/// Makes the VM again, in memory that is still in the file. Its vCPUs wait.
pub(crate) fn restore(path: &Path, kvm: &Kvm, host: &Host) -> Result<Vmm, Failed> {
    let saved = SavedVm::open_with_devices(path, kvm, host, |name, _| name == CONSOLE)?;
    let pieces = saved.memory().iter().flat_map(|block| block.pieces());
    let ranges = pieces.map(|(guest, length)| Ok((GuestAddress(guest.0), usize::try_from(length.0)?)));
    let ram = adopt(Memory::from_ranges(&ranges.collect::<Result<Vec<_>, Failed>>()?)?)?;
    // It serves before any state is loaded, which touches memory.
    let regions = ram.regions(saved.source().layout())?;
    let engine = Engine::builder().regions(regions).source(Arc::clone(saved.source())).start()?;
    let vcpus = u64::try_from(saved.state().vcpus.len())?;
    let vmm = Vmm::new(kvm, ram, Some(engine), vcpus, |vm, vcpus| {
        let vcpus: Vec<_> = vcpus.iter().collect();
        saved.state().restore_created(vm, &vcpus, host, ClockPolicy::GoOn)?;
        Ok(())
    })?;
    let console = saved.snapshot().device(CONSOLE, 0)?.ok_or("the snapshot has no console")?;
    vmm.shared.lock().console = console.decode()?.field("written")?.bytes().to_vec();
    Ok(vmm)
}
