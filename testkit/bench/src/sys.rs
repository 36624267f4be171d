//! The system calls of the floors, defined here once more so that they share nothing with the product.
//!
//! Numbers and layouts: `include/uapi/linux/userfaultfd.h` of Linux 6.18.
#![expect(unsafe_code, reason = "mappings and raw ioctls are what is measured")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use page_units::{HostAddr, PageRun};
use uffd_engine::{Backing, Region};

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// The first pages of a mapping, which has to outlive the engine.
#[must_use]
pub fn region(memory: &Map, run: PageRun) -> Region {
    // SAFETY: private anonymous memory of at least that length (`run` was made for it); every access to it goes by value,
    // and it is dropped after the engine.
    unsafe { Region::from_raw(HostAddr(memory.address(0)), run, Backing::Anonymous) }
}

/// A mapping that is undone on drop.
#[derive(Debug)]
pub struct Map {
    start: *mut u8,
    len: usize,
}

// SAFETY: it owns its memory, and every access through it goes by value or by the kernel.
unsafe impl Send for Map {}
// SAFETY: as above; concurrent touches of the same byte are what a guest does too, and are volatile.
unsafe impl Sync for Map {}

impl Map {
    /// Private memory that nothing is reserved for, without huge pages.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn anonymous(len: usize) -> io::Result<Map> {
        let map = Map::new(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?;
        // SAFETY: the range is this mapping; the advice changes no content.
        check(unsafe { libc::madvise(map.start.cast(), len, libc::MADV_NOHUGEPAGE) })?;
        Ok(map)
    }

    /// A file's first bytes, to be read.
    ///
    /// # Errors
    /// If it can't be mapped.
    pub fn file(file: &File, len: usize) -> io::Result<Map> {
        Map::new(len, libc::PROT_READ, 0, file.as_raw_fd())
    }

    fn new(len: usize, protection: i32, flags: i32, fd: i32) -> io::Result<Map> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_PRIVATE | flags, fd, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Map { start: start.cast(), len }) }
    }

    /// How long it is, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the byte at `offset`, for the kernel.
    #[must_use]
    pub fn address(&self, offset: usize) -> u64 {
        self.start.wrapping_add(offset) as u64
    }

    /// The start, for the calls that take a pointer.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Reads one byte of anonymous memory, or of a file that is not truncated meanwhile.
    ///
    /// # Panics
    /// If it lies outside.
    #[must_use]
    pub fn touch(&self, offset: usize) -> u8 {
        assert!(offset < self.len, "byte {offset} of {}", self.len);
        // SAFETY: the address lies inside the mapping, which lives as long as `self`.
        unsafe { self.start.wrapping_add(offset).read_volatile() }
    }

    /// Writes one byte of anonymous memory.
    ///
    /// # Panics
    /// If it lies outside.
    pub fn put(&self, offset: usize, byte: u8) {
        assert!(offset < self.len, "byte {offset} of {}", self.len);
        // SAFETY: the address lies inside the mapping, which lives as long as `self`; nobody holds a reference.
        unsafe { self.start.wrapping_add(offset).write_volatile(byte) };
    }

    /// Copies one page of this memory to one of `other`.
    ///
    /// # Panics
    /// If either lies outside, or they are the same mapping.
    pub fn copy_page(&self, from: usize, other: &Map, to: usize) {
        assert!(from + PAGE <= self.len && to + PAGE <= other.len && self.start != other.start);
        let (from, to) = (self.start.wrapping_add(from), other.start.wrapping_add(to));
        // SAFETY: both pages lie inside their mappings, which are not the same; nobody holds a reference.
        unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE) };
    }

    /// Reads from a file straight into the mapping.
    ///
    /// # Errors
    /// If the file can't be read, or ends before.
    ///
    /// # Panics
    /// If the bytes lie outside the mapping.
    pub fn read_from(&self, file: &File, at: usize, from: u64, len: usize) -> io::Result<()> {
        assert!(at <= self.len && len <= self.len - at, "{at}+{len} of {}", self.len);
        let mut done = 0;
        while done < len {
            let offset = i64::try_from(from + done as u64).map_err(io::Error::other)?;
            let to = self.start.wrapping_add(at + done).cast();
            // SAFETY: the kernel writes at most `len - done` bytes, all inside the mapping; nobody holds a reference.
            match unsafe { libc::pread(file.as_raw_fd(), to, len - done, offset) } {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += usize::try_from(n).map_err(|_| io::Error::last_os_error())?,
            }
        }
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and `self` is the last that knows it.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const FEATURE_WRITE_FAULTS: u64 = 1;
const FEATURE_OF_SHARED_MEMORY: u64 = 1 << 12;
const EVENT_PAGEFAULT: u8 = 0x12;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WRITES: u64 = 2;
const PROTECT: u64 = 1;

const fn iowr<T>(number: libc::c_ulong) -> libc::c_ulong {
    3 << 30 | (size_of::<T>() as libc::c_ulong) << 16 | (UFFD_API as libc::c_ulong) << 8 | number
}
const _: () = assert!(UFFDIO_API == iowr::<Api>(0x3F));
const _: () = assert!(UFFDIO_REGISTER == iowr::<Register>(0));
const _: () = assert!(UFFDIO_WRITEPROTECT == iowr::<Protect>(6));
const _: () = assert!(UFFDIO_COPY == iowr::<Copy>(3));
const _: () = assert!(size_of::<Message>() == 32);

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// A userfaultfd whose reads wait.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one and registers the whole of `memory` for missing faults.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn register(memory: &Map) -> io::Result<Uffd> {
        let uffd = Uffd::open(0)?;
        uffd.watch(memory.address(0), memory.len() as u64, REGISTER_MODE_MISSING)?;
        Ok(uffd)
    }

    /// Opens one that can tell of writes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn of_writes() -> io::Result<Uffd> {
        Uffd::open(FEATURE_WRITE_FAULTS)
    }

    /// The same, and for memory that is shared (Linux 5.19).
    ///
    /// # Errors
    /// If the kernel has no such thing or does not allow it.
    pub fn of_writes_to_shared() -> io::Result<Uffd> {
        Uffd::open(FEATURE_WRITE_FAULTS | FEATURE_OF_SHARED_MEMORY)
    }

    /// Registers a range for missing faults and for writes to protected pages, and protects it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn arm(&self, start: u64, len: u64) -> io::Result<()> {
        self.watch(start, len, REGISTER_MODE_MISSING | REGISTER_MODE_WRITES)?;
        self.ioctl(UFFDIO_WRITEPROTECT, &mut Protect { start, len, mode: PROTECT })
    }

    /// Takes the protection off a range, and wakes its writers.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn release(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WRITEPROTECT, &mut Protect { start, len, mode: 0 })
    }

    /// Forgets a range.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut Range { start, len })
    }

    fn open(features: u64) -> io::Result<Uffd> {
        // SAFETY: the call takes flags and touches no memory of ours.
        let fd = check_long(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it, and nobody else has it.
        let uffd = Uffd(unsafe { OwnedFd::from_raw_fd(fd) });
        uffd.ioctl(UFFDIO_API, &mut Api { api: UFFD_API, features, ioctls: 0 })?;
        Ok(uffd)
    }

    fn watch(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut Register { start, len, mode, ioctls: 0 })
    }

    /// Waits for a page fault and returns its address.
    ///
    /// # Errors
    /// If reading fails.
    pub fn next_fault(&self) -> io::Result<u64> {
        loop {
            let mut message = Message::default();
            let to: *mut Message = &raw mut message;
            // SAFETY: the kernel writes one message of 32 bytes, which is what `message` is.
            check_long(unsafe { libc::read(self.0.as_raw_fd(), to.cast(), size_of::<Message>()) } as i64)?;
            if message.event == EVENT_PAGEFAULT {
                return Ok(message.address);
            }
        }
    }

    /// Copies `len` bytes to missing pages, and wakes who waits for them.
    ///
    /// # Errors
    /// If the kernel refuses, or copies less.
    pub fn copy(&self, to: u64, from: u64, len: usize) -> io::Result<()> {
        let len = len as u64;
        self.ioctl(UFFDIO_COPY, &mut Copy { to, from, len, mode: 0, copied: 0 })
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        let argument: *mut T = argument;
        // SAFETY: request and argument belong together, as asserted above; what they do to memory is to fill pages
        // of a registered range that are missing, which no reference can point to, or to delay accesses to it.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) })
    }
}

