//! Which form a stored value has, before any key is involved.

use std::borrow::Cow;

use crate::armor::{self, Head, Parts};
use crate::envelope::{Envelope, MAGIC, PAYLOAD_OVERHEAD, header_length};
use crate::error::{Malformed, Result};

/// A value as the column's type gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// A `text` value, in UTF-8.
    Text(&'a str),
    /// A `bytea` value.
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    /// The value's bytes.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Value::Text(text) => text.as_bytes(),
            Value::Bytes(bytes) => bytes,
        }
    }

    /// Which type it has.
    pub fn kind(self) -> Kind {
        match self {
            Value::Text(_) => Kind::Text,
            Value::Bytes(_) => Kind::Bytes,
        }
    }
}

/// The type of a value, which decides how it is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `text`: armored.
    Text,
    /// `bytea`: binary.
    Bytes,
}

/// A value's form.
pub enum Stored<'a> {
    /// Version 2, an envelope: a header that parses, and a payload of 28 bytes or more.
    Envelope {
        /// The header's bytes.
        header: Cow<'a, [u8]>,
        /// nonce ‖ ciphertext ‖ tag.
        payload: Cow<'a, [u8]>,
    },
    /// Version 2, the literal form.
    Literal {
        /// AWS KMS's ciphertext blob.
        blob: Vec<u8>,
        /// nonce ‖ ciphertext ‖ tag.
        payload: Vec<u8>,
    },
    /// Not version 2.
    Other(Value<'a>),
}

impl<'a> Stored<'a> {
    /// Recognises a value. A value that begins as version 2 and is not well-formed is an error, never plaintext.
    pub fn parse(value: Value<'a>) -> std::result::Result<Self, Malformed> {
        match value {
            Value::Bytes(bytes) if bytes.starts_with(&MAGIC) => {
                let envelope = Envelope::parse(bytes)?;
                let (header, payload) = bytes.split_at(envelope.header.bytes.len());
                Ok(Stored::Envelope { header: header.into(), payload: payload.into() })
            }
            Value::Text(text) => {
                if let Some(parts) = Parts::split(text) {
                    return Self::parse_parts(parts?);
                }
                if let Some(inner) = armor::unwrap_base64(text) {
                    let parts = Parts::split(&inner).expect("the prefix was seen");
                    return Self::parse_parts(parts?);
                }
                Ok(Stored::Other(value))
            }
            Value::Bytes(_) => Ok(Stored::Other(value)),
        }
    }

    fn parse_parts(parts: Parts<'_>) -> std::result::Result<Self, Malformed> {
        let payload = armor::decode_payload(parts.payload)?;
        Ok(match Head::decode(parts.head)? {
            Head::Header(header) => Stored::Envelope { header: header.into(), payload: payload.into() },
            Head::Blob(blob) => Stored::Literal { blob, payload },
        })
    }
}

/// What comes before the payload of an envelope, as it is stored: the same for all values under one wrapped DEK and
/// context. It is not decoded, nor checked: it is to be compared with what was. `None` for what is no envelope, if that
/// can be told without decoding.
pub fn head(value: Value<'_>) -> Option<&[u8]> {
    match value {
        Value::Text(text) => text_head(text.as_bytes()),
        Value::Bytes(bytes) => bytes_head(bytes),
    }
}

/// The same of a stored `text`, which need not be known to be text.
#[inline]
pub(crate) fn text_head(text: &[u8]) -> Option<&[u8]> {
    let behind = text.strip_prefix(armor::PREFIX.as_bytes())?;
    memchr::memchr(b':', behind).map(|length| &text[..armor::PREFIX.len() + length])
}

/// The same of a stored `bytea`.
#[inline]
pub(crate) fn bytes_head(bytes: &[u8]) -> Option<&[u8]> {
    if !bytes.starts_with(&MAGIC) {
        return None;
    }
    header_length(bytes).map(|length| &bytes[..length])
}

/// The sealed bytes of a value that has the shape of version 1: 28 bytes or more, base64 in text.
pub fn direct_shape(value: Value<'_>) -> Result<Cow<'_, [u8]>> {
    let sealed = match value {
        Value::Text(text) => Cow::Owned(armor::decode(text)?),
        Value::Bytes(bytes) => Cow::Borrowed(bytes),
    };
    if sealed.len() < PAYLOAD_OVERHEAD {
        return Err(Malformed("shorter than nonce and tag").into());
    }
    Ok(sealed)
}

/// Whether the value is an envelope in any form that is read. Needs no key; the same for the same bytes, always.
pub fn is_envelope(value: Value<'_>) -> bool {
    matches!(Stored::parse(value), Ok(Stored::Envelope { .. } | Stored::Literal { .. }))
}
