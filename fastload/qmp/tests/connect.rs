//! A socket that nobody serves, and one that says too much.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use fastload_qmp::{Qmp, QmpAddress, QmpError};
use nix::sys::socket::{Backlog, listen};
use serde_json::json;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}"#;
/// Far more than it takes.
const LONG: Duration = Duration::from_secs(20);

/// Speaks as QEMU does to one client, with an event before each answer.
fn serve(client: UnixStream) -> std::io::Result<()> {
    let mut to = client.try_clone()?;
    writeln!(to, "{GREETING}")?;
    for line in BufReader::new(client).lines() {
        let command: serde_json::Value = serde_json::from_str(&line?)?;
        writeln!(to, r#"{{"event": "NEWS", "timestamp": {{"seconds": 1, "microseconds": 2}}}}"#)?;
        writeln!(to, "{}", json!({"return": {"did": command["execute"]}, "id": command["id"]}))?;
    }
    Ok(())
}

#[test]
fn a_socket_that_another_program_holds_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let limit = Duration::from_millis(300);
    // This one waits in the queue, and the next one for a place in it.
    let waiting = UnixStream::connect(&path).unwrap();
    for _ in 0..2 {
        let begun = Instant::now();
        let error = Qmp::connect(&path.as_path().into(), limit).unwrap_err();
        assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
        assert!(error.to_string().contains("another program"), "{error}");
        assert!(begun.elapsed() >= limit && begun.elapsed() < LONG);
    }
    // In the queue there is no greeting either.
    drop((listener.accept().unwrap(), waiting));
    let error = Qmp::connect(&path.as_path().into(), limit).unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    let error = Qmp::connect(&QmpAddress::from(dir.path().join("nothing").as_path()), limit).unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
}

/// One whose main thread is held up: its greeting comes from elsewhere.
#[test]
fn a_qemu_that_greets_and_says_nothing_is_told_from_a_socket_that_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut client = listener.accept()?.0;
        writeln!(client, "{}", GREETING.replace("[]", "[\"oob\"]"))?;
        let mut line = String::new();
        BufReader::new(client.try_clone()?).read_line(&mut line)?;
        // It stays there until the client has gone.
        std::io::copy(&mut client, &mut std::io::sink())?;
        Ok::<_, std::io::Error>(line)
    });
    // Enough for a greeting on a busy machine.
    let error = Qmp::connect(&path.as_path().into(), Duration::from_secs(2)).unwrap_err();
    assert!(matches!(error, QmpError::Mute { .. }), "{error}");
    assert!(error.to_string().contains("main thread"), "{error}");
    let line: serde_json::Value = serde_json::from_str(&server.join().unwrap().unwrap()).unwrap();
    assert_eq!(line["arguments"]["enable"], json!(["oob"]));
}

#[test]
fn it_connects_as_soon_as_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let first = UnixStream::connect(&path).unwrap();
    let client = thread::spawn(move || {
        let mut qmp = Qmp::connect(&path.as_path().into(), LONG)?;
        let answer = qmp.execute("query-status", json!({}))?;
        let event = qmp.wait_event(&["NEWS"], LONG)?;
        Ok::<_, QmpError>((qmp.version(), answer, event))
    });
    drop(listener.accept().unwrap());
    drop(first);
    let server = thread::spawn(move || serve(listener.accept()?.0));
    let (version, answer, event) = client.join().unwrap().unwrap();
    assert_eq!((version, &answer["did"]), ((10, 0, 2), &json!("query-status")));
    assert_eq!(event.unwrap().happened, Duration::new(1, 2000));
    // The client is gone.
    let _ = server.join().unwrap();
}
