//! The context: a small set of string pairs, stored in clear, bound to DEK and payload.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Malformed, Result};

/// A context in its one canonical encoding: u16 length, then pairs in ascending order of their names' bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Context {
    encoded: Box<[u8]>,
}

/// Bytes of the pairs that the format's u16 can count.
const MAX_PAIR_BYTES: usize = u16::MAX as usize;

impl Context {
    /// The context without pairs.
    pub fn empty() -> Self {
        Context { encoded: Box::new([0, 0]) }
    }

    /// The context with these pairs.
    pub fn from_pairs(pairs: &BTreeMap<String, String>) -> Result<Self> {
        let mut encoded = vec![0, 0];
        // A BTreeMap of strings is in the order of their UTF-8 bytes, which is the canonical order.
        for (name, value) in pairs {
            if name.is_empty() {
                return Err(Error::BadContext("a name is empty"));
            }
            push_string(&mut encoded, name)?;
            push_string(&mut encoded, value)?;
        }
        let length = encoded.len() - 2;
        if length > MAX_PAIR_BYTES {
            return Err(Error::BadContext("it is longer than 65535 bytes"));
        }
        encoded[..2].copy_from_slice(&(length as u16).to_be_bytes());
        Ok(Context { encoded: encoded.into() })
    }

    /// The context in a JSON object of strings, for example `{"tenant": "a"}`.
    pub fn from_json(json: &str) -> Result<Self> {
        // No context fits that is longer; and parsing must not run out of memory.
        if json.len() > 16 * MAX_PAIR_BYTES {
            return Err(Error::BadContext("it is longer than 65535 bytes"));
        }
        serde_json::from_str::<BTreeMap<String, String>>(json)
            .map_err(|_| Error::BadContext("it must be a JSON object whose values are strings"))
            .and_then(|pairs| Self::from_pairs(&pairs))
    }

    /// The context at the start of `bytes`; what follows it is not looked at.
    pub(crate) fn parse_prefix(bytes: &[u8]) -> std::result::Result<Self, Malformed> {
        let too_short = Malformed("context is cut off");
        let length = bytes.first_chunk().map(|length| u16::from_be_bytes(*length)).ok_or(too_short)?;
        let encoded = bytes.get(..2 + usize::from(length)).ok_or(too_short)?;
        let mut rest = &encoded[2..];
        let mut last: Option<&str> = None;
        while !rest.is_empty() {
            let name = take_string(&mut rest)?;
            take_string(&mut rest)?;
            if name.is_empty() {
                return Err(Malformed("context has an empty name"));
            }
            if last.is_some_and(|last| last >= name) {
                return Err(Malformed("context names are not in order"));
            }
            last = Some(name);
        }
        Ok(Context { encoded: encoded.into() })
    }

    /// The canonical encoding, length first.
    pub fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    /// Name and value of every pair, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut rest = &self.encoded[2..];
        std::iter::from_fn(move || {
            (!rest.is_empty()).then(|| (take_string(&mut rest).unwrap_or(""), take_string(&mut rest).unwrap_or("")))
        })
    }

    /// Whether every pair of `other` is in this context.
    pub fn includes(&self, other: &Context) -> bool {
        other.pairs().all(|pair| self.pairs().any(|own| own == pair))
    }

    /// This context with `additions`, none of which may contradict it.
    pub fn with(&self, additions: &Context) -> Result<Self> {
        let mut pairs = self.to_map();
        for (name, value) in additions.pairs() {
            match pairs.insert(name.to_owned(), value.to_owned()) {
                Some(own) if own != value => {
                    return Err(Error::BadContext("it contradicts the key's own context"));
                }
                _ => {}
            }
        }
        Self::from_pairs(&pairs)
    }

    /// The pairs as a map.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.pairs().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_map().entries(self.pairs()).finish()
    }
}

fn push_string(encoded: &mut Vec<u8>, string: &str) -> Result<()> {
    if string.contains('\0') {
        return Err(Error::BadContext("it contains the character U+0000"));
    }
    let length = u16::try_from(string.len()).map_err(|_| Error::BadContext("it is longer than 65535 bytes"))?;
    encoded.extend_from_slice(&length.to_be_bytes());
    encoded.extend_from_slice(string.as_bytes());
    Ok(())
}

fn take_string<'a>(rest: &mut &'a [u8]) -> std::result::Result<&'a str, Malformed> {
    let cut_off = Malformed("context pair is cut off");
    let (length, behind) = rest.split_first_chunk::<2>().ok_or(cut_off)?;
    let (string, behind) = behind.split_at_checked(u16::from_be_bytes(*length).into()).ok_or(cut_off)?;
    *rest = behind;
    let string = std::str::from_utf8(string).map_err(|_| Malformed("context is not UTF-8"))?;
    if string.contains('\0') { Err(Malformed("context contains U+0000")) } else { Ok(string) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn json_order_does_not_matter() {
        let one = Context::from_json(r#"{"b":"2","a":"1"}"#).unwrap();
        let two = Context::from_json(r#"{"a":"1","b":"2"}"#).unwrap();
        assert_eq!(one, two);
        assert_eq!(one.encoded(), b"\0\x0c\0\x01a\0\x011\0\x01b\0\x012");
    }

    #[test]
    fn what_is_not_an_object_of_strings_is_refused() {
        for json in ["[]", "1", r#"{"a":1}"#, r#"{"a":null}"#, r#"{"":"x"}"#, r#"{"a":"\u0000"}"#, ""] {
            assert!(matches!(Context::from_json(json), Err(Error::BadContext(_))), "{json}");
        }
    }

    #[test]
    fn additions_cannot_override() {
        let own = Context::from_json(r#"{"a":"1"}"#).unwrap();
        let more = Context::from_json(r#"{"b":"2"}"#).unwrap();
        let clash = Context::from_json(r#"{"a":"2"}"#).unwrap();
        assert!(own.with(&more).unwrap().includes(&own));
        assert!(own.with(&own).is_ok());
        assert!(matches!(own.with(&clash), Err(Error::BadContext(_))));
    }

    proptest! {
        #[test]
        fn written_contexts_parse_to_themselves(pairs in proptest::collection::btree_map("[^\0]{1,8}", "[^\0]{0,8}", 0..6)) {
            let context = Context::from_pairs(&pairs).unwrap();
            let mut bytes = context.encoded().to_vec();
            bytes.extend_from_slice(b"behind");
            prop_assert_eq!(Context::parse_prefix(&bytes).unwrap(), context.clone());
            prop_assert_eq!(context.to_map(), pairs);
        }

        #[test]
        fn what_parses_is_canonical(bytes in proptest::collection::vec(0u8..4, 0..24)) {
            if let Ok(context) = Context::parse_prefix(&bytes) {
                prop_assert_eq!(&Context::from_pairs(&context.to_map()).unwrap(), &context);
            }
        }
    }
}
