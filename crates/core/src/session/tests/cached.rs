//! Values whose DEK is at hand: what is not asked again, and that all the rest is.

use std::cell::Cell;
use std::rc::Rc;

use super::world::World;
use super::*;
use crate::access::{Function, Gate, Journal, Outcome, Privilege, Rights, Use};
use crate::envelope::PAYLOAD_OVERHEAD;
use crate::keyring::Honey;
use crate::stored::Kind;

const KINDS: [Kind; 2] = [Kind::Bytes, Kind::Text];

fn seal(world: &mut World, kind: Kind, plaintext: &str, sealing: Sealing<'_>) -> Vec<u8> {
    match kind {
        Kind::Bytes => world.encrypt_bytes(plaintext.as_bytes(), sealing).unwrap(),
        Kind::Text => world.encrypt(plaintext, sealing).unwrap().into_bytes(),
    }
}

fn value(kind: Kind, stored: &[u8]) -> Value<'_> {
    match kind {
        Kind::Bytes => Value::Bytes(stored),
        Kind::Text => Value::Text(str::from_utf8(stored).unwrap()),
    }
}

fn read(world: &mut World, kind: Kind, stored: &[u8], reading: Reading<'_>) -> Result<Vec<u8>> {
    match value(kind, stored) {
        Value::Bytes(stored) => world.decrypt_bytes(stored, reading),
        Value::Text(stored) => world.decrypt(stored, reading).map(String::into_bytes),
    }
}

/// Nothing where it is left to decrypt_any().
fn read_cached(world: &mut World, kind: Kind, stored: &[u8], reading: Reading<'_>) -> Result<Option<Vec<u8>>> {
    let (session, mut run) = world.split();
    let mut out = Vec::new();
    let decrypted = session.decrypt_cached(&mut run, kind, stored, reading, &mut out)?;
    assert!(decrypted || out.is_empty());
    Ok(decrypted.then_some(out))
}

fn read_any(world: &mut World, kind: Kind, stored: &[u8], reading: Reading<'_>) -> Result<Vec<u8>> {
    let (session, mut run) = world.split();
    let mut out = Vec::new();
    session.decrypt_any(&mut run, value(kind, stored), reading, &mut out)?;
    Ok(out)
}

/// nonce ‖ ciphertext ‖ tag of a value with that plaintext.
fn payload(kind: Kind, stored: &[u8], plaintext: &str) -> Vec<u8> {
    let sealed = match kind {
        Kind::Bytes => stored.to_vec(),
        Kind::Text => armor::decode(str::from_utf8(stored).unwrap().rsplit_once(':').unwrap().1).unwrap(),
    };
    sealed[sealed.len() - plaintext.len() - PAYLOAD_OVERHEAD..].to_vec()
}

/// The value with another tag.
fn tampered(kind: Kind, stored: &[u8]) -> Vec<u8> {
    let mut tampered = stored.to_vec();
    // Not the last character of a text: it may be padding, or have bits that base64 does not allow.
    let at = stored.len() - if kind == Kind::Text { 4 } else { 1 };
    tampered[at] = if stored[at] == b'A' { b'B' } else { b'A' };
    tampered
}

#[test]
fn text_whose_header_was_seen_is_decrypted_out_of_any_bytes() {
    let mut world = World::new();
    let texts: Vec<_> = ["a", "ключ"].map(|each| world.encrypt(each, Sealing::default()).unwrap()).into();
    world.fresh_session();
    let read = |world: &mut World, stored: &[u8]| read_cached(world, Kind::Text, stored, none());
    assert!(read(&mut world, texts[0].as_bytes()).unwrap().is_none(), "nothing was read yet");
    world.decrypt(&texts[0], none()).unwrap();
    assert_eq!(read(&mut world, texts[1].as_bytes()).unwrap().unwrap(), "ключ".as_bytes());
    let (head, _) = texts[0].split_at(texts[0].rfind(':').unwrap());
    for other in [&b""[..], b"plain", b"plain:text", head.as_bytes(), &texts[0].as_bytes()[1..], b"\xFF\xFE"] {
        assert!(read(&mut world, other).unwrap().is_none());
    }
    // Malformed, which decrypt_any() tells: bytes that are not text are another thing to it.
    for payload in [&b""[..], b"\xFF\xFE", b"AAAA:AAAA", b"AAAA"] {
        let broken = [head.as_bytes(), b":", payload].concat();
        assert!(read(&mut world, &broken).unwrap().is_none());
    }
    // Binary envelopes are remembered too, and in some encodings their bytes are text.
    let sealed = world.encrypt_bytes(b"x", Sealing::default()).unwrap();
    let (session, run) = world.split();
    let header = session.needed_head(&run, Value::Bytes(&sealed)).unwrap();
    let mixed = [&header[..], b":", armor::encode(&sealed[header.len()..]).as_bytes()].concat();
    assert!(read(&mut world, &mixed).unwrap().is_none(), "the header that was seen last");
    world.decrypt(&texts[0], none()).unwrap();
    assert!(read(&mut world, &mixed).unwrap().is_none());
}

