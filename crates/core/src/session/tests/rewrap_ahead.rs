//! DEKs that are moved to another KEK together: each once, checked where a job wants that, and for who may move them.

use super::prefetch::counts;
use super::world::{World, head, heads, with_wraps};
use super::*;
use crate::access::{Function, Privilege::*};
use crate::envelope::Wrap;
use crate::provider::{Fault, NoCalls};
use crate::session::{BulkOperation, BulkTask, Prefetched, Run};

fn job(key: &str) -> BulkTask<'_> {
    BulkTask { operation: BulkOperation::Rewrap, key: Some(key), context: None, check_wraps: true }
}

impl World {
    fn move_ahead(&mut self, values: &[Vec<u8>], key: &str) -> Result<Prefetched> {
        let (session, mut run) = self.split();
        session.prefetch_rewraps(&mut run, Some(key), &heads(values))
    }

    fn prepare_rewraps(&mut self, values: &[Vec<u8>], key: &str) -> Result<Vec<(usize, Error)>> {
        let (session, mut run) = self.split();
        session.prepare_heads(&mut run, job(key), &heads(values))
    }

    /// What a job makes of a value with what was prepared. It can call nothing.
    fn converts(&mut self, value: &[u8], key: &str) -> Vec<u8> {
        let mut no_calls = NoCalls::default();
        let mut run = Run::new(&self.keyring, &self.policy, &mut no_calls, &mut self.gate);
        let mut out = Vec::new();
        assert!(self.session.convert(&mut run, job(key), Value::Bytes(value), None, None, &mut out).unwrap());
        self.session.assure(&mut run, job(key), Value::Bytes(&out)).unwrap();
        out
    }

    fn move_calls(&self) -> [u64; 3] {
        [self.service.moved.get(), self.service.unwrapped.get(), self.service.wrapped.get()]
    }

    fn rewraps_all(&mut self, values: &[Vec<u8>], key: &str) -> Vec<Vec<u8>> {
        values.iter().map(|value| self.rewrap(value, Some(key)).unwrap().0).collect()
    }

    fn opens_all(&mut self, values: &[Vec<u8>]) {
        for (n, value) in values.iter().enumerate() {
            assert_eq!(self.decrypt_bytes(value, none()).unwrap(), [n as u8]);
        }
    }
}

#[test]
fn each_distinct_dek_is_moved_once_and_many_at_a_time() {
    for moves in [true, false] {
        let mut world = World::new();
        world.add("next", "id-2", "{}", moves, true);
        let values = world.made(30, "main");
        let twice = [values.clone(), values.clone()].concat();
        assert_eq!(world.move_ahead(&twice, "next").map(counts).unwrap(), (30, 0));
        let calls = if moves { [30, 0, 0] } else { [0, 30, 30] };
        assert_eq!((world.move_calls(), world.service.peak.get()), (calls, 4));
        let moved = world.rewraps_all(&values, "next");
        assert_eq!(world.move_calls(), calls, "what was moved before needs no call");
        assert_eq!(world.move_ahead(&values, "next").unwrap().deks, 0);
        assert_eq!(world.move_ahead(&moved, "next").unwrap().deks, 0);
        assert_eq!(world.move_calls(), calls);
        world.fresh_session();
        world.opens_all(&moved);
    }
}

#[test]
fn a_job_has_each_new_wrap_opened_by_its_service() {
    for moves in [true, false] {
        let mut world = World::new();
        world.add("next", "id-2", "{}", moves, true);
        let values = world.made(20, "main");
        world.service.deks.borrow_mut().remove(&b"wrapped 7"[..]).unwrap();
        let failures = world.prepare_rewraps(&values, "next").unwrap();
        assert!(matches!(failures[..], [(7, Error::Service { .. })]), "{failures:?}");
        let calls = if moves { [20, 19, 0] } else { [0, 39, 19] };
        assert_eq!((world.move_calls(), world.service.peak.get()), (calls, 4));
        for (n, value) in values.iter().enumerate().filter(|(n, _)| *n != 7) {
            world.converts(value, "next");
            assert_eq!(world.move_calls(), calls, "value {n}");
        }
        assert!(world.prepare_rewraps(&values[..7], "next").unwrap().is_empty());
        assert_eq!(world.move_calls(), calls, "all of it is known by now");
    }
}

