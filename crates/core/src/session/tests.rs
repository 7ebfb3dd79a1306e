//! The session against a key service in memory.

mod ahead;
mod bulk;
mod cached;
mod prefetch;
mod rewrap_ahead;
mod rights;
mod world;

use proptest::prelude::*;

use super::*;
use crate::armor;
use crate::context::Context;
use crate::envelope::{Envelope, Header};
use crate::error::Mismatch;
use crate::keyring::{KeyState, Legacy};
use crate::policy::{Limits, PlaintextReads, WriteFormat};
use crate::stored::Value;
use world::World;

fn aad(aad: &str) -> Reading<'_> {
    Reading { aad: Some(aad), ..Reading::default() }
}

fn stated(version: i32) -> Reading<'static> {
    Reading { version: Some(version), ..Reading::default() }
}

fn none() -> Reading<'static> {
    Reading::default()
}

#[test]
fn values_come_back_in_both_forms() {
    let mut world = World::new();
    for plaintext in ["", "x", "contraseña-ключ-鍵-🔑", "kms:v2: looks like one", &"t".repeat(5000)] {
        let text = world.encrypt(plaintext, Sealing::default()).unwrap();
        assert!(text.starts_with("kms:v2:"));
        assert_eq!(world.decrypt(&text, none()).unwrap(), plaintext);
        assert_eq!(world.decrypt(&armor::encode(text.as_bytes()), none()).unwrap(), plaintext, "base64-wrapped");
        let bytes = world.encrypt_bytes(plaintext.as_bytes(), Sealing::default()).unwrap();
        assert_eq!(world.decrypt_bytes(&bytes, none()).unwrap(), plaintext.as_bytes());
    }
}

#[test]
fn one_dek_serves_as_many_values_as_the_limit_says() {
    let mut world = World::new();
    let values: Vec<_> = (0..2500).map(|n| world.encrypt(&n.to_string(), Sealing::default()).unwrap()).collect();
    assert_eq!(world.service.generated.get(), 3);
    world.fresh_session();
    for (n, value) in values.iter().enumerate() {
        assert_eq!(world.decrypt(value, none()).unwrap(), n.to_string());
    }
    assert_eq!(world.service.unwrapped.get(), 3);
    assert_eq!(world.session.stats().cache_misses, 3);
    assert_eq!(world.session.stats().cache_hits, 2497);
    world.policy.limits.max_uses = 1;
    for _ in 0..10 {
        world.encrypt("x", Sealing::default()).unwrap();
    }
    world.session.begin_statement();
    assert_eq!(world.service.generated.get() - world.session.stats().deks_unused, 13);
}

#[test]
fn age_and_bytes_limit_a_dek_too() {
    let mut world = World::new();
    world.policy.limits = Limits { max_bytes: 100, max_age_ms: 1000, ..Limits::default() };
    for _ in 0..4 {
        world.encrypt(&"x".repeat(50), Sealing::default()).unwrap();
    }
    assert_eq!(world.service.generated.get(), 2);
    let large = world.encrypt(&"x".repeat(500), Sealing::default()).unwrap();
    assert_eq!(world.service.generated.get(), 3, "a value above the limit gets a DEK of its own");
    world.time.set(world.time.get() + 1000);
    world.decrypt(&large, none()).unwrap();
    assert_eq!(world.service.unwrapped.get(), 1, "the cached DEK was too old");
    assert_eq!(world.session.stats().cache_expiries, 1);
    let policy = world.policy;
    world.time.set(world.time.get() + 1000);
    world.session.expire(&policy);
    assert_eq!(world.session.cached_deks(), 0);
}

#[test]
fn the_cache_is_bounded() {
    let mut world = World::new();
    world.policy.limits = Limits { cache_entries: 2, max_uses: 1, ..Limits::default() };
    let values: Vec<_> = (0..3).map(|_| world.encrypt("x", Sealing::default()).unwrap()).collect();
    assert_eq!(world.session.cached_deks(), 2);
    assert_eq!(world.session.stats().cache_evictions, 1);
    world.decrypt(&values[2], none()).unwrap();
    assert_eq!(world.service.unwrapped.get(), 0);
    world.decrypt(&values[0], none()).unwrap();
    assert_eq!(world.service.unwrapped.get(), 1, "the oldest was evicted");
    world.session.clear();
    assert_eq!(world.session.cached_deks(), 0);
}

