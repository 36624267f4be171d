//! Huge pages for a test: overcommitted while it runs, and put back.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};

use nix::fcntl::{Flock, FlockArg};

const LIMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// Pages beyond what a holder asks for: while huge pages are being filled, the kernel (6.18) now and then counts one page
/// more as taken or promised than is mapped, and refuses to map huge pages in that moment (seen in 3 of 100 runs
/// of three tests side by side: 9 for 8). The limit costs nothing; a page beyond it does.
const SLACK: u64 = 16;

/// Allows some more 2 MiB pages, until it is dropped.
///
/// Several tests, also of several processes, may hold one at a time. A file says who holds how much, so that what a
/// killed process held is taken back by the next one that comes.
#[derive(Debug)]
pub struct Overcommit {
    pages: u64,
}

impl Overcommit {
    /// Raises `nr_overcommit_hugepages` by `pages`, and by some that cover the kernel's own bookkeeping.
    ///
    /// # Errors
    /// If that is not permitted (it takes root).
    pub fn reserve(pages: u64) -> io::Result<Overcommit> {
        let pages = pages.saturating_add(SLACK);
        change(|holders| holders.push(Holder { process: myself(), pages }))?;
        Ok(Overcommit { pages })
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        let mine = Holder { process: myself(), pages: self.pages };
        let given_back = change(|holders| {
            if let Some(at) = holders.iter().position(|holder| *holder == mine) {
                holders.remove(at);
            }
        });
        if let Err(error) = given_back {
            eprintln!("{LIMIT} could not be put back: {error}");
        }
    }
}

/// A process, told from another one that has its number later by the time at which it began.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    id: u32,
    began: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    process: Process,
    pages: u64,
}

/// When a process began, if there is one of that number: field 22 of its `stat` (proc(5)).
fn began(id: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(19).map(str::to_owned)
}

fn myself() -> Process {
    let id = std::process::id();
    Process { id, began: began(id).unwrap_or_default() }
}

fn parse(line: &str) -> Option<Holder> {
    let mut words = line.split(' ');
    let (id, began, pages) = (words.next()?, words.next()?, words.next()?);
    Some(Holder { process: Process { id: id.parse().ok()?, began: began.to_owned() }, pages: pages.parse().ok()? })
}

/// Changes who holds what, and the limit accordingly.
fn change(by: impl FnOnce(&mut Vec<Holder>)) -> io::Result<()> {
    let path = std::env::temp_dir().join("testkit-hugepages");
    let file: File = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let mut holders: Vec<Holder> = text.lines().filter_map(parse).collect();
    let sum = |holders: &[Holder]| holders.iter().map(|holder| holder.pages).sum::<u64>();
    let held = sum(&holders);
    holders.retain(|holder| began(holder.process.id).as_ref() == Some(&holder.process.began));
    by(&mut holders);

    let limit: u64 = std::fs::read_to_string(LIMIT)?.trim().parse().map_err(io::Error::other)?;
    std::fs::write(LIMIT, limit.saturating_sub(held).saturating_add(sum(&holders)).to_string())?;
    let mut text = String::new();
    for Holder { process: Process { id, began }, pages } in &holders {
        writeln!(text, "{id} {began} {pages}").map_err(io::Error::other)?;
    }
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit() -> u64 {
        std::fs::read_to_string(LIMIT).unwrap().trim().parse().unwrap()
    }

    #[test]
    fn what_was_held_is_put_back() {
        crate::require!(Hugepages);
        let held = Overcommit::reserve(3).unwrap();
        assert!(limit() >= 3);
        // A process that was killed: its pages are taken back by the next one.
        let dead = Process { id: u32::MAX >> 1, began: "1".into() };
        change(|holders| holders.push(Holder { process: dead.clone(), pages: 5 })).unwrap();
        change(|holders| assert!(holders.iter().all(|holder| holder.process != dead))).unwrap();
        drop(held);
    }
}
