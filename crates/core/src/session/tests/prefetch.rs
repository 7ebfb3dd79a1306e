//! DEKs that are fetched together: each once, for who may have it, and no more than the session keeps.

use super::world::{World, head, heads, with_wraps};
use super::*;
use crate::access::{Function, Journal, Outcome, Privilege::*, Rights, Use};
use crate::envelope::Wrap;
use crate::provider::Fault;
use crate::session::{BulkOperation, BulkTask, Prefetched};

/// So many values, each under a DEK of its own, and a session that knows none of them.
fn cold(count: usize) -> (World, Vec<Vec<u8>>) {
    let mut world = World::new();
    let values = world.made(count, "main");
    world.fresh_session();
    (world, values)
}

impl World {
    /// How many DEKs it fetched, and how many did not fit.
    fn prefetch(&mut self, values: &[Vec<u8>]) -> Result<(u64, u64)> {
        self.prefetch_heads(&heads(values))
    }

    fn prefetch_heads(&mut self, heads: &[&[u8]]) -> Result<(u64, u64)> {
        let (session, mut run) = self.split();
        session.prefetch(&mut run, heads).map(counts)
    }

    /// The uses of keys since this was last asked, that came to something: how each ended, of which key, and how often.
    fn uses(&mut self) -> Vec<(Outcome, String, u64)> {
        let uses = self.gate.take().into_iter().filter(|(_, tally)| tally.values > 0);
        uses.map(|(used, tally)| (used.outcome, used.key, tally.values)).collect()
    }

    fn unwrapped(&self) -> u64 {
        self.service.unwrapped.get()
    }

    fn reads_all(&mut self, values: &[Vec<u8>]) {
        for (n, value) in values.iter().enumerate() {
            assert_eq!(self.decrypt_bytes(value, none()).unwrap(), [n as u8]);
        }
    }
}

pub(super) fn counts(found: Prefetched) -> (u64, u64) {
    (found.deks, found.left_out)
}

#[test]
fn each_distinct_dek_is_fetched_once_and_many_at_a_time() {
    let (mut world, values) = cold(50);
    let twice = [values.clone(), values.clone()].concat();
    assert_eq!(world.prefetch(&twice).unwrap(), (50, 0));
    assert_eq!((world.unwrapped(), world.service.peak.get()), (50, 4));
    world.reads_all(&values);
    assert_eq!(world.unwrapped(), 50);
    assert_eq!((world.session.stats().cache_misses, world.session.stats().cache_hits), (0, 50));
    assert_eq!(world.prefetch(&twice).unwrap(), (0, 0));
    world.time.set(world.time.get() + world.policy.limits.max_age_ms);
    assert_eq!(world.prefetch(&values).unwrap(), (50, 0), "they had grown too old");
}

#[test]
fn headers_that_share_a_dek_share_the_call() {
    let mut world = World::new();
    let bound = world.encrypt_bytes(b"x", Sealing { aad: Some("row"), ..Sealing::default() }).unwrap();
    let free = world.encrypt_bytes(b"y", Sealing::default()).unwrap();
    let recovery = with_wraps(&free, |wraps| {
        wraps.push(Wrap { key_name: "recovery", kek_id: "id-9", wrapped_dek: b"held elsewhere" });
    });
    world.fresh_session();
    assert_eq!(world.prefetch(&[bound.clone(), free.clone(), recovery.clone()]).unwrap(), (1, 0));
    assert_eq!(world.decrypt_bytes(&bound, aad("row")).unwrap(), b"x");
    assert_eq!(world.decrypt_bytes(&free, none()).unwrap(), b"y");
    assert_eq!(world.decrypt_bytes(&recovery, none()).unwrap(), b"y");
    assert_eq!(world.unwrapped(), 1);
}

#[test]
fn one_wrapped_dek_is_never_asked_about_twice_at_a_time() {
    let (mut world, values) = cold(6);
    world.add("twin", "id-1", "{}", false, true);
    world.add("stranger", "id-2", "{}", false, true);
    let named = |name: &'static str| {
        values.iter().map(move |value| with_wraps(value, |wraps| wraps[0].key_name = name)).collect::<Vec<_>>()
    };
    let mixed = [values.clone(), named("twin"), named("stranger")].concat();
    assert_eq!(world.prefetch(&mixed).unwrap(), (18, 0), "the fake service would have noticed");
    assert_eq!(world.unwrapped(), 18);
    world.reads_all(&values);
    world.reads_all(&named("twin"));
    assert_eq!(world.unwrapped(), 18);
}