#[test]
fn what_the_service_opens_to_something_else_is_not_kept() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(3, "main");
    world.service.swaps.set(true);
    let failures = world.prepare_rewraps(&values, "next").unwrap();
    assert_eq!(failures.len(), 3);
    assert!(failures.iter().all(|(_, error)| matches!(error, Error::Unverified(Mismatch::Commitment))));
    world.service.swaps.set(false);
    assert!(world.prepare_rewraps(&values, "next").unwrap().is_empty());
    assert_eq!(world.service.moved.get(), 6, "moved anew");
}

#[test]
fn with_an_alias_one_goes_first_and_tells_what_is_up_to_date() {
    let mut world = World::new();
    let alias = world.add("alias", "id-5", "{}", true, false);
    let mut values = world.made(5, "alias");
    *alias.id.borrow_mut() = "id-6".into();
    let newer = world.made(5, "alias");
    values.extend_from_slice(&newer);
    // The fake service finds DEKs by the id that they were wrapped under, as AWS KMS does.
    assert_eq!(world.move_ahead(&values, "alias").map(counts).unwrap(), (5, 0));
    assert_eq!(world.service.moved.get(), 5);
    for value in &newer {
        assert!(!world.rewrap(value, Some("alias")).unwrap().1);
    }
    assert_eq!(world.service.moved.get(), 5);
}

#[test]
fn what_a_job_asks_at_its_beginning_need_not_be_asked_again() {
    let mut world = World::new();
    world.add("alias", "id-5", "{}", true, false);
    let values = world.made(3, "alias");
    let (session, mut run) = world.split();
    let (_, newest) = session.newest_kek_id(&mut run, Some("alias")).unwrap();
    assert_eq!(newest.as_deref(), Some("id-5"));
    assert!(world.prepare_rewraps(&values, "alias").unwrap().is_empty());
    assert_eq!(world.move_calls(), [0, 0, 0]);
}

#[test]
fn who_may_not_move_is_refused_before_anything_is_called() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(3, "main");
    for granted in [
        &[("main", Rewrap)][..],
        &[("next", Rewrap)],
        &[("main", Decrypt), ("next", Decrypt)],
        &[("main", Rewrap), ("next", Rewrap), ("next", Decrypt)],
    ] {
        world.enter(1, granted);
        assert!(matches!(world.move_ahead(&values, "next"), Err(Error::NotGranted { .. })), "{granted:?}");
    }
    assert_eq!(world.move_calls(), [0, 0, 0]);
    world.enter(2, &[("main", Rewrap), ("next", Rewrap)]);
    world.gate.take();
    world.gate.begin(Function::PrefetchRewraps);
    assert_eq!(world.move_ahead(&values, "next").unwrap().deks, 3);
    let uses: Vec<_> =
        world.gate.take().into_iter().map(|(used, tally)| (used.key, used.privilege, tally.values)).collect();
    assert_eq!(uses, [("next".to_owned(), Rewrap, 3), ("main".to_owned(), Rewrap, 3)]);
}

#[test]
fn a_service_that_is_down_is_asked_no_further() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(40, "main");
    world.service.fails_after.set(Some((10, Fault::Throttled)));
    let error = world.move_ahead(&values, "next").unwrap_err();
    assert!(matches!(error, Error::Service { source, .. } if source.fault == Fault::Throttled));
    assert!((11..=17).contains(&world.service.moved.get()), "{}", world.service.moved.get());
    world.service.fails_after.set(None);
    assert_eq!(world.move_ahead(&values, "next").unwrap().deks, 30, "what came is known");
}

#[test]
fn no_more_is_moved_than_is_remembered() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(10, "main");
    world.policy.limits.cache_entries = 8;
    assert_eq!(world.move_ahead(&values, "next").map(counts).unwrap(), (8, 2));
    world.rewraps_all(&values[..8], "next");
    assert_eq!(world.service.moved.get(), 8);
    world.fresh_session();
    assert!(world.prepare_rewraps(&values, "next").unwrap().is_empty(), "a job moves the rest too");
    assert_eq!(world.service.moved.get(), 18);
}

