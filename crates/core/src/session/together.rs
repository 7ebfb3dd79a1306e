//! Calls that are known together, made together.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::ControlFlow;

use futures_util::StreamExt;
use futures_util::stream;

use crate::provider::ProviderError;

/// What is to be asked, in lanes: the calls of one lane are made one after the other.
pub(super) struct Lanes<N, J> {
    lanes: Vec<Vec<J>>,
    by_name: HashMap<N, usize>,
}

impl<N: Hash + Eq, J> Lanes<N, J> {
    pub(super) fn new() -> Self {
        Lanes { lanes: Vec::new(), by_name: HashMap::new() }
    }

    /// The lane of that name. A wrapped DEK is one: of it no two calls are under way at a time.
    pub(super) fn lane(&mut self, name: N) -> &mut Vec<J> {
        let at = *self.by_name.entry(name).or_insert_with(|| {
            self.lanes.push(Vec::new());
            self.lanes.len() - 1
        });
        &mut self.lanes[at]
    }

    /// Drops the jobs that need no call.
    pub(super) fn retain(&mut self, mut wanted: impl FnMut(&mut J) -> bool) {
        self.lanes.iter_mut().for_each(|lane| lane.retain_mut(&mut wanted));
    }

    pub(super) fn jobs(&mut self) -> impl Iterator<Item = &mut J> {
        self.lanes.iter_mut().flatten()
    }

    pub(super) fn into_inner(self) -> Vec<Vec<J>> {
        self.lanes
    }
}

/// Asks, with at most `concurrency` calls under way. `answered` takes each answer soon after it arrives, so that what came
/// stays when the wait is interrupted. Once it says so no further call begins, and those under way come to their end:
/// what they bring was asked for, and is paid for.
pub(super) async fn together<J, A>(
    lanes: Vec<Vec<J>>,
    concurrency: usize,
    ask: impl AsyncFn(&J) -> A,
    mut answered: impl FnMut(J, A) -> ControlFlow<()>,
) {
    let (ask, stopped) = (&ask, &Cell::new(false));
    let lanes = lanes.into_iter().map(|lane| async move {
        let mut answers = Vec::with_capacity(lane.len());
        for job in lane {
            if stopped.get() {
                break;
            }
            let answer = ask(&job).await;
            answers.push((job, answer));
        }
        answers
    });
    let mut answers = stream::iter(lanes).buffer_unordered(concurrency.max(1));
    while let Some(answers) = answers.next().await {
        for (job, answer) in answers {
            if answered(job, answer).is_break() {
                stopped.set(true);
            }
        }
    }
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
