//! Signals that are taken without a handler.
#![expect(unsafe_code, reason = "signal calls, each checked by the kernel")]

use std::io;
use std::mem::MaybeUninit;

use page_units::HostAddr;

/// A set of signals.
#[derive(Clone, Copy)]
pub(crate) struct Signals(libc::sigset_t);

impl Signals {
    pub(crate) fn of(signals: &[i32]) -> Signals {
        let mut set = MaybeUninit::uninit();
        // SAFETY: the call initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised just now.
        let mut set = unsafe { set.assume_init() };
        for &signal in signals {
            // SAFETY: an initialised set; a bad number is refused.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        Signals(set)
    }

    /// The set as the kernel has it.
    pub(crate) fn bits(&self) -> u64 {
        // SAFETY: an initialised set.
        let member = |signal: i32| unsafe { libc::sigismember(&raw const self.0, signal) } == 1;
        (1..=64).filter(|&signal| member(signal)).fold(0, |bits, signal| bits | 1 << (signal - 1))
    }

    /// Blocks them in this thread, and returns what was blocked before.
    pub(crate) fn block(&self) -> io::Result<Signals> {
        let mut old = Signals::of(&[]);
        // SAFETY: both sets are initialised.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const self.0, &raw mut old.0) };
        if error == 0 { Ok(old) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Takes one of them, if one is pending for this thread. With it comes the address of the fault, if it has one.
    pub(crate) fn take(&self) -> Option<(i32, HostAddr)> {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: set and time are initialised, and the kernel writes one siginfo.
        let signal = unsafe { libc::sigtimedwait(&raw const self.0, info.as_mut_ptr(), &raw const now) };
        if signal < 0 {
            return None;
        }
        // SAFETY: zeroed, and then written by the kernel.
        let info = unsafe { info.assume_init() };
        // SAFETY: for signals that have no address these bytes are something else, which the caller does not use.
        let address = unsafe { info.si_addr() };
        Some((signal, HostAddr(address.addr() as u64)))
    }
}