#[test]
fn each_value_finds_its_own_dek() {
    for kind in KINDS {
        let mut world = World::new();
        world.policy.limits.max_uses = 2;
        let bound = Sealing { aad: Some("row"), ..Sealing::default() };
        // Two under each DEK: bound to an aad and not.
        let values: Vec<_> = (0..6)
            .map(|n| {
                let (sealing, reading) = if n % 2 == 0 { (bound, aad("row")) } else { (Sealing::default(), none()) };
                (seal(&mut world, kind, &n.to_string(), sealing), reading, n.to_string())
            })
            .collect();
        world.fresh_session();
        for (stored, reading, _) in &values {
            assert!(read_cached(&mut world, kind, stored, *reading).unwrap().is_none() || kind == Kind::Bytes);
            read(&mut world, kind, stored, *reading).unwrap();
        }
        assert_eq!(world.service.unwrapped.get(), 3);
        for at in [0, 1, 2, 5, 4, 0, 3, 3, 1, 2, 4, 5, 0] {
            let (stored, reading, plaintext) = &values[at];
            let found = read_cached(&mut world, kind, stored, *reading).unwrap();
            assert_eq!(found.expect("it is cached"), plaintext.as_bytes());
        }
        assert_eq!(world.service.unwrapped.get(), 3);
    }
}

#[test]
fn what_the_cache_drops_is_not_found_by_where_it_was() {
    for kind in KINDS {
        let mut world = World::new();
        world.policy.limits.max_uses = 1;
        let values: Vec<_> = (0..3).map(|n| seal(&mut world, kind, &n.to_string(), Sealing::default())).collect();
        world.fresh_session();
        world.policy.limits.cache_entries = 2;
        for stored in &values {
            read(&mut world, kind, stored, none()).unwrap();
        }
        assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_none(), "evicted");
        assert_eq!(read_cached(&mut world, kind, &values[1], none()).unwrap().unwrap(), b"1");
        assert_eq!(read(&mut world, kind, &values[0], none()).unwrap(), b"0");
        assert_eq!(read_cached(&mut world, kind, &values[0], none()).unwrap().unwrap(), b"0");

        // The key is taken away, and given back: the headers are still known.
        let keks = std::mem::take(&mut world.keyring.keks);
        world.session.keys_changed(&world.keyring);
        assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_none());
        world.keyring.keks = keks;
        world.session.keys_changed(&world.keyring);
        assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_none());
        read(&mut world, kind, &values[0], none()).unwrap();
        assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_some());

        world.session.clear();
        assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_none(), "wiped");

        // Another one's entry may come to lie where its own was, but for what is kept of it.
        let others = world.made(50, "main");
        read(&mut world, kind, &values[0], none()).unwrap();
        world.policy.limits.cache_entries = 1;
        for other in &others {
            world.decrypt_bytes(other, none()).unwrap();
            assert!(read_cached(&mut world, kind, &values[0], none()).unwrap().is_none());
        }
    }
}

