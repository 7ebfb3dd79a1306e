//! What the headers of stored envelopes say, remembered: a table has many values for each header.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use crate::armor;
use crate::cache::{Bounded, ByCommitment, OpenedKey};
use crate::envelope::{Header, Payload, Wrap};
use crate::error::Result;
use crate::policy::Limits;
use crate::stored::{Stored, Value, armored_head, head};

/// A wrap's key name and KEK id.
pub(super) type Under = (String, String);

/// What a value is, without a key.
pub(super) enum Form {
    /// An envelope.
    Envelope(Known),
    /// The literal form, and its blob.
    Literal(Vec<u8>),
    /// Not version 2.
    Other,
}

/// What is known of a header.
#[derive(Clone)]
pub(super) struct Known {
    /// Its wraps.
    pub wraps: Rc<[Under]>,
    /// The header, decoded.
    pub header: Rc<[u8]>,
    /// The DEK that it was last found to have, as long as that is cached.
    pub opened: RefCell<Weak<OpenedKey>>,
}

/// Headers by their stored form. Holds no secret.
#[derive(Default)]
pub(super) struct Heads(Bounded<Known, ByCommitment>);

impl Heads {
    /// The form of a value; an error for what begins as version 2 and is malformed.
    pub(super) fn form(&mut self, value: Value<'_>, limits: &Limits) -> Result<Form> {
        let known = head(value).and_then(|head| self.0.get(head).map(|known| (head.len(), known.clone())));
        if let Some((length, known)) = known {
            check_payload(value, length)?;
            return Ok(Form::Envelope(known));
        }
        let header = match Stored::parse(value)? {
            Stored::Envelope { header, .. } => header,
            Stored::Literal { blob, .. } => return Ok(Form::Literal(blob)),
            Stored::Other(_) => return Ok(Form::Other),
        };
        self.remember(value, &header, limits).map(Form::Envelope)
    }
}

impl Heads {
    /// What is known of the header of an armored envelope, if it was seen before; and the armored payload.
    #[inline]
    pub(super) fn armored<'a>(&mut self, stored: &'a [u8]) -> Option<(&Known, &'a [u8])> {
        if let Some(payload) = self.payload_behind_latest(stored) {
            return self.0.latest().map(|(_, known)| (known, payload));
        }
        let head = armored_head(stored).filter(|head| is_armored(head))?;
        let known = self.0.get(head)?;
        Some((known, &stored[head.len() + 1..]))
    }

    /// What follows in a text that begins as the envelope that was asked for last: the next value is likely to.
    #[inline]
    fn payload_behind_latest<'a>(&self, stored: &'a [u8]) -> Option<&'a [u8]> {
        let (head, _) = self.0.latest().filter(|(head, _)| is_armored(head))?;
        stored.strip_prefix(head)?.strip_prefix(b":")
    }

    /// Wraps of an envelope whose header was seen before; its payload is not looked at.
    pub(super) fn wraps(&mut self, value: Value<'_>) -> Option<Rc<[Under]>> {
        self.0.get(head(value)?).map(|known| Rc::clone(&known.wraps))
    }

    /// Remembers the header of an envelope.
    pub(super) fn remember(&mut self, value: Value<'_>, header: &[u8], limits: &Limits) -> Result<Known> {
        let under = |wrap: &Wrap<'_>| (wrap.key_name.to_owned(), wrap.kek_id.to_owned());
        let wraps = Header::parse(header)?.wraps.iter().map(under).collect();
        let known = Known { wraps, header: header.into(), opened: RefCell::default() };
        if let Some(head) = head(value) {
            self.0.put(head.into(), known.clone(), limits.cache_entries);
        }
        Ok(known)
    }
}

/// Whether a header that was seen is an armored one: those of `bytea` are here too.
fn is_armored(head: &[u8]) -> bool {
    head.starts_with(armor::PREFIX.as_bytes())
}

/// Checks the part of a value behind a header that is known to be well-formed.
fn check_payload(value: Value<'_>, head: usize) -> Result<()> {
    match value {
        Value::Text(text) => armor::decode_payload(&text[head + 1..]).map(drop)?,
        Value::Bytes(bytes) => Payload::parse(&bytes[head..]).map(drop)?,
    }
    Ok(())
}
