//! The local KEK against the format's vectors.
#![cfg(feature = "local")]
// A vector file that cannot be read is a failed test.
#![allow(clippy::unwrap_used)]

use std::fs::{Permissions, set_permissions, write};
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::task::{Context as TaskContext, Poll, Waker};

use serde_json::Value as Json;
use vod_tender_core::envelope::Header;
use vod_tender_core::provider::{Fault, KeyProvider, ProviderError, ProviderFuture, WrappedRef};
use vod_tender_core::stats::CallLog;
use vod_tender_core::stored::{Stored, Value};
use vod_tender_providers::local::LocalKek;

fn now<T>(mut future: ProviderFuture<'_, T>) -> Result<T, ProviderError> {
    match Future::poll(future.as_mut(), &mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("a file is read at once"),
    }
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

#[test]
fn wrapped_deks_of_the_vectors_open() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/envelope.json");
    let file: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut opened = 0;
    for vector in file["vectors"].as_array().unwrap() {
        let Ok(Stored::Envelope { header, .. }) = Stored::parse(Value::Text(vector["armored"].as_str().unwrap()))
        else {
            continue;
        };
        let header = Header::parse(&header).unwrap();
        for wrap in &header.wraps {
            let Some(kek) = file["keks"][wrap.key_name].as_str() else { continue };
            let path = dir.path().join(wrap.key_name);
            write(&path, kek).unwrap();
            set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            let provider = LocalKek::new(path, CallLog::default());
            let wrapped = WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek };
            let dek = now(provider.unwrap(wrapped, &header.context)).unwrap();
            assert_eq!(dek.expose().as_slice(), unhex(vector["dek_hex"].as_str().unwrap()), "{}", vector["name"]);
            assert_eq!(provider.is_current(wrap.kek_id), Some(true));
            let other = vod_tender_core::context::Context::from_json(r#"{"other":"context"}"#).unwrap();
            assert_eq!(now(provider.unwrap(wrapped, &other)).unwrap_err().fault, Fault::Unverified);
            opened += 1;
        }
    }
    assert!(opened >= 8, "{opened}");
}
