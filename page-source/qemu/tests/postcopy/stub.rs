//! A destination that keeps QEMU's rules, and complains where QEMU would hang, exit or lose a page without a word.

use std::collections::{HashMap, HashSet};
use std::io::BufReader;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qemu_pages::wire::return_path::Message;

use crate::conversation::{Conversation, say};
use crate::door::{Door, Stream};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// What it does beyond the ordinary.
#[derive(Clone, Default)]
pub(crate) struct Habits {
    pub(crate) preempt: bool,
    /// Pages in a huge page, for the blocks that have such.
    pub(crate) huge: HashMap<String, u64>,
    /// Faults while it loads its devices.
    pub(crate) while_loading: Vec<(String, u64)>,
    /// Answers no PING of the background.
    pub(crate) keeps_pongs: bool,
    /// What it expects in the package, if not [`crate::DEVICES`].
    pub(crate) devices: Option<Vec<u8>>,
    /// Does not say that its devices are loaded.
    pub(crate) never_loads: bool,
    /// Does not say that it has everything.
    pub(crate) never_ends: bool,
    /// What it has already: it waits to be resumed.
    pub(crate) resumes_with: Option<HashMap<(String, u64), Vec<u8>>>,
    /// The length of each block in pages, where it is resumed.
    pub(crate) blocks: HashMap<String, u64>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pages: HashMap<(String, u64), Vec<u8>>,
    pub(crate) zeros: HashSet<(String, u64)>,
    pub(crate) requested: HashSet<(String, u64)>,
    /// In the order of arrival: block, page, on the second connection.
    pub(crate) order: Vec<(String, u64, bool)>,
    pub(crate) blocks: HashMap<String, u64>,
    pub(crate) loaded: bool,
    pub(crate) ended: bool,
    pub(crate) wrong: Option<String>,
    pub(crate) closed: bool,
    pub(crate) bytes: u64,
}

pub(crate) type Shared = Arc<(Mutex<State>, Condvar)>;

pub(crate) struct Stub {
    shared: Shared,
    back: Arc<Mutex<Option<Stream>>>,
    threads: Vec<JoinHandle<()>>,
    last: Mutex<Option<String>>,
}

impl Stub {
    pub(crate) fn open(door: Door, habits: Habits) -> Stub {
        let shared = Shared::default();
        let back = Arc::new(Mutex::new(None));
        let (theirs, sender) = (Arc::clone(&shared), Arc::clone(&back));
        let thread = std::thread::spawn(move || {
            let main = door.accept();
            *sender.lock().unwrap() = Some(main.again());
            let mut conversation =
                Conversation { shared: Arc::clone(&theirs), back: sender, habits, door, fast: None, discarded: false };
            if let Err(error) = conversation.run(&mut BufReader::with_capacity(1 << 16, main)) {
                let mut state = theirs.0.lock().unwrap();
                if error.kind() == std::io::ErrorKind::InvalidData {
                    state.wrong.get_or_insert(error.to_string());
                }
            }
            theirs.0.lock().unwrap().closed = true;
            theirs.1.notify_all();
            if let Some(fast) = conversation.fast.take() {
                fast.0.close();
                fast.1.join().unwrap();
            }
        });
        Stub { shared, back, threads: vec![thread], last: Mutex::default() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    /// Waits for something to be true.
    pub(crate) fn wait(&self, what: &str, mut is: impl FnMut(&State) -> bool) {
        let until = Instant::now() + LIMIT;
        let mut state = self.state();
        loop {
            assert_eq!(state.wrong, None, "waiting for {what}");
            if is(&state) {
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not happen");
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }

    pub(crate) fn say(&self, message: &Message) {
        say(&self.back, message);
    }

    /// Asks for pages, as QEMU does: the block is named only if it is another one.
    pub(crate) fn request(&self, block: &str, first: u64, pages: u64) {
        let mut last = self.last.lock().unwrap();
        let name = (last.as_deref() != Some(block)).then(|| block.to_owned());
        *last = Some(block.to_owned());
        self.state().requested.extend((first..first + pages).map(|page| (block.to_owned(), page)));
        let length = u32::try_from(pages * 4096).unwrap();
        self.say(&Message::Request { block: name, start: first * 4096, length });
    }

    /// Dies.
    pub(crate) fn close(&self) {
        if let Some(back) = &*self.back.lock().unwrap() {
            back.close();
        }
    }

    pub(crate) fn finish(mut self) -> State {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        std::mem::take(&mut *self.shared.0.lock().unwrap())
    }
}
