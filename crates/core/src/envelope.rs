//! The envelope's binary form: `docs/FORMAT.md`, section 1. Parsed once, into views that cannot be wrong.

use std::fmt;

use crate::context::Context;
use crate::error::{Malformed, Result};

pub use vod_tender_aead::{NONCE_BYTES, TAG_BYTES};

/// First bytes of every binary envelope; never the start of UTF-8 text.
pub const MAGIC: [u8; 4] = [0x8f, b'V', b'T', b'2'];
/// HKDF-SHA-256 and AES-256-GCM, the only suite.
pub const SUITE: u8 = 1;
/// Flag bit: the payload is bound to a caller's aad.
pub const FLAG_AAD: u8 = 1;
/// Where the flags byte is.
pub(crate) const FLAGS_AT: usize = 5;
/// Where the context (length, pairs) begins.
const CONTEXT_AT: usize = 6;

/// Bytes of the commitment to the DEK.
pub const COMMITMENT_BYTES: usize = 32;
/// What a payload holds beside the ciphertext.
pub const PAYLOAD_OVERHEAD: usize = NONCE_BYTES + TAG_BYTES;

/// Most bytes in a KEK's name.
pub const MAX_KEY_NAME: usize = 63;
/// Most bytes in a KEK id.
pub const MAX_KEK_ID: usize = 2048;
/// Most bytes in a wrapped DEK.
pub const MAX_WRAPPED_DEK: usize = 4096;

type Parsed<T> = std::result::Result<T, Malformed>;

/// A binary envelope, split into header and payload.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// Everything from magic to commitment.
    pub header: Header<'a>,
    /// Nonce, ciphertext and tag.
    pub payload: Payload<'a>,
}

impl<'a> Envelope<'a> {
    /// Parses a whole binary envelope.
    pub fn parse(bytes: &'a [u8]) -> Parsed<Self> {
        let (header, payload) = Header::parse_prefix(bytes)?;
        Ok(Envelope { header, payload: Payload::parse(payload)? })
    }
}

/// An envelope's header: which keys hold its DEK, and what the payload is bound to.
#[derive(Debug)]
pub struct Header<'a> {
    /// The header as stored.
    pub bytes: &'a [u8],
    /// Whether the payload is bound to an aad.
    pub has_aad: bool,
    /// The context in clear.
    pub context: Context,
    /// At least one; no key name twice.
    pub wraps: Vec<Wrap<'a>>,
    /// What the DEK must derive to.
    pub commitment: &'a [u8; COMMITMENT_BYTES],
}

impl<'a> Header<'a> {
    /// Parses bytes that are a header and nothing more.
    pub fn parse(bytes: &'a [u8]) -> Parsed<Self> {
        let (header, rest) = Self::parse_prefix(bytes)?;
        if rest.is_empty() { Ok(header) } else { Err(Malformed("bytes behind the header")) }
    }

    fn parse_prefix(bytes: &'a [u8]) -> Parsed<(Self, &'a [u8])> {
        let has_aad = match bytes.get(..CONTEXT_AT) {
            Some([m0, m1, m2, m3, suite, flags]) => {
                if [*m0, *m1, *m2, *m3] != MAGIC {
                    return Err(Malformed("no envelope magic"));
                }
                if *suite != SUITE {
                    return Err(Malformed("unknown suite"));
                }
                if flags & !FLAG_AAD != 0 {
                    return Err(Malformed("unknown flags"));
                }
                flags & FLAG_AAD != 0
            }
            _ => return Err(Malformed("header is cut off")),
        };
        let context = Context::parse_prefix(&bytes[CONTEXT_AT..])?;
        let mut rest = &bytes[CONTEXT_AT + context.encoded().len()..];
        let wraps = take_wraps(&mut rest)?;
        let (commitment, payload) = rest.split_first_chunk().ok_or(Malformed("commitment is cut off"))?;
        let header = Header { bytes: &bytes[..bytes.len() - payload.len()], has_aad, context, wraps, commitment };
        Ok((header, payload))
    }

    /// Magic to context: the part that the payload's tag covers.
    pub fn bound_prefix(&self) -> &'a [u8] {
        bound_prefix(self.bytes)
    }

    /// The same header with other wraps: what rewrapping writes.
    pub fn with_wraps(&self, wraps: &[Wrap<'_>]) -> Result<Vec<u8>> {
        write_header(self.has_aad, &self.context, wraps, self.commitment)
    }
}

/// Where the header of a binary envelope ends if it is well-formed: its lengths are followed and nothing is checked, so
/// that it can be compared with headers that were. `None` where it or the payload behind it is cut off.
#[inline]
pub(crate) fn header_length(bytes: &[u8]) -> Option<usize> {
    let long = |at: usize| Some(usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?)));
    let wraps_at = CONTEXT_AT + 2 + long(CONTEXT_AT)?;
    let mut at = wraps_at + 1;
    for _ in 0..*bytes.get(wraps_at)? {
        let kek_id_at = at + 1 + usize::from(*bytes.get(at)?);
        let wrapped_at = kek_id_at + 2 + long(kek_id_at)?;
        at = wrapped_at + 2 + long(wrapped_at)?;
    }
    let end = at + COMMITMENT_BYTES;
    (end + PAYLOAD_OVERHEAD <= bytes.len()).then_some(end)
}