#[test]
fn no_more_is_fetched_than_is_kept() {
    let (mut world, values) = cold(12);
    world.policy.limits.cache_entries = 8;
    assert_eq!(world.prefetch(&values[..3]).unwrap(), (3, 0));
    assert_eq!(world.prefetch(&values).unwrap(), (5, 4));
    assert_eq!((world.unwrapped(), world.session.stats().cache_evictions), (8, 0));
    world.reads_all(&values[..8]);
    assert_eq!(world.unwrapped(), 8, "what was fetched is there when it is read");
}

#[test]
fn who_may_not_decrypt_is_refused_before_anything_is_called() {
    let (mut world, mut values) = cold(5);
    world.add("other", "id-2", "{}", false, true);
    values.extend(world.made(1, "other"));
    world.fresh_session();
    for granted in [&[("main", Rewrap), ("main", Encrypt)][..], &[("main", Decrypt)], &[]] {
        world.enter(1, granted);
        assert!(matches!(world.prefetch(&values), Err(Error::NotGranted { .. })), "{granted:?}");
        assert_eq!(world.unwrapped(), 0);
    }
    world.enter(2, &[("main", Decrypt), ("other", Decrypt)]);
    assert_eq!(world.prefetch(&values).unwrap(), (6, 0));
    // What is at hand by now is for those who may have it.
    world.enter(3, &[("main", Decrypt)]);
    assert!(matches!(world.prefetch(&values), Err(Error::NotGranted { key, .. }) if key == "other"));
    assert_eq!(world.prefetch(&values[..5]).unwrap(), (0, 0));
}

#[test]
fn an_alias_fetches_nothing_of_another_configured_key_for_who_may_not_use_that() {
    let mut world = World::new();
    world.add("alias", "id-1", "{}", false, false);
    let values = world.made(2, "alias");
    world.fresh_session();
    world.enter(1, &[("alias", Decrypt)]);
    assert!(matches!(world.prefetch(&values), Err(Error::NotGranted { key, .. }) if key == "main"));
    assert_eq!(world.unwrapped(), 0);
}

#[test]
fn each_dek_that_was_fetched_counts_as_a_use() {
    let (mut world, values) = cold(5);
    world.service.deks.borrow_mut().remove(&b"wrapped 2"[..]).unwrap();
    world.gate.take();
    world.gate.begin(Function::Prefetch);
    world.prefetch(&values).unwrap();
    assert_eq!(world.uses(), [(Outcome::Done, "main".into(), 4), (failed(), "main".into(), 1)]);
}

struct Full;

impl Journal for Full {
    fn sqlstate(&self, _error: &Error) -> String {
        String::new()
    }

    fn announce(&mut self, _used: &Use) -> Result<Option<u64>> {
        Err(Error::NotAudited("the disk is full".to_owned()))
    }
}

#[test]
fn nothing_is_fetched_that_cannot_be_recorded() {
    let (mut world, values) = cold(5);
    world.gate = crate::access::Gate::new(Box::new(Full));
    world.gate.enter(0, std::rc::Rc::new(Rights::all()));
    assert!(matches!(world.prefetch(&values), Err(Error::NotAudited(_))));
    assert_eq!((world.unwrapped(), world.session.cached_deks()), (0, 0));
}

#[test]
fn what_is_wrong_with_one_value_is_left_for_its_reader() {
    let (mut world, values) = cold(10);
    let kept = world.service.deks.borrow_mut().remove(&b"wrapped 4"[..]).unwrap();
    assert_eq!(world.prefetch(&values).unwrap(), (9, 0));
    assert!(matches!(world.decrypt_bytes(&values[4], none()), Err(Error::Service { .. })));
    // One whose DEK is not the one that it commits to.
    world.fresh_session();
    let stranger = Envelope::parse(&values[0]).unwrap().header.wraps[0];
    let forged = with_wraps(&values[1], |wraps| wraps[0] = stranger);
    assert_eq!(world.prefetch(&[forged.clone(), values[0].clone()]).unwrap(), (1, 0));
    assert!(matches!(world.decrypt_bytes(&forged, none()), Err(Error::Unverified(Mismatch::Commitment))));
    assert_eq!(world.decrypt_bytes(&values[0], none()).unwrap(), [0]);
    world.service.deks.borrow_mut().insert(b"wrapped 4".to_vec(), kept);
    world.keyring.keks[0].name = "another".into();
    world.fresh_session();
    assert_eq!(world.prefetch(&values).unwrap(), (0, 0), "its key is not configured");
}

