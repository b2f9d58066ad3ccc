//! A server made for tests, which misbehaves as servers do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

/// What the server does with a request.
pub(crate) enum Reply {
    Json(u16, Value),
    /// These bytes, and then the connection ends.
    Bytes(Vec<u8>),
    /// These bytes, one after another with so long a pause before each, and then the connection ends.
    Drip(Vec<u8>, Duration),
    /// A body of so many bytes, for as long as somebody reads.
    Flood(u64),
    /// The connection is reset.
    Reset,
    /// Nothing, for so long.
    Silence(Duration),
}

type Handler = dyn Fn(&str, &Value) -> Reply + Send + Sync;

/// Serves at an address of this machine until the test ends; the handler gets path and body.
pub(crate) fn serve(handler: impl Fn(&str, &Value) -> Reply + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let handler: Arc<Handler> = Arc::new(handler);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let handler = Arc::clone(&handler);
            std::thread::spawn(move || talk(stream, &*handler));
        }
    });
    url
}

/// A whole answer with this status, these further headers and this body.
pub(crate) fn answer(status: &str, headers: &str, body: &str) -> Reply {
    let length = body.len();
    Reply::Bytes(format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\n\r\n{body}").into_bytes())
}

/// One request after another on a connection.
fn talk(stream: TcpStream, handler: &Handler) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut writer = stream;
    loop {
        let mut first = String::new();
        reader.read_line(&mut first).ok().filter(|read| *read > 0)?;
        let path = first.split(' ').nth(1)?.to_owned();
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        match handler(&path, &serde_json::from_slice(&body).unwrap_or(Value::Null)) {
            Reply::Json(status, value) => {
                let text = value.to_string();
                let length = text.len();
                write!(writer, "HTTP/1.1 {status} Said\r\ncontent-length: {length}\r\n\r\n{text}").ok()?;
            }
            Reply::Bytes(bytes) => {
                writer.write_all(&bytes).ok()?;
                return None;
            }
            Reply::Drip(bytes, pause) => {
                for byte in bytes {
                    std::thread::sleep(pause);
                    writer.write_all(&[byte]).ok()?;
                }
                return None;
            }
            Reply::Flood(length) => {
                write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").ok()?;
                let piece = vec![b' '; 1 << 16];
                for _ in 0..length >> 16 {
                    writer.write_all(&piece).ok()?;
                }
                return None;
            }
            Reply::Reset => {
                // What is unread when a socket is closed is answered by a reset.
                drop(reader);
                return None;
            }
            Reply::Silence(time) => std::thread::sleep(time),
        }
    }
}
