//! Just enough JSON for the exit record and for a runtime's log: a writer with a fixed layout, a reader of flat objects.

use std::fmt::Write as _;

/// Writes `{"a":1,...}` on one line.
pub struct Writer(String);

impl Default for Writer {
    fn default() -> Writer {
        Writer(String::from("{"))
    }
}

impl Writer {
    fn key(&mut self, key: &str) {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        let _ = write!(self.0, "\"{key}\":");
    }

    pub fn raw(&mut self, key: &str, value: impl std::fmt::Display) -> &mut Self {
        self.key(key);
        let _ = write!(self.0, "{value}");
        self
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        self.0.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => {
                    self.0.push('\\');
                    self.0.push(c);
                }
                c if u32::from(c) < 0x20 => {
                    let _ = write!(self.0, "\\u{:04x}", u32::from(c));
                }
                c => self.0.push(c),
            }
        }
        self.0.push('"');
        self
    }

    pub fn finish(&mut self) -> String {
        self.0.push('}');
        std::mem::take(&mut self.0)
    }
}

/// A scalar of a flat object; nested values are skipped by the reader.
#[derive(Debug, PartialEq, Eq)]
pub enum Value {
    Number(i64),
    Bool(bool),
    Text(String),
    /// null, fraction, array, object.
    Other,
}

/// Calls `each` with every member of the object. `None`: not one well-formed JSON object.
pub fn members(text: &str, mut each: impl FnMut(&str, Value)) -> Option<()> {
    let mut reader = Reader { rest: text.trim_ascii() };
    reader.take(b'{')?;
    if !reader.accept(b'}') {
        loop {
            let key = reader.text()?;
            reader.take(b':')?;
            let value = reader.value(0)?;
            each(&key, value);
            if reader.accept(b',') {
                continue;
            }
            reader.take(b'}')?;
            break;
        }
    }
    reader.space();
    reader.rest.is_empty().then_some(())
}

/// Nesting that unknown members may have; beyond it the text is refused rather than the stack risked.
const MAX_DEPTH: u32 = 16;

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn accept(&mut self, byte: u8) -> bool {
        self.space();
        match self.rest.strip_prefix(char::from(byte)) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        self.accept(byte).then_some(())
    }

    fn value(&mut self, depth: u32) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.space();
        match self.rest.bytes().next()? {
            b'"' => self.text().map(Value::Text),
            b'{' | b'[' => self.skip_nested(depth),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Option<Value> {
        let end = self.rest.find([',', '}', ']', ' ', '\t', '\n', '\r']).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "" => None,
            "true" => Some(Value::Bool(true)),
            "false" => Some(Value::Bool(false)),
            "null" => Some(Value::Other),
            number => match number.parse() {
                Ok(number) => Some(Value::Number(number)),
                Err(_) => number.parse::<f64>().ok().map(|_| Value::Other),
            },
        }
    }

    fn skip_nested(&mut self, depth: u32) -> Option<Value> {
        let object = self.accept(b'{');
        let close = if object {
            b'}'
        } else {
            self.take(b'[')?;
            b']'
        };
        if self.accept(close) {
            return Some(Value::Other);
        }
        loop {
            if object {
                self.text()?;
                self.take(b':')?;
            }
            self.value(depth + 1)?;
            if !self.accept(b',') {
                self.take(close)?;
                return Some(Value::Other);
            }
        }
    }

    fn text(&mut self) -> Option<String> {
        self.take(b'"')?;
        let mut out = String::new();
        let mut chars = self.rest.chars();
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => out.push(match chars.next()? {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'u' => {
                        let (hex, rest) = chars.as_str().split_at_checked(4)?;
                        chars = rest.chars();
                        // Surrogates never come from our writer; they become the replacement character.
                        let code = u32::from_str_radix(hex, 16).ok()?;
                        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
                    }
                    c @ ('"' | '\\' | '/') => c,
                    _ => return None,
                }),
                c => out.push(c),
            }
        }
        self.rest = chars.as_str();
        Some(out)
    }
}