#[test]
fn a_cached_dek_is_asked_for_like_any_other() {
    for kind in KINDS {
        let mut world = World::new();
        let stored = seal(&mut world, kind, "token", Sealing { aad: Some("row 1"), ..Sealing::default() });
        let own = aad("row 1");
        read(&mut world, kind, &stored, own).unwrap();
        world.gate.take();
        let before = world.session.stats().clone();
        assert_eq!(read_cached(&mut world, kind, &stored, own).unwrap().unwrap(), b"token");
        let after = world.session.stats();
        assert_eq!(after.values_decrypted, before.values_decrypted + 1);
        assert_eq!((after.cache_hits, after.cache_misses), (before.cache_hits + 1, before.cache_misses));
        let uses: Vec<_> = world.gate.take().into_iter().map(|(used, tally)| (used.outcome, tally.values)).collect();
        assert_eq!(uses, [(Outcome::Done, 1)]);

        for version in [0, 1, 3] {
            let stated = Reading { version: Some(version), ..own };
            assert!(read_cached(&mut world, kind, &stored, stated).unwrap().is_none());
        }
        let other = read_cached(&mut world, kind, &tampered(kind, &stored), own);
        assert!(matches!(other, Err(Error::Unverified(Mismatch::Payload))));

        // Cached for one who may is not for one who may not.
        world.enter(1, &[]);
        assert!(read_cached(&mut world, kind, &stored, own).unwrap().is_none());
        world.enter(2, &[("main", Privilege::Decrypt)]);
        assert!(read_cached(&mut world, kind, &stored, own).unwrap().is_some());

        world.time.set(world.time.get() + world.policy.limits.max_age_ms - 1);
        assert!(read_cached(&mut world, kind, &stored, own).unwrap().is_some());
        world.time.set(world.time.get() + 1);
        assert!(read_cached(&mut world, kind, &stored, own).unwrap().is_none(), "too old");
        read(&mut world, kind, &stored, own).unwrap();
        assert!(read_cached(&mut world, kind, &stored, own).unwrap().is_some());
    }
}

/// Announces nothing the first time.
struct OnceFull(Rc<Cell<u32>>);

impl Journal for OnceFull {
    fn sqlstate(&self, _error: &Error) -> String {
        String::new()
    }

    fn announce(&mut self, _used: &Use) -> Result<Option<u64>> {
        self.0.set(self.0.get() + 1);
        if self.0.get() == 1 { Err(Error::NotAudited("the disk is full".to_owned())) } else { Ok(None) }
    }
}

#[test]
fn what_cannot_be_recorded_is_not_tried_again() {
    for kind in KINDS {
        let mut world = World::new();
        let stored = seal(&mut world, kind, "token", Sealing::default());
        read(&mut world, kind, &stored, none()).unwrap();
        let announced = Rc::new(Cell::new(0));
        world.gate = Gate::new(Box::new(OnceFull(Rc::clone(&announced))));
        world.gate.enter(0, Rc::new(Rights::all()));
        world.gate.forget();
        assert!(matches!(read(&mut world, kind, &stored, none()), Err(Error::NotAudited(_))));
        assert_eq!(announced.get(), 1);
        assert_eq!(read(&mut world, kind, &stored, none()).unwrap(), b"token");
    }
}

/// What two calls of one transaction give and leave behind, as far as it must not depend on which way they went.
fn outcome(
    world: &mut World,
    function: Function,
    read: impl Fn(&mut World) -> Result<Vec<u8>>,
) -> (String, Vec<String>, [u64; 3]) {
    let counters = |world: &World| {
        let stats = world.session.stats();
        [stats.values_decrypted, stats.cache_hits, stats.cache_misses]
    };
    let before = counters(world);
    world.gate.take();
    // What the first one left behind serves the second.
    let results = [(); 2].map(|()| {
        world.gate.begin(function);
        let result = read(world);
        if let Err(error) = &result {
            world.gate.failed(&error.to_string(), error.key());
        }
        result
    });
    let alarms = world.gate.take_alarms().into_iter().map(|(used, _)| format!("alarm {used:?}")).collect::<Vec<_>>();
    let uses = world.gate.take().into_iter().map(|(used, tally)| format!("{used:?} {}", tally.values));
    let uses = alarms.into_iter().chain(uses).collect();
    let after = counters(world);
    (format!("{results:?}"), uses, std::array::from_fn(|at| after[at] - before[at]))
}

