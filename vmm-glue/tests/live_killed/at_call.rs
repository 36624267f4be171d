//! The kernel kills this process when it is about to make a certain system call: seccomp(2), classic BPF over
//! `struct seccomp_data` of linux/seccomp.h.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;

/// At which calls.
pub(crate) struct Call {
    /// One of these numbers.
    pub(crate) numbers: Vec<i64>,
    /// With an argument (its position) that is, or is not, of this value.
    pub(crate) argument: Option<(u32, u64, bool)>,
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn step(code: u32, k: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap(), jt: if_true, jf: if_false, k }
}

/// From now on in this thread, and in those that it starts.
pub(crate) fn die(call: &Call) {
    let number = |number: &i64| u32::try_from(*number).unwrap();
    let mut program = vec![step(LOAD, 0, 0, 0)];
    // One after the other: the last one that does not match jumps to the end.
    let matched = match call.argument {
        Some(_) => 5,
        None => 1,
    };
    let count = u8::try_from(call.numbers.len()).unwrap();
    for (left, of) in (0..count).rev().zip(&call.numbers) {
        let otherwise = if left == 0 { matched } else { 0 };
        program.push(step(EQUAL, number(of), left, otherwise));
    }
    if let Some((position, value, is)) = call.argument {
        // Little-endian words, both of which have to match.
        let low = u32::try_from(value & u64::from(u32::MAX)).unwrap();
        let high = u32::try_from(value >> 32).unwrap();
        let at = 16 + 8 * position;
        let (same, other) = if is { (0, 1) } else { (1, 0) };
        program.push(step(LOAD, at, 0, 0));
        program.push(step(EQUAL, low, 0, if is { 3 } else { 2 }));
        program.push(step(LOAD, at + 4, 0, 0));
        program.push(step(EQUAL, high, same, other));
    }
    program.push(step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0));
    program.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
    let filter = libc::sock_fprog { len: u16::try_from(program.len()).unwrap(), filter: program.as_mut_ptr() };
    // SAFETY: numbers alone.
    let plain = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(plain, 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel reads the program, which lives until then, and checks it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}
