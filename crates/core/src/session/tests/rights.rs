//! What each privilege lets a caller do, and what none of them does.

use super::world::World;
use super::*;
use crate::access::{Function, Outcome, Privilege::*};
use crate::stored::Value;

fn refused<T: std::fmt::Debug>(result: Result<T>, key: &str) {
    match result {
        Err(Error::NotGranted { key: named, .. }) => assert_eq!(named, key),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_key_that_another_caller_cached_is_not_for_this_one() {
    let mut world = World::new();
    world.add("other", "id-2", "{}", false, true);
    let value = world.encrypt("token", Sealing::default()).unwrap();
    assert_eq!(world.decrypt(&value, none()).unwrap(), "token");
    world.enter(1, &[("main", Encrypt), ("main", Rewrap), ("other", Decrypt)]);
    refused(world.decrypt(&value, none()), "main");
    world.enter(2, &[("main", Decrypt)]);
    assert_eq!(world.decrypt(&value, none()).unwrap(), "token");
    refused(world.encrypt("x", Sealing::default()), "main");
    refused(world.rewrap(&armor_to_bytes(&value), None), "main");
    assert_eq!(world.service.unwrapped.get(), 0, "nobody had to ask the service");
}

#[test]
fn a_refused_caller_makes_no_call() {
    let mut world = World::new();
    let value = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    world.fresh_session();
    let made = world.service.generated.get();
    world.enter(1, &[]);
    refused(world.decrypt_bytes(&value, none()), "main");
    refused(world.encrypt_bytes(b"x", Sealing::default()), "main");
    refused(world.rewrap(&value, None), "main");
    assert_eq!((world.service.unwrapped.get(), world.service.generated.get()), (0, made));
}

#[test]
fn whoever_may_only_encrypt_can_upgrade_and_not_read() {
    let mut world = World::new().with_legacy();
    world.policy.write_format = WriteFormat::Direct;
    let direct = world.encrypt("token", Sealing::default()).unwrap();
    world.policy.write_format = WriteFormat::Auto;
    world.enter(1, &[("main", Encrypt)]);
    let upgraded = world.upgrade("plain", Some(0)).unwrap();
    refused(world.decrypt(&upgraded, none()), "main");
    refused(world.upgrade(&direct, Some(1)), "legacy");
    refused(world.decrypt(&direct, none()), "legacy");
    world.enter(2, &[("main", Encrypt), ("legacy", Decrypt)]);
    let upgraded = world.upgrade(&direct, None).unwrap();
    refused(world.decrypt(&upgraded, none()), "main");
    refused(world.downgrade(&upgraded, None), "main");
    world.enter(3, &[("main", Decrypt)]);
    refused(world.downgrade(&upgraded, None), "legacy");
    world.enter(4, &[("main", Decrypt), ("legacy", Encrypt)]);
    assert!(world.downgrade(&upgraded, None).is_ok());
}

#[test]
fn whoever_may_rewrap_moves_between_versions_unseen_unless_that_shows() {
    let mut world = World::new().with_legacy();
    world.policy.write_format = WriteFormat::Direct;
    let direct = world.encrypt("token", Sealing::default()).unwrap();
    world.policy.write_format = WriteFormat::Auto;
    world.enter(1, &[("main", Encrypt), ("legacy", Rewrap)]);
    let upgraded = world.upgrade(&direct, None).unwrap();
    refused(world.decrypt(&direct, none()), "legacy");
    refused(world.decrypt(&upgraded, none()), "main");
    world.enter(2, &[("main", Encrypt), ("main", Decrypt), ("legacy", Rewrap)]);
    refused(world.upgrade(&direct, None), "legacy");
    world.enter(3, &[("main", Rewrap), ("legacy", Encrypt)]);
    assert!(world.downgrade(&upgraded, None).is_ok());
    world.enter(4, &[("main", Rewrap), ("legacy", Encrypt), ("legacy", Decrypt)]);
    refused(world.downgrade(&upgraded, None), "main");
}

#[test]
fn an_alias_opens_nothing_of_another_configured_key_for_who_may_not_use_that() {
    let mut world = World::new();
    world.add("alias", "id-1", "{}", false, false);
    world.add("tenant", "id-1", r#"{"tenant": "b"}"#, false, true);
    world.add("next", "id-2", "{}", false, true);
    let value = world.encrypt_bytes(b"token", Sealing { key: Some("alias"), ..Sealing::default() }).unwrap();
    for fresh in [false, true] {
        if fresh {
            world.fresh_session();
        }
        world.enter(1, &[("alias", Decrypt), ("alias", Rewrap), ("tenant", Decrypt), ("next", Rewrap)]);
        refused(world.decrypt_bytes(&value, none()), "main");
        refused(world.rewrap(&value, Some("next")).map(drop), "main");
        world.enter(2, &[("alias", Decrypt), ("main", Decrypt)]);
        assert_eq!(world.decrypt_bytes(&value, none()).unwrap(), b"token");
    }
    // A key that is configured later owns what was cached before.
    world.add("alias-2", "id-3", "{}", false, false);
    world.enter(3, &[("alias-2", Encrypt), ("alias-2", Decrypt)]);
    let value = world.encrypt_bytes(b"token", Sealing { key: Some("alias-2"), ..Sealing::default() }).unwrap();
    assert_eq!(world.decrypt_bytes(&value, none()).unwrap(), b"token");
    world.add("owner", "id-3", "{}", false, true);
    world.session.keys_changed(&world.keyring);
    refused(world.decrypt_bytes(&value, none()), "owner");
}

#[test]
fn plaintext_that_looks_like_ciphertext_needs_no_right() {
    let mut world = World::new().with_legacy();
    world.policy.plaintext_reads = PlaintextReads::Allow;
    let token = armor::encode(&[9; 40]);
    world.enter(1, &[]);
    assert_eq!(world.decrypt(&token, none()).unwrap(), token);
}

#[test]
fn the_right_to_move_is_no_right_to_read() {
    let mut world = World::new();
    world.add("mine", "id-2", "{}", false, true);
    let theirs = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    world.enter(1, &[("main", Rewrap), ("mine", Rewrap), ("mine", Decrypt)]);
    refused(world.rewrap(&theirs, Some("mine")), "main");
    world.enter(2, &[("main", Rewrap)]);
    refused(world.rewrap(&theirs, Some("mine")), "mine");
    world.enter(3, &[("mine", Rewrap)]);
    refused(world.rewrap(&theirs, Some("mine")), "main");
    world.enter(4, &[("main", Rewrap), ("mine", Rewrap)]);
    let (moved, changed) = world.rewrap(&theirs, Some("mine")).unwrap();
    assert!(changed);
    refused(world.decrypt_bytes(&moved, none()), "mine");
    world.enter(5, &[("mine", Rewrap)]);
    refused(world.rewrap(&theirs, Some("mine")), "main");
    world.enter(6, &[("mine", Decrypt)]);
    assert_eq!(world.decrypt_bytes(&moved, none()).unwrap(), b"token");
}

#[test]
fn a_wrap_that_was_added_opens_nothing_that_another_caller_cached() {
    let mut world = World::new();
    world.add("mine", "id-2", "{}", false, true);
    let theirs = world.encrypt_bytes(b"token", Sealing::default()).unwrap();
    let envelope = Envelope::parse(&theirs).unwrap();
    let mut wraps = envelope.header.wraps.clone();
    wraps.push(crate::envelope::Wrap { key_name: "mine", kek_id: "id-2", wrapped_dek: b"nothing" });
    let mut forged = envelope.header.with_wraps(&wraps).unwrap();
    forged.extend_from_slice(&theirs[envelope.header.bytes.len()..]);
    world.fresh_session();
    assert_eq!(world.decrypt_bytes(&forged, none()).unwrap(), b"token", "the owner opens and caches it");
    world.enter(1, &[("mine", Decrypt)]);
    assert!(world.decrypt_bytes(&forged, none()).is_err());
}

#[test]
fn uses_are_counted_by_caller_key_and_outcome() {
    let mut world = World::new();
    let values: Vec<_> = (0..5).map(|n| world.encrypt_bytes(&[n], Sealing::default()).unwrap()).collect();
    world.gate.take();
    let read = |world: &mut World, value: &[u8]| {
        world.gate.begin(Function::Decrypt);
        let result = world.decrypt_bytes(value, none());
        if result.is_err() {
            world.gate.failed("39000", None);
        }
        result
    };
    for value in &values {
        read(&mut world, value).unwrap();
    }
    let mut broken = values[0].clone();
    *broken.last_mut().unwrap() ^= 1;
    read(&mut world, &broken).unwrap_err();
    world.enter(1, &[("main", Decrypt)]);
    read(&mut world, &values[0]).unwrap();
    let uses: Vec<_> =
        world.gate.take().into_iter().map(|(used, tally)| (used.party, used.outcome, tally.values)).collect();
    assert_eq!(uses, [(0, Outcome::Done, 5), (0, Outcome::Failed("39000".into()), 1), (1, Outcome::Done, 1)]);
}

#[test]
fn an_upgrade_counts_one_use_and_its_own_check_none() {
    let mut world = World::new();
    world.upgrade("plain", Some(0)).unwrap();
    let uses = world.gate.take();
    assert_eq!(uses.len(), 1);
    assert_eq!((uses[0].0.privilege, uses[0].1.values), (Encrypt, 1));
}

#[test]
fn a_watched_value_raises_the_alarm_also_when_it_does_not_open() {
    let mut world = World::new();
    let value = world.encrypt_bytes(b"honey", Sealing { aad: Some("row"), ..Sealing::default() }).unwrap();
    let header = Envelope::parse(&value).unwrap().header.bytes.len();
    let mark = crate::keyring::Honey::mark(&value[header..]).unwrap();
    assert!(world.keyring.honey.add(&mark));
    world.gate.begin(Function::Verify);
    world.decrypt_bytes(&value, aad("row")).unwrap();
    assert!(!world.gate.has_alarms(), "verify() shows nothing");
    world.gate.begin(Function::Decrypt);
    world.decrypt_bytes(&value, none()).unwrap_err();
    assert_eq!(world.gate.take_alarms().len(), 1);
    assert_eq!(world.decrypt_bytes(&value, aad("row")).unwrap(), b"honey");
    assert_eq!(world.gate.take_alarms()[0].0.key, "main");
    world.enter(1, &[]);
    world.decrypt_bytes(&value, aad("row")).unwrap_err();
    assert_eq!(world.gate.take_alarms()[0].0.party, 1);
    // It stays what it is under another key.
    world.add("next", "id-2", "{}", false, true);
    world.enter(0, &[("main", Rewrap), ("next", Rewrap)]);
    world.gate.begin(Function::Rewrap);
    let (moved, _) = world.rewrap(&value, Some("next")).unwrap();
    assert!(!world.gate.has_alarms());
    world.enter(2, &[("next", Decrypt)]);
    world.gate.begin(Function::Decrypt);
    world.decrypt_bytes(&moved, aad("row")).unwrap();
    assert_eq!(world.gate.take_alarms().len(), 1);
}

#[test]
fn a_literal_form_is_watched_too() {
    let mut world = World::new();
    let payload = [7; 40];
    let value = format!("kms:v2:{}:{}", armor::encode(b"a blob of the service's"), armor::encode(&payload));
    world.keyring.honey.add(&crate::keyring::Honey::mark(&payload).unwrap());
    world.gate.begin(Function::Decrypt);
    world.enter(1, &[]);
    refused(world.decrypt(&value, none()), "main");
    assert_eq!(world.gate.take_alarms().len(), 1);
}

#[test]
fn very_many_uses_are_to_be_written_before_the_end() {
    let mut world = World::new();
    let mut written = 0;
    for n in 0..2500 {
        let context = Context::from_json(&format!(r#"{{"n": "{n}"}}"#)).unwrap();
        world.encrypt("x", Sealing { context: Some(&context), ..Sealing::default() }).unwrap();
        if world.gate.is_full() {
            written += world.gate.take().len();
        }
    }
    assert_eq!(written, 2000);
    assert_eq!(world.gate.take().len(), 500);
    let large = Context::from_json(&format!(r#"{{"n": "{}"}}"#, "x".repeat(60_000))).unwrap();
    for n in 0..9 {
        assert!(!world.gate.is_full(), "{n}");
        let own = large.with(&Context::from_json(&format!(r#"{{"m": "{n}"}}"#)).unwrap()).unwrap();
        world.encrypt("x", Sealing { context: Some(&own), ..Sealing::default() }).unwrap();
    }
    assert!(world.gate.is_full());
}

fn armor_to_bytes(text: &str) -> Vec<u8> {
    match crate::stored::Stored::parse(Value::Text(text)).unwrap() {
        crate::stored::Stored::Envelope { header, payload } => [&header[..], &payload[..]].concat(),
        _ => unreachable!(),
    }
}
