//! Threads: the core they run on, and how they are interrupted.
#![expect(unsafe_code, reason = "calls that `nix` does not wrap, each checked by the kernel")]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

fn only(core: usize) -> Option<libc::cpu_set_t> {
    // SAFETY: a set of bits, of which none is set.
    let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
    if core >= 8 * size_of_val(&set) {
        return None;
    }
    // SAFETY: the set has such a bit.
    unsafe { libc::CPU_SET(core, &mut set) };
    Some(set)
}

/// Moves another thread to a core. One that has not run yet begins there, instead of waiting for its maker's core
/// first, which costs a new thread more than all else.
pub(crate) fn move_to(thread: &JoinHandle<()>, core: usize) {
    let Some(set) = only(core) else { return };
    // SAFETY: the thread was not joined yet; the kernel reads the set.
    let error = unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&set), &raw const set) };
    if error != 0 {
        // The thread tries for itself, and says what is wrong.
        log::debug!("moving a thread to core {core}: {}", io::Error::from_raw_os_error(error));
    }
}

/// Moves `thread`, the calling one or one that waits for its core, to another core where it may run. It is not bound to
/// anything by that, and nothing depends on whether it succeeds.
pub(crate) fn push_off(thread: Pid, core: usize) {
    let Ok(allowed) = sched_getaffinity(thread) else { return };
    let mut others = allowed;
    // With nowhere else to go the kernel refuses.
    if others.unset(core).is_ok() && sched_setaffinity(thread, &others).is_ok() {
        let back = sched_setaffinity(thread, &allowed);
        log::trace!("thread {thread} was moved off core {core}: {back:?}");
    }
}

/// Sends `signal` to the thread of this process, which exists and has it blocked.
pub(crate) fn kick(thread: i32, signal: i32) {
    let process = nix::unistd::getpid().as_raw();
    // SAFETY: only numbers are passed, and a signal is taken by its thread with `sigtimedwait`.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}