#[test]
fn other_wraps_serve_where_the_first_does_not() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    world.add("twin", "id-1", "{}", true, true);
    let values = world.made(6, "main");
    let two: Vec<_> = values
        .iter()
        .map(|value| {
            with_wraps(value, |wraps| wraps.insert(0, Wrap { key_name: "twin", wrapped_dek: b"nothing", ..wraps[0] }))
        })
        .collect();
    assert_eq!(world.move_ahead(&two, "next").unwrap().deks, 6);
    let calls = world.move_calls();
    assert_eq!(calls, [6 + 6, 0, 0], "each commits to another DEK than the broken wrap could hold");
    world.rewraps_all(&two[..1], "next");
}

#[test]
fn a_wrap_of_its_own_that_cannot_be_reached_now_is_not_replaced() {
    let mut world = World::new();
    let alias = world.add("alias", "id-5", "{}", true, false);
    let values = world.made(3, "alias");
    let other: Vec<_> = world.made(3, "main");
    let two: Vec<_> = values
        .iter()
        .zip(&other)
        .map(|(value, other)| with_wraps(value, |wraps| wraps.push(Envelope::parse(other).unwrap().header.wraps[0])))
        .collect();
    *alias.id.borrow_mut() = "id-6".into();
    world.service.failing.borrow_mut().insert("id-6".into(), Fault::Denied);
    assert!(matches!(world.move_ahead(&two, "alias"), Err(Error::Service { key, .. }) if key == "alias"));
    assert_eq!(world.move_calls(), [1, 0, 0], "only its own wrap was tried");
}

#[test]
fn what_was_known_of_an_alias_grows_no_younger_by_being_checked() {
    let mut world = World::new();
    let alias = world.add("alias", "id-5", "{}", true, false);
    let values = world.made(3, "main");
    assert_eq!(world.move_ahead(&values, "alias").unwrap().deks, 3);
    *alias.id.borrow_mut() = "id-6".into();
    let age = world.policy.limits.max_age_ms;
    world.time.set(world.time.get() + age - 1);
    // A job only checks what is known.
    assert!(world.prepare_rewraps(&values, "alias").unwrap().is_empty());
    assert_eq!(world.service.moved.get(), 3);
    world.time.set(world.time.get() + 1);
    assert_eq!(world.move_ahead(&values, "alias").unwrap().deks, 3, "it is asked again");
    assert_eq!(world.service.moved.get(), 6);
}

#[test]
fn a_wrap_that_fails_its_check_is_forgotten() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(3, "main");
    world.move_ahead(&values, "next").unwrap();
    let lost = format!("wrapped {}", 3 + 1).into_bytes();
    world.service.deks.borrow_mut().remove(&lost).unwrap();
    let failures = world.prepare_rewraps(&values, "next").unwrap();
    assert!(matches!(failures[..], [(_, Error::Service { .. })]), "{failures:?}");
    assert!(world.prepare_rewraps(&values, "next").unwrap().is_empty(), "it was moved again");
    assert_eq!(world.service.moved.get(), 4);
}

#[test]
fn a_forged_header_makes_nothing_of_others_be_forgotten() {
    let mut world = World::new();
    world.add("next", "id-2", "{}", true, true);
    let values = world.made(3, "main");
    world.move_ahead(&values, "next").unwrap();
    let end = head(&values[0]).len();
    let mut forged = values[0].clone();
    forged[end - 1] ^= 1;
    let all = [&values[..], &[forged]].concat();
    let failures = world.prepare_rewraps(&all, "next").unwrap();
    assert!(matches!(failures[..], [(3, Error::Unverified(Mismatch::Commitment))]), "{failures:?}");
    let calls = world.move_calls();
    for value in &values {
        world.converts(value, "next");
    }
    assert_eq!(world.move_calls(), calls);
}

#[test]
fn a_job_gets_past_a_wrap_of_its_own_that_is_broken() {
    let mut world = World::new();
    let alias = world.add("next", "id-5", "{}", true, true);
    let values = world.made(2, "main");
    let both = with_wraps(&values[0], |wraps| {
        wraps.insert(0, Wrap { key_name: "next", kek_id: "id-4", wrapped_dek: b"nothing" });
    });
    assert!(world.prepare_rewraps(std::slice::from_ref(&both), "next").unwrap().is_empty());
    let calls = world.move_calls();
    let moved = world.converts(&both, "next");
    assert_eq!(world.move_calls(), calls);
    drop(alias);
    world.fresh_session();
    assert_eq!(world.decrypt_bytes(&moved, none()).unwrap(), [0]);
}