#[test]
fn what_is_no_header_is_left_out_of_it() {
    let (mut world, values) = cold(1);
    let whole = head(&values[0]);
    let heads: Vec<_> = (4..whole.len()).map(|length| &whole[..length]).collect();
    assert_eq!(world.prefetch_heads(&heads).unwrap(), (0, 0));
    let (session, mut run) = world.split();
    assert_eq!(session.prefetch_rewraps(&mut run, None, &heads).map(counts).unwrap(), (0, 0));
    assert_eq!(world.unwrapped(), 0);
}

#[test]
fn a_service_that_is_down_is_asked_no_further_and_what_came_stays() {
    for fault in [Fault::Unreachable, Fault::Throttled, Fault::BadAnswer] {
        let (mut world, values) = cold(40);
        world.service.fails_after.set(Some((10, fault)));
        let error = world.prefetch(&values).unwrap_err();
        assert!(matches!(error, Error::Service { source, .. } if source.fault == fault));
        assert!((11..=17).contains(&world.unwrapped()), "{} calls", world.unwrapped());
        assert_eq!(world.session.cached_deks(), 10);
        world.service.fails_after.set(None);
        assert_eq!(world.prefetch(&values).unwrap(), (30, 0));
    }
}

#[test]
fn what_came_before_a_cancel_stays() {
    let (mut world, values) = cold(40);
    world.wait.patience = Some(5);
    assert!(world.prefetch(&values).is_err());
    let (came, asked) = (world.session.cached_deks() as u64, world.unwrapped());
    assert!(came > 0 && came < asked && asked < 40, "{came} of {asked}");
    world.wait.patience = None;
    assert_eq!(world.prefetch(&values).unwrap(), (40 - came, 0));
    world.reads_all(&values);
}

#[test]
fn other_wraps_serve_where_the_first_does_not() {
    let mut world = World::new();
    world.policy.concurrency = 4;
    let values = world.made(6, "main");
    world.add("spare", "id-2", "{}", false, true);
    let with_spare: Vec<_> = values
        .iter()
        .map(|value| {
            let (moved, _) = world.rewrap(value, Some("spare")).unwrap();
            let second = Envelope::parse(&moved).unwrap().header.wraps[0];
            with_wraps(value, |wraps| wraps.push(second))
        })
        .collect();
    world.session.clear();
    // The first key's service is down: after the first answers it is not asked again.
    world.service.failing.borrow_mut().insert("id-1".into(), Fault::Unreachable);
    let before = world.unwrapped();
    assert_eq!(world.prefetch(&with_spare).unwrap(), (6, 0));
    assert_eq!(world.unwrapped() - before, 4 + 6);
    world.reads_all(&with_spare);
    // Among values that have no other wrap it is an error.
    world.session.clear();
    let mixed = [&with_spare[..3], &values[3..]].concat();
    assert!(matches!(world.prefetch(&mixed), Err(Error::Service { key, .. }) if key == "main"));
    // The first wrap is not for this caller; then it is damaged.
    world.service.failing.borrow_mut().clear();
    world.session.clear();
    let before = world.unwrapped();
    world.enter(1, &[("spare", Decrypt)]);
    assert_eq!(world.prefetch(&with_spare).unwrap(), (6, 0));
    assert_eq!(world.unwrapped() - before, 6);
    world.session.clear();
    world.enter(0, &[("spare", Decrypt), ("main", Decrypt)]);
    let damaged: Vec<_> =
        with_spare.iter().map(|value| with_wraps(value, |wraps| wraps[0].wrapped_dek = b"nothing")).collect();
    assert_eq!(world.prefetch(&damaged).unwrap(), (6, 0));
    world.reads_all(&damaged);
}