/// Magic to context of bytes that are known to be a header.
#[inline(always)]
pub(crate) fn bound_prefix(header: &[u8]) -> &[u8] {
    let pairs = u16::from_be_bytes([header[CONTEXT_AT], header[CONTEXT_AT + 1]]);
    &header[..CONTEXT_AT + 2 + usize::from(pairs)]
}

/// One wrapped DEK and what it was wrapped under.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Wrap<'a> {
    /// Name under which the reader has the KEK configured.
    pub key_name: &'a str,
    /// The KEK's id in its provider's words.
    pub kek_id: &'a str,
    /// The DEK as the provider encrypted it.
    pub wrapped_dek: &'a [u8],
}

impl fmt::Debug for Wrap<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Wrap({}, {}, {} bytes)", self.key_name, self.kek_id, self.wrapped_dek.len())
    }
}

/// Nonce, ciphertext and tag.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    /// 12 random bytes.
    pub nonce: &'a [u8; NONCE_BYTES],
    /// As long as the plaintext.
    pub ciphertext: &'a [u8],
    /// 16 bytes.
    pub tag: &'a [u8; TAG_BYTES],
}

impl<'a> Payload<'a> {
    /// Parses nonce, ciphertext and tag.
    pub fn parse(bytes: &'a [u8]) -> Parsed<Self> {
        let cut_off = Malformed("payload is cut off");
        let (nonce, rest) = bytes.split_first_chunk().ok_or(cut_off)?;
        let (ciphertext, tag) = rest.split_last_chunk().ok_or(cut_off)?;
        Ok(Payload { nonce, ciphertext, tag })
    }
}

/// Whether `name` can be the name of a KEK.
pub fn is_key_name(name: &str) -> bool {
    (1..=MAX_KEY_NAME).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// Whether `id` can be a KEK id.
pub fn is_kek_id(id: &str) -> bool {
    (1..=MAX_KEK_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Writes a header. An error when the parts do not make a header that [`Header::parse`] accepts.
pub fn write_header(
    has_aad: bool,
    context: &Context,
    wraps: &[Wrap<'_>],
    commitment: &[u8; COMMITMENT_BYTES],
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(64 + context.encoded().len() + 512 * wraps.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.push(SUITE);
    bytes.push(if has_aad { FLAG_AAD } else { 0 });
    bytes.extend_from_slice(context.encoded());
    bytes.push(wraps.len() as u8);
    for wrap in wraps {
        bytes.push(wrap.key_name.len() as u8);
        bytes.extend_from_slice(wrap.key_name.as_bytes());
        push_long(&mut bytes, wrap.kek_id.as_bytes());
        push_long(&mut bytes, wrap.wrapped_dek);
    }
    bytes.extend_from_slice(commitment);
    // What is written must be read again: a provider's id or blob out of bounds ends here, before it is stored.
    let parsed = Header::parse(&bytes)?;
    if parsed.wraps != wraps {
        return Err(Malformed("a wrap does not fit the format").into());
    }
    drop(parsed);
    Ok(bytes)
}

fn push_long(bytes: &mut Vec<u8>, field: &[u8]) {
    bytes.extend_from_slice(&(field.len() as u16).to_be_bytes());
    bytes.extend_from_slice(field);
}

fn take_wraps<'a>(rest: &mut &'a [u8]) -> Parsed<Vec<Wrap<'a>>> {
    let count = take(rest, 1)?[0];
    if count == 0 {
        return Err(Malformed("no wraps"));
    }
    let mut wraps: Vec<Wrap<'a>> = Vec::with_capacity(count.into());
    for _ in 0..count {
        let wrap = take_wrap(rest)?;
        if wraps.iter().any(|other| other.key_name == wrap.key_name) {
            return Err(Malformed("a key name occurs twice"));
        }
        wraps.push(wrap);
    }
    Ok(wraps)
}

fn take_wrap<'a>(rest: &mut &'a [u8]) -> Parsed<Wrap<'a>> {
    let name_length = take(rest, 1)?[0];
    let key_name = ascii(take(rest, name_length.into())?)?;
    if !is_key_name(key_name) {
        return Err(Malformed("bad key name"));
    }
    let kek_id = ascii(take_long(rest)?)?;
    if !is_kek_id(kek_id) {
        return Err(Malformed("bad KEK id"));
    }
    let wrapped_dek = take_long(rest)?;
    if !(1..=MAX_WRAPPED_DEK).contains(&wrapped_dek.len()) {
        return Err(Malformed("bad length of a wrapped DEK"));
    }
    Ok(Wrap { key_name, kek_id, wrapped_dek })
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Parsed<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(length).ok_or(Malformed("header is cut off"))?;
    *rest = behind;
    Ok(taken)
}

fn take_long<'a>(rest: &mut &'a [u8]) -> Parsed<&'a [u8]> {
    let length = take(rest, 2)?;
    take(rest, u16::from_be_bytes([length[0], length[1]]).into())
}

