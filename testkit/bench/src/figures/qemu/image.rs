//! Snapshots without a zero page, and QEMUs that load them.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;
use serde_json::json;
use testkit::scratch::Scratch;
use testkit_qemu::guest::{LOWEST, Plan};
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use super::super::{Bench, Measured};

/// No load takes as long.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether that much memory is free.
pub(super) fn room(bytes: u64) -> Result<(), String> {
    let info = fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let available = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = available.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok());
    match kilobytes.map(|kilobytes: u64| kilobytes << 10) {
        Some(free) if free >= bytes => Ok(()),
        Some(free) => Err(format!("{} MiB of memory are available, {} are needed", free >> 20, bytes >> 20)),
        None => Err("/proc/meminfo does not tell what is available".into()),
    }
}

/// A directory for `bytes` of files: on tmpfs, where neither write-back nor reclaim disturbs what is measured, or else
/// where the other figures have theirs.
pub(super) fn place(bench: &Bench, bytes: u64) -> Measured<Scratch> {
    let shared = Path::new("/dev/shm");
    let fits = statvfs(shared).is_ok_and(|free| free.blocks_available() * free.fragment_size() >= bytes);
    Ok(Scratch::new_in(if fits { shared } else { &bench.directory })?)
}

/// What a guest does once it has filled its memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rest {
    /// It asks its serial port for orders, and takes a core for itself.
    Busy,
    /// It is halted, and takes none.
    Idle,
}

/// A snapshot of a guest that has filled its memory and writes no more to it.
pub(super) struct Image {
    pub(super) path: PathBuf,
    setup: Setup,
}

impl Image {
    /// Lets a guest fill its memory, and QEMU save it.
    pub(super) fn make(dir: &Path, megabytes: u64, rest: Rest) -> Measured<Image> {
        let setup = Setup::new(Machine::Pc, megabytes);
        let mut ranges = setup.machine.ram_ranges(setup.ram());
        ranges[0].0 = LOWEST;
        // The firmware's tables are at the end of what lies below 4 GiB.
        ranges[0].1 -= 4 << 20;
        let plan = Plan { ranges, stride: 1, stored: 1, step: 4096, ..Plan::check(setup.ram()) };
        let path = dir.join(format!("{megabytes}-{rest:?}.mr"));
        let mut qemu = Qemu::start(&setup, &plan.build())?;
        qemu.wait_ready()?;
        qemu.order(match rest {
            Rest::Busy => 's',
            Rest::Idle => 'h',
        })?;
        qemu.save(&path, false, false)?;
        // Written back now, so that a disk is idle while something is measured.
        fs::File::open(&path)?.sync_all()?;
        Ok(Image { path, setup })
    }

    /// A QEMU that waits for it.
    pub(super) fn waiting(&self) -> Measured<Qemu> {
        let mut qemu = Qemu::start(&self.setup.waiting(), &Plan::check(4 << 20).build())?;
        qemu.set_capabilities(&[("events", true)])?;
        Ok(qemu)
    }

    fn load(&self, qemu: &Qemu) -> Measured<Fastload> {
        let (path, qmp) = (self.path.as_os_str(), qemu.qmp_path());
        Ok(Fastload::start(["load".as_ref(), path, "--qmp".as_ref(), qmp.as_os_str(), "--json".as_ref()])?)
    }

    /// Milliseconds from the start of `fastload load` until the guest runs.
    pub(super) fn fastload(&self) -> Measured<f64> {
        let mut qemu = self.waiting()?;
        let begun = Instant::now();
        let load = self.load(&qemu)?;
        match resumed(&mut qemu, begun) {
            // What comes later does not matter here.
            Ok(took) => Ok(took),
            Err(error) => {
                drop(qemu);
                Err(format!("{error}; {:?}", load.finish()?).into())
            }
        }
    }

    /// Milliseconds from the command until the guest runs, if QEMU loads the file itself.
    pub(super) fn native(&self) -> Measured<f64> {
        let mut qemu = self.waiting()?;
        qemu.set_capabilities(&[("mapped-ram", true)])?;
        let begun = Instant::now();
        qemu.execute("migrate-incoming", json!({"uri": format!("file:{}", self.path.display())}))?;
        resumed(&mut qemu, begun)
    }

    /// Memory that is let go just before a load begins, so that the QEMU can take it at once. In a virtual
    /// machine, memory that was free for a moment goes back to the host, and the next owner waits for it: up to a
    /// second for a GiB, on one side of a pair or on the other by chance.
    pub(super) fn warm(&self) -> Measured<Vec<u8>> {
        Ok(black_box(vec![1; usize::try_from(self.setup.ram())?]))
    }

    /// Bytes a second of a whole `fastload load`, from connecting until QEMU has everything.
    pub(super) fn pushed(&self) -> Measured<f64> {
        let warm = self.warm()?;
        let qemu = self.waiting()?;
        drop(warm);
        let ended = self.load(&qemu)?.finish()?;
        if !ended.status.success() {
            return Err(format!("fastload failed: {ended:?}").into());
        }
        let figures = ended.figures();
        let number = |name: &str| figures[name].as_f64().ok_or_else(|| format!("no {name} in {figures}"));
        let before = number("running_us")? - number("connect_to_running_us")?;
        Ok(number("sent_bytes")? / (number("complete_us")? - before) * 1e6)
    }
}

fn resumed(qemu: &mut Qemu, begun: Instant) -> Measured<f64> {
    let event = qemu.qmp().wait_event(&["RESUME"], LIMIT)?;
    let event = event.ok_or_else(|| format!("the guest does not run: {}", qemu.stderr()))?;
    Ok(event.seen.saturating_duration_since(begun).as_secs_f64() * 1e3)
}
