//! The envelope's text forms: `docs/FORMAT.md`, sections 2 and 6.

use base64_simd::{AsOut, STANDARD};

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
    let mut bytes = Vec::new();
    decode_into(text.as_bytes(), &mut bytes)?;
    Ok(bytes)
}

/// Decodes canonical base64 in place of what `bytes` holds.
fn decode_into(text: &[u8], bytes: &mut Vec<u8>) -> std::result::Result<(), Malformed> {
    let not_canonical = |_| Malformed("not canonical base64");
    let length = STANDARD.decoded_length(text).map_err(not_canonical)?;
    resize(bytes, length).ok_or(Malformed::NO_MEMORY)?;
    STANDARD.decode(text, bytes.as_mut_slice().as_out()).map_err(not_canonical)?;
    Ok(())
}

/// `length` zero bytes, if there is memory: an allocation that fails otherwise ends the process, and with it the server's
/// other sessions.
pub(crate) fn zeroed(length: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    resize(&mut bytes, length)?;
    Some(bytes)
}

/// Gives `bytes` that length, if there is memory. What is in them is not meant to be read.
pub(crate) fn resize(bytes: &mut Vec<u8>, length: usize) -> Option<()> {
    if bytes.len() < length {
        bytes.clear();
        bytes.try_reserve_exact(length).ok()?;
    }
    bytes.resize(length, 0);
    Some(())
}

/// Decodes the base64 of a payload and checks that it can be one.
pub fn decode_payload(text: &str) -> std::result::Result<Vec<u8>, Malformed> {
    let mut bytes = Vec::new();
    decode_payload_into(text.as_bytes(), &mut bytes)?;
    Ok(bytes)
}

/// The same in place of what `bytes` holds.
pub(crate) fn decode_payload_into(text: &[u8], bytes: &mut Vec<u8>) -> std::result::Result<(), Malformed> {
    decode_into(text, bytes)?;
    Payload::parse(bytes).map(drop)
}

/// base64 of `bytes`.
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode_to_string(bytes)
}

/// [`PREFIX`], base64 of a header, and the colon: all of an armored envelope before its payload.
pub fn armored_head(header: &[u8]) -> String {
    format!("{PREFIX}{}:", encode(header))
}

/// Length of an armored envelope with this head and a payload of so many bytes.
pub(crate) fn armored_length(head: &str, payload: usize) -> Result<usize> {
    // base64-simd panics above this.
    const MOST_BYTES: usize = isize::MAX as usize / 4 * 3;
    if payload > MOST_BYTES {
        return Err(Error::TooLarge);
    }
    STANDARD.encoded_length(payload).checked_add(head.len()).ok_or(Error::TooLarge)
}

/// Writes an armored envelope into `out`, which has [`armored_length`] bytes.
pub(crate) fn write_armored(head: &str, payload: &[u8], out: &mut [u8]) {
    let (start, rest) = out.split_at_mut(head.len());
    start.copy_from_slice(head.as_bytes());
    let room = rest.len();
    let written = STANDARD.encode(payload, rest.as_out());
    debug_assert_eq!(written.len(), room);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// Another implementation's verdict, and what it decodes to.
    fn reference(text: &str) -> Option<Vec<u8>> {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.decode(text).ok()
    }

    proptest! {
        #[test]
        fn two_implementations_agree_on_what_is_base64(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            at in any::<proptest::sample::Index>(),
            other in any::<char>(),
            cut in 0usize..6,
        ) {
            let text = encode(&bytes);
            prop_assert_eq!(decode(&text).ok(), Some(bytes));
            let mut changed: Vec<char> = text.chars().collect();
            if !changed.is_empty() {
                let at = at.index(changed.len());
                changed[at] = other;
            }
            changed.truncate(changed.len().saturating_sub(cut));
            let changed: String = changed.into_iter().collect();
            prop_assert_eq!(decode(&changed).ok(), reference(&changed));
        }

        #[test]
        fn the_last_characters_are_as_strict(head in "([A-Za-z0-9+/]{4}){0,20}", tail in "[A-Za-z0-9+/=]{0,5}") {
            let text = head + &tail;
            prop_assert_eq!(decode(&text).ok(), reference(&text));
        }
    }

    #[test]
    fn scratch_memory_is_used_again() {
        let mut bytes = vec![9; 100];
        decode_into(b"AAEC", &mut bytes).unwrap();
        assert_eq!(bytes, [0, 1, 2]);
        assert!(decode_into(b"AAE", &mut bytes).is_err());
    }

    #[test]
    fn one_extra_layer_is_seen() {
        let inner = "kms:v2:AA==:BB==";
        assert_eq!(unwrap_base64(&encode(inner.as_bytes())).as_deref(), Some(inner));
        assert_eq!(unwrap_base64(&encode(encode(inner.as_bytes()).as_bytes())), None);
        assert_eq!(unwrap_base64(inner), None);
    }
}
