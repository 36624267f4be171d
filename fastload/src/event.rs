//! What programs are told (`--json`): one JSON object per line on standard output, as `docs/json.md` describes.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::output;

/// The version of the schema. A field or an event that is new does not change it; one that means something else does.
const SCHEMA: u32 = 1;

static BEGUN: OnceLock<Instant> = OnceLock::new();
static COMMAND: OnceLock<&str> = OnceLock::new();

/// The one clock of a run starts.
pub(crate) fn begin() {
    // It is the first call.
    let _ = BEGUN.set(Instant::now());
}

/// From here on every event has the name of this command.
pub(crate) fn name(command: &'static str) {
    // The same.
    let _ = COMMAND.set(command);
}

/// How long the program has been at work.
pub(crate) fn now() -> Duration {
    BEGUN.get().map(Instant::elapsed).unwrap_or_default()
}

/// One line.
#[derive(Clone, Debug)]
pub(crate) struct Event(Map<String, Value>);

impl Event {
    /// An event that happens now.
    pub(crate) fn new(name: &str) -> Event {
        // Of a command line that is wrong no command is known.
        let command = COMMAND.get().copied();
        let mut fields = Map::new();
        fields.insert("schema".into(), json!(SCHEMA));
        fields.insert("command".into(), json!(command));
        fields.insert("event".into(), json!(name));
        fields.insert("at_us".into(), json!(u64::try_from(now().as_micros()).unwrap_or(u64::MAX)));
        Event(fields)
    }

    /// With the fields of an object. A path belongs into [`Event::path`].
    pub(crate) fn with(mut self, fields: impl Serialize) -> Event {
        match serde_json::to_value(fields) {
            Ok(Value::Object(more)) => self.0.extend(more),
            // Nothing that is given here is anything else.
            Ok(other) => drop(self.0.insert("value".into(), other)),
            Err(error) => drop(self.0.insert("unprintable".into(), json!(error.to_string()))),
        }
        self
    }

    /// With a value that may be large.
    pub(crate) fn value(mut self, key: &str, value: Value) -> Event {
        self.0.insert(key.into(), value);
        self
    }

    /// With a path. One that is not UTF-8 has its bytes as well.
    pub(crate) fn path(mut self, key: &str, path: impl AsRef<OsStr>) -> Event {
        put_path(&mut self.0, key, path.as_ref());
        self
    }

    pub(crate) fn print(&self) -> io::Result<()> {
        output::print(&(serde_json::to_string(&self.0)? + "\n"))
    }
}

fn put_path(fields: &mut Map<String, Value>, key: &str, path: &OsStr) {
    fields.insert(key.into(), json!(path.to_string_lossy()));
    if path.to_str().is_none() {
        let mut hex = String::new();
        for byte in path.as_bytes() {
            // Writing into a string does not fail.
            let _ = write!(hex, "{byte:02x}");
        }
        fields.insert(format!("{key}_hex"), json!(hex));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_path_of_any_bytes_comes_back(bytes in proptest::collection::vec(1u8.., 1..40)) {
            let event = Event::new("complete").path("file", OsStr::from_bytes(&bytes));
            let line = Value::Object(event.0).to_string();
            prop_assert_eq!(line.lines().count(), 1);
            let read: Value = serde_json::from_str(&line).unwrap();
            let back = match read["file_hex"].as_str() {
                Some(hex) => (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect(),
                None => read["file"].as_str().unwrap().as_bytes().to_vec(),
            };
            prop_assert_eq!(back, bytes);
        }
    }
}
