//! The gate between callers and keys: lets through what is granted, at every use of a key, and counts it.

use std::cell::Cell;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::rc::Rc;

use crate::access::rights::{Privilege, Rights};
use crate::context::Context;
use crate::error::{Error, Result};

/// What was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Function {
    /// `envelope_encrypt()`
    Encrypt,
    /// `envelope_decrypt()`
    Decrypt,
    /// `rewrap()`
    Rewrap,
    /// `envelope_upgrade()`
    Upgrade,
    /// `envelope_downgrade()`
    Downgrade,
    /// The job `migrate()`.
    MigrateJob,
    /// The job `rewrap_table()`.
    RewrapJob,
    /// The job `downgrade()`.
    DowngradeJob,
    /// `verify()`, which shows no plaintext.
    Verify,
    /// `envelope_prefetch()`, which shows none either: it fetches DEKs for those who may decrypt with them.
    Prefetch,
    /// The same for the operation `rewrap`.
    PrefetchRewraps,
    /// What uses no key.
    Other,
}

impl Function {
    /// Its name in the audit.
    pub fn name(self) -> &'static str {
        match self {
            Function::Encrypt => "envelope_encrypt",
            Function::Decrypt => "envelope_decrypt",
            Function::Rewrap => "rewrap",
            Function::Upgrade => "envelope_upgrade",
            Function::Downgrade => "envelope_downgrade",
            Function::MigrateJob => "migrate",
            Function::RewrapJob => "rewrap_table",
            Function::DowngradeJob => "downgrade",
            Function::Verify => "verify",
            Function::Prefetch | Function::PrefetchRewraps => "envelope_prefetch",
            Function::Other => "other",
        }
    }

    /// The privilege that it mainly needs: what a failure is filed under that came before a key was found.
    fn privilege(self) -> Privilege {
        match self {
            Function::Encrypt | Function::Upgrade | Function::MigrateJob => Privilege::Encrypt,
            Function::Rewrap | Function::RewrapJob | Function::PrefetchRewraps => Privilege::Rewrap,
            _ => Privilege::Decrypt,
        }
    }
}

/// How uses of a key ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// As wanted.
    Done,
    /// With this SQLSTATE.
    Failed(String),
    /// A honey value was asked for, whether it opened or not.
    Honey,
}

/// Number of one of the callers of this transaction; the owner of the [`Gate`] knows who it is.
pub type Party = u32;

/// Uses of a key by one caller, through one function, with one context.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Use {
    /// Who.
    pub party: Party,
    /// Through what.
    pub function: Function,
    /// What was done with the key.
    pub privilege: Privilege,
    /// The key's name; empty where none was found.
    pub key: String,
    /// The envelope's context; empty for version 1.
    pub context: Context,
    /// How it ended.
    pub outcome: Outcome,
}

/// How often.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of values.
    pub values: u64,
    /// Under which ids the key service logged what it was asked for them; no more than [`Tally::MOST_REQUESTS`].
    pub requests: Vec<String>,
    /// What [`Journal::announce`] gave.
    pub announced: Option<u64>,
    /// How many of them the last alarm told of.
    pub alarmed: u64,
}

impl Tally {
    /// Request ids that are kept.
    pub const MOST_REQUESTS: usize = 32;
}

/// Told of a use of a key before anything comes of it.
pub trait Journal {
    /// What a failure is filed under: its SQLSTATE.
    fn sqlstate(&self, error: &Error) -> String;

    /// Sees to it that the use will be known whatever happens next, where that is required; gives a number for it then.
    /// After an error nothing is decrypted or encrypted.
    fn announce(&mut self, used: &Use) -> Result<Option<u64>>;
}

/// Announces nothing.
impl Journal for () {
    fn sqlstate(&self, _error: &Error) -> String {
        String::new()
    }

    fn announce(&mut self, _used: &Use) -> Result<Option<u64>> {
        Ok(None)
    }
}

/// Stands between callers and keys: lets through what is granted, and counts it.
pub struct Gate {
    journal: Box<dyn Journal>,
    party: Party,
    rights: Rc<Rights>,
    function: Function,
    /// Grows whenever what was admitted must be asked again.
    generation: u64,
    uses: Vec<(Use, Tally)>,
    /// Bytes of contexts in `uses`.
    bytes: usize,
    index: HashMap<Use, usize>,
    /// What was admitted and is not done yet.
    attempt: Option<usize>,
    last: Option<usize>,
    alarms: Vec<usize>,
}