#[test]
fn literal_forms_are_fetched_too() {
    let (mut world, values) = cold(3);
    // As another writer makes it: the wrapped DEK and a payload sealed with the DEK itself.
    let blobs: Vec<_> =
        values.iter().map(|value| Envelope::parse(value).unwrap().header.wraps[0].wrapped_dek).collect();
    let literal = |blob: &[u8], plaintext: &str| {
        let key = crate::seal::ExpandedKey::new(&world.service.deks.borrow()[blob].0);
        let mut payload = vec![0; 12 + plaintext.len() + 16];
        let mut random = crate::random::SessionRandom::from_system().unwrap();
        crate::seal::write_payload(&key, &mut random, &[], plaintext.as_bytes(), &mut payload).unwrap();
        format!("kms:v2:{}:{}", armor::encode(blob), armor::encode(&payload))
    };
    let stored: Vec<_> = blobs.iter().zip(["a", "b", "c"]).map(|(blob, plaintext)| literal(blob, plaintext)).collect();
    let unknown = b"blob".as_slice();
    assert_eq!(world.prefetch_heads(&[&blobs[..], &[unknown]].concat()).unwrap(), (3, 0));
    assert_eq!(world.unwrapped(), 4);
    for (stored, plaintext) in stored.iter().zip(["a", "b", "c"]) {
        assert_eq!(world.decrypt(stored, none()).unwrap(), plaintext);
    }
    assert_eq!(world.unwrapped(), 4, "they are at hand");
    world.enter(1, &[]);
    assert!(matches!(world.prefetch_heads(&blobs), Err(Error::NotGranted { .. })));
}

#[test]
fn jobs_learn_what_is_wrong_with_which_value() {
    let (mut world, values) = cold(10);
    world.service.deks.borrow_mut().remove(&b"wrapped 4"[..]).unwrap();
    world.policy.limits.cache_entries = 8;
    let heads = heads(&values);
    let task = BulkTask { operation: BulkOperation::Verify, key: None, context: None, check_wraps: false };
    let (session, mut run) = world.split();
    let failures = session.prepare_heads(&mut run, task, &heads).unwrap();
    assert!(matches!(failures[..], [(4, Error::Service { .. })]), "{failures:?}");
    assert_eq!(world.unwrapped(), 10, "also what does not fit at once");
    let uses = world.gate.take();
    assert!(
        uses.iter().all(|(used, tally)| used.privilege == Encrypt || tally.values == 0),
        "values are counted later"
    );
    world.service.fails_after.set(Some((0, Fault::Unreachable)));
    world.fresh_session();
    let (session, mut run) = world.split();
    assert!(session.prepare_heads(&mut run, task, &heads).is_err());
}

/// How what was refused ended: the journal of these tests has one name for all failures.
fn failed() -> Outcome {
    Outcome::Failed(String::new())
}

#[test]
fn what_was_refused_is_counted_beside_an_error_and_a_cancel() {
    for cancelled in [false, true] {
        let (mut world, values) = cold(40);
        (0..3).for_each(|n| drop(world.service.deks.borrow_mut().remove(format!("wrapped {n}").as_bytes()).unwrap()));
        if cancelled {
            world.wait.patience = Some(5);
        } else {
            world.service.fails_after.set(Some((10, Fault::Unreachable)));
        }
        world.gate.take();
        world.gate.begin(Function::Prefetch);
        assert!(world.prefetch(&values).is_err());
        let refused: Vec<_> = world.uses().into_iter().filter(|(outcome, ..)| *outcome == failed()).collect();
        assert_eq!(refused, [(failed(), "main".into(), 3)], "{cancelled}");
    }
}

#[test]
fn one_wrapped_dek_in_many_headers_is_no_way_around_a_service_that_is_down() {
    let (mut world, values) = cold(1);
    let names: Vec<_> = (0..30).map(|n| format!("twin{n}")).collect();
    names.iter().for_each(|name| drop(world.add(name, "id-1", "{}", false, true)));
    let twins: Vec<_> = names.iter().map(|name| with_wraps(&values[0], |wraps| wraps[0].key_name = name)).collect();
    world.service.fails_after.set(Some((10, Fault::Unreachable)));
    assert!(world.prefetch(&twins).is_err());
    assert_eq!(world.unwrapped(), 11, "one after the other, and none after the one that failed");
    assert_eq!(world.session.cached_deks(), 10);
    // What came before a cancel stays, of one lane too.
    world.fresh_session();
    world.service.fails_after.set(None);
    world.wait.patience = Some(7);
    assert!(world.prefetch(&twins).is_err());
    assert!((1..30).contains(&world.session.cached_deks()), "{}", world.session.cached_deks());
}
