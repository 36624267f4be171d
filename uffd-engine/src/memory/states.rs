//! The state of each granule of a region: one atomic byte, and one path that wins a claim.
//!
//! ```text
//! Missing -> InFlight -> Present            installed
//! Missing -> Zero -> InFlight -> Present    known to be zero; installed only when somebody touches it
//! InFlight -> what it was                   the install did not happen; try again
//! any but Poisoned -> Removed -> InFlight -> Present (as zero)
//! InFlight -> Poisoned                      fail closed
//! ```

use std::io;
use std::sync::atomic::Ordering;

use crate::sys::memory::Table;

/// Where a granule stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// Nobody has brought it yet.
    Missing,
    /// An install is under way.
    InFlight,
    /// The guest has it.
    Present,
    /// It is zero, and not installed.
    Zero,
    /// The guest gave it back: it reads as zero.
    Removed,
    /// Its content is unavailable: any access is an error.
    Poisoned,
}

const STATES: [State; 8] = [
    State::Missing,
    State::InFlight,
    State::Present,
    State::Zero,
    State::Removed,
    State::Poisoned,
    State::Poisoned,
    State::Poisoned,
];
const STATE: u8 = 0b111;
/// A request for it is on its way to the source.
const REQUESTED: u8 = 1 << 3;
/// Somebody stands still until it comes.
const WANTED: u8 = 1 << 4;
/// Set on an InFlight granule when a fault, or the check for completion, relies on the installer to finish the job.
const MET: u8 = 1 << 5;
/// Of an InFlight granule: the state it was claimed in, Missing if it is neither of these.
const WAS: u8 = WAS_ZERO | WAS_REMOVED;
const WAS_ZERO: u8 = 1 << 6;
const WAS_REMOVED: u8 = 1 << 7;

/// A granule's state with its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) state: State,
    pub(crate) requested: bool,
    pub(crate) wanted: bool,
    pub(crate) met: bool,
}

fn decode(byte: u8) -> Entry {
    let has = |mark| byte & mark != 0;
    let state = STATES[usize::from(byte & STATE)];
    Entry { state, requested: has(REQUESTED), wanted: has(WANTED), met: has(MET) }
}

/// Of an InFlight granule.
fn claimed_from(byte: u8) -> State {
    match byte & WAS {
        WAS_ZERO => State::Zero,
        WAS_REMOVED => State::Removed,
        _ => State::Missing,
    }
}

/// The states of a region's granules. Costs no memory where nothing has happened yet.
#[derive(Debug)]
pub(crate) struct StateMap {
    /// Each byte with the bits of `fresh` turned round.
    granules: Table,
    /// What a byte stands for that nobody has touched.
    fresh: u8,
}

impl StateMap {
    pub(crate) fn new(granules: usize) -> io::Result<StateMap> {
        Ok(StateMap { granules: Table::new(granules)?, fresh: State::Missing as u8 })
    }

    /// As [`new`](StateMap::new), but everything is Present.
    pub(crate) fn present_from_the_start(granules: usize) -> io::Result<StateMap> {
        Ok(StateMap { granules: Table::new(granules)?, fresh: State::Present as u8 })
    }

    pub(crate) fn len(&self) -> usize {
        self.granules.len()
    }

    pub(crate) fn get(&self, granule: usize) -> Entry {
        decode(self.byte(granule))
    }

    /// The same, about to be changed: if it is the first look at a page of the table, it is a write (see `update`).
    pub(crate) fn get_to_change(&self, granule: usize) -> Entry {
        let untouched = 0;
        match self.granules[granule].compare_exchange(untouched, untouched, Ordering::AcqRel, Ordering::Acquire) {
            Ok(old) | Err(old) => decode(old ^ self.fresh),
        }
    }

    fn byte(&self, granule: usize) -> u8 {
        self.granules[granule].load(Ordering::Acquire) ^ self.fresh
    }

