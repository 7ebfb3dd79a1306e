//! What bulk jobs rely on: nothing is guessed, nothing is stored that only this session can open, and a key service is
//! called before rows are locked and not after.

use super::*;
use crate::session::{BulkOperation, BulkTask};

fn task(operation: BulkOperation) -> BulkTask<'static> {
    BulkTask { operation, key: None, context: None, check_wraps: true }
}

const MIGRATE: BulkOperation = BulkOperation::Migrate;

impl World {
    fn convert(&mut self, task: BulkTask<'_>, value: &str, version: Option<i32>) -> Result<Option<String>> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        let changed = session.convert(&mut run, task, Value::Text(value), None, version, &mut out)?;
        if changed {
            session.assure(&mut run, task, Value::Text(std::str::from_utf8(&out).unwrap()))?;
        }
        Ok(changed.then(|| String::from_utf8(out).unwrap()))
    }

    fn is_due(&mut self, operation: BulkOperation, value: &str, newest: Option<&str>) -> bool {
        let (session, run) = self.split();
        session.is_due(&run, operation, Value::Text(value), None, newest).unwrap()
    }

    fn make_ahead(&mut self, needed: u64, wanted: u64) -> Result<()> {
        let (session, mut run) = self.split();
        session.make_deks_ahead(&mut run, task(MIGRATE), needed, wanted)
    }

    fn prepare(&mut self, operation: BulkOperation, value: &str) -> Result<()> {
        let (session, mut run) = self.split();
        let head = session.needed_head(&run, Value::Text(value)).unwrap();
        match session.prepare_heads(&mut run, task(operation), &[&head])?.pop() {
            Some((_, failure)) => Err(failure),
            None => Ok(()),
        }
    }

    fn calls(&self) -> u64 {
        let service = &self.service;
        service.generated.get() + service.unwrapped.get() + service.wrapped.get() + service.moved.get()
    }

    fn direct(&mut self, plaintext: &str) -> String {
        self.policy.write_format = WriteFormat::Direct;
        let value = self.encrypt(plaintext, Sealing::default()).unwrap();
        self.policy.write_format = WriteFormat::Auto;
        value
    }
}

#[test]
fn deks_are_made_for_what_is_left_and_checked() {
    let mut world = World::new();
    world.make_ahead(1500, 4200).unwrap();
    assert_eq!((world.service.generated.get(), world.service.unwrapped.get()), (5, 5));
    for n in 0..5000 {
        let sealed = world.convert(task(MIGRATE), &format!("value {n}"), Some(0)).unwrap().unwrap();
        assert!(sealed.starts_with("kms:v2:"));
    }
    assert_eq!(world.calls(), 10, "nothing was asked while values were converted");
    world.make_ahead(1, 1).unwrap();
    assert_eq!(world.service.generated.get(), 6);
    world.make_ahead(1000, 1000).unwrap();
    assert_eq!(world.service.generated.get(), 6, "what is ready is enough");
}

#[test]
fn what_its_service_does_not_open_is_not_used() {
    let mut world = World::new();
    world.service.refuses.set(true);
    assert!(world.make_ahead(10, 10).is_err());
    assert!(matches!(world.convert(task(MIGRATE), "value", Some(0)), Err(Error::Service { .. })));
    world.service.refuses.set(false);
    world.service.swaps.set(true);
    world.fresh_session();
    assert!(matches!(world.make_ahead(10, 10), Err(Error::Unverified(Mismatch::RoundTrip))));
    assert!(matches!(world.convert(task(MIGRATE), "value", Some(0)), Err(Error::Unverified(Mismatch::Commitment))));
    let unchecked = BulkTask { check_wraps: false, ..task(MIGRATE) };
    assert!(world.convert(unchecked, "value", Some(0)).unwrap().is_some());
}

#[test]
fn migrating_guesses_nothing() {
    let mut world = World::new().with_legacy();
    let direct = world.direct("token");
    let envelope = world.encrypt("token", Sealing::default()).unwrap();
    assert_eq!(world.convert(task(MIGRATE), &envelope, None).unwrap(), None);
    assert_eq!(world.convert(task(MIGRATE), "", None).unwrap(), None);
    let migrated = world.convert(task(MIGRATE), &direct, None).unwrap().unwrap();
    assert_eq!(world.decrypt(&migrated, none()).unwrap(), "token");
    for policy in [PlaintextReads::Allow, PlaintextReads::Warn, PlaintextReads::Refuse] {
        world.policy.plaintext_reads = policy;
        let mut damaged = direct.clone().into_bytes();
        damaged[20] = if damaged[20] == b'A' { b'B' } else { b'A' };
        let damaged = String::from_utf8(damaged).unwrap();
        assert!(world.convert(task(MIGRATE), &damaged, None).is_err(), "ciphertext for plaintext under {policy:?}");
        assert!(world.convert(task(MIGRATE), &damaged, Some(1)).is_err());
        assert_eq!(world.policy.plaintext_reads, policy);
        let plain = world.convert(task(MIGRATE), "plain text", None);
        assert_eq!(plain.is_ok(), policy != PlaintextReads::Refuse);
        assert!(world.convert(task(MIGRATE), "plain text", Some(0)).is_ok());
    }
    world.keyring.legacy = Legacy::Absent;
    world.policy.plaintext_reads = PlaintextReads::Allow;
    assert!(world.convert(task(MIGRATE), &direct, None).is_err(), "the legacy key is missing");
}