/// What a key remembers of its last use, so that the next one costs a comparison.
#[derive(Debug, Default)]
pub struct Seen(Cell<Option<(Stamp, usize)>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    generation: u64,
    party: Party,
    function: Function,
    privilege: Privilege,
}

/// What was called before something else was.
#[derive(Debug, Clone, Copy)]
pub struct Interrupted {
    function: Function,
    attempt: Option<usize>,
}

/// A use that was admitted.
#[derive(Debug, Clone, Copy)]
pub struct Admitted(Option<NonZeroUsize>);

impl Admitted {
    /// The session's own check of what it made: nobody sees anything of it.
    pub(crate) const CHECK: Admitted = Admitted(None);

    /// The use at a place. One more is kept, so that it fits into a register.
    fn at(slot: usize) -> Self {
        Admitted(Some(NonZeroUsize::MIN.saturating_add(slot)))
    }

    fn slot(self) -> Option<usize> {
        self.0.map(|slot| slot.get() - 1)
    }
}

impl Gate {
    /// A gate that lets nobody through yet.
    pub fn new(journal: Box<dyn Journal>) -> Self {
        Gate {
            journal,
            party: 0,
            rights: Rc::default(),
            function: Function::Other,
            generation: 0,
            uses: Vec::new(),
            bytes: 0,
            index: HashMap::new(),
            attempt: None,
            last: None,
            alarms: Vec::new(),
        }
    }

    /// Says who calls from now on. One party has one set of rights until [`Gate::forget`].
    pub fn enter(&mut self, party: Party, rights: Rc<Rights>) {
        self.party = party;
        self.rights = rights;
    }

    /// Says what is called. Gives what was called before, for [`Gate::resume`].
    pub fn begin(&mut self, function: Function) -> Interrupted {
        let before = Interrupted { function: self.function, attempt: self.attempt };
        self.function = function;
        self.attempt = None;
        before
    }

    /// Goes back to what was called before something that uses no key.
    pub fn resume(&mut self, before: Interrupted) {
        self.function = before.function;
        self.attempt = before.attempt;
    }

    /// What was admitted so far must be asked again: rights have changed.
    pub fn forget(&mut self) {
        self.generation += 1;
    }

    /// All uses since this was last asked: at the end of a transaction. What was announced and came to nothing but a failure
    /// is one of them: the failure.
    pub fn take(&mut self) -> Vec<(Use, Tally)> {
        for at in 0..self.uses.len() {
            let Use { outcome: Outcome::Failed(_), .. } = &self.uses[at].0 else { continue };
            let meant = Use { outcome: Outcome::Done, ..self.uses[at].0.clone() };
            if let Some(&meant) = self.index.get(&meant)
                && self.uses[meant].1.values == 0
            {
                self.uses[at].1.announced = self.uses[meant].1.announced.take();
            }
        }
        self.forget();
        self.index.clear();
        self.bytes = 0;
        self.alarms.clear();
        (self.attempt, self.last) = (None, None);
        std::mem::take(&mut self.uses)
    }

    /// Whether it is time to [`Gate::take`] also when the transaction goes on: memory is bounded, contexts are not.
    pub fn is_full(&self) -> bool {
        const MOST_USES: usize = 1000;
        const MOST_BYTES: usize = 1 << 20;
        self.uses.len() >= MOST_USES || self.bytes >= MOST_BYTES
    }

    /// Whether there is nothing to [`Gate::take`].
    pub fn is_empty(&self) -> bool {
        self.uses.is_empty()
    }

    /// The honey values asked for since this was last asked: what was done, and how often by now.
    pub fn take_alarms(&mut self) -> Vec<(Use, &mut Tally)> {
        let alarms = std::mem::take(&mut self.alarms);
        let alarmed = self.uses.iter_mut().enumerate().filter(|(at, _)| alarms.contains(at));
        alarmed.map(|(_, (used, tally))| (used.clone(), tally)).collect()
    }

    /// Whether there are any.
    pub fn has_alarms(&self) -> bool {
        !self.alarms.is_empty()
    }

    /// Refuses what is not granted.
    pub(crate) fn require(&self, privilege: Privilege, key: &str) -> Result<()> {
        match self.allows(privilege, key) {
            true => Ok(()),
            false => Err(Error::NotGranted { key: key.to_owned(), privilege: privilege.name() }),
        }
    }

    pub(crate) fn allows(&self, privilege: Privilege, key: &str) -> bool {
        self.rights.allow(privilege, key)
    }

