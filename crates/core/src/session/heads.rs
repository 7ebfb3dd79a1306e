//! What the headers of stored envelopes say, remembered: a table has many values for each header.

use std::rc::Rc;

use lru::LruCache;

use crate::armor;
use crate::envelope::{Header, Payload, Wrap};
use crate::error::Result;
use crate::policy::Limits;
use crate::stored::{Stored, Value, head};

/// A wrap's key name and KEK id.
pub type Under = (String, String);

/// What a value is, without a key.
pub enum Form {
    /// An envelope with these wraps.
    Envelope(Rc<[Under]>),
    /// The literal form.
    Literal,
    /// Not version 2.
    Other,
}

/// Wraps by header, as stored. Holds no secret.
pub(super) struct Heads(LruCache<Box<[u8]>, Rc<[Under]>>);

impl Default for Heads {
    fn default() -> Self {
        Heads(LruCache::unbounded())
    }
}

impl Heads {
    /// The form of a value; an error for what begins as version 2 and is malformed.
    pub(super) fn form(&mut self, value: Value<'_>, limits: &Limits) -> Result<Form> {
        let known = head(value).and_then(|head| self.0.get(head).map(|wraps| (head.len(), Rc::clone(wraps))));
        if let Some((length, wraps)) = known {
            check_payload(value, length)?;
            return Ok(Form::Envelope(wraps));
        }
        let header = match Stored::parse(value)? {
            Stored::Envelope { header, .. } => header,
            Stored::Literal { .. } => return Ok(Form::Literal),
            Stored::Other(_) => return Ok(Form::Other),
        };
        let under = |wrap: &Wrap<'_>| (wrap.key_name.to_owned(), wrap.kek_id.to_owned());
        let wraps: Rc<[Under]> = Header::parse(&header)?.wraps.iter().map(under).collect();
        if let Some(head) = head(value) {
            while self.0.len() >= limits.cache_entries.max(1) {
                self.0.pop_lru();
            }
            self.0.put(head.into(), Rc::clone(&wraps));
        }
        Ok(Form::Envelope(wraps))
    }
}

/// Checks the part of a value behind a header that is known to be well-formed.
fn check_payload(value: Value<'_>, head: usize) -> Result<()> {
    match value {
        Value::Text(text) => armor::decode_payload(&text[head + 1..]).map(drop)?,
        Value::Bytes(bytes) => Payload::parse(&bytes[head..]).map(drop)?,
    }
    Ok(())
}
