//! What the destination makes of the stream, message by message.

use std::io::{BufReader, Read, Write};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use qemu_pages::wire::record::{Reader, Record};
use qemu_pages::wire::return_path::Message;

use crate::DEVICES;
use crate::door::{Door, Stream};
use crate::stub::{Habits, LIMIT, Shared, State};

pub(crate) fn say(back: &Mutex<Option<Stream>>, message: &Message) {
    let mut bytes = Vec::new();
    message.push(&mut bytes);
    if let Some(back) = &mut *back.lock().unwrap() {
        // The server may have gone, which is what some tests want.
        let _ = back.write_all(&bytes);
    }
}

pub(crate) struct Conversation {
    pub(crate) shared: Shared,
    pub(crate) back: Arc<Mutex<Option<Stream>>>,
    pub(crate) habits: Habits,
    pub(crate) door: Door,
    pub(crate) fast: Option<(Stream, JoinHandle<()>)>,
    pub(crate) discarded: bool,
}

fn wrong<T>(what: impl Into<String>) -> std::io::Result<T> {
    Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what.into()))
}

fn number<const N: usize>(from: &mut impl Read) -> std::io::Result<u64> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes.iter().fold(0, |all, byte| (all << 8) | u64::from(*byte)))
}

fn bytes(from: &mut impl Read, length: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn name(from: &mut impl Read) -> std::io::Result<String> {
    let length = number::<1>(from)?;
    Ok(String::from_utf8(bytes(from, length)?).unwrap())
}

impl Conversation {
    pub(crate) fn run(&mut self, from: &mut impl Read) -> std::io::Result<()> {
        let mut ram = None;
        let mut records = Reader::new();
        if self.habits.resumes_with.is_none() {
            if number::<4>(from)? != 0x5145_564d || number::<4>(from)? != 3 || number::<1>(from)? != 7 {
                return wrong("no header");
            }
            let length = number::<4>(from)?;
            bytes(from, length)?;
        }
        loop {
            match number::<1>(from)? {
                0 => {
                    let mut state = self.shared.0.lock().unwrap();
                    if !state.loaded {
                        return wrong("the end before the devices were loaded");
                    }
                    state.ended = true;
                    // With preempt, QEMU waits for every page that it has asked for.
                    let waiting = |state: &State| state.requested.iter().any(|page| !has(state, page));
                    while self.habits.preempt && waiting(&state) {
                        let (again, late) = self.shared.1.wait_timeout(state, LIMIT).unwrap();
                        if late.timed_out() {
                            return wrong("the end, but a page that was asked for did not come");
                        }
                        state = again;
                    }
                    drop(state);
                    self.shared.1.notify_all();
                    if !self.habits.never_ends {
                        say(&self.back, &Message::Shut(0));
                        return Ok(());
                    }
                }
                1 => {
                    let id = number::<4>(from)?;
                    if id == 0 || name(from)? != "ram" || number::<8>(from)? != 4 {
                        return wrong("a strange section");
                    }
                    ram = Some(id);
                    self.blocks(from)?;
                    self.footer(from, id)?;
                }
                2 | 3 => {
                    let id = number::<4>(from)?;
                    if self.habits.resumes_with.is_some() {
                        ram.get_or_insert(id);
                    }
                    if ram != Some(id) {
                        return wrong("a part of no section");
                    }
                    self.take_records(from, &mut records, false)?;
                    self.footer(from, id)?;
                }
                8 => self.command(from)?,
                other => return wrong(format!("a part of kind {other}")),
            }
        }
    }

    fn footer(&self, from: &mut impl Read, id: u64) -> std::io::Result<()> {
        if number::<1>(from)? != 0x7e || number::<4>(from)? != id {
            return wrong("no footer");
        }
        Ok(())
    }

    fn blocks(&self, from: &mut impl Read) -> std::io::Result<()> {
        let word = number::<8>(from)?;
        assert_eq!(word & 0xfff, 4);
        let mut left = word & !0xfff;
        while left > 0 {
            let (name, length) = (name(from)?, number::<8>(from)?);
            if let Some(pages) = self.habits.huge.get(&name) {
                assert_eq!(number::<8>(from)?, pages * 4096);
            }
            left -= length;
            self.shared.0.lock().unwrap().blocks.insert(name, length / 4096);
        }
        assert_eq!(number::<8>(from)?, 0x10);
        Ok(())
    }

    fn command(&mut self, from: &mut impl Read) -> std::io::Result<()> {
        let (command, length) = (number::<2>(from)?, number::<2>(from)?);
        let payload = bytes(from, length)?;
        match command {
            1 | 5 => {}
            2 => {
                let ping = u32::try_from(number::<4>(&mut payload.as_slice())?).unwrap();
                if ping == 1 || !self.habits.keeps_pongs {
                    say(&self.back, &Message::Pong(ping));
                }
                if ping == 1 && self.habits.preempt {
                    self.open_fast();
                }
            }
            3 => {
                let sizes = self.habits.huge.values().fold(4096, |all, pages| all | (pages * 4096));
                let expected: Vec<u8> = [sizes, 4096].iter().flat_map(|size| size.to_be_bytes()).collect();
                if payload != expected {
                    return wrong(format!("page sizes {payload:?}"));
                }
            }
            6 => self.discarded = true,
            7 => {
                let length = number::<4>(&mut payload.as_slice())?;
                let package = bytes(from, length)?;
                return self.package(&package);
            }
            9 => {
                say(&self.back, &Message::ResumeAck(1));
                let waiting = self.habits.while_loading.clone();
                self.ask_for(&waiting);
            }
            10 => {
                if self.habits.preempt && self.fast.is_some() {
                    return wrong("the second connection came too early");
                }
                let block = name(&mut payload.as_slice())?;
                let have = self.habits.resumes_with.clone().unwrap();
                let mut state = self.shared.0.lock().unwrap();
                state.loaded = true;
                let pages = self.habits.blocks[&block];
                let mut bits = vec![0; usize::try_from(pages.div_ceil(64) * 8).unwrap()];
                for (name, page) in have.keys().filter(|(name, _)| *name == block) {
                    bits[usize::try_from(page / 8).unwrap()] |= 1 << (page % 8);
                    state.pages.insert((name.clone(), *page), have[&(name.clone(), *page)].clone());
                }
                drop(state);
                say(&self.back, &Message::Received { block, bits });
                if self.habits.preempt && self.habits.blocks.len() == 1 {
                    self.open_fast();
                }
            }
            other => return wrong(format!("command {other}")),
        }
        Ok(())
    }

    fn ask_for(&self, pages: &[(String, u64)]) {
        for (block, page) in pages {
            let size = self.habits.huge.get(block).copied().unwrap_or(1);
            let first = page / size * size;
            let mut state = self.shared.0.lock().unwrap();
            state.requested.extend((first..first + size).map(|page| (block.clone(), page)));
            drop(state);
            let length = u32::try_from(size * 4096).unwrap();
            say(&self.back, &Message::Request { block: Some(block.clone()), start: first * 4096, length });
        }
    }

    /// Loads the package in another thread, as QEMU does: pages come meanwhile.
    fn package(&mut self, package: &[u8]) -> std::io::Result<()> {
        if !self.discarded {
            return wrong("LISTEN without a discard: QEMU hangs");
        }
        let mut listen = vec![8, 0, 4, 0, 0];
        listen.extend_from_slice(self.habits.devices.as_deref().unwrap_or(DEVICES));
        listen.extend_from_slice(&[8, 0, 2, 0, 4, 0, 0, 0, 3, 8, 0, 5, 0, 0]);
        if package != listen {
            return wrong("a strange package");
        }
        let (shared, back) = (Arc::clone(&self.shared), Arc::clone(&self.back));
        self.ask_for(&self.habits.while_loading);
        if self.habits.never_loads {
            return Ok(());
        }
        let waiting = self.habits.while_loading.clone();
        std::thread::spawn(move || {
            let mut state = shared.0.lock().unwrap();
            while !state.closed && !waiting.iter().all(|page| has(&state, page)) {
                state = shared.1.wait(state).unwrap();
            }
            state.loaded = true;
            drop(state);
            shared.1.notify_all();
            say(&back, &Message::Pong(3));
        });
        Ok(())
    }

    fn open_fast(&mut self) {
        let stream = self.door.accept();
        let (mut from, shared) = (BufReader::new(stream.again()), Arc::clone(&self.shared));
        let habits = self.habits.clone();
        let thread = std::thread::spawn(move || {
            let mut records = Reader::new();
            let error = take_records(&shared, &habits, &mut from, &mut records, true).err();
            if let Some(error) = error.filter(|error| error.kind() == std::io::ErrorKind::InvalidData) {
                shared.0.lock().unwrap().wrong.get_or_insert(error.to_string());
                shared.1.notify_all();
            }
        });
        self.fast = Some((stream, thread));
    }

    fn take_records(&self, from: &mut impl Read, records: &mut Reader, fast: bool) -> std::io::Result<()> {
        take_records(&self.shared, &self.habits, from, records, fast)
    }
}

fn has(state: &State, page: &(String, u64)) -> bool {
    state.pages.contains_key(page) || state.zeros.contains(page)
}

fn take_records(
    shared: &Shared,
    habits: &Habits,
    from: &mut impl Read,
    records: &mut Reader,
    fast: bool,
) -> std::io::Result<()> {
    let mut page = [0; 4096];
    // The huge page that is being received, and how many of its parts have come.
    let mut open: Option<(String, u64, u64)> = None;
    loop {
        let record = records.next(from, &mut page)?;
        let block = records.block().to_owned();
        let mut state = shared.0.lock().unwrap();
        let index = match record {
            Record::End if open.is_some() => return wrong("the section ends inside a huge page"),
            Record::End => return Ok(()),
            Record::Page(index) | Record::Zero(index) => index.0,
        };
        let limit = state.blocks.get(&block).or(habits.blocks.get(&block)).copied();
        if limit.is_none_or(|limit| index >= limit) {
            return wrong(format!("page {index} of {block}"));
        }
        if has(&state, &(block.clone(), index)) {
            return wrong(format!("page {index} of {block} came twice"));
        }
        if let Some(size) = habits.huge.get(&block) {
            let (name, granule, parts) = open.take().unwrap_or((block.clone(), index / size, 0));
            if (&name, granule) != (&block, index / size) {
                return wrong("two huge pages mixed");
            }
            open = (parts + 1 < *size).then_some((name, granule, parts + 1));
        } else if open.is_some() {
            return wrong("a small page inside a huge one");
        }
        state.bytes += 4096;
        state.order.push((block.clone(), index, fast));
        match record {
            Record::Page(_) => _ = state.pages.insert((block, index), page.to_vec()),
            _ => _ = state.zeros.insert((block, index)),
        }
        drop(state);
        shared.1.notify_all();
    }
}
