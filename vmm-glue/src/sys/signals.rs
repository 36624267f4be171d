//! Signals that are taken without a handler.
#![expect(unsafe_code, reason = "signal calls, each checked by the kernel")]

use std::io;
use std::marker::PhantomData;
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
    #[cfg(feature = "vcpus")]
    pub(crate) fn bits(&self) -> u64 {
        (1..=64).filter(|&signal| self.has(signal)).fold(0, |bits, signal| bits | 1 << (signal - 1))
    }

    /// Blocks them in this thread, and returns what was blocked before.
    pub(crate) fn block(&self) -> io::Result<Signals> {
        let mut old = Signals::of(&[]);
        // SAFETY: both sets are initialised.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const self.0, &raw mut old.0) };
        if error == 0 { Ok(old) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Makes these, and no others, the blocked ones of this thread.
    fn restore(&self) -> io::Result<()> {
        // SAFETY: an initialised set; the old one is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
        if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Those that wait for this thread, or for the process.
    fn pending() -> io::Result<Signals> {
        let mut set = Signals::of(&[]);
        // SAFETY: the kernel writes the set.
        match unsafe { libc::sigpending(&raw mut set.0) } {
            0 => Ok(set),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn has(&self, signal: i32) -> bool {
        // SAFETY: an initialised set.
        unsafe { libc::sigismember(&raw const self.0, signal) == 1 }
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

/// What a write to a file may raise, and what ends a process that has made no other arrangements: beyond `RLIMIT_FSIZE`,
/// and into a pipe that has no reader.
const OF_WRITES: [i32; 2] = [libc::SIGXFSZ, libc::SIGPIPE];

/// As long as it lives, a write that fails is an error and not a signal: in this thread, and for good in those that it
/// starts meanwhile, which inherit what is blocked.
pub(crate) struct WritesFail {
    before: Signals,
    /// Those that were neither blocked nor pending before: what is pending at the end is of our own making.
    ours: Signals,
    /// It belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl WritesFail {
    pub(crate) fn new() -> io::Result<WritesFail> {
        let pending = Signals::pending()?;
        let before = Signals::of(&OF_WRITES).block()?;
        let ours = OF_WRITES.into_iter().filter(|&signal| !before.has(signal) && !pending.has(signal));
        Ok(WritesFail { before, ours: Signals::of(&ours.collect::<Vec<_>>()), _thread: PhantomData })
    }
}

impl Drop for WritesFail {
    fn drop(&mut self) {
        while self.ours.take().is_some() {}
        if let Err(error) = self.before.restore() {
            log::error!("signals stay blocked: {error}");
        }
    }
}
