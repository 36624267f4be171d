//! What the demo found, as a table or as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::timeline::Timeline;

/// One restore, as numbers. Times are in microseconds from the call on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Restore {
    /// Until the first instruction of the guest.
    pub resume_us: u64,
    /// Until the guest's first fault on a missing page was read. 0 where there is none.
    pub first_fault_us: u64,
    /// Until the last page was in.
    pub complete_us: u64,
    /// Pages that the guest waited for.
    pub demand_faults: u64,
    /// Pages that were loaded without anybody waiting.
    pub background_pages: u64,
    /// Pages that are zero, for which nothing was loaded.
    pub zero_pages: u64,
}

/// The snapshot that was taken while the guest ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Live {
    /// How long no vCPU ran.
    pub blackout_us: u64,
    /// Writes of the guest that waited until the old content was copied away, or until a page of zeros was made.
    pub write_faults: u64,
    /// From the call until the file was durable.
    pub complete_us: u64,
    /// Steps that the guest did meanwhile.
    pub steps_meanwhile: u64,
    /// Bytes that the file takes on disk, divided by the bytes of pages that are not zero.
    pub file_ratio: f64,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Guest RAM.
    pub ram_bytes: u64,
    /// Whether the guest went on where it was saved, and all memory was what it should be, each time.
    pub verified: bool,
    /// Everything was loaded before the guest ran.
    pub eager: Restore,
    /// The guest ran first.
    pub on_demand: Restore,
    /// Saved while it ran.
    pub live: Live,
}

impl Report {
    /// As a table with a timeline, for people.
    #[must_use]
    pub fn table(&self, eager: &Timeline, on_demand: &Timeline) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{:28}{:>14}{:>14}", "", "eager", "on demand");
        let mut row = |name: &str, cell: fn(&Restore) -> String| {
            let _ = writeln!(text, "{name:28}{:>14}{:>14}", cell(&self.eager), cell(&self.on_demand));
        };
        row("time to resume", |restore| time(restore.resume_us));
        row("first fault after", |restore| match restore.first_fault_us {
            0 => "-".into(),
            after => time(after),
        });
        row("time to complete", |restore| time(restore.complete_us));
        row("pages the guest waited for", |restore| restore.demand_faults.to_string());
        row("pages loaded in the background", |restore| restore.background_pages.to_string());
        row("zero pages, not loaded", |restore| restore.zero_pages.to_string());
        let end = self.eager.complete_us.max(self.on_demand.complete_us);
        let _ = write!(text, "\n{}", super::timeline::draw(&[("eager", eager), ("on demand", on_demand)], end));
        let ratio = self.eager.resume_us as f64 / self.on_demand.resume_us.max(1) as f64;
        let _ = writeln!(text, "\nThe guest ran {ratio:.0} times sooner.");
        let live = &self.live;
        let mut row = |name: &str, cell: String| {
            let _ = writeln!(text, "{name:28}{cell:>14}");
        };
        row("\nLive snapshot", String::new());
        row("the guest stood still for", time(live.blackout_us));
        row("write faults served", live.write_faults.to_string());
        row("steps of the guest meanwhile", live.steps_meanwhile.to_string());
        row("time to complete", time(live.complete_us));
        row("file size / non-zero memory", format!("{:.3}", live.file_ratio));
        text.push('\n');
        let verdict = if self.verified {
            "Verified: each time the guest went on where it was saved, and every byte of memory is right."
        } else {
            "NOT VERIFIED: see above."
        };
        let _ = writeln!(text, "{verdict}");
        text
    }
}

/// A time as people read it.
#[must_use]
pub fn time(microseconds: u64) -> String {
    match microseconds {
        0..1_000 => format!("{microseconds} us"),
        1_000..100_000 => format!("{:.1} ms", microseconds as f64 / 1e3),
        100_000..1_000_000 => format!("{:.0} ms", microseconds as f64 / 1e3),
        _ => format!("{:.2} s", microseconds as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        Report {
            ram_bytes: 1 << 30,
            verified: true,
            eager: Restore { resume_us: 250_000, complete_us: 249_000, background_pages: 1000, ..Restore::default() },
            on_demand: Restore {
                resume_us: 1_500,
                first_fault_us: 900,
                complete_us: 310_000,
                demand_faults: 40,
                background_pages: 960,
                zero_pages: 3,
            },
            live: Live { blackout_us: 700, file_ratio: 1.004, ..Live::default() },
        }
    }

    #[test]
    fn the_json_has_exactly_the_documented_keys() {
        let json = serde_json::to_value(sample()).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&json), ["ram_bytes", "verified", "eager", "on_demand", "live"]);
        for way in ["eager", "on_demand"] {
            let expected =
                ["resume_us", "first_fault_us", "complete_us", "demand_faults", "background_pages", "zero_pages"];
            assert_eq!(keys(&json[way]), expected);
        }
        let expected = ["blackout_us", "write_faults", "complete_us", "steps_meanwhile", "file_ratio"];
        assert_eq!(keys(&json["live"]), expected);
        assert_eq!(json["on_demand"]["first_fault_us"], 900);
    }

    #[test]
    fn the_table_says_both() {
        let text = sample().table(&Timeline::default(), &Timeline::default());
        assert!(text.contains("250 ms") && text.contains("1.5 ms") && text.contains("167 times sooner"), "{text}");
        assert!(text.contains("stood still for           700 us\n") && text.contains(" 1.004\n"), "{text}");
        assert!(text.contains("Verified"), "{text}");
        let failed = Report { verified: false, ..sample() };
        assert!(failed.table(&Timeline::default(), &Timeline::default()).contains("NOT VERIFIED"));
    }

    #[test]
    fn times_are_shown_with_a_fitting_unit() {
        assert_eq!([999, 1_000, 123_456, 1_234_567].map(time), ["999 us", "1.0 ms", "123 ms", "1.23 s"]);
    }
}
