//! What the headers of stored envelopes say, remembered: a table has many values for each header.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use crate::armor;
use crate::cache::{Bounded, ByCommitment, OpenedCache, OpenedKey};
use crate::envelope::{Header, Payload, Wrap};
use crate::error::Result;
use crate::policy::Limits;
use crate::stored::{Stored, Value, head, text_head};

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

/// A header, and the DEK that it was found to have last.
pub(super) struct SeenHead {
    known: Known,
    /// Keeps no DEK: see [`OpenedCache::get_found`]. In a cell, because what was used last is given out shared.
    opened: RefCell<Weak<OpenedKey>>,
}

impl SeenHead {
    /// The header, decoded.
    pub(super) fn header(&self) -> &Rc<[u8]> {
        &self.known.header
    }

    /// Its DEK, if that is cached.
    #[inline]
    pub(super) fn opened(&self, cache: &mut OpenedCache) -> Option<Rc<OpenedKey>> {
        cache.get_found(self.header(), &mut self.opened.borrow_mut())
    }
}

/// Headers by their stored form. Holds no secret.
#[derive(Default)]
pub(super) struct Heads(Bounded<SeenHead, ByCommitment>);

impl Heads {
    /// The form of a value; an error for what begins as version 2 and is malformed.
    pub(super) fn form(&mut self, value: Value<'_>, limits: &Limits) -> Result<Form> {
        let known = head(value).and_then(|head| self.0.get(head).map(|seen| (head.len(), seen.known.clone())));
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

    /// The header of an armored envelope, if it was seen before, and the armored payload.
    #[inline]
    pub(super) fn armored<'a>(&mut self, stored: &'a [u8]) -> Option<(&SeenHead, &'a [u8])> {
        if let Some(payload) = self.payload_behind_latest(stored) {
            return self.0.latest().map(|(_, seen)| (seen, payload));
        }
        let head = text_head(stored)?;
        let seen = self.0.get(head)?;
        Some((seen, &stored[head.len() + 1..]))
    }

    /// What follows in a text that begins as the envelope that was asked for last: the next value is likely to. That
    /// one may have been a `bytea`.
    #[inline]
    fn payload_behind_latest<'a>(&self, stored: &'a [u8]) -> Option<&'a [u8]> {
        let (head, _) = self.0.latest().filter(|(head, _)| head.starts_with(armor::PREFIX.as_bytes()))?;
        stored.strip_prefix(head)?.strip_prefix(b":")
    }

    /// Wraps of an envelope whose header was seen before; its payload is not looked at.
    pub(super) fn wraps(&mut self, value: Value<'_>) -> Option<Rc<[Under]>> {
        self.0.get(head(value)?).map(|seen| Rc::clone(&seen.known.wraps))
    }

    /// Remembers the header of an envelope.
    pub(super) fn remember(&mut self, value: Value<'_>, header: &[u8], limits: &Limits) -> Result<Known> {
        let under = |wrap: &Wrap<'_>| (wrap.key_name.to_owned(), wrap.kek_id.to_owned());
        let wraps = Header::parse(header)?.wraps.iter().map(under).collect();
        let known = Known { wraps, header: header.into() };
        if let Some(head) = head(value) {
            let seen = SeenHead { known: known.clone(), opened: RefCell::default() };
            self.0.put(head.into(), seen, limits.cache_entries);
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
