//! DEKs that are made before they are needed: how many, and what becomes of those that are not needed after all.

use super::world::World;
use super::*;
use crate::provider::Fault;
use crate::session::{BulkOperation, BulkTask};

/// One DEK for each value, and few calls at a time.
fn fresh_for_each() -> World {
    let mut world = World::new();
    world.policy.limits.max_uses = 1;
    world.policy.concurrency = 4;
    world
}

impl World {
    /// Encrypts so many values; gives how many DEKs were made for each.
    fn made_for(&mut self, values: usize) -> Vec<u64> {
        let mut made = |n: usize| {
            let before = self.service.generated.get();
            self.encrypt(&n.to_string(), Sealing::default()).unwrap();
            self.service.generated.get() - before
        };
        (0..values).map(&mut made).collect()
    }

    fn unused(&self) -> u64 {
        self.session.stats().deks_unused
    }
}

fn groups(made: &[u64]) -> Vec<u64> {
    made.iter().copied().filter(|&made| made > 0).collect()
}

#[test]
fn a_statement_that_goes_on_asking_gets_growing_groups() {
    let mut world = fresh_for_each();
    assert_eq!(groups(&world.made_for(70)), [1, 1, 2, 4, 8, 16, 16, 16, 16]);
    assert_eq!(world.service.peak.get(), 4);
    assert_eq!(world.session.cached_deks(), 70, "what nobody encrypts with is not among what can be decrypted");
    assert_eq!(world.unused(), 0, "they may still be needed");
    world.session.begin_statement();
    assert_eq!((world.unused(), world.session.stats().deks_made), (10, 80));
    assert_eq!(groups(&world.made_for(3)), [1, 1, 2], "another statement begins small");
    world.session.begin_statement();
    assert_eq!(world.unused(), 11);
}

#[test]
fn never_more_stay_unused_than_were_used() {
    for (values, max_uses) in (1..60).flat_map(|values| [(values, 1), (values, 3)]) {
        let mut world = fresh_for_each();
        world.policy.limits.max_uses = max_uses;
        world.made_for(values);
        world.session.begin_statement();
        let used = (values as u64).div_ceil(max_uses);
        assert_eq!(world.session.stats().deks_made - world.unused(), used);
        assert!(world.unused() < used, "{values} values, {} unused", world.unused());
    }
}

#[test]
fn contexts_and_keys_grow_by_themselves() {
    let mut world = fresh_for_each();
    world.add("other", "id-2", "{}", false, true);
    world.made_for(8);
    let before = world.service.generated.get();
    world.encrypt("x", Sealing { key: Some("other"), ..Sealing::default() }).unwrap();
    let tenant = Context::from_json(r#"{"tenant":"a"}"#).unwrap();
    world.encrypt("x", Sealing { context: Some(&tenant), ..Sealing::default() }).unwrap();
    assert_eq!(world.service.generated.get() - before, 2);
}

#[test]
fn each_value_has_a_dek_of_its_own_and_opens() {
    let mut world = fresh_for_each();
    let values: Vec<_> = (0..50).map(|n| world.encrypt(&n.to_string(), Sealing::default()).unwrap()).collect();
    let heads: std::collections::HashSet<_> = values.iter().map(|value| value.rsplit_once(':').unwrap().0).collect();
    assert_eq!(heads.len(), 50);
    for (n, value) in values.iter().enumerate() {
        assert_eq!(world.decrypt(value, none()).unwrap(), n.to_string());
    }
    assert_eq!(world.service.unwrapped.get(), 0);
    world.fresh_session();
    for (n, value) in values.iter().enumerate() {
        assert_eq!(world.decrypt(value, none()).unwrap(), n.to_string());
    }
}

#[test]
fn after_a_failure_it_begins_small_again_and_without_any_answer_it_fails() {
    let mut world = fresh_for_each();
    world.made_for(8);
    assert_eq!(world.service.generated.get(), 8);
    world.service.fails_after.set(Some((3, Fault::Throttled)));
    assert_eq!(world.made_for(3), [4, 0, 0], "3 of 8 came, and no more were asked for");
    let error = world.encrypt("x", Sealing::default()).unwrap_err();
    assert!(matches!(error, Error::Service { source, .. } if source.fault == Fault::Throttled));
    world.service.fails_after.set(None);
    assert_eq!(groups(&world.made_for(4)), [3, 6], "as many as were used since");
    assert_eq!(world.session.stats().deks_made, 8 + 3 + 9);
}

#[test]
fn what_came_before_a_cancel_is_kept_and_goes_with_the_statement() {
    let mut world = fresh_for_each();
    world.made_for(16);
    world.wait.patience = Some(3);
    assert!(world.encrypt("x", Sealing::default()).is_err());
    world.wait.patience = None;
    let (made, asked) = (world.session.stats().deks_made, world.service.generated.get());
    assert!(made > 16 && made < asked, "{made} of {asked}");
    world.encrypt("x", Sealing::default()).unwrap();
    assert_eq!(world.service.generated.get(), asked, "one that came before is used");
    world.session.begin_statement();
    assert_eq!(world.unused(), made - 17);
}

#[test]
fn deks_that_grow_too_old_are_not_made_in_advance_any_more() {
    let mut world = fresh_for_each();
    world.made_for(9);
    world.time.set(world.time.get() + world.policy.limits.max_age_ms);
    assert_eq!(world.made_for(2), [1, 1]);
    assert_eq!(world.unused(), 0);
    world.session.begin_statement();
    assert_eq!(world.unused(), 7);
}

#[test]
fn what_a_job_has_made_survives_its_commits() {
    let mut world = fresh_for_each();
    let task = BulkTask { operation: BulkOperation::Migrate, key: None, context: None, check_wraps: true };
    let (session, mut run) = world.split();
    session.make_deks_ahead(&mut run, task, 10, 100).unwrap();
    assert_eq!(world.service.generated.get(), 16, "no more in one go than four rounds");
    world.session.begin_statement();
    world.session.begin_statement();
    assert_eq!(world.made_for(16), [0; 16]);
    assert_eq!(world.unused(), 0);
}

#[test]
fn the_cache_bounds_a_group_too() {
    let mut world = fresh_for_each();
    world.policy.limits.cache_entries = 3;
    assert_eq!(groups(&world.made_for(10)), [1, 1, 2, 3, 3]);
}

#[test]
fn many_contexts_together_are_bounded() {
    let mut world = fresh_for_each();
    world.policy.limits.cache_entries = 20;
    for _ in 0..10 {
        for tenant in 0..15 {
            let context = Context::from_json(&format!(r#"{{"tenant":"{tenant}"}}"#)).unwrap();
            world.encrypt("x", Sealing { context: Some(&context), ..Sealing::default() }).unwrap();
            let at_hand = world.session.sealing.at_hand();
            assert!(at_hand <= 20 + 1, "{at_hand} keys at hand");
        }
    }
}
