//! KEK URIs and AWS names: accepted or refused, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vod_tender_providers::KekUri;
use vod_tender_providers::aws_key::{AwsKey, KeyArn};

fuzz_target!(|text: &str| {
    let _ = KekUri::parse(text);
    let _ = KekUri::parse_environment(text);
    if let Ok(key) = AwsKey::parse(text) {
        assert!(text.starts_with(key.id()));
        assert!(key.endpoint().is_none_or(|endpoint| text.contains(endpoint)));
    }
    if let Some(arn) = KeyArn::parse(text) {
        assert!(arn.is_same_key(text) && arn.is_neighbour(&arn));
    }
});
