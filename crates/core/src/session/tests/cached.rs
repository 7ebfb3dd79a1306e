//! Values whose DEK is at hand: what is not asked again, and that all the rest is.

use super::world::World;
use super::*;
use crate::access::Privilege;
use crate::envelope::PAYLOAD_OVERHEAD;
use crate::keyring::Honey;
use crate::stored::Kind;

fn cached(world: &mut World, kind: Kind, stored: &[u8], reading: Reading<'_>) -> Option<Vec<u8>> {
    let (session, mut run) = world.split();
    let mut out = Vec::new();
    let read_as = session.decrypt_cached(&mut run, kind, stored, reading, &mut out)?;
    assert_eq!(read_as, ReadAs::Envelope);
    Some(out)
}

#[test]
fn text_whose_header_was_seen_is_decrypted_out_of_any_bytes() {
    let mut world = World::new();
    let texts: Vec<_> = ["a", "ключ"].map(|each| world.encrypt(each, Sealing::default()).unwrap()).into();
    world.fresh_session();
    let cached = |world: &mut World, stored: &[u8]| cached(world, Kind::Text, stored, none());
    assert!(cached(&mut world, texts[0].as_bytes()).is_none(), "nothing was read yet");
    world.decrypt(&texts[0], none()).unwrap();
    assert_eq!(cached(&mut world, texts[1].as_bytes()).unwrap(), "ключ".as_bytes());
    let (head, _) = texts[0].split_at(texts[0].rfind(':').unwrap());
    let broken = [head.as_bytes(), b":\xFF\xFE"].concat();
    for other in [
        &b""[..],
        b"plain",
        head.as_bytes(),
        &texts[0].as_bytes()[1..],
        b"\xFF\xFE",
        &broken,
        &broken[..head.len() + 1],
    ] {
        assert!(cached(&mut world, other).is_none());
    }
    // Binary envelopes are remembered too, and in some encodings their bytes are text.
    let sealed = world.encrypt_bytes(b"x", Sealing::default()).unwrap();
    let (session, run) = world.split();
    let header = session.needed_head(&run, Value::Bytes(&sealed)).unwrap();
    let mixed = [&header[..], b":", armor::encode(&sealed[header.len()..]).as_bytes()].concat();
    assert!(cached(&mut world, &mixed).is_none(), "the header that was seen last");
    world.decrypt(&texts[0], none()).unwrap();
    assert!(cached(&mut world, &mixed).is_none());
}

#[test]
fn what_is_cached_is_opened_for_nobody_who_would_be_refused() {
    let context = Context::from_json(r#"{"Other":"context"}"#).unwrap();
    for kind in [Kind::Bytes, Kind::Text] {
        let mut world = World::new();
        let sealing = Sealing { aad: Some("row 1"), ..Sealing::default() };
        let mut stored = match kind {
            Kind::Bytes => world.encrypt_bytes(b"token", sealing).unwrap(),
            Kind::Text => world.encrypt("token", sealing).unwrap().into_bytes(),
        };
        let read = |world: &mut World, stored: &[u8], reading| cached(world, kind, stored, reading);
        let any = |world: &mut World, stored: &[u8]| match kind {
            Kind::Bytes => world.decrypt_bytes(stored, aad("row 1")),
            Kind::Text => world.decrypt(std::str::from_utf8(stored).unwrap(), aad("row 1")).map(String::into_bytes),
        };
        any(&mut world, &stored).unwrap();
        assert_eq!(read(&mut world, &stored, aad("row 1")).unwrap(), b"token");
        for version in [0, 1, 3] {
            assert!(read(&mut world, &stored, Reading { version: Some(version), ..aad("row 1") }).is_none());
        }
        assert!(read(&mut world, &stored, Reading { version: Some(2), ..aad("row 1") }).is_some());
        for reading in [aad("row 2"), none(), Reading { context: Some(&context), ..aad("row 1") }] {
            assert!(read(&mut world, &stored, reading).is_none());
        }

        // A watched value is for decrypt_any(), which raises the alarm.
        let payload = match kind {
            Kind::Bytes => stored.clone(),
            Kind::Text => armor::decode(str::from_utf8(&stored).unwrap().rsplit_once(':').unwrap().1).unwrap(),
        };
        let payload = &payload[payload.len() - (b"token".len() + PAYLOAD_OVERHEAD)..];
        world.keyring.honey.add(&Honey::mark(payload).unwrap());
        assert!(read(&mut world, &stored, aad("row 1")).is_none());
        world.keyring.honey = Honey::default();
        assert!(read(&mut world, &stored, aad("row 1")).is_some());

        // Neither may it be read by somebody else because it was cached for one who may.
        world.enter(1, &[]);
        assert!(read(&mut world, &stored, aad("row 1")).is_none());
        world.enter(2, &[("main", Privilege::Decrypt)]);
        assert!(read(&mut world, &stored, aad("row 1")).is_some());

        world.time.set(world.time.get() + world.policy.limits.max_age_ms - 1);
        assert!(read(&mut world, &stored, aad("row 1")).is_some());
        world.time.set(world.time.get() + 1);
        assert!(read(&mut world, &stored, aad("row 1")).is_none(), "too old");
        any(&mut world, &stored).unwrap();
        assert!(read(&mut world, &stored, aad("row 1")).is_some());

        let tag = stored.len() - 2;
        stored[tag] ^= 1;
        let hits = world.session.stats().cache_hits;
        assert!(read(&mut world, &stored, aad("row 1")).is_none());
        assert_eq!(world.session.stats().cache_hits, hits, "decrypt_any() counts it");
        stored[tag] ^= 1;

        world.session.clear();
        assert!(read(&mut world, &stored, aad("row 1")).is_none(), "wiped");
    }
}
