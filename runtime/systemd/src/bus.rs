//! One blocking conversation over D-Bus: connect, call, wait for a signal, all before a deadline.
//!
//! The encoding is the library's; the framing around it (<https://dbus.freedesktop.org/doc/dbus-specification.html>,
//! "Authentication Protocol" and "Message Format") is short, and a general connection would bring an executor.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::ser::{SerializeStruct, Serializer};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;
use zbus::wire::serialized::{Context, Data};
use zbus::wire::{self, BE, LE};
use zbus::{DynamicType, ObjectPath, Signature, Type, Variant};

/// Whose services: the host's, or those of the calling user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instance {
    System,
    User,
}

#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("no D-Bus address: {0}")]
    Address(String),
    #[error("connect to D-Bus at {address}")]
    Connect { address: String, source: io::Error },
    #[error("D-Bus refuses the authentication: {0:?}")]
    Refused(String),
    #[error("talk over D-Bus")]
    Io(#[source] io::Error),
    #[error("no answer over D-Bus in time to {0}")]
    Timeout(&'static str),
    #[error("encode for D-Bus: {0}")]
    Encode(String),
    #[error("unreadable D-Bus message: {0}")]
    Decode(String),
    #[error("{method}: {text} ({name})")]
    Answer { method: &'static str, name: String, text: String },
}

/// The answers of systemd's manager are short; what is longer is not one.
const MESSAGE_MAX_BYTES: usize = 1 << 20;
/// Signals that came before the answer they belong to; the oldest are dropped.
const SIGNALS_MAX: usize = 256;

const VERSION: u8 = 1;
const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

// Codes of header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

type Header<'a> = (u8, u8, u8, u8, u32, u32, Vec<(u8, Variant<'a>)>);

pub(crate) struct Bus {
    stream: UnixStream,
    serial: u32,
    signals: VecDeque<Message>,
    deadline: Instant,
    /// A bus between many; a direct line to the manager has neither names nor subscriptions.
    pub(crate) shared: bool,
}

/// One message from the other side.
pub(crate) struct Message {
    kind: u8,
    reply_serial: u32,
    pub(crate) member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
    context: Context,
}

impl Message {
    pub(crate) fn body<T: DeserializeOwned + Type>(&self) -> Result<T, BusError> {
        let data = Data::new(self.body.as_slice(), self.context);
        let read = data.deserialize::<T>().map(|(value, _)| value);
        read.map_err(|e| BusError::Decode(format!("{e} in a body of {:?}", self.signature)))
    }

    /// The text that an error message carries.
    fn text(&self) -> String {
        if self.signature.starts_with('s') {
            self.body::<String>().unwrap_or_default()
        } else {
            String::new()
        }
    }
}

impl Bus {
    /// The bus of the instance; without one, the manager's own socket.
    pub(crate) fn connect(instance: Instance, uid: u32, deadline: Instant) -> Result<Bus, BusError> {
        let (bus, direct) = addresses(instance, uid)?;
        let (stream, shared) = match open(&bus) {
            Ok(stream) => (stream, true),
            Err(error) => match UnixStream::connect(&direct) {
                Ok(stream) => (stream, false),
                // The bus is what a host is expected to have.
                Err(_) => return Err(error),
            },
        };
        let mut bus = Bus { stream, serial: 0, signals: VecDeque::new(), deadline, shared };
        bus.authenticate()?;
        if shared {
            bus.call(&BUS, "Hello", &())?;
        }
        Ok(bus)
    }

