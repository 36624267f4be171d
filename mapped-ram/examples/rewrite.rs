//! Copies a snapshot into a new file with QEMU's layout: zero pages become holes, stale bytes are dropped.
//!
//! `cargo run -p mapped-ram --example rewrite -- IN OUT`
//!
//! The result loads in QEMU: `qemu-system-x86_64 ... -global migration.mapped-ram=on -incoming file:OUT`.

#![expect(clippy::print_stdout, reason = "a program")]

use std::error::Error;

use mapped_ram::{FileRun, Snapshot, Writer};
use page_units::{PageCount, PageIndex, PageRun};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to] = arguments.as_slice() else {
        return Err("usage: rewrite IN OUT".into());
    };
    // Opening reads the description of the snapshot, not its RAM.
    let snapshot = Snapshot::open(from)?;
    for warning in snapshot.warnings() {
        println!("warning: {warning}");
    }
    let writer = Writer::create(to, snapshot.configuration(), snapshot.layout().clone())?;
    for (block, ram) in snapshot.layout().iter() {
        let mut page = PageIndex(0);
        while page.0 < ram.pages().0 {
            // The bitmap tells stored pages from zero pages; here in runs of at most 1 MiB.
            let found = snapshot.load_run(block, page, PageCount(256))?;
            if let FileRun::Stored(pages) = found {
                let run = PageRun::new(block, page, pages);
                let at = snapshot.page_offset(block, page).ok_or("no such page")?;
                writer.write(run, &snapshot.read(at..at + run.len())?)?;
            }
            page += found.pages();
        }
        println!("{}: {} of {} pages stored", ram.name(), writer.stored_pages(block), ram.pages());
    }
    // Device sections, end mark and description are copied as they are. Only now the file appears.
    writer.finish(&snapshot.read(snapshot.tail())?)?;
    println!("{to}: published");
    Ok(())
}
