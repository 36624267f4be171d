//! Every figure: what is measured, against what, and what it has to reach.

mod background;
mod busy;
mod fault;
mod files;
mod live;
mod live_memory;
mod open;
mod qemu;
mod resume;

use std::error::Error;
use std::path::PathBuf;

use crate::figure::Figure;

/// What a measurement ends with.
pub type Measured<T = Vec<Figure>> = Result<T, Box<dyn Error + Send + Sync>>;

/// What the measurements share.
#[derive(Debug)]
pub struct Bench {
    /// Where files may be put.
    pub directory: PathBuf,
    /// The core on which memory is touched.
    pub near: usize,
    /// Another core. The same where there is only one.
    pub far: usize,
}

/// Some figures that are measured together.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What the names of its figures begin with.
    pub names: &'static [&'static str],
    /// Measures them.
    pub measure: fn(&Bench) -> Measured,
}

/// All groups, in the order in which they are measured.
pub const GROUPS: &[Group] = &[
    Group { names: &["open"], measure: open::measure },
    Group { names: &["resume.sparse", "resume.library"], measure: resume::sparse },
    Group { names: &["resume.eager"], measure: resume::eager },
    Group { names: &["fault.same_core", "fault.other_core"], measure: fault::measure },
    Group { names: &["fault.busy"], measure: busy::measure },
    Group { names: &["background.load", "background.threads"], measure: background::load },
    Group { names: &["background.zero"], measure: background::zero },
    Group { names: &["live.blackout", "live.sparse"], measure: live::blackout },
    Group { names: &["live.huge"], measure: live::huge },
    Group { names: &["live.fault"], measure: live_memory::faults },
    Group { names: &["live.total", "live.file", "live.guest"], measure: live::whole },
    Group { names: &["qemu.running", "qemu.native"], measure: qemu::running },
    Group { names: &["qemu.push"], measure: qemu::push },
    Group { names: &["qemu.demand"], measure: qemu::demand },
];

/// Whether a group may have figures whose name begins with one of `wanted`; nothing wanted is everything.
#[must_use]
pub fn selected(group: &Group, wanted: &[String]) -> bool {
    let overlap = |a: &str, b: &str| a.starts_with(b) || b.starts_with(a);
    wanted.is_empty() || group.names.iter().any(|name| wanted.iter().any(|prefix| overlap(name, prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_chosen_by_prefix() {
        let chosen = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|&name| name.into()).collect();
            GROUPS.iter().filter(|group| selected(group, &wanted)).count()
        };
        assert_eq!(chosen(&[]), GROUPS.len());
        assert_eq!(chosen(&["fault"]), 2);
        assert_eq!(chosen(&["fault.same_core.p50"]), 1);
        assert_eq!(chosen(&["fault.busy", "background.zero"]), 2);
        assert_eq!(chosen(&["nothing"]), 0);
    }
}
