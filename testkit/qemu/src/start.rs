//! How a QEMU is started.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// i440FX.
    Pc,
    /// Q35.
    Q35,
    /// microvm: no PCI.
    Microvm,
}

impl Machine {
    /// As the command line names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm",
        }
    }

    /// The machine type of a certain version, such as `pc-i440fx-7.2`. microvm has none.
    fn versioned(self, version: Option<&str>) -> String {
        match (self, version) {
            (Machine::Pc, Some(version)) => format!("pc-i440fx-{version}"),
            (Machine::Q35, Some(version)) => format!("pc-q35-{version}"),
            _ => self.name().to_owned(),
        }
    }

    /// The guest-physical ranges of `ram` bytes of RAM (QEMU hw/i386/pc_piix.c, pc_q35.c, microvm.c).
    #[must_use]
    pub fn ram_ranges(self, ram: u64) -> Vec<(u64, u64)> {
        let (most_below, split) = match self {
            Machine::Pc => (0xe000_0000, 0xc000_0000),
            Machine::Q35 => (0xb000_0000, 0x8000_0000),
            Machine::Microvm => (0xe000_0000, 0xc000_0000),
        };
        if ram < most_below {
            return vec![(0, ram)];
        }
        vec![(0, split), (1 << 32, (1 << 32) + ram - split)]
    }
}

/// What guest RAM is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBackend {
    /// QEMU's default.
    Anonymous,
    /// A shared memfd.
    Memfd,
    /// A memfd of huge pages.
    HugeMemfd,
    /// A file, on tmpfs if postcopy is wanted.
    File(PathBuf),
}

/// A QEMU to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The machine type.
    pub machine: Machine,
    /// RAM in MiB.
    pub megabytes: u64,
    /// What RAM is made of.
    pub backend: MemoryBackend,
    /// Processors.
    pub cpus: u64,
    /// KVM instead of TCG.
    pub kvm: bool,
    /// Virtio devices: network, disk, random numbers, balloon, serial.
    pub virtio: bool,
    /// Whether it waits for an incoming migration.
    pub incoming: Option<String>,
    /// Started with `-S`.
    pub stopped: bool,
    /// Run as this user.
    pub user: Option<u32>,
    /// The version of the machine type, such as `7.2`, instead of the newest.
    pub version: Option<&'static str>,
    /// Run by an [older QEMU](testkit::require::older_qemu).
    pub older: bool,
    /// A command that starts it, and stands before it: `unshare`, or a shell.
    pub within: Vec<String>,
    /// More arguments.
    pub extra: Vec<String>,
}

impl Setup {
    /// A TCG guest with anonymous memory and one processor.
    #[must_use]
    pub fn new(machine: Machine, megabytes: u64) -> Setup {
        Setup {
            machine,
            megabytes,
            backend: MemoryBackend::Anonymous,
            cpus: 1,
            kvm: false,
            virtio: false,
            incoming: None,
            stopped: false,
            user: None,
            version: None,
            older: false,
            within: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// The same machine in an older QEMU, 7.2, of whose version it is then.
    #[must_use]
    pub fn older(&self) -> Setup {
        Setup { version: Some("7.2"), older: true, ..self.clone() }
    }

    /// The same machine, waiting for an incoming migration that QMP will start.
    #[must_use]
    pub fn waiting(&self) -> Setup {
        Setup { incoming: Some("defer".into()), ..self.clone() }
    }

    /// RAM in bytes.
    #[must_use]
    pub fn ram(&self) -> u64 {
        self.megabytes << 20
    }

    /// The name of the RAM block that has the guest's RAM.
    pub(crate) fn main_memory(&self) -> &'static str {
        if self.machine == Machine::Microvm { "microvm.ram" } else { "pc.ram" }
    }

    /// The program; one that was unpacked somewhere is told where its firmware and modules lie.
    pub(crate) fn program(&self) -> Command {
        let older = testkit::require::older_qemu().filter(|_| self.older);
        let program = older.clone().unwrap_or_else(|| "qemu-system-x86_64".into());
        let mut command = match self.within.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        if let Some(usr) = older.as_ref().and_then(|program| program.ancestors().nth(2)) {
            command.env("QEMU_MODULE_DIR", usr.join("lib/x86_64-linux-gnu/qemu"));
            for name in ["qemu", "seabios"] {
                command.arg("-L").arg(usr.join("share").join(name));
            }
        }
        command
    }

    /// The arguments; files lie in `dir`.
    pub(crate) fn arguments(&self, dir: &Path) -> Vec<String> {
        let at = |name: &str| dir.join(name).display().to_string();
        let accel = if self.kvm { "kvm" } else { "tcg" };
        // What the kernel merges can't be captured, and other tests may have it do so.
        let mut machine = format!("{},accel={accel},mem-merge=off", self.machine.versioned(self.version));
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |list: &[&str]| arguments.extend(list.iter().map(|argument| (*argument).to_owned()));
        let backend = match &self.backend {
            MemoryBackend::Anonymous => None,
            MemoryBackend::Memfd => Some("memory-backend-memfd,share=on".to_owned()),
            MemoryBackend::HugeMemfd => Some("memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned()),
            MemoryBackend::File(path) => Some(format!("memory-backend-file,share=on,mem-path={}", path.display())),
        };
        if let Some(backend) = backend {
            // Named as the machine's own RAM is, so that its snapshots fit.
            let id = self.main_memory();
            add(&["-object", &format!("{backend},id={id},size={}M", self.megabytes)]);
            machine.push_str(&format!(",memory-backend={id}"));
        }
        add(&["-machine", &machine, "-m", &format!("{}M", self.megabytes), "-smp", &self.cpus.to_string()]);
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-kernel", &at("guest.elf")]);
        for (id, file) in [("own", "own.qmp"), ("serial", "serial")] {
            add(&["-chardev", &format!("socket,id={id},path={},server=off", at(file))]);
        }
        add(&["-mon", "chardev=own,mode=control", "-serial", "chardev:serial"]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))]);
        if self.virtio {
            add(&["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"]);
            add(&["-blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on"]);
            add(&["-device", "virtio-blk-pci,drive=disk", "-device", "virtio-rng-pci"]);
            add(&["-device", "virtio-balloon-pci", "-device", "virtio-serial-pci"]);
        }
        if let Some(incoming) = &self.incoming {
            add(&["-incoming", incoming]);
        }
        if self.stopped {
            add(&["-S"]);
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }
}