/// A value, and others like it that do not open.
fn and_broken(world: &mut World, kind: Kind, sealing: Sealing<'_>) -> Vec<Vec<u8>> {
    let whole = seal(world, kind, "token", sealing);
    let payload = payload(kind, &whole, "token").len();
    match kind {
        Kind::Bytes => {
            let cut_off = whole[..whole.len() - payload + 27].to_vec();
            vec![tampered(kind, &whole), cut_off, whole]
        }
        Kind::Text => {
            let head = str::from_utf8(&whole).unwrap().rsplit_once(':').unwrap().0.as_bytes();
            let broken = [&b"AAAA"[..], b"AAA", b"", b"=", b"AAAA:AAAA"].map(|payload| [head, b":", payload].concat());
            let sealed = world.encrypt_bytes(b"\xFF", sealing).unwrap();
            let not_text = armor::encode(&sealed[Envelope::parse(&sealed).unwrap().header.bytes.len()..]);
            let not_text = [head, b":", not_text.as_bytes()].concat();
            broken.into_iter().chain([not_text, tampered(kind, &whole), whole]).collect()
        }
    }
}

#[test]
fn both_ways_give_and_record_the_same() {
    let [included, other] = [r#"{"a":"1"}"#, r#"{"a":"2"}"#].map(|json| Context::from_json(json).unwrap());
    let mut readings = Vec::new();
    for aad in [None, Some("row"), Some("another row"), Some("")] {
        for context in [None, Some(&included), Some(&other)] {
            readings.extend([None, Some(2), Some(1), Some(0), Some(3)].map(|version| Reading {
                aad,
                context,
                version,
            }));
        }
    }
    let grants: [&[(&str, Privilege)]; 4] =
        [&[], &[("main", Privilege::Decrypt)], &[("main", Privilege::Encrypt)], &[("other", Privilege::Decrypt)]];
    let calls = [(false, Function::Decrypt), (true, Function::Decrypt), (true, Function::Verify)];
    for (kind, aad) in KINDS.into_iter().flat_map(|kind| [(kind, Some("row")), (kind, None)]) {
        let mut world = World::new();
        world.add("other", "id-2", "{}", false, true);
        let sealing = Sealing { aad, context: Some(&included), ..Sealing::default() };
        let values = and_broken(&mut world, kind, sealing);
        let (whole, broken) = values.split_last().unwrap();
        read(&mut world, kind, whole, Reading { aad, ..none() }).unwrap();
        let marks = [whole, &tampered(kind, whole)].map(|each| Honey::mark(&payload(kind, each, "token")).unwrap());
        let mut opened = 0;
        for (party, granted) in grants.into_iter().enumerate() {
            world.enter(party as u32, granted);
            for (stored, reading, (watched, function)) in values.iter().flat_map(|stored| {
                let calls = readings.iter().flat_map(|reading| calls.map(|call| (*reading, call)));
                calls.map(move |(reading, call)| (stored, reading, call))
            }) {
                world.keyring.honey = Honey::default();
                if watched {
                    marks.iter().for_each(|mark| assert!(world.keyring.honey.add(mark)));
                }
                let usual = outcome(&mut world, function, |world| read(world, kind, stored, reading));
                let general = outcome(&mut world, function, |world| read_any(world, kind, stored, reading));
                assert_eq!(usual, general, "{kind:?} {reading:?} {granted:?} {watched}");
                assert!(!broken.contains(stored) || !usual.0.contains("Ok"));
                opened += usize::from(usual.0.contains("Ok"));
            }
        }
        // For those with one of the grants, with the one right aad, one of two contexts or none, version 2 or none.
        assert_eq!(opened, 2 * 2 * calls.len());
    }
}

#[test]
fn of_bytea_no_header_is_kept_twice() {
    let mut world = World::new();
    let text = world.encrypt("text", Sealing::default()).unwrap();
    world.decrypt(&text, none()).unwrap();
    let bytes = world.encrypt_bytes(b"bytes", Sealing::default()).unwrap();
    world.fresh_session();
    world.decrypt(&text, none()).unwrap();
    world.decrypt_bytes(&bytes, none()).unwrap();
    assert!(world.session.heads.wraps(Value::Text(&text)).is_some());
    assert!(world.session.heads.wraps(Value::Bytes(&bytes)).is_none());
}
