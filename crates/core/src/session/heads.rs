//! What the headers of stored envelopes say, remembered: a table has many values for each header.

use std::rc::Rc;

use crate::armor;
use crate::cache::{Bounded, ByCommitment};
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
    /// The header, decoded, and the armored payload of an armored envelope whose header is the one that was asked for last: the
    /// next value is likely to have the same.
    #[inline]
    fn latest<'a>(&self, stored: &'a [u8]) -> Option<(Rc<[u8]>, &'a [u8])> {
        // Those of `bytea` are here too.
        let (head, known) = self.0.latest().filter(|(head, _)| head.starts_with(armor::PREFIX.as_bytes()))?;
        let payload = stored.strip_prefix(head)?.strip_prefix(b":")?;
        Some((Rc::clone(&known.header), payload))
    }

    /// The same of one whose header was seen before.
    #[inline]
    pub(super) fn armored<'a>(&mut self, stored: &'a [u8]) -> Option<(Rc<[u8]>, &'a [u8])> {
        if let Some(latest) = self.latest(stored) {
            return Some(latest);
        }
        let head = armored_head(stored).filter(|head| head.starts_with(armor::PREFIX.as_bytes()))?;
        let known = self.0.get(head)?;
        Some((Rc::clone(&known.header), &stored[head.len() + 1..]))
    }

    /// Wraps of an envelope whose header was seen before; its payload is not looked at.
    pub(super) fn wraps(&mut self, value: Value<'_>) -> Option<Rc<[Under]>> {
        self.0.get(head(value)?).map(|known| Rc::clone(&known.wraps))
    }

    /// Remembers the header of an envelope.
    pub(super) fn remember(&mut self, value: Value<'_>, header: &[u8], limits: &Limits) -> Result<Known> {
        let under = |wrap: &Wrap<'_>| (wrap.key_name.to_owned(), wrap.kek_id.to_owned());
        let wraps = Header::parse(header)?.wraps.iter().map(under).collect();
        let known = Known { wraps, header: header.into() };
        if let Some(head) = head(value) {
            self.0.put(head.into(), known.clone(), limits.cache_entries);
        }
        Ok(known)
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