    /// Lets one use of a key through, or does not. `seen` belongs to the key and the context.
    #[inline(always)]
    pub fn admit(&mut self, seen: &Seen, privilege: Privilege, key: &str, context: &Context) -> Result<Admitted> {
        let stamp = self.stamp(privilege);
        if let Some((seen, slot)) = seen.0.get()
            && seen == stamp
        {
            self.attempt = Some(slot);
            return Ok(Admitted::at(slot));
        }
        let admitted = self.admit_anew(privilege, key, context)?;
        seen.0.set(admitted.slot().map(|slot| (stamp, slot)));
        Ok(admitted)
    }

    /// Lets something be opened with the key `from` that is sealed under the key `to` (or not at all) before anybody sees it.
    pub(crate) fn admit_move(&mut self, seen: &Seen, from: &str, to: &str, context: &Context) -> Result<Admitted> {
        // Asked every time: it depends on both keys, and `seen` belongs to one.
        self.require_move(from, to)?;
        let stamp = self.stamp(Privilege::Rewrap);
        let slot = match seen.0.get() {
            Some((seen, slot)) if seen == stamp => slot,
            _ => self.announced(self.named(Privilege::Rewrap, from, context, Outcome::Done))?,
        };
        seen.0.set(Some((stamp, slot)));
        self.attempt = Some(slot);
        Ok(Admitted::at(slot))
    }

    /// Refuses a move that is not granted: it takes the right to rewrap, or to decrypt. Whoever may decrypt with the target
    /// would read by moving, and so must have the right to decrypt with the source.
    pub(crate) fn require_move(&self, from: &str, to: &str) -> Result<()> {
        if self.allows(Privilege::Decrypt, from) {
            return Ok(());
        }
        self.require(Privilege::Rewrap, from)?;
        if self.allows(Privilege::Decrypt, to) && from != to { self.require(Privilege::Decrypt, from) } else { Ok(()) }
    }

    fn stamp(&self, privilege: Privilege) -> Stamp {
        Stamp { generation: self.generation, party: self.party, function: self.function, privilege }
    }

    /// Where a use is counted; announces it if it is new.
    fn announced(&mut self, used: Use) -> Result<usize> {
        match self.index.get(&used) {
            Some(&slot) => Ok(slot),
            None => {
                let announced = self.journal.announce(&used)?;
                Ok(self.file(used, announced))
            }
        }
    }

    /// Lets one use through of a key that remembers nothing.
    pub(crate) fn admit_anew(&mut self, privilege: Privilege, key: &str, context: &Context) -> Result<Admitted> {
        self.require(privilege, key)?;
        let slot = self.announced(self.named(privilege, key, context, Outcome::Done))?;
        self.attempt = Some(slot);
        Ok(Admitted::at(slot))
    }

    /// Counts one value of a use that came to its end.
    #[inline]
    pub fn done(&mut self, admitted: Admitted) {
        if let Some(slot) = admitted.slot() {
            self.uses[slot].1.values += 1;
            self.attempt = None;
            self.last = Some(slot);
        }
    }

    /// Goes back to a use that was admitted before others were: what comes next is about that one.
    pub fn attempt(&mut self, admitted: Admitted) {
        self.attempt = admitted.slot().or(self.attempt);
    }

    /// Notes that what was called failed: under `key`, which the failure names, or else under the key that was admitted last.
    pub fn failed(&mut self, sqlstate: &str, key: Option<&str>) {
        // What uses no key is open to everybody, and no attempt at anything.
        if self.function == Function::Other {
            return;
        }
        let outcome = Outcome::Failed(sqlstate.to_owned());
        let used = match self.attempt.take() {
            Some(slot) => {
                let tried = self.uses[slot].0.clone();
                Use { outcome, key: key.map_or(tried.key, str::to_owned), ..tried }
            }
            None => self.named(self.function.privilege(), key.unwrap_or_default(), &Context::empty(), outcome),
        };
        let slot = self.slot(used);
        self.uses[slot].1.values += 1;
        self.last = Some(slot);
    }

    /// Notes that a use failed among others that go on.
    pub(crate) fn refused(&mut self, admitted: Admitted, error: &Error) {
        let attempt = self.attempt;
        self.attempt(admitted);
        self.failed(&self.journal.sqlstate(error), error.key());
        self.attempt = attempt;
    }

    /// Notes that a honey value was asked for.
    pub(crate) fn alarm(&mut self, key: &str, context: &Context) {
        let slot = self.slot(self.named(Privilege::Decrypt, key, context, Outcome::Honey));
        self.uses[slot].1.values += 1;
        if !self.alarms.contains(&slot) {
            self.alarms.push(slot);
        }
    }

    /// Whether what is called shows a plaintext to its caller.
    pub(crate) fn shows_plaintext(&self) -> bool {
        self.function != Function::Verify
    }

