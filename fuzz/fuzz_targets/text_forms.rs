//! Every text form: recognised or refused, and an armored envelope is the binary one and nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vod_tender_core::armor;
use vod_tender_core::info::describe;
use vod_tender_core::stored::{Stored, Value, is_envelope};

fuzz_target!(|text: &str| {
    let value = Value::Text(text);
    let _ = describe(value, 0);
    match Stored::parse(value) {
        Ok(Stored::Envelope { header, payload }) => {
            let again = format!("{}{}", armor::armored_head(&header), armor::encode(&payload));
            assert!(text == again || armor::unwrap_base64(text).as_deref() == Some(&again));
            let binary = [&*header, &*payload].concat();
            assert!(is_envelope(Value::Bytes(&binary)));
        }
        Ok(Stored::Literal { .. }) => assert!(is_envelope(value)),
        Ok(Stored::Other(_)) => assert!(!text.starts_with(armor::PREFIX) && !is_envelope(value)),
        Err(_) => assert!(!is_envelope(value)),
    }
});