#[test]
fn aad_binds_a_value_to_its_row() {
    let mut world = World::new();
    let sealing = Sealing { aad: Some("row 1"), ..Sealing::default() };
    let bound = world.encrypt("token", sealing).unwrap();
    let free = world.encrypt("token", Sealing::default()).unwrap();
    let empty = world.encrypt("token", Sealing { aad: Some(""), ..Sealing::default() }).unwrap();
    assert_eq!(world.decrypt(&bound, aad("row 1")).unwrap(), "token");
    let refused = |result: Result<String>, why: Mismatch| {
        assert!(matches!(result, Err(Error::Unverified(mismatch)) if mismatch == why));
    };
    refused(world.decrypt(&bound, aad("row 2")), Mismatch::Payload);
    refused(world.decrypt(&bound, none()), Mismatch::AadMissing);
    refused(world.decrypt(&free, aad("row 1")), Mismatch::AadUnexpected);
    refused(world.decrypt(&empty, none()), Mismatch::AadMissing);
    assert_eq!(world.decrypt(&empty, aad("")).unwrap(), "token");
    assert_eq!(world.service.generated.get(), 1, "one DEK serves with and without aad");
    world.fresh_session();
    world.decrypt(&bound, aad("row 1")).unwrap();
    world.decrypt(&free, none()).unwrap();
    assert_eq!(world.service.unwrapped.get(), 1);
}

#[test]
fn a_session_that_knows_the_header_judges_as_one_that_does_not() {
    let mut world = World::new();
    let value = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    let text = world.encrypt("token", Sealing::default()).unwrap();
    let verdict = |result: Result<()>| result.err().map(|error| format!("{error:?}"));
    for at in 0..value.len() {
        let mut changed = value.clone();
        changed[at] ^= 0x82;
        let cut = &value[..at];
        world.decrypt_bytes(&value, none()).unwrap();
        let known = [&changed[..], cut].map(|bytes| verdict(world.decrypt_bytes(bytes, none()).map(drop)));
        world.fresh_session();
        let unknown = [&changed[..], cut].map(|bytes| verdict(world.decrypt_bytes(bytes, none()).map(drop)));
        assert_eq!(known, unknown, "{at}");
        assert!(known[0].is_some());
    }
    for at in 0..text.len() {
        let mut changed = text.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b':' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        let cut = &text[..at];
        world.decrypt(&text, none()).unwrap();
        let known = [&changed[..], cut].map(|text| verdict(world.decrypt(text, none()).map(drop)));
        world.fresh_session();
        let unknown = [&changed[..], cut].map(|text| verdict(world.decrypt(text, none()).map(drop)));
        assert_eq!(known, unknown, "{at}");
    }
}

