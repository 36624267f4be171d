//! The kernel kills a process when it is about to make a certain system call: seccomp(2), classic BPF over
//! `struct seccomp_data` of linux/seccomp.h. It dies by `SIGSYS`, and without a chance to do anything.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// At which calls.
#[derive(Clone, Debug)]
pub struct Call {
    numbers: Vec<i64>,
    argument: Option<(u32, Is)>,
}

/// What an argument has to be.
#[derive(Clone, Copy, Debug)]
pub enum Is {
    /// This.
    Equal(u64),
    /// Anything but this.
    Not(u64),
    /// This or more.
    AtLeast(u64),
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Where a step of the filter goes on.
#[derive(Clone, Copy)]
enum To {
    Next,
    /// That many steps further.
    Over(usize),
    Kill,
    Allow,
}

impl Call {
    /// One of these (`libc::SYS_...`).
    #[must_use]
    pub fn any_of(numbers: &[i64]) -> Call {
        Call { numbers: numbers.into(), argument: None }
    }

    /// With such an argument at this position, from 0 on.
    #[must_use]
    pub fn with(self, position: u32, is: Is) -> Call {
        Call { argument: Some((position, is)), ..self }
    }

    /// Kills this process there, from now on: in this thread, and in those that it starts.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn kills_this_thread(&self) {
        set(&self.filter()).unwrap();
    }

    /// Kills the program that `command` starts there.
    pub fn kills(&self, command: &mut Command) {
        let filter = self.filter();
        // SAFETY: two system calls, on memory that was made before the process is forked.
        unsafe { command.pre_exec(move || set(&filter)) };
    }

    fn filter(&self) -> Vec<libc::sock_filter> {
        let mut steps = vec![(LOAD, 0, To::Next, To::Next)];
        for (left, number) in (0..self.numbers.len()).rev().zip(&self.numbers) {
            let otherwise = if left == 0 { To::Allow } else { To::Next };
            steps.push((EQUAL, u32::try_from(*number).unwrap_or(u32::MAX), To::Over(left), otherwise));
        }
        if let Some((position, is)) = self.argument {
            // Two words in little-endian order.
            let at = 16 + 8 * position;
            let (Is::Equal(value) | Is::Not(value) | Is::AtLeast(value)) = is;
            let low = u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
            let high = u32::try_from(value >> 32).unwrap_or(0);
            let (same, other) = if matches!(is, Is::Not(_)) { (To::Allow, To::Kill) } else { (To::Kill, To::Allow) };
            steps.push((LOAD, at + 4, To::Next, To::Next));
            match is {
                Is::Equal(_) | Is::Not(_) => steps.push((EQUAL, high, To::Next, other)),
                Is::AtLeast(_) => {
                    steps.extend([(GREATER, high, To::Kill, To::Next), (EQUAL, high, To::Next, To::Allow)]);
                }
            }
            steps.push((LOAD, at, To::Next, To::Next));
            steps.push((if matches!(is, Is::AtLeast(_)) { AT_LEAST } else { EQUAL }, low, same, other));
        }
        let end = steps.len();
        let jump = |at: usize, to: To| {
            let over = match to {
                To::Next => 0,
                To::Over(steps) => steps,
                To::Kill => end - at - 1,
                To::Allow => end - at,
            };
            u8::try_from(over).unwrap_or(u8::MAX)
        };
        let of = |(at, (code, k, yes, no)): (usize, (u32, u32, To, To))| step(code, k, jump(at, yes), jump(at, no));
        let mut filter: Vec<_> = steps.into_iter().enumerate().map(of).collect();
        filter.push(step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0));
        filter.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
        filter
    }
}

fn step(code: u32, k: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt: yes, jf: no, k }
}

/// Allocates nothing: it may be called after a fork.
fn set(filter: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: numbers alone.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel reads the program, which lives until then, and checks it.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    /// What becomes of `dd`, which goes to a place in a file and writes there.
    fn dies(call: &Call, megabytes: u64) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=1M", "count=0"]).arg(format!("seek={megabytes}"));
        dd.arg(format!("of={}", file.path().display()));
        call.kills(&mut dd);
        let output = dd.output().unwrap();
        assert!(output.status.success() || output.status.signal() == Some(libc::SIGSYS), "{output:?}");
        !output.status.success()
    }

    #[test]
    fn it_dies_there_and_nowhere_else() {
        // Which makes the file so long.
        let call = |is| Call::any_of(&[libc::SYS_reboot, libc::SYS_ftruncate]).with(1, is);
        for at in [3, 5000] {
            let bytes = at << 20;
            assert!(dies(&call(Is::Equal(bytes)), at) && !dies(&call(Is::Equal(bytes)), at + 4096));
            assert!(!dies(&call(Is::Not(bytes)), at) && dies(&call(Is::Not(bytes)), at + 4096));
            for (megabytes, dead) in [(at - 1, false), (at, true), (at + 1, true), (at + 4096, true)] {
                assert_eq!(dies(&call(Is::AtLeast(bytes)), megabytes), dead, "{megabytes} of {at}");
            }
        }
        assert!(!dies(&call(Is::AtLeast(5000 << 20)), 904 + 3072), "the lower word alone says nothing");
        assert!(dies(&Call::any_of(&[libc::SYS_ftruncate, libc::SYS_reboot]), 1));
        assert!(!dies(&Call::any_of(&[libc::SYS_reboot]), 1));
    }
}
