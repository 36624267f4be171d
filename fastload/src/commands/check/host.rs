//! `fastload check --host`: what a snapshot needs, and this host or this QEMU does not have.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use mapped_ram::Snapshot;
use serde::Serialize;
use serde_json::json;
use vmm_glue::{Lack, host_check};
use vmstate::{SectionKind, VmDesc};

use crate::commands::Failure;
use crate::event::Event;
use crate::output::{self, BAD, GOOD, HEAD, WARN};

/// The section that only our own snapshots have.
const OURS: &str = "kvm-vcpu";

/// What QEMU keeps of a processor only if it has the feature: the subsection of "cpu", and the flag in /proc/cpuinfo
/// (QEMU target/i386/machine.c).
const SUBSECTIONS: [(&str, &str); 9] = [
    ("cpu/avx512", "avx512f"),
    ("cpu/pkru", "pku"),
    ("cpu/pkrs", "pks"),
    ("cpu/mpx", "mpx"),
    ("cpu/xss", "xsaves"),
    ("cpu/intel_pt", "intel_pt"),
    ("cpu/intel_amx_xtile", "amx_tile"),
    ("cpu/nested_state", "vmx|svm"),
    ("cpu/umwait", "waitpkg"),
];

/// One thing that is needed.
#[derive(Debug, Serialize)]
struct Need {
    kind: &'static str,
    what: String,
    /// Whether it is here; `None` if that can't be told.
    here: Option<bool>,
}

/// Tells whether the snapshot can run here. `Ok` with a reason if it can't.
pub(super) fn check(snapshot: &Snapshot, qemu: Option<&Path>, json: bool) -> Result<Option<String>, Failure> {
    let full = || snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full);
    let needs = if full().any(|section| section.name == OURS) {
        let lacks = host_check(snapshot).map_err(|error| format!("{}: {error}", snapshot.path().display()))?;
        lacks.iter().map(|lack| Need { kind: kind(lack), what: lack.to_string(), here: Some(false) }).collect()
    } else {
        of_qemu(snapshot, qemu)?
    };
    let missing = needs.iter().filter(|need| need.here == Some(false)).count();
    if json {
        let event = Event::new("host").path("file", snapshot.path());
        event.with(json!({ "fits": missing == 0, "needs": needs })).print()?;
    } else {
        output::print(&table(&needs, snapshot.path())?)?;
    }
    let first = needs.iter().find(|need| need.here == Some(false));
    Ok(first.map(|first| {
        let more = if missing > 1 { format!(" (and {} more)", missing - 1) } else { String::new() };
        format!("{}: this host lacks: {}{more}", snapshot.path().display(), first.what)
    }))
}

fn kind(lack: &Lack) -> &'static str {
    match lack {
        Lack::CpuFeature { .. } => "cpuid",
        Lack::ExtendedState { .. } | Lack::ExtendedStateLength { .. } => "xsave",
        Lack::Msr { .. } => "msr",
        Lack::TscFrequency { .. } => "tsc",
        Lack::Vcpus { .. } => "vcpus",
        _ => "kvm",
    }
}

/// What can be told of a file of QEMU's: it has no CPUID in it, and devices under names of their own.
fn of_qemu(snapshot: &Snapshot, qemu: Option<&Path>) -> Result<Vec<Need>, Failure> {
    let machine = &snapshot.configuration().machine;
    let names: BTreeSet<&str> = snapshot
        .sections()
        .iter()
        .filter(|section| section.kind == SectionKind::Full)
        .map(|section| section.name.as_str())
        .collect();
    let mut needs = Vec::new();
    let known = match qemu {
        Some(qemu) => {
            let machines = ask(qemu, &["-machine", "help"])?;
            Some(machines.lines().any(|line| line.split_whitespace().next() == Some(machine)))
        }
        None => None,
    };
    needs.push(Need { kind: "machine", what: format!("machine type {machine}"), here: known });
    let virtio: BTreeSet<&str> =
        names.iter().filter_map(|name| name.rsplit('/').next()).filter(|name| name.starts_with("virtio-")).collect();
    // The machine's own devices are there if it is.
    let devices = match qemu {
        Some(qemu) if known == Some(true) => Some(ask(qemu, &["-machine", machine, "-device", "help"])?),
        _ => None,
    };
    for device in virtio {
        let here = devices.as_ref().map(|help| help.contains(&format!("name \"{device}")));
        needs.push(Need { kind: "device", what: format!("device {device}"), here });
    }
    if names.contains("kvmclock") {
        let here = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        needs.push(Need { kind: "kvm", what: "/dev/kvm (it was saved under KVM)".into(), here: Some(here) });
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags: BTreeSet<&str> = flags
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().collect())
        .unwrap_or_default();
    let kept = snapshot.vmdesc().map(subsections).unwrap_or_default();
    for (_, flag) in SUBSECTIONS.iter().filter(|(subsection, _)| kept.contains(*subsection)) {
        // Under TCG QEMU brings them itself.
        let here = names.contains("kvmclock").then(|| flag.split('|').any(|flag| flags.contains(flag)));
        needs.push(Need { kind: "cpuid", what: format!("CPU feature {flag}"), here });
    }
    Ok(needs)
}

/// The subsections of the processors that are in the file.
fn subsections(vmdesc: &VmDesc) -> BTreeSet<String> {
    vmdesc
        .devices()
        .iter()
        .filter(|device| device.name == "cpu")
        .flat_map(|device| device.state.subsections.iter().map(|part| part.name.clone()))
        .collect()
}

/// What a QEMU says of itself.
fn ask(qemu: &Path, arguments: &[&str]) -> Result<String, Failure> {
    let named = |what: &dyn std::fmt::Display| format!("{} {}: {what}", qemu.display(), arguments.join(" "));
    let mut command = Command::new(qemu);
    let output = command.args(arguments).stdin(Stdio::null()).output().map_err(|error| named(&error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(named(&format!("{} ({})", output.status, said.lines().next().unwrap_or_default())).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn table(needs: &[Need], file: &Path) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    if !needs.is_empty() {
        writeln!(out, "{HEAD}{:<8} {:<7} needed{HEAD:#}", "kind", "here")?;
    }
    for Need { kind, what, here } in needs {
        let (style, word) = match here {
            Some(true) => (GOOD, "yes"),
            Some(false) => (BAD, "no"),
            None => (WARN, "unknown"),
        };
        writeln!(out, "{kind:<8} {style}{word:<7}{style:#} {what}")?;
    }
    let unknown = needs.iter().any(|need| need.here.is_none());
    let file = file.display();
    match (needs.iter().any(|need| need.here == Some(false)), unknown) {
        (true, _) => writeln!(out, "{file}: {BAD}can't run here{BAD:#}")?,
        (false, true) => writeln!(out, "{file}: nothing is known to be missing")?,
        (false, false) => writeln!(out, "{file}: {GOOD}this host has all that it needs{GOOD:#}")?,
    }
    Ok(out)
}
