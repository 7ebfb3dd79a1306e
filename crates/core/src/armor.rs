//! The envelope's text forms: `docs/FORMAT.md`, sections 2 and 6.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::envelope::{Header, MAGIC, Payload};
use crate::error::{Error, Malformed, Result};

/// How every text form of an envelope begins.
pub const PREFIX: &str = "kms:v2:";
/// How base64 of a text that begins with [`PREFIX`] begins (its first six bytes).
const PREFIX_IN_BASE64: &str = "a21zOnYy";
/// Most bytes in the blob of the literal form: AWS KMS's own limit.
const MAX_LITERAL_BLOB: usize = 6144;

/// The two base64 parts of a text form that begins with [`PREFIX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'a> {
    /// base64 of the header, or of an AWS blob.
    pub head: &'a str,
    /// base64 of the payload.
    pub payload: &'a str,
}

impl<'a> Parts<'a> {
    /// Splits a text; `None` when it does not begin with [`PREFIX`].
    pub fn split(text: &'a str) -> Option<std::result::Result<Self, Malformed>> {
        let parts = text.strip_prefix(PREFIX)?.split_once(':');
        Some(parts.map(|(head, payload)| Parts { head, payload }).ok_or(Malformed("no second part")))
    }
}

/// The decoded first part of a text form.
pub enum Head {
    /// An envelope's header.
    Header(Vec<u8>),
    /// The AWS ciphertext blob of the literal form.
    Blob(Vec<u8>),
}

impl Head {
    /// Decodes and checks a first part.
    pub fn decode(head: &str) -> std::result::Result<Self, Malformed> {
        let bytes = decode(head)?;
        if bytes.starts_with(&MAGIC) {
            Header::parse(&bytes)?;
            Ok(Head::Header(bytes))
        } else if (1..=MAX_LITERAL_BLOB).contains(&bytes.len()) {
            Ok(Head::Blob(bytes))
        } else {
            Err(Malformed("bad length of the wrapped DEK"))
        }
    }
}

/// The text inside base64, when `text` is base64 of a text that begins with [`PREFIX`].
pub fn unwrap_base64(text: &str) -> Option<String> {
    if !text.starts_with(PREFIX_IN_BASE64) {
        return None;
    }
    let inner = String::from_utf8(decode(text).ok()?).ok()?;
    inner.starts_with(PREFIX).then_some(inner)
}

/// Decodes canonical base64.
pub fn decode(text: &str) -> std::result::Result<Vec<u8>, Malformed> {
    let room = base64::decoded_len_estimate(text.len());
    let mut bytes = zeroed(room).ok_or(Malformed::NO_MEMORY)?;
    let length = STANDARD.decode_slice(text, &mut bytes).map_err(|_| Malformed("not canonical base64"))?;
    bytes.truncate(length);
    Ok(bytes)
}

/// `length` zero bytes, if there is memory: an allocation that fails otherwise ends the process, and with it the server's
/// other sessions.
pub(crate) fn zeroed(length: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(length).ok()?;
    bytes.resize(length, 0);
    Some(bytes)
}

/// Decodes the base64 of a payload and checks that it can be one.
pub fn decode_payload(text: &str) -> std::result::Result<Vec<u8>, Malformed> {
    let bytes = decode(text)?;
    Payload::parse(&bytes)?;
    Ok(bytes)
}

/// base64 of `bytes`.
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// [`PREFIX`], base64 of a header, and the colon: all of an armored envelope before its payload.
pub fn armored_head(header: &[u8]) -> String {
    format!("{PREFIX}{}:", STANDARD.encode(header))
}

/// Length of an armored envelope with this head and a payload of so many bytes.
pub(crate) fn armored_length(head: &str, payload: usize) -> Result<usize> {
    base64::encoded_len(payload, true).and_then(|length| length.checked_add(head.len())).ok_or(Error::TooLarge)
}

/// Writes an armored envelope into `out`, which has [`armored_length`] bytes.
pub(crate) fn write_armored(head: &str, payload: &[u8], out: &mut [u8]) {
    let (start, rest) = out.split_at_mut(head.len());
    start.copy_from_slice(head.as_bytes());
    let written = STANDARD.encode_slice(payload, rest);
    debug_assert_eq!(written.ok(), Some(rest.len()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_split_at_the_colon() {
        assert_eq!(Parts::split("kms:v2:AA==:BB=="), Some(Ok(Parts { head: "AA==", payload: "BB==" })));
        assert!(matches!(Parts::split("kms:v2:AA=="), Some(Err(_))));
        assert_eq!(Parts::split("kms:v3:AA==:BB=="), None);
    }

    #[test]
    fn base64_that_is_not_canonical_is_refused() {
        for text in ["AA", "AA=", "AB==", "A A=", "AA==\n", "_w==", "AA==AA=="] {
            assert!(decode(text).is_err(), "{text}");
        }
        assert_eq!(decode("AA==").unwrap(), [0]);
    }

    #[test]
    fn one_extra_layer_is_seen() {
        let inner = "kms:v2:AA==:BB==";
        assert_eq!(unwrap_base64(&encode(inner.as_bytes())).as_deref(), Some(inner));
        assert_eq!(unwrap_base64(&encode(encode(inner.as_bytes()).as_bytes())), None);
        assert_eq!(unwrap_base64(inner), None);
    }
}
