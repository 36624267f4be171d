//! Threads that stand still in the kernel: seen there, instead of sleeping and hoping.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use nix::unistd::{Pid, gettid};

/// What never happens is waited for no longer than this.
const NEVER: Duration = Duration::from_secs(20);

/// A thread whose stand is looked up in `/proc`.
pub(crate) struct Thread<'scope, T> {
    id: Pid,
    handle: ScopedJoinHandle<'scope, T>,
    result: Receiver<()>,
}

impl<'scope, T: Send + 'scope> Thread<'scope, T> {
    pub(crate) fn spawn<'env>(
        scope: &'scope Scope<'scope, 'env>,
        body: impl FnOnce() -> T + Send + 'scope,
    ) -> Thread<'scope, T> {
        let (tell, heard) = channel();
        let (done, result) = channel();
        let handle = scope.spawn(move || {
            tell.send(gettid()).unwrap();
            let value = body();
            drop(done);
            value
        });
        Thread { id: heard.recv().unwrap(), handle, result }
    }

    /// Waits until it sleeps in a page fault of its own code.
    pub(crate) fn wait_for_fault(&self) {
        self.wait_for("-1");
    }

    /// Waits until it sleeps in `madvise`: its event is there to be read then, and is not.
    pub(crate) fn wait_for_discard(&self) {
        self.wait_for(&libc::SYS_madvise.to_string());
    }

    /// Its number of a system call is what `/proc` shows only of a thread that sleeps; `-1` is a fault. It may sleep there
    /// on its way, too, for a lock of the address space.
    fn wait_for(&self, call: &str) {
        let look = |what: &str| std::fs::read_to_string(format!("/proc/self/task/{}/{what}", self.id));
        loop {
            let before = look("syscall").unwrap();
            let place = look("wchan").unwrap();
            if before.split_whitespace().next() == Some(call)
                && !place.contains("down_")
                && !place.contains("rwsem")
                && place != "0"
                && look("syscall").unwrap() == before
            {
                return;
            }
            assert!(!self.handle.is_finished(), "it was to be blocked in {call}");
            std::thread::yield_now();
        }
    }

    /// Its value; if it does not come, `otherwise` has to make it.
    pub(crate) fn heard(self, otherwise: impl FnOnce()) -> T {
        if self.result.recv_timeout(NEVER) == Err(RecvTimeoutError::Timeout) {
            otherwise();
        }
        self.join()
    }

    pub(crate) fn join(self) -> T {
        self.handle.join().unwrap()
    }
}