    /// The granules that are Present: the first of each run, and how many.
    pub(crate) fn present(&self) -> impl Iterator<Item = (usize, usize)> {
        let there = |granule: &usize| self.get(*granule).state == State::Present;
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..self.len()).find(there)?;
            let granules = (first..self.len()).take_while(there).count();
            at = first + granules;
            Some((first, granules))
        })
    }

    /// Missing or Zero becomes InFlight, and the caller is the one who installs it.
    pub(crate) fn claim(&self, granule: usize) -> bool {
        self.change(granule, |state| matches!(state, State::Missing | State::Zero), State::InFlight)
    }

    /// Anything that reads as zero becomes InFlight, and the caller installs zeros.
    pub(crate) fn claim_zero(&self, granule: usize) -> bool {
        self.change(granule, |state| matches!(state, State::Zero | State::Removed), State::InFlight)
    }

    /// What a granule was before it was claimed.
    pub(crate) fn claimed_from(&self, granule: usize) -> State {
        claimed_from(self.byte(granule))
    }

    /// The state of a granule that the caller has claimed; drops the marks, and says what they were.
    pub(crate) fn settle(&self, granule: usize, state: State) -> Entry {
        decode(
            self.replace(granule, |old| {
                state as u8 | if state == State::Missing { old & (WANTED | REQUESTED) } else { 0 }
            }),
        )
    }

    /// A granule that the caller has claimed becomes what it was before. `true` if something was left to the caller
    /// meanwhile: waiters have to be woken, to fault again, and the check for completion has to be repeated.
    pub(crate) fn give_back(&self, granule: usize) -> bool {
        let old = self.replace(granule, |old| claimed_from(old) as u8 | old & (WANTED | REQUESTED));
        old & MET != 0
    }

    fn replace(&self, granule: usize, new: impl Fn(u8) -> u8) -> u8 {
        let there = self.byte(granule);
        match self.update(granule, there, |old| Some(new(old))) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Leaves something to the thread that has claimed the granule; `false` if it is not InFlight any more.
    pub(crate) fn meet(&self, granule: usize) -> bool {
        let there = self.byte(granule);
        let met = |old| (decode(old).state == State::InFlight).then_some(old | MET);
        self.update(granule, there, met).is_ok()
    }

    /// Missing becomes Zero. Answers what it was before.
    pub(crate) fn mark_zero(&self, granule: usize) -> Entry {
        let zero = |old| (decode(old).state == State::Missing).then_some(State::Zero as u8 | old & WANTED);
        self.update(granule, self.fresh, zero).map_or_else(decode, decode)
    }

    /// Anything but InFlight and Poisoned becomes Removed, and nobody wants it any more. Answers what it was: if it was
    /// InFlight, nothing has happened.
    pub(crate) fn remove(&self, granule: usize) -> Entry {
        let keep = |was| matches!(was, State::InFlight | State::Poisoned);
        let removed = |old| (!keep(decode(old).state)).then_some(State::Removed as u8);
        self.update(granule, self.fresh, removed).map_or_else(decode, decode)
    }

    /// Missing becomes InFlight, and the caller poisons it.
    pub(crate) fn claim_missing(&self, granule: usize) -> bool {
        self.change(granule, |state| state == State::Missing, State::InFlight)
    }

    /// Marks a Missing granule as requested and, for a fault, as wanted. `None` if it is not Missing any more;
    /// otherwise whether a request was on its way already.
    pub(crate) fn request(&self, granule: usize, wanted: bool) -> Option<bool> {
        let marks = if wanted { REQUESTED | WANTED } else { REQUESTED };
        let marked = |old| (decode(old).state == State::Missing).then_some(old | marks);
        self.update(granule, self.fresh, marked).ok().map(|old| decode(old).requested)
    }

    /// Forgets that a request was on its way; says whether one was.
    pub(crate) fn unrequest(&self, granule: usize) -> bool {
        self.granules[granule].fetch_and(!REQUESTED, Ordering::AcqRel) & REQUESTED != 0
    }

    fn change(&self, granule: usize, allowed: impl Fn(State) -> bool, to: State) -> bool {
        let changed = |old| {
            let from = decode(old).state;
            let was = match from {
                State::Zero if to == State::InFlight => WAS_ZERO,
                State::Removed if to == State::InFlight => WAS_REMOVED,
                _ => 0,
            };
            allowed(from).then_some(to as u8 | was | old & (REQUESTED | WANTED))
        };
        self.update(granule, self.fresh, changed).is_ok()
    }

    /// The byte, taken to be `expected` at first, becomes what `new` makes of it, if anything. Answers what it was.
    ///
    /// Who may be the first to touch a page of the table expects it to be untouched, and does not look before: reading
    /// maps the kernel's page of zeros, and the write that comes next costs an interrupt on every core where a thread of
    /// this process runs.
    fn update(&self, granule: usize, expected: u8, new: impl Fn(u8) -> Option<u8>) -> Result<u8, u8> {
        let byte = &self.granules[granule];
        let mut old = if new(expected).is_some() { expected } else { self.byte(granule) };
        loop {
            let changed = new(old).ok_or(old)?;
            match byte.compare_exchange_weak(
                old ^ self.fresh,
                changed ^ self.fresh,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(old),
                Err(now) => old = now ^ self.fresh,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{UsageWho, getrusage};

    use super::*;

    #[test]
    fn the_bytes_say_what_they_mean() {
        for state in STATES {
            assert_eq!(STATES[usize::from(state as u8)], state);
        }
    }

    #[test]
    fn one_path_wins_a_claim() {
        let map = StateMap::new(4).unwrap();
        let wins: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..4).filter(|&g| map.claim(g)).count())).collect();
            tries.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(wins, 4);
    }

    #[test]
    fn zero_is_remembered_and_may_still_be_wanted() {
        let map = StateMap::new(2).unwrap();
        assert_eq!(map.request(0, true), Some(false));
        let was = map.mark_zero(0);
        assert!(was.requested && was.wanted);
        assert_eq!(map.get(0), Entry { state: State::Zero, requested: false, wanted: true, met: false });
        assert_eq!(map.request(0, true), None);
        assert!(map.claim_zero(0) && !map.claim_zero(1));
        assert_eq!(map.mark_zero(0).state, State::InFlight);
    }

    #[test]
    fn what_is_present_is_told_in_runs() {
        let map = StateMap::new(6).unwrap();
        for granule in [1, 2, 5] {
            assert!(map.claim(granule));
            map.settle(granule, State::Present);
        }
        assert_eq!(map.present().collect::<Vec<_>>(), [(1, 2), (5, 1)]);
    }

    #[test]
    fn a_map_of_what_is_there_begins_with_everything_present() {
        let map = StateMap::present_from_the_start(3).unwrap();
        assert_eq!(map.present().collect::<Vec<_>>(), [(0, 3)]);
        assert!(!map.claim(0) && !map.claim_missing(0) && map.request(0, true).is_none());
        assert_eq!(map.remove(1).state, State::Present);
        assert!(map.claim_zero(1) && map.meet(1));
        let was = map.settle(1, State::Present);
        assert!(was.met && was.state == State::InFlight);
        assert_eq!(map.get_to_change(2).state, State::Present);
        assert_eq!(map.present().collect::<Vec<_>>(), [(0, 3)]);
    }

    #[test]
    fn removed_stays_removed_until_a_zero_is_installed() {
        let map = StateMap::new(2).unwrap();
        assert_eq!(map.remove(0).state, State::Missing);
        assert!(!map.claim(0), "the old content is gone");
        assert!(map.claim_zero(0));
        assert_eq!(map.remove(0).state, State::InFlight, "an install is under way");
        map.settle(0, State::Present);
        assert_eq!(map.remove(0).state, State::Present);
        assert!(map.claim_missing(1));
        map.settle(1, State::Poisoned);
        assert!(!map.claim(1));
        assert_eq!((map.remove(1).state, map.get(1).state), (State::Poisoned, State::Poisoned));
    }

    #[test]
    fn what_was_claimed_and_given_back_is_what_it_was() {
        let map = StateMap::new(3).unwrap();
        map.mark_zero(1);
        map.remove(2);
        for (granule, was) in [State::Missing, State::Zero, State::Removed].into_iter().enumerate() {
            for met in [false, true] {
                assert!(!map.meet(granule), "nobody has claimed it");
                assert!(map.claim(granule) || map.claim_zero(granule));
                assert!(!met || map.meet(granule));
                assert_eq!(map.give_back(granule), met);
                assert_eq!(map.get(granule), Entry { state: was, requested: false, wanted: false, met: false });
            }
        }
    }

    #[test]
    fn the_first_access_to_a_page_of_the_table_is_a_write() {
        const PAGES: usize = 64;
        let accesses: [fn(&StateMap, usize); 7] = [
            |map, at| assert_eq!(map.request(at, false), Some(false)),
            |map, at| assert_eq!(map.get_to_change(at).state, State::Missing),
            |map, at| assert_eq!(map.mark_zero(at).state, State::Missing),
            |map, at| assert!(map.claim(at)),
            |map, at| assert!(map.claim_missing(at)),
            |map, at| assert_eq!(map.remove(at).state, State::Missing),
            // As the loop of a fault does it.
            |map, at| {
                assert_eq!(map.get_to_change(at).state, State::Missing);
                assert_eq!(map.request(at, true), Some(false));
                assert!(map.claim(at));
                map.settle(at, State::Present);
            },
        ];
        let faults = || getrusage(UsageWho::RUSAGE_THREAD).unwrap().minor_page_faults();
        for (number, access) in accesses.iter().enumerate() {
            let map = StateMap::new(PAGES * 4096).unwrap();
            let before = faults();
            (0..PAGES).for_each(|page| access(&map, page * 4096));
            let taken = usize::try_from(faults() - before).unwrap();
            // Two for each page if it was read first.
            assert!(taken < PAGES + PAGES / 2, "access {number}: {taken} faults for {PAGES} pages");
        }
    }

    #[test]
    fn marks_survive_a_failed_install_and_end_with_a_good_one() {
        let map = StateMap::new(1).unwrap();
        assert_eq!(map.request(0, false), Some(false));
        assert_eq!(map.request(0, true), Some(true));
        assert!(map.claim(0));
        map.settle(0, State::Missing);
        assert_eq!(map.get(0), Entry { state: State::Missing, requested: true, wanted: true, met: false });
        assert!(map.claim(0));
        let was = map.settle(0, State::Present);
        assert!(was.wanted && was.requested);
        assert_eq!(map.get(0), Entry { state: State::Present, requested: false, wanted: false, met: false });
    }
}