fn check(result: i32) -> io::Result<()> {
    check_long(result.into()).map(|_| ())
}

fn check_long(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Gives a VM a piece of memory.
///
/// # Errors
/// If KVM refuses.
pub fn set_slot(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the guest may write to that memory, which its owner lent for this; it is mapped until the VM is gone.
    unsafe { vm.set_user_memory_region(region) }
}

/// Gives a vCPU its floating-point state.
///
/// # Errors
/// If KVM refuses.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: no process here enables a feature whose state is longer than the structure.
    unsafe { vcpu.set_xsave(xsave) }
}

/// Binds the calling thread to one core.
///
/// # Errors
/// If the core may not be used.
pub fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Two cores that this process may use; the same one twice if there is one.
///
/// # Errors
/// If the kernel does not say.
pub fn two_cores() -> io::Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut cores = (0..CpuSet::count()).filter(|&core| allowed.is_set(core).unwrap_or(false));
    let near = cores.next().ok_or(io::ErrorKind::NotFound)?;
    Ok([near, cores.next().unwrap_or(near)])
}

/// Lets the calling thread run on any core again.
///
/// # Errors
/// If the kernel refuses.
pub fn unpin() -> io::Result<()> {
    let mut set = CpuSet::new();
    (0..CpuSet::count()).try_for_each(|core| set.set(core))?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_mapping_takes_what_a_file_holds() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; PAGE]).unwrap();
        let map = Map::anonymous(2 * PAGE).unwrap();
        map.read_from(&file, PAGE, 0, PAGE).unwrap();
        assert_eq!((map.touch(0), map.touch(PAGE), map.touch(2 * PAGE - 1)), (0, 7, 7));
        map.read_from(&file, 0, 1, PAGE).unwrap_err();
    }

    #[test]
    fn a_fault_is_served() {
        testkit::require!(Userfaultfd);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; PAGE]).unwrap();
        let source = Map::file(&file, PAGE).unwrap();
        let memory = Map::anonymous(4 * PAGE).unwrap();
        let uffd = Uffd::register(&memory).unwrap();
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| memory.touch(2 * PAGE + 5));
            let address = uffd.next_fault().unwrap();
            assert_eq!(address & !(PAGE as u64 - 1), memory.address(2 * PAGE));
            uffd.copy(memory.address(2 * PAGE), source.address(0), PAGE).unwrap();
            assert_eq!(toucher.join().unwrap(), 9);
        });
        assert_eq!(
            uffd.copy(memory.address(2 * PAGE), source.address(0), PAGE).unwrap_err().raw_os_error(),
            Some(libc::EEXIST)
        );
    }
}