    /// Notes under which ids a key service logged its calls for the use at hand.
    pub fn note_requests(&mut self, requests: Vec<String>) {
        if let Some(slot) = self.attempt.or(self.last) {
            let kept = &mut self.uses[slot].1.requests;
            kept.extend(requests.into_iter().take(Tally::MOST_REQUESTS.saturating_sub(kept.len())));
        }
    }

    fn named(&self, privilege: Privilege, key: &str, context: &Context, outcome: Outcome) -> Use {
        Use {
            party: self.party,
            function: self.function,
            privilege,
            key: key.to_owned(),
            context: context.clone(),
            outcome,
        }
    }

    fn slot(&mut self, used: Use) -> usize {
        match self.index.get(&used) {
            Some(&slot) => slot,
            None => self.file(used, None),
        }
    }

    fn file(&mut self, used: Use, announced: Option<u64>) -> usize {
        let slot = self.uses.len();
        // Twice: here and in the index.
        self.bytes += 2 * used.context.encoded().len();
        self.index.insert(used.clone(), slot);
        self.uses.push((used, Tally { announced, ..Tally::default() }));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Journal for Full {
        fn sqlstate(&self, _error: &Error) -> String {
            String::new()
        }

        fn announce(&mut self, _used: &Use) -> Result<Option<u64>> {
            Err(Error::NotAudited("the disk is full".to_owned()))
        }
    }

    fn granted(pairs: &[(&str, Privilege)]) -> Rc<Rights> {
        let mut rights = Rights::default();
        pairs.iter().for_each(|(key, privilege)| rights.grant(key, *privilege));
        Rc::new(rights)
    }

    #[test]
    fn a_cached_key_is_asked_for_again_when_caller_rights_or_transaction_change() {
        let mut gate = Gate::new(Box::new(()));
        let (seen, context) = (Seen::default(), Context::empty());
        let open = |gate: &mut Gate| {
            let admitted = gate.admit(&seen, Privilege::Decrypt, "a", &context)?;
            gate.done(admitted);
            Result::Ok(())
        };
        gate.begin(Function::Decrypt);
        assert!(open(&mut gate).is_err(), "nobody has entered");
        gate.enter(1, granted(&[("a", Privilege::Decrypt)]));
        open(&mut gate).unwrap();
        open(&mut gate).unwrap();
        gate.enter(2, granted(&[("b", Privilege::Decrypt)]));
        assert!(open(&mut gate).is_err(), "another caller");
        gate.enter(1, granted(&[("a", Privilege::Decrypt)]));
        open(&mut gate).unwrap();
        gate.forget();
        gate.enter(1, granted(&[]));
        assert!(open(&mut gate).is_err(), "revoked");
        let uses = gate.take();
        assert_eq!(uses.len(), 1);
        assert_eq!((uses[0].0.party, uses[0].1.values), (1, 3));
        assert!(gate.take().is_empty());
    }

    #[test]
    fn nothing_is_admitted_that_cannot_be_announced() {
        let mut gate = Gate::new(Box::new(Full));
        gate.begin(Function::Decrypt);
        gate.enter(1, Rc::new(Rights::all()));
        let seen = Seen::default();
        for _ in 0..2 {
            let refused = gate.admit(&seen, Privilege::Decrypt, "a", &Context::empty());
            assert!(matches!(refused, Err(Error::NotAudited(_))));
        }
        assert!(gate.is_empty());
    }

    #[test]
    fn a_failure_is_filed_under_the_key_that_was_used() {
        let mut gate = Gate::new(Box::new(()));
        gate.enter(1, Rc::new(Rights::all()));
        gate.begin(Function::Decrypt);
        gate.admit(&Seen::default(), Privilege::Decrypt, "a", &Context::empty()).unwrap();
        gate.failed("39000", None);
        gate.begin(Function::Decrypt);
        gate.failed("42501", Some("b"));
        gate.begin(Function::Decrypt);
        gate.admit(&Seen::default(), Privilege::Decrypt, "a", &Context::empty()).unwrap();
        gate.failed("08006", Some("c"));
        let uses = gate.take();
        let failed: Vec<_> = uses.iter().filter(|(used, _)| used.outcome != Outcome::Done).collect();
        assert_eq!(failed.len(), 3);
        assert_eq!(failed[0].0.key, "a");
        assert_eq!(failed[1].0.key, "b");
        assert_eq!(failed[2].0.key, "c", "the failure names it");
        assert_eq!(uses[0].1.values, 0, "what failed is not counted as done");
    }
}