fn ascii(bytes: &[u8]) -> Parsed<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| text.is_ascii()).ok_or(Malformed("a name or id is not ASCII"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn following_the_lengths_finds_the_end_that_parsing_finds(
            keys in proptest::collection::vec("[a-z]{1,8}", 1..4),
            kek_id in "[!-~]{1,40}",
            wrapped in proptest::collection::vec(any::<u8>(), 1..300),
            cut in 0usize..400,
            change in any::<(proptest::sample::Index, u8)>(),
        ) {
            let keys: std::collections::BTreeSet<_> = keys.into_iter().collect();
            let wrap = |key_name| Wrap { key_name, kek_id: &kek_id, wrapped_dek: &wrapped };
            let wraps: Vec<_> = keys.iter().map(|key| wrap(key)).collect();
            let mut bytes = write_header(false, &Context::empty(), &wraps, &[7; 32]).unwrap();
            let end = bytes.len();
            bytes.extend_from_slice(&[0; PAYLOAD_OVERHEAD + 3]);
            prop_assert_eq!(header_length(&bytes), Some(end));
            let (at, byte) = change;
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            // What parses has the same end; what does not may have any within the bytes.
            if let Ok(envelope) = Envelope::parse(&bytes) {
                prop_assert_eq!(header_length(&bytes), Some(envelope.header.bytes.len()));
            }
            prop_assert!(header_length(&bytes).is_none_or(|end| end + PAYLOAD_OVERHEAD <= bytes.len()));
        }
    }

    fn header(has_aad: bool) -> Vec<u8> {
        let context = Context::from_json(r#"{"Application":"vod-tender"}"#).unwrap();
        let wraps = [
            Wrap { key_name: "main", kek_id: "local:0011223344556677", wrapped_dek: &[7; 81] },
            Wrap { key_name: "spare", kek_id: "arn:aws:kms:eu-west-1:1:key/x", wrapped_dek: &[8; 180] },
        ];
        write_header(has_aad, &context, &wraps, &[9; 32]).unwrap()
    }

    #[test]
    fn a_written_header_parses() {
        let bytes = header(true);
        let parsed = Header::parse(&bytes).unwrap();
        assert!(parsed.has_aad);
        assert_eq!(parsed.wraps.len(), 2);
        assert_eq!(parsed.bound_prefix(), &bytes[..8 + 4 + 11 + 10]);
        assert_eq!(parsed.with_wraps(&parsed.wraps).unwrap(), bytes);
    }

    #[test]
    fn truncations_at_every_length_are_refused() {
        let mut bytes = header(false);
        bytes.extend_from_slice(&[1; PAYLOAD_OVERHEAD]);
        assert!(Envelope::parse(&bytes).is_ok());
        for length in 0..bytes.len() {
            assert!(Envelope::parse(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn parts_out_of_bounds_are_not_written() {
        let write = |wraps: &[Wrap<'_>]| write_header(false, &Context::empty(), wraps, &[0; 32]);
        let good = Wrap { key_name: "k", kek_id: "id", wrapped_dek: &[1] };
        assert!(write(&[good]).is_ok());
        assert!(write(&[]).is_err());
        assert!(write(&[good, good]).is_err());
        assert!(write(&[Wrap { wrapped_dek: &[], ..good }]).is_err());
        assert!(write(&[Wrap { wrapped_dek: &[0; 4097], ..good }]).is_err());
        assert!(write(&[Wrap { wrapped_dek: &[0; 65537], ..good }]).is_err());
        assert!(write(&[Wrap { kek_id: "a b", ..good }]).is_err());
        assert!(write(&[Wrap { kek_id: &"x".repeat(2049), ..good }]).is_err());
        assert!(write(&[Wrap { key_name: "", ..good }]).is_err());
        assert!(write(&[Wrap { key_name: "-k", ..good }]).is_err());
        assert!(write(&[Wrap { key_name: &"k".repeat(300), ..good }]).is_err());
    }

    proptest! {
        #[test]
        fn what_parses_is_written_back_as_it_was(
            mut bytes in Just(header(true)),
            at in 0usize..260,
            value in any::<u8>(),
        ) {
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(parsed) = Header::parse(&bytes) {
                prop_assert_eq!(parsed.with_wraps(&parsed.wraps).unwrap(), bytes.clone());
            }
        }

        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::parse(&bytes);
        }
    }
}
