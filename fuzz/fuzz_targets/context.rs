//! Contexts from JSON: whatever is accepted has one encoding, which a header carries unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vod_tender_core::context::Context;
use vod_tender_core::envelope::{Header, Wrap, write_header};

fuzz_target!(|json: &str| {
    let Ok(context) = Context::from_json(json) else { return };
    assert_eq!(Context::from_pairs(&context.to_map()).expect("it was one"), context);
    assert!(context.includes(&context) && context.includes(&Context::empty()));
    let wrap = Wrap { key_name: "k", kek_id: "id", wrapped_dek: &[1] };
    let bytes = write_header(false, &context, &[wrap], &[0; 32]).expect("every context fits a header");
    assert_eq!(Header::parse(&bytes).expect("it was just written").context, context);
});
