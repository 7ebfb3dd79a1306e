//! The format's vectors in `tests/vectors/`, which the independent decoder reads too.
// A vector file that cannot be read is a failed test.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::Value as Json;
use vod_tender_core::armor;
use vod_tender_core::dek::Dek;
use vod_tender_core::envelope::{Envelope, Header, Payload};
use vod_tender_core::legacy::LegacyKeys;
use vod_tender_core::seal::{Derived, ExpandedKey};
use vod_tender_core::stored::{Stored, Value, direct_shape, is_envelope};

fn load(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn text<'a>(vector: &'a Json, field: &str) -> &'a str {
    vector[field].as_str().unwrap_or_else(|| panic!("{}: no {field}", vector["name"]))
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn dek(vector: &Json) -> Dek {
    Dek::copied(&unhex(text(vector, "dek_hex"))).unwrap()
}

/// Opens a header and payload with a known DEK, as FORMAT.md says and as the session does.
fn open(header: &Header<'_>, payload: &[u8], dek: &Dek, aad: Option<&str>) -> Option<Vec<u8>> {
    let key = Derived::from_dek(dek).committed(header.commitment).ok()?;
    (header.has_aad == aad.is_some()).then_some(())?;
    let associated = [header.bound_prefix(), aad.unwrap_or("").as_bytes()].concat();
    open_payload(&key, &associated, payload)
}

fn open_payload(key: &ExpandedKey, associated: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
    let payload = Payload::parse(payload).ok()?;
    let mut buffer = payload.ciphertext.to_vec();
    key.open(payload.nonce, associated, &mut buffer, payload.tag).ok()?;
    Some(buffer)
}

#[test]
fn positive_vectors_open_in_every_form() {
    let file = load("envelope.json");
    let vectors = file["vectors"].as_array().unwrap();
    let mut forms = std::collections::BTreeSet::new();
    for vector in vectors {
        let name = text(vector, "name");
        let plaintext = unhex(text(vector, "plaintext_hex"));
        let armored = text(vector, "armored");
        assert!(is_envelope(Value::Text(armored)), "{name}");
        forms.insert(text(vector, "form").to_owned());
        match Stored::parse(Value::Text(armored)).unwrap() {
            Stored::Literal { payload, .. } => {
                let key = ExpandedKey::new(dek(vector).expose());
                assert_eq!(open_payload(&key, &[], &payload), Some(plaintext), "{name}");
            }
            Stored::Envelope { header, payload } => {
                let parsed = Header::parse(&header).unwrap();
                assert_eq!(parsed.with_wraps(&parsed.wraps).unwrap(), *header, "{name}: one encoding");
                assert_eq!(parsed.commitment, unhex(text(vector, "commitment_hex")).as_slice(), "{name}");
                let opened = open(&parsed, &payload, &dek(vector), vector["aad"].as_str());
                assert_eq!(opened, Some(plaintext), "{name}");
                assert_eq!([&*header, &*payload].concat(), unhex(text(vector, "binary_hex")), "{name}");
                let again = format!("{}{}", armor::armored_head(&header), armor::encode(&payload));
                assert!(again == armored || armor::encode(again.as_bytes()) == armored, "{name}");
            }
            Stored::Other(_) => panic!("{name} is not recognised"),
        }
    }
    assert!(vectors.len() >= 12 && forms.len() == 3, "{} vectors, {forms:?}", vectors.len());
}

#[test]
fn negative_vectors_are_refused() {
    let positive = load("envelope.json");
    let deks: Vec<_> = positive["vectors"].as_array().unwrap().iter().map(dek).collect();
    let file = load("envelope_negative.json");
    let vectors = file["vectors"].as_array().unwrap();
    for vector in vectors {
        let name = text(vector, "name");
        let bytes = vector["value_hex"].as_str().map(unhex).unwrap_or_default();
        let value = match text(vector, "form") {
            "bytea" => Value::Bytes(&bytes),
            _ => Value::Text(text(vector, "value")),
        };
        match text(vector, "kind") {
            "malformed" => assert!(Stored::parse(value).is_err() && !is_envelope(value), "{name}"),
            "other" => assert!(matches!(Stored::parse(value), Ok(Stored::Other(_))), "{name}"),
            "unverified" => {
                let Ok(Stored::Envelope { header, payload }) = Stored::parse(value) else { panic!("{name}") };
                let header = Header::parse(&header).unwrap();
                let aad = vector["aad"].as_str();
                assert!(deks.iter().all(|dek| open(&header, &payload, dek, aad).is_none()), "{name}");
            }
            // Well-formed; only unwrapping tells that the DEK is another one.
            "unopenable" => assert!(is_envelope(value), "{name}"),
            kind => panic!("{name}: {kind}"),
        }
    }
    assert!(vectors.len() >= 30, "{}", vectors.len());
}

#[test]
fn version_1_vectors() {
    let file = load("v1.json");
    let mut keys = LegacyKeys::default();
    assert!(keys.add_base64(text(&file, "encryption_key")));
    let values = file["values"].as_array().unwrap();
    for value in values {
        let sealed = direct_shape(Value::Text(text(value, "stored"))).unwrap();
        let payload = Payload::parse(&sealed).unwrap();
        let mut out = vec![0; payload.ciphertext.len()];
        keys.open(payload, &mut out).unwrap();
        assert_eq!(out, text(value, "plaintext").as_bytes());
    }
    for value in file["must_fail"].as_array().unwrap() {
        let sealed = direct_shape(Value::Text(text(value, "stored")));
        assert!(sealed.is_err() || !keys.opens(Payload::parse(&sealed.unwrap()).unwrap()).unwrap(), "{}", value["why"]);
    }
    assert_eq!(values.len(), 8);
}

#[test]
fn truncations_and_flips_of_a_vector() {
    let file = load("envelope.json");
    let vector = file["vectors"].as_array().unwrap().iter().find(|vector| vector["aad"].is_string()).unwrap();
    let whole = unhex(text(vector, "binary_hex"));
    let dek = dek(vector);
    let opens = |bytes: &[u8]| {
        let parsed = Envelope::parse(bytes).ok()?;
        open(&parsed.header, &bytes[parsed.header.bytes.len()..], &dek, vector["aad"].as_str())
    };
    assert!(opens(&whole).is_some());
    assert!((0..whole.len()).all(|length| opens(&whole[..length]).is_none()));
}