    /// A new time by which the calls that follow must be answered.
    pub(crate) fn until(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// By the credentials of the socket. The user is not named: within a user namespace we do not know by which number
    /// the other side knows us.
    fn authenticate(&mut self) -> Result<(), BusError> {
        // All in one piece, as systemd's own clients do it: a message right behind the last word would lie in the reader of
        // systemd's socket until something else comes.
        self.write(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n", "authenticate")?;
        loop {
            let line = self.read_line()?;
            if line.starts_with("OK") {
                return Ok(());
            }
            if !line.starts_with("DATA") {
                return Err(BusError::Refused(line));
            }
        }
    }

    /// Byte by byte: what follows the line is for another reader.
    fn read_line(&mut self) -> Result<String, BusError> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < 512 {
            let mut byte = [0];
            self.read(&mut byte, "authenticate")?;
            line.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Calls a method and waits for its answer.
    pub(crate) fn call<B>(&mut self, to: &Object, method: &'static str, body: &B) -> Result<Message, BusError>
    where
        B: Serialize + DynamicType,
    {
        let serial = self.send(to, method, body)?;
        loop {
            let message = self.receive(method)?;
            match message.kind {
                METHOD_RETURN if message.reply_serial == serial => return Ok(message),
                ERROR if message.reply_serial == serial => {
                    let text = message.text();
                    return Err(BusError::Answer { method, name: message.error, text });
                }
                SIGNAL => {
                    if self.signals.len() == SIGNALS_MAX {
                        self.signals.pop_front();
                    }
                    self.signals.push_back(message);
                }
                _ => {}
            }
        }
    }

    /// The next signal, also one that came while an answer was awaited.
    pub(crate) fn signal(&mut self, what: &'static str) -> Result<Message, BusError> {
        if let Some(message) = self.signals.pop_front() {
            return Ok(message);
        }
        loop {
            let message = self.receive(what)?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }

    fn send<B>(&mut self, to: &Object, method: &'static str, body: &B) -> Result<u32, BusError>
    where
        B: Serialize + DynamicType,
    {
        self.serial += 1;
        let packet = packet(self.serial, to, method, body, self.shared);
        self.write(&packet.map_err(|e| BusError::Encode(e.to_string()))?, method)?;
        Ok(self.serial)
    }

    fn receive(&mut self, what: &'static str) -> Result<Message, BusError> {
        // What every header begins with: byte order, kind, flags, version, sizes of body and list of fields.
        let mut packet = vec![0; 16];
        self.read(&mut packet, what)?;
        let rest = rest_of(&packet)?;
        packet.resize(16 + rest, 0);
        self.read(&mut packet[16..], what)?;
        parse(&packet)
    }

    fn left(&self, what: &'static str) -> Result<std::time::Duration, BusError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(BusError::Timeout(what)) } else { Ok(left) }
    }

    fn read(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), BusError> {
        let mut done = 0;
        while done < buffer.len() {
            self.stream.set_read_timeout(Some(self.left(what)?)).map_err(BusError::Io)?;
            match self.stream.read(&mut buffer[done..]) {
                Ok(0) => return Err(BusError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => done += n,
                Err(e) if again(&e) => {}
                Err(e) => return Err(BusError::Io(e)),
            }
        }
        Ok(())
    }

    fn write(&mut self, mut data: &[u8], what: &'static str) -> Result<(), BusError> {
        while !data.is_empty() {
            self.stream.set_write_timeout(Some(self.left(what)?)).map_err(BusError::Io)?;
            match self.stream.write(data) {
                Ok(n) => data = &data[n..],
                Err(e) if again(&e) => {}
                Err(e) => return Err(BusError::Io(e)),
            }
        }
        Ok(())
    }
}

/// An interruption, or the end of a wait: the deadline decides.
fn again(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Whom a call is for.
pub(crate) struct Object {
    pub(crate) destination: &'static str,
    pub(crate) path: &'static str,
    pub(crate) interface: &'static str,
}

/// The bus itself.
pub(crate) const BUS: Object = Object {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
};

/// A header field's value. The signature of a body is that of a sequence, which is no type, so the library's own variant
/// would put it into parentheses.
enum Field<'a> {
    Value(Variant<'a>),
    Sequence(String),
}

impl Type for Field<'_> {
    const SIGNATURE: &'static Signature = &Signature::Variant;
}

impl Serialize for Field<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Field::Value(value) => value.serialize(serializer),
            Field::Sequence(text) => {
                let mut variant = serializer.serialize_struct("Variant", 2)?;
                variant.serialize_field("signature", &Signature::Signature)?;
                variant.serialize_field("value", text)?;
                variant.end()
            }
        }
    }
}

fn packet<B>(serial: u32, to: &Object, method: &str, body: &B, shared: bool) -> Result<Vec<u8>, zbus::Error>
where
    B: Serialize + DynamicType,
{
    let context = Context::new(LE, 0);
    let signature = body.signature();
    let body = wire::to_bytes(context, body)?;
    let mut fields = vec![
        (PATH, Field::Value(ObjectPath::try_from(to.path)?.into())),
        (INTERFACE, Field::Value(to.interface.into())),
        (MEMBER, Field::Value(method.into())),
    ];
    if shared {
        fields.push((DESTINATION, Field::Value(to.destination.into())));
    }
    if !body.is_empty() {
        fields.push((SIGNATURE, Field::Sequence(signature.to_string_no_parens())));
    }
    let header = (b'l', METHOD_CALL, 0u8, VERSION, body.len() as u32, serial, fields);
    let mut packet = wire::to_bytes(context, &header)?.to_vec();
    packet.resize(packet.len().next_multiple_of(8), 0);
    packet.extend_from_slice(&body);
    Ok(packet)
}

/// Bytes after the first sixteen.
fn rest_of(start: &[u8]) -> Result<usize, BusError> {
    let number = |at: usize| {
        let bytes = [start[at], start[at + 1], start[at + 2], start[at + 3]];
        let number = if start[0] == b'B' { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
        number as usize
    };
    let (body, fields) = (number(4), number(12));
    if body.max(fields) > MESSAGE_MAX_BYTES {
        return Err(BusError::Decode(format!("{} bytes are too long", body.max(fields))));
    }
    Ok(fields.next_multiple_of(8) + body)
}

fn parse(packet: &[u8]) -> Result<Message, BusError> {
    let decode = |e: zbus::Error| BusError::Decode(e.to_string());
    let context = Context::new(if packet[0] == b'B' { BE } else { LE }, 0);
    let data = Data::new(packet, context);
    let ((_, kind, _, _, body_bytes, _, fields), _): (Header<'_>, usize) =
        data.deserialize().map_err(decode)?;
    let mut message = Message {
        kind,
        reply_serial: 0,
        member: String::new(),
        error: String::new(),
        signature: String::new(),
        body: packet[packet.len() - body_bytes as usize..].to_vec(),
        context,
    };
    for (code, value) in fields {
        match (code, value) {
            (MEMBER, Variant::Str(text)) => message.member = text.to_string(),
            (ERROR_NAME, Variant::Str(text)) => message.error = text.to_string(),
            (REPLY_SERIAL, Variant::U32(serial)) => message.reply_serial = serial,
            (SIGNATURE, Variant::Signature(signature)) => message.signature = signature.to_string_no_parens(),
            _ => {}
        }
    }
    Ok(message)
}

/// The address of the bus, and the path of the manager's own socket.
fn addresses(instance: Instance, uid: u32) -> Result<(String, PathBuf), BusError> {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    match instance {
        Instance::System => Ok((
            var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or("unix:path=/run/dbus/system_bus_socket".to_owned()),
            "/run/systemd/private".into(),
        )),
        Instance::User => {
            let run = var("XDG_RUNTIME_DIR").map_or_else(|| format!("/run/user/{uid}").into(), PathBuf::from);
            if !Path::new(&run).is_dir() {
                return Err(BusError::Address(format!(
                    "{} does not exist: no session of this user (loginctl enable-linger makes one)",
                    run.display()
                )));
            }
            let bus = var("DBUS_SESSION_BUS_ADDRESS")
                .unwrap_or_else(|| format!("unix:path={}", run.join("bus").display()));
            Ok((bus, run.join("systemd/private")))
        }
    }
}

/// The first address of the list that answers.
fn open(list: &str) -> Result<UnixStream, BusError> {
    let mut last = BusError::Address(format!("{list:?} has no unix: part"));
    for address in list.split(';') {
        let Some(keys) = address.strip_prefix("unix:") else { continue };
        let value = |name: &str| keys.split(',').find_map(|k| k.strip_prefix(name)).map(unescape);
        let result = match (value("path="), value("abstract=")) {
            (Some(path), _) => UnixStream::connect(path),
            (None, Some(name)) => {
                SocketAddr::from_abstract_name(name).and_then(|a| UnixStream::connect_addr(&a))
            }
            (None, None) => continue,
        };
        match result {
            Ok(stream) => return Ok(stream),
            Err(source) => last = BusError::Connect { address: address.to_owned(), source },
        }
    }
    Err(last)
}

/// `%2d` stands for a byte.
fn unescape(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                out.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => {
                out.push(b'%');
                out.extend_from_slice(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pair(deadline: Duration) -> (Bus, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + deadline;
        (Bus { stream: ours, serial: 0, signals: VecDeque::new(), deadline, shared: true }, theirs)
    }

    fn answer(kind: u8, fields: Vec<(u8, Variant<'_>)>, body: &[u8]) -> Vec<u8> {
        let header: Header<'_> = (b'l', kind, 0, VERSION, body.len() as u32, 9, fields);
        let mut packet = wire::to_bytes(Context::new(LE, 0), &header).unwrap().to_vec();
        packet.resize(packet.len().next_multiple_of(8), 0);
        packet.extend_from_slice(body);
        packet
    }

    #[test]
    fn a_signal_that_overtakes_the_answer_is_kept() {
        let (mut bus, mut peer) = pair(Duration::from_secs(5));
        let body = wire::to_bytes(Context::new(LE, 0), &("done",)).unwrap();
        let text = Variant::from(Signature::try_from("s").unwrap());
        let signal = vec![(MEMBER, Variant::from("JobRemoved")), (SIGNATURE, text)];
        peer.write_all(&answer(SIGNAL, signal, &body)).unwrap();
        peer.write_all(&answer(METHOD_RETURN, vec![(REPLY_SERIAL, Variant::from(1u32))], &[])).unwrap();
        bus.call(&BUS, "Hello", &()).unwrap();
        let signal = bus.signal("wait").unwrap();
        assert_eq!((signal.member.as_str(), signal.body::<String>().unwrap()), ("JobRemoved", "done".into()));
    }

    #[test]
    fn an_error_has_name_and_text() {
        let (mut bus, mut peer) = pair(Duration::from_secs(5));
        let body = wire::to_bytes(Context::new(LE, 0), &("no such thing",)).unwrap();
        let fields = vec![
            (ERROR_NAME, Variant::from("org.example.Wrong")),
            (REPLY_SERIAL, Variant::from(1u32)),
            (SIGNATURE, Variant::from(Signature::try_from("s").unwrap())),
        ];
        peer.write_all(&answer(ERROR, fields, &body)).unwrap();
        let error = bus.call(&BUS, "Hello", &()).err().unwrap();
        assert_eq!(error.to_string(), "Hello: no such thing (org.example.Wrong)");
    }

    #[test]
    fn a_call_is_laid_out_as_the_specification_says() {
        let packet = packet(7, &BUS, "AddMatch", &("a", 1u32), true).unwrap();
        assert_eq!(packet[..4], [b'l', METHOD_CALL, 0, VERSION]);
        let has = |part: &[u8]| packet.windows(part.len()).any(|window| window == part);
        assert!(has(b"\x01g\0\x02su\0"), "the signature of a body has no parentheses: {packet:?}");
        assert_eq!(packet[packet.len() - 12..], [1, 0, 0, 0, b'a', 0, 0, 0, 1, 0, 0, 0]);
        let parsed = parse(&packet).unwrap();
        assert_eq!((parsed.member.as_str(), parsed.signature.as_str()), ("AddMatch", "su"));
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (mut bus, _peer) = pair(Duration::from_millis(50));
        assert!(matches!(bus.call(&BUS, "Hello", &()), Err(BusError::Timeout("Hello"))));
    }

    #[test]
    fn garbage_is_an_error() {
        for bytes in
            [[0u8; 64], [255; 64], *b"lllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll "]
        {
            let (mut bus, mut peer) = pair(Duration::from_secs(5));
            peer.write_all(&bytes).unwrap();
            drop(peer);
            assert!(bus.signal("wait").is_err());
        }
    }

    #[test]
    fn addresses_are_unescaped() {
        assert_eq!(unescape("/run/a%2db%zz%"), "/run/a-b%zz%");
    }
}