#[test]
fn what_is_due() {
    let mut world = World::new().with_legacy();
    let direct = world.direct("token");
    let envelope = world.encrypt("token", Sealing::default()).unwrap();
    let malformed = &envelope[..envelope.len() - 3];
    for (value, migrate, downgrade, rewrap) in [
        ("", false, false, false),
        ("plain", true, false, false),
        (direct.as_str(), true, false, false),
        (envelope.as_str(), false, true, false),
        (malformed, true, true, true),
        ("kms:v2:YWJj:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", false, true, true),
    ] {
        for _again in 0..2 {
            assert_eq!(world.is_due(MIGRATE, value, None), migrate, "migrate {value}");
            assert_eq!(world.is_due(BulkOperation::Downgrade, value, None), downgrade, "downgrade {value}");
            assert_eq!(world.is_due(BulkOperation::Rewrap, value, None), rewrap, "rewrap {value}");
        }
    }
    world.keyring.keks.clear();
    world.add("main", "id-1", "{}", true, false);
    assert!(world.is_due(BulkOperation::Rewrap, &envelope, None), "only the service knows");
    assert!(world.is_due(BulkOperation::Rewrap, &envelope, Some("id-2")));
    assert!(!world.is_due(BulkOperation::Rewrap, &envelope, Some("id-1")));
}

#[test]
fn what_was_prepared_needs_no_call() {
    let mut world = World::new().with_legacy();
    let envelope = world.encrypt("token", Sealing::default()).unwrap();
    world.fresh_session();
    world.prepare(BulkOperation::Downgrade, &envelope).unwrap();
    let before = world.calls();
    let direct = world.convert(task(BulkOperation::Downgrade), &envelope, None).unwrap().unwrap();
    assert_eq!(world.decrypt(&direct, none()).unwrap(), "token");
    for moves in [true, false] {
        let name = format!("other-{moves}");
        world.add(&name, &format!("id-{moves}"), "{}", moves, true);
        let rewrap = BulkTask { key: Some(&name), ..task(BulkOperation::Rewrap) };
        let (session, mut run) = world.split();
        let head = session.needed_head(&run, Value::Text(&envelope)).unwrap();
        assert!(session.prepare_heads(&mut run, rewrap, &[&head]).unwrap().is_empty());
        let prepared = world.calls();
        assert!(prepared > before);
        let moved = world.convert(rewrap, &envelope, None).unwrap().unwrap();
        assert_eq!(world.calls(), prepared, "moves: {moves}");
        assert_eq!(world.decrypt(&moved, none()).unwrap(), "token");
    }
}

#[test]
fn errors_are_a_values_or_everyones() {
    let mut world = World::new().with_legacy();
    let envelope = world.encrypt("token", Sealing::default()).unwrap();
    let wrong = |world: &mut World, value: &str, operation| {
        world.fresh_session();
        world.convert(task(operation), value, None).unwrap_err()
    };
    assert!(wrong(&mut world, "kms:v2:x", MIGRATE).concerns_one_value(Some("main")));
    world.service.refuses.set(true);
    let denied = wrong(&mut world, &envelope, BulkOperation::Downgrade);
    assert!(denied.concerns_one_value(None), "another value may be under another key");
    assert!(!denied.concerns_one_value(Some("main")), "nothing can be made under it");
    world.keyring.keks[0].state = KeyState::DecryptOnly;
    let refused = wrong(&mut world, "plain", MIGRATE);
    world.policy.plaintext_reads = PlaintextReads::Allow;
    assert!(refused.concerns_one_value(Some("main")), "{refused}");
    let not_active = wrong(&mut world, "plain", MIGRATE);
    assert!(!not_active.concerns_one_value(Some("main")), "{not_active}");
    world.keyring.legacy = Legacy::Absent;
    world.service.refuses.set(false);
    assert!(!wrong(&mut world, &envelope, BulkOperation::Downgrade).concerns_one_value(None), "no legacy key");
}