#[test]
fn contexts_are_bound_and_kept_apart() {
    let mut world = World::new();
    let a = Context::from_json(r#"{"tenant":"a"}"#).unwrap();
    let b = Context::from_json(r#"{"tenant":"b"}"#).unwrap();
    let of_a = world.encrypt_bytes(b"token", Sealing { context: Some(&a), ..Sealing::default() }).unwrap();
    let of_b = world.encrypt_bytes(b"token", Sealing { context: Some(&b), ..Sealing::default() }).unwrap();
    assert_eq!(world.service.generated.get(), 2);
    let expects = |context| Reading { context: Some(context), ..Reading::default() };
    assert!(world.decrypt_bytes(&of_a, expects(&a)).is_ok());
    let refused = world.decrypt_bytes(&of_b, expects(&a));
    assert!(matches!(refused, Err(Error::Unverified(Mismatch::Context))));

    // A payload under the header of another context, and a context swapped inside the header.
    let (head_a, head_b) = (Envelope::parse(&of_a).unwrap(), Envelope::parse(&of_b).unwrap());
    let payload = &of_b[head_b.header.bytes.len()..];
    let swapped = [head_a.header.bytes, payload].concat();
    assert!(world.decrypt_bytes(&swapped, none()).is_err());
    let mut renamed = of_b.clone();
    let at = renamed.windows(6).position(|window| window == b"tenant").unwrap() + 8;
    renamed[at] = b'a';
    world.fresh_session();
    assert!(world.decrypt_bytes(&renamed, none()).is_err());
}

#[test]
fn a_forged_key_name_does_not_open_another_tenants_value() {
    let mut world = World::new();
    world.add("tenant-a", "shared", r#"{"tenant":"a"}"#, true, true);
    world.add("tenant-b", "shared", r#"{"tenant":"b"}"#, true, true);
    let of_a = world.encrypt_bytes(b"token", Sealing { key: Some("tenant-a"), ..Sealing::default() }).unwrap();
    let mut forged = of_a.clone();
    let at = forged.windows(8).position(|window| window == b"tenant-a").unwrap() + 7;
    forged[at] = b'b';
    let calls = world.service.unwrapped.get();
    let refused = world.decrypt_bytes(&forged, none());
    assert!(matches!(refused, Err(Error::Unverified(Mismatch::KeyContext))));
    assert!(matches!(world.rewrap(&of_a, Some("tenant-b")), Err(Error::KeyContext(_))));
    assert_eq!(world.service.unwrapped.get(), calls, "nobody was asked");
}

#[test]
fn keys_that_are_not_configured_are_never_called() {
    let mut world = World::new();
    let value = world.encrypt("token", Sealing::default()).unwrap();
    world.fresh_session();
    world.keyring.keks[0].name = "other".into();
    assert!(matches!(world.decrypt(&value, none()), Err(Error::UnknownKey(name)) if name == "main"));
    assert_eq!(world.service.unwrapped.get(), 0);
    assert!(matches!(
        world.encrypt("x", Sealing { key: Some("nope"), ..Sealing::default() }),
        Err(Error::UnknownGivenKey)
    ));
}

#[test]
fn a_keys_state_holds_for_cached_deks_too() {
    let mut world = World::new();
    let value = world.encrypt("token", Sealing::default()).unwrap();
    world.keyring.keks[0].state = KeyState::DecryptOnly;
    world.session.keys_changed(&world.keyring);
    assert!(world.decrypt(&value, none()).is_ok());
    assert_eq!(world.service.unwrapped.get(), 0, "a key that may decrypt keeps its DEKs");
    assert!(matches!(world.encrypt("x", Sealing::default()), Err(Error::KeyState { .. })));
    world.keyring.keks[0].state = KeyState::Disabled;
    world.session.keys_changed(&world.keyring);
    assert!(matches!(world.decrypt(&value, none()), Err(Error::KeyState { .. })));
    assert!(matches!(world.rewrap(b"\x8fVT2", None), Err(Error::Malformed(_))));
}

#[test]
fn envelopes_are_not_encrypted_again() {
    let mut world = World::new().with_legacy();
    let text = world.encrypt("token", Sealing::default()).unwrap();
    let bytes = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    assert!(matches!(world.encrypt(&text, Sealing::default()), Err(Error::AlreadyEnvelope)));
    let wrapped = armor::encode(text.as_bytes());
    assert!(matches!(world.encrypt(&wrapped, Sealing::default()), Err(Error::AlreadyEnvelope)));
    assert!(matches!(world.encrypt_bytes(&bytes, Sealing::default()), Err(Error::AlreadyEnvelope)));
    assert_eq!(world.upgrade(&text, None).unwrap(), text);
    assert_eq!(world.upgrade(&text, Some(1)).unwrap(), text);
}

#[test]
fn dual_mode_reads_every_version() {
    let mut world = World::new().with_legacy();
    world.policy.write_format = WriteFormat::Direct;
    let direct = world.encrypt("token", Sealing::default()).unwrap();
    assert_eq!(world.decrypt(&direct, none()).unwrap(), "token");
    assert_eq!(world.decrypt(&direct, stated(1)).unwrap(), "token");
    assert_eq!(world.decrypt(&direct, aad("any row")).unwrap(), "token");
    assert!(matches!(world.decrypt("plain", none()), Err(Error::PlaintextRefused)));
    assert!(matches!(world.decrypt("plain", stated(0)), Err(Error::PlaintextRefused)));
    assert!(matches!(world.decrypt("plain", stated(1)), Err(Error::Malformed(_))));
    assert!(matches!(world.decrypt("plain", stated(2)), Err(Error::Malformed(_))));
    assert!(matches!(world.decrypt("plain", stated(3)), Err(Error::UnknownVersion)));
    assert_eq!(world.decrypt("", none()).unwrap(), "");
    world.policy.plaintext_reads = PlaintextReads::Allow;
    assert_eq!(world.decrypt("plain", none()).unwrap(), "plain");
    assert_eq!(world.decrypt("plain", stated(0)).unwrap(), "plain");
    let mut broken = armor::decode(&direct).unwrap();
    broken[20] ^= 1;
    let broken = armor::encode(&broken);
    assert!(matches!(world.decrypt(&broken, stated(1)), Err(Error::Unverified(Mismatch::Legacy))));
    let envelope = {
        world.policy.write_format = WriteFormat::Auto;
        world.encrypt("token", Sealing::default()).unwrap()
    };
    assert!(matches!(world.decrypt(&envelope, stated(0)), Err(Error::VersionMismatch(0))));
    assert!(matches!(
        world.decrypt(&envelope[..envelope.len() - 4], none()),
        Err(Error::Malformed(_)) | Err(Error::Unverified(_))
    ));
    assert!(matches!(world.decrypt("kms:v2:nonsense", none()), Err(Error::Malformed(_))), "never plaintext");
    let (session, run) = world.split();
    for (value, version) in [(envelope.as_str(), 2), (direct.as_str(), 1), ("plain", 0), ("", 0), (&broken, 0)] {
        assert_eq!(session.version(&run, Value::Text(value)).unwrap(), version);
    }
}

#[test]
fn up_and_down_again() {
    let mut world = World::new().with_legacy();
    let direct = world.downgrade("token", Some(0)).unwrap();
    assert_eq!(world.downgrade(&direct, None).unwrap(), direct, "version 1 comes back unchanged");
    let envelope = world.upgrade(&direct, None).unwrap();
    assert_eq!(world.decrypt(&envelope, stated(2)).unwrap(), "token");
    let back = world.downgrade(&envelope, Some(2)).unwrap();
    assert_eq!(world.decrypt(&back, stated(1)).unwrap(), "token");
    assert!(matches!(world.upgrade("token", None), Err(Error::PlaintextRefused)));
    let stated_plain = world.upgrade("token", Some(0)).unwrap();
    assert_eq!(world.decrypt(&stated_plain, none()).unwrap(), "token");
    for empty in [world.upgrade("", None).unwrap(), world.downgrade("", None).unwrap()] {
        assert!(!empty.is_empty());
        assert_eq!(world.decrypt(&empty, none()).unwrap(), "");
    }
}

#[test]
fn what_auto_writes_depends_on_what_is_configured() {
    let mut world = World::new();
    world.keyring.keks.clear();
    assert!(matches!(world.encrypt("x", Sealing::default()), Err(Error::NothingConfigured)));
    let mut world = world.with_legacy();
    let direct = world.encrypt("x", Sealing::default()).unwrap();
    assert_eq!(world.decrypt(&direct, stated(1)).unwrap(), "x");
    assert!(matches!(
        world.encrypt("x", Sealing { key: Some("k"), ..Sealing::default() }),
        Err(Error::UnknownGivenKey)
    ));
    world.keyring.legacy = Legacy::Broken("bad");
    assert!(matches!(world.encrypt("x", Sealing::default()), Err(Error::LegacyKey("bad"))));
    world.policy.plaintext_reads = PlaintextReads::Allow;
    assert!(matches!(world.decrypt(&direct, none()), Err(Error::LegacyKey("bad"))), "not taken for plaintext");
}

#[test]
fn every_changed_bit_is_refused() {
    let mut world = World::new();
    let context = Context::from_json(r#"{"Application":"vod-tender"}"#).unwrap();
    let sealing = Sealing { context: Some(&context), aad: Some("row"), ..Sealing::default() };
    let value = world.encrypt_bytes(b"secret", sealing).unwrap();
    let mut flips = 0;
    for at in 0..value.len() {
        for bit in 0..8 {
            let mut changed = value.clone();
            changed[at] ^= 1 << bit;
            world.session.clear();
            assert!(world.decrypt_bytes(&changed, aad("row")).is_err(), "byte {at}, bit {bit}");
            flips += 1;
        }
    }
    assert_eq!(flips, value.len() * 8);
    for length in 0..value.len() {
        if length > 0 && length < 4 {
            continue; // not an envelope any more, see the next test
        }
        assert!(length == 0 || world.decrypt_bytes(&value[..length], aad("row")).is_err(), "{length}");
    }
}

#[test]
fn cut_off_magic_is_refused_as_plaintext() {
    let mut world = World::new();
    assert!(matches!(world.decrypt_bytes(b"\x8fVT", none()), Err(Error::PlaintextRefused)));
}

#[test]
fn rewrapping_leaves_the_payload_as_it_is() {
    let mut world = World::new();
    world.add("second", "id-2", "{}", false, true);
    let value = world.encrypt_bytes(b"token", Sealing { aad: Some("row"), ..Sealing::default() }).unwrap();
    let (moved, changed) = world.rewrap(&value, Some("second")).unwrap();
    assert!(changed);
    let (before, after) = (Envelope::parse(&value).unwrap(), Envelope::parse(&moved).unwrap());
    assert_eq!(value[before.header.bytes.len()..], moved[after.header.bytes.len()..]);
    assert_eq!(after.header.wraps[0].key_name, "second");
    assert_eq!(after.header.wraps[0].kek_id, "id-2");
    assert_eq!(world.decrypt_bytes(&moved, aad("row")).unwrap(), b"token");
    let calls = (world.service.unwrapped.get(), world.service.wrapped.get());
    assert_eq!(world.rewrap(&moved, Some("second")).unwrap(), (moved, false));
    world.rewrap(&value, Some("second")).unwrap();
    assert_eq!((world.service.unwrapped.get(), world.service.wrapped.get()), calls, "each wrapped DEK moves once");
}

#[test]
fn a_service_that_knows_its_newest_key_is_asked_once() {
    let mut world = World::new();
    let kek = world.add("alias", "id-old", "{}", true, false);
    let sealing = Sealing { key: Some("alias"), ..Sealing::default() };
    world.policy.limits.max_uses = 1;
    let values: Vec<_> = (0..3).map(|_| world.encrypt_bytes(b"token", sealing).unwrap()).collect();
    assert!(!world.rewrap(&values[0], Some("alias")).unwrap().1, "still the newest");
    assert_eq!(world.service.moved.get(), 1);
    assert!(!world.rewrap(&values[1], Some("alias")).unwrap().1);
    assert_eq!(world.service.moved.get(), 1, "what the first answer taught is kept");
    *kek.id.borrow_mut() = "id-new".into();
    world.time.set(world.time.get() + 300_000);
    for value in &values {
        let (moved, changed) = world.rewrap(value, Some("alias")).unwrap();
        assert!(changed);
        assert_eq!(Envelope::parse(&moved).unwrap().header.wraps[0].kek_id, "id-new");
        let calls = world.service.moved.get();
        assert!(!world.rewrap(&moved, Some("alias")).unwrap().1);
        assert_eq!(world.service.moved.get(), calls);
    }
    assert_eq!(world.service.unwrapped.get(), 0, "no DEK came here");
}

#[test]
fn several_wraps_are_tried_in_order_and_kept() {
    let mut world = World::new();
    world.add("recovery", "id-r", "{}", false, true);
    world.add("third", "id-3", "{}", false, true);
    let value = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    let (recovery, _) = world.rewrap(&value, Some("recovery")).unwrap();
    let (one, two) = (Envelope::parse(&value).unwrap(), Envelope::parse(&recovery).unwrap());
    let wraps = [one.header.wraps[0], two.header.wraps[0]];
    let both = [one.header.with_wraps(&wraps).unwrap(), value[one.header.bytes.len()..].to_vec()].concat();
    world.session.clear();
    world.keyring.keks[0].state = KeyState::Disabled;
    assert_eq!(world.decrypt_bytes(&both, none()).unwrap(), b"token", "through the second wrap");
    world.keyring.keks[0].state = KeyState::Active;
    let (moved, _) = world.rewrap(&both, Some("third")).unwrap();
    let parsed = Envelope::parse(&moved).unwrap();
    let names: Vec<_> = parsed.header.wraps.iter().map(|wrap| wrap.key_name).collect();
    assert_eq!(names, ["third", "recovery"], "the wrap that was not used stays");
    world.service.refuses.set(true);
    world.session.clear();
    assert!(matches!(world.decrypt_bytes(&both, none()), Err(Error::Service { .. })));
}

#[test]
fn a_dek_that_is_not_the_payloads_is_refused() {
    let mut world = World::new();
    world.policy.limits.max_uses = 1;
    let one = world.encrypt_bytes(b"one", Sealing::default()).unwrap();
    let two = world.encrypt_bytes(b"two", Sealing::default()).unwrap();
    let (of_one, of_two) = (Envelope::parse(&one).unwrap(), Envelope::parse(&two).unwrap());
    let header = of_one.header.with_wraps(&of_two.header.wraps).unwrap();
    let swapped = [header, one[of_one.header.bytes.len()..].to_vec()].concat();
    assert!(matches!(world.decrypt_bytes(&swapped, none()), Err(Error::Unverified(Mismatch::Commitment))));
    world.add("second", "id-2", "{}", false, true);
    assert!(matches!(world.rewrap(&swapped, Some("second")), Err(Error::Unverified(Mismatch::Commitment))));
    assert_eq!(world.service.wrapped.get(), 0);
}

#[test]
fn text_results_are_text() {
    let mut world = World::new();
    let bytes = world.encrypt_bytes(b"\xff\xfe", Sealing::default()).unwrap();
    let parsed = Envelope::parse(&bytes).unwrap();
    let payload = &bytes[parsed.header.bytes.len()..];
    let armored = format!("{}{}", armor::armored_head(parsed.header.bytes), armor::encode(payload));
    assert!(matches!(world.decrypt(&armored, none()), Err(Error::NotText)));
    assert_eq!(world.decrypt_bytes(&bytes, none()).unwrap(), b"\xff\xfe");
}

#[test]
fn headers_are_the_same_in_both_forms() {
    let mut world = World::new();
    let text = world.encrypt("x", Sealing::default()).unwrap();
    let bytes = world.encrypt_bytes(b"x", Sealing::default()).unwrap();
    let parts = armor::Parts::split(&text).unwrap().unwrap();
    let header = armor::decode(parts.head).unwrap();
    assert_eq!(Header::parse(&header).unwrap().bytes, Envelope::parse(&bytes).unwrap().header.bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_come_back(plaintext in proptest::collection::vec(any::<u8>(), 0..300), row in ".{0,12}") {
        let mut world = World::new();
        let value = world.encrypt_bytes(&plaintext, Sealing { aad: Some(&row), ..Sealing::default() }).unwrap();
        world.fresh_session();
        prop_assert_eq!(world.decrypt_bytes(&value, aad(&row)).unwrap(), plaintext);
    }

    #[test]
    fn a_changed_byte_never_gives_other_bytes(at in any::<prop::sample::Index>(), flip in 1u8.., text in any::<bool>()) {
        let mut world = World::new();
        let mut value = if text {
            world.encrypt("plaintext", Sealing::default()).unwrap().into_bytes()
        } else {
            world.encrypt_bytes(b"plaintext", Sealing::default()).unwrap()
        };
        let at = at.index(value.len());
        value[at] ^= flip;
        world.session.clear();
        let opened = match (text, String::from_utf8(value.clone())) {
            (true, Ok(value)) => world.decrypt(&value, none()).map(String::into_bytes),
            (true, Err(_)) => return Ok(()),
            (false, _) => world.decrypt_bytes(&value, none()),
        };
        prop_assert!(opened.is_err(), "byte {}", at);
    }
}

#[test]
fn ascii_without_zeros_is_told_from_everything_else() {
    for length in 0..=24 {
        for (at, byte) in (0..length).flat_map(|at| (0..=u8::MAX).map(move |byte| (at, byte))) {
            for others in [1, 0x7F] {
                let mut text = vec![others; length];
                text[at] = byte;
                let expected = text.iter().all(|byte| (1..0x80).contains(byte));
                assert_eq!(decrypt::is_ascii_without_zeros(&text), expected, "{text:?}");
            }
        }
    }
    assert!(decrypt::is_ascii_without_zeros(b""));
}

#[test]
fn a_text_result_is_text_without_zeros() {
    let mut world = World::new();
    for (plaintext, is_text) in [
        (&b""[..], true),
        (&[b'x'; 300], true),
        (&[&[b'x'; 300][..], "é".as_bytes()].concat(), true),
        (&[&[b'x'; 300][..], &[0]].concat(), false),
        (&[&[b'x'; 300][..], &[0x80]].concat(), false),
        (&[&[0xFF][..], &[b'x'; 300]].concat(), false),
        (&["é".as_bytes(), &[0]].concat(), false),
        (&[&[0][..], &[b'x'; 3]].concat(), false),
        (&[0x7F; 40], true),
        (&[1; 40], true),
    ] {
        let sealed = world.encrypt_bytes(plaintext, Sealing::default()).unwrap();
        let end = Envelope::parse(&sealed).unwrap().header.bytes.len();
        let text = format!("{}{}", armor::armored_head(&sealed[..end]), armor::encode(&sealed[end..]));
        match world.decrypt(&text, none()) {
            Ok(read) => assert!(is_text && read.as_bytes() == plaintext),
            Err(error) => assert!(!is_text && matches!(error, Error::NotText), "{error}"),
        }
    }
}
