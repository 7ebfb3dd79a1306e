//! Calls that are known together, made together.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::ControlFlow;

use futures_util::StreamExt;
use futures_util::stream;

use crate::access::{Admitted, Gate};
use crate::error::{Error, Result};
use crate::provider::ProviderError;
use crate::session::Run;

/// What a prefetch did.
#[derive(Debug)]
pub struct Prefetched {
    /// DEKs that were fetched.
    pub deks: u64,
    /// Headers whose DEKs were not, because the session keeps no more than [`crate::policy::Limits::cache_entries`].
    pub left_out: u64,
}

/// Whom calls are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// A caller who asks for nothing else: each DEK counts as one use of its key, what is refused as one that failed, for nobody
    /// may come to read those values. Nothing is asked of a service when one of the keys is not for the caller.
    ByCaller,
    /// A job, which counts the values it converts, and to which each head is one of many.
    ByJob,
}

/// What calls that were made together brought.
#[derive(Default)]
pub(super) struct Outcome {
    pub deks: u64,
    /// Places of the heads that there was no room for.
    pub left_out: Vec<usize>,
    /// What is wrong with single heads, by place.
    pub failures: Vec<(usize, Error)>,
}

impl Outcome {
    pub(super) fn fail(&mut self, places: &[usize], error: &Error) {
        self.failures.extend(places.iter().map(|&place| (place, error.clone())));
    }

    pub(super) fn prefetched(self) -> Prefetched {
        Prefetched { deks: self.deks, left_out: self.left_out.len() as u64 }
    }
}

/// Heads that one call serves, and what goes with them.
pub(super) struct Group<H, X> {
    pub heads: Vec<H>,
    pub with: X,
}

/// Groups of heads in lanes: the calls of one lane are made one after the other.
pub(super) type Lanes<H, X> = Vec<Vec<Group<H, X>>>;

/// Sorts heads by the wrapped DEK that each needs, and by what else its call depends on. A wrapped DEK is a lane: of it no two
/// calls are under way at a time.
pub(super) fn lanes<'h, H, N: Hash + Eq, X>(
    heads: Vec<H>,
    name: impl Fn(&H) -> (&'h [u8], N),
    with: impl Fn() -> X,
) -> Lanes<H, X> {
    let mut lanes: Lanes<H, X> = Vec::new();
    let mut by_wrapped_dek: HashMap<&[u8], usize> = HashMap::new();
    let mut by_name: HashMap<(&[u8], N), usize> = HashMap::new();
    for head in heads {
        let name = name(&head);
        let at = *by_wrapped_dek.entry(name.0).or_insert_with(|| {
            lanes.push(Vec::new());
            lanes.len() - 1
        });
        let lane = &mut lanes[at];
        let group = *by_name.entry(name).or_insert_with(|| {
            lane.push(Group { heads: Vec::new(), with: with() });
            lane.len() - 1
        });
        lane[group].heads.push(head);
    }
    lanes
}

/// Asks, with at most `concurrency` calls under way. `answered` takes each answer when it arrives, so that what came stays when
/// the wait is interrupted. Once it says so no further call begins, and those under way come to their end: what they bring
/// was asked for, and is paid for.
pub(super) async fn together<J, A>(
    lanes: Vec<Vec<J>>,
    concurrency: usize,
    ask: impl AsyncFn(&J) -> A,
    answered: impl FnMut(J, A) -> ControlFlow<()>,
) {
    let (ask, answered, stopped) = (&ask, &RefCell::new(answered), &Cell::new(false));
    let lanes = lanes.into_iter().map(|lane| async move {
        for job in lane {
            if stopped.get() {
                break;
            }
            let answer = ask(&job).await;
            if (answered.borrow_mut())(job, answer).is_break() {
                stopped.set(true);
            }
        }
    });
    stream::iter(lanes).buffer_unordered(concurrency.max(1)).collect::<()>().await;
}

/// How one head's call failed.
pub(super) struct Failed<H, F> {
    pub head: H,
    pub admitted: Admitted,
    pub failure: F,
}

/// Ends a round that was stopped: the error is about that use of a key.
pub(super) fn check_stopped(gate: &mut Gate, stopped_by: Option<(Admitted, Error)>) -> Result<()> {
    let Some((admitted, error)) = stopped_by else { return Ok(()) };
    gate.attempt(admitted);
    Err(error)
}

/// The heads that another round goes on with. What is wrong with single ones is noted; `target` is the KEK that all go to, if
/// they do.
pub(super) fn next_round<'k, W, H, F>(
    run: &mut Run<'k, W>,
    failed: Vec<Failed<H, F>>,
    target: Option<&str>,
    outcome: &mut Outcome,
    through_another_wrap: impl Fn(H, &Run<'k, W>, F) -> std::result::Result<H, (Vec<usize>, Error)>,
) -> Result<Vec<H>> {
    let mut next = Vec::new();
    for Failed { head, admitted, failure } in failed {
        match through_another_wrap(head, run, failure) {
            Ok(head) => next.push(head),
            Err((places, error)) if error.concerns_one_value(target) => outcome.fail(&places, &error),
            Err((_, error)) => check_stopped(run.gate, Some((admitted, error)))?,
        }
    }
    Ok(next)
}

/// The keys that answer nobody, and with what: they are not asked again, and what can be reached through another key is.
#[derive(Default)]
pub(super) struct Down(RefCell<HashMap<String, (String, ProviderError)>>);

impl Down {
    /// Notes that the key `name` failed in a way that all calls will: with an error of the key `blamed`.
    pub(super) fn note(&self, name: &str, blamed: &str, failure: &ProviderError) {
        self.0.borrow_mut().insert(name.to_owned(), (blamed.to_owned(), failure.clone()));
    }

    /// The failure of a key that is known to fail, and which key's it is.
    pub(super) fn of(&self, name: &str) -> Option<(String, ProviderError)> {
        self.0.borrow().get(name).cloned()
    }
}
