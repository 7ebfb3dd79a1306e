//! What an envelope says without being opened.

use serde::Serialize;
use std::collections::BTreeMap;

use crate::envelope::{Header, PAYLOAD_OVERHEAD, SUITE, Wrap};
use crate::error::Result;
use crate::stored::{Stored, Value};

/// What is not secret about a stored value. Serialises to what `envelope_info` shows.
#[derive(Debug, Serialize)]
pub struct Info {
    version: i32,
    /// `envelope`, `literal`, `direct` or `plaintext`.
    form: &'static str,
    #[serde(flatten)]
    envelope: Option<EnvelopeInfo>,
    /// Bytes of the plaintext, which encryption does not hide.
    plaintext_bytes: usize,
    /// Bytes of the value as stored.
    stored_bytes: usize,
}

#[derive(Debug, Serialize)]
struct EnvelopeInfo {
    /// Name of the first KEK.
    key: Option<String>,
    /// Id of the first KEK, as wrapped.
    kek_id: Option<String>,
    suite: Option<&'static str>,
    context: Option<BTreeMap<String, String>>,
    aad: bool,
    wraps: Vec<WrapInfo>,
}

#[derive(Debug, Serialize)]
struct WrapInfo {
    key: Option<String>,
    kek_id: Option<String>,
    wrapped_dek_bytes: usize,
}

/// Describes a value; `version` is what [`crate::session::Session::version`] found for what is not an envelope.
pub fn describe(value: Value<'_>, version: i32) -> Result<Info> {
    let stored_bytes = value.bytes().len();
    let (form, envelope, plaintext_bytes) = match Stored::parse(value)? {
        Stored::Envelope { header, payload } => {
            ("envelope", Some(describe_header(&Header::parse(&header)?)), payload.len() - PAYLOAD_OVERHEAD)
        }
        Stored::Literal { blob, payload } => ("literal", Some(describe_blob(&blob)), payload.len() - PAYLOAD_OVERHEAD),
        Stored::Other(_) if version == 1 => {
            ("direct", None, crate::stored::direct_shape(value)?.len() - PAYLOAD_OVERHEAD)
        }
        Stored::Other(_) => ("plaintext", None, stored_bytes),
    };
    Ok(Info { version, form, envelope, plaintext_bytes, stored_bytes })
}

/// What a stored value needs to be opened, in a form to group by.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct StoredUnder {
    /// 0, 1 or 2; `None` for what begins as version 2 and is malformed.
    pub version: Option<i32>,
    /// Key name and KEK id of each wrap; both `None` for the literal form, which names none.
    pub wraps: Vec<(Option<String>, Option<String>)>,
}

fn describe_header(header: &Header<'_>) -> EnvelopeInfo {
    debug_assert_eq!(header.bytes[4], SUITE);
    let wraps: Vec<_> = header.wraps.iter().map(describe_wrap).collect();
    EnvelopeInfo {
        key: wraps[0].key.clone(),
        kek_id: wraps[0].kek_id.clone(),
        suite: Some("HKDF-SHA-256 + AES-256-GCM"),
        context: Some(header.context.to_map()),
        aad: header.has_aad,
        wraps,
    }
}

fn describe_wrap(wrap: &Wrap<'_>) -> WrapInfo {
    WrapInfo {
        key: Some(wrap.key_name.to_owned()),
        kek_id: Some(wrap.kek_id.to_owned()),
        wrapped_dek_bytes: wrap.wrapped_dek.len(),
    }
}

fn describe_blob(blob: &[u8]) -> EnvelopeInfo {
    let wrap = WrapInfo { key: None, kek_id: None, wrapped_dek_bytes: blob.len() };
    EnvelopeInfo { key: None, kek_id: None, suite: Some("AES-256-GCM"), context: None, aad: false, wraps: vec![wrap] }
}
