//! Runs something with a limit of threads: each further one fails, as on a host whose limit is reached.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;

/// linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`, and what a userfaultfd takes.
const VERSION: u32 = 0x2008_0522;
const CAP_SYS_PTRACE: u32 = 19;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`: the lower and the upper 32 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Calls `run` on a thread of its own, of a user of its own, who may have `more` threads besides this one. It may have a
/// userfaultfd, and nothing else that takes a right.
///
/// # Panics
/// If the caller is not root, or `run` panics.
pub fn few_threads<T: Send>(more: u64, run: impl FnOnce() -> T + Send) -> T {
    // The limit is the process's: one at a time.
    static LIMITED: Mutex<u32> = Mutex::new(0);
    let mut calls = LIMITED.lock();
    *calls += 1;
    let user = (1 << 30) + (std::process::id() << 8) + (*calls & 0xff);
    let before = getrlimit(Resource::RLIMIT_NPROC).unwrap();
    // It counts the threads of a user, and does not hold for root: for nobody else in this process.
    setrlimit(Resource::RLIMIT_NPROC, more + 1, before.1).unwrap();
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            become_user(user).unwrap();
            run()
        });
        thread.join()
    });
    setrlimit(Resource::RLIMIT_NPROC, before.0, before.1).unwrap();
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes this thread, and not the process, that of another user.
fn become_user(user: u32) -> io::Result<()> {
    // SAFETY: numbers alone. Capabilities are a thread's own.
    checked(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into())?;
    // SAFETY: numbers alone. The system call, other than the C library's function, changes this thread only.
    checked(unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) })?;
    let header = Header { version: VERSION, pid: 0 };
    let keep = Data { effective: 1 << CAP_SYS_PTRACE, permitted: 1 << CAP_SYS_PTRACE, inheritable: 0 };
    let data = [keep, Data::default()];
    // SAFETY: the kernel reads both structures.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread::Builder;

    use super::*;

    #[test]
    fn it_may_have_so_many_and_no_more() {
        crate::require!(Root);
        for more in [0u8, 1, 3] {
            few_threads(more.into(), || {
                let meet = Barrier::new(usize::from(more) + 1);
                std::thread::scope(|scope| {
                    for _ in 0..more {
                        Builder::new().spawn_scoped(scope, || _ = meet.wait()).unwrap();
                    }
                    let another = Builder::new().spawn_scoped(scope, || ()).err().unwrap();
                    assert_eq!(another.raw_os_error(), Some(libc::EAGAIN));
                    meet.wait();
                });
            });
        }
        assert!(std::thread::spawn(|| ()).join().is_ok(), "others are as free as before");
    }
}
