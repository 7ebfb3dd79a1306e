//! The binary envelope: whatever parses is written back as it was, and one byte more or less is another value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vod_tender_core::envelope::{Envelope, Header};
use vod_tender_core::stored::{Value, is_envelope};

fuzz_target!(|bytes: &[u8]| {
    let _ = Header::parse(bytes);
    let Ok(envelope) = Envelope::parse(bytes) else {
        assert!(!is_envelope(Value::Bytes(bytes)));
        return;
    };
    let header = envelope.header.with_wraps(&envelope.header.wraps).expect("what parses can be written");
    assert_eq!(header, envelope.header.bytes);
    assert!(is_envelope(Value::Bytes(bytes)));
});
