//! Version 1: key lines and values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vod_tender_core::envelope::Payload;
use vod_tender_core::legacy::LegacyKeys;
use vod_tender_core::stored::{Value, direct_shape};

fuzz_target!(|text: &str| {
    let mut keys = LegacyKeys::default();
    let added = keys.add_base64(text);
    assert_eq!(added, !keys.is_empty());
    for value in [Value::Text(text), Value::Bytes(text.as_bytes())] {
        if let Ok(sealed) = direct_shape(value) {
            let payload = Payload::parse(&sealed).expect("the shape was checked");
            assert!(!keys.opens(payload).expect("little memory is needed"), "nobody guesses a tag");
        }
    }
});
