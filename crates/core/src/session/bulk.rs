//! What the bulk jobs do with each stored value, and what may be said of it without a key service.

use std::rc::Rc;

use zeroize::Zeroizing;

use crate::access::Privilege;
use crate::armor;
use crate::cache::{Bounded, MOST_HEAD_BYTES};
use crate::context::Context;
use crate::envelope::Header;
use crate::error::{Error, Mismatch, Result};
use crate::info::StoredUnder;
use crate::keyring::{Keyring, LEGACY_KEY};
use crate::policy::{Limits, PlaintextReads, Policy};
use crate::provider::{Wait, WrappedRef};
use crate::session::decrypt::unwrap_one;
use crate::session::heads::Form;
use crate::session::rewrap_ahead::Destination;
use crate::session::together::Asked;
use crate::session::{Reading, Run, Sealing, Session};
use crate::sink::Sink;
use crate::stored::{Stored, Value, direct_shape, head};

/// What a job does with the values of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BulkOperation {
    /// Versions 0 and 1 become version 2.
    Migrate,
    /// Version 2 goes under another KEK, or the newest id of its own.
    Rewrap,
    /// Version 2 becomes version 1.
    Downgrade,
    /// Every version is opened and nothing is made of it.
    Verify,
}

impl BulkOperation {
    /// The operation of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "migrate" => BulkOperation::Migrate,
            "rewrap_table" => BulkOperation::Rewrap,
            "downgrade" => BulkOperation::Downgrade,
            "verify" => BulkOperation::Verify,
            _ => return None,
        })
    }
}

/// What is the same for every value of a job.
#[derive(Clone, Copy)]
pub struct BulkTask<'a> {
    /// What is done.
    pub operation: BulkOperation,
    /// Name of the KEK; the default one when there is none.
    pub key: Option<&'a str>,
    /// Pairs beside the KEK's own, for what is encrypted.
    pub context: Option<&'a Context>,
    /// Whether each new wrapped DEK is opened once by its key service before anything that needs it is handed out.
    pub check_wraps: bool,
}

/// In place of a key's name, for what is opened and not sealed again.
const NOWHERE: &str = "";

/// Headers of new values that were looked at, and whether the key service opened their wrapped DEK. Holds no secret.
#[derive(Default)]
pub(super) struct Assured(Bounded<bool>);

impl Assured {
    /// Whether a header was looked at, and with `checked` also opened by its key service.
    pub(super) fn knows(&mut self, name: &[u8], checked: bool) -> bool {
        self.0.get(name).is_some_and(|was_checked| *was_checked || !checked)
    }

    /// Notes a header, in its binary form and in the one that text has.
    pub(super) fn put(&mut self, header: &[u8], checked: bool, limits: &Limits) {
        // A DEK has two headers and each two names; those that were made ahead must all be known.
        let most = limits.cache_entries.max(128).saturating_mul(4);
        let armored = armor::armored_head(header);
        for name in [header, armored.trim_end_matches(':').as_bytes()] {
            self.0.put(name.into(), checked, most);
        }
    }
}

impl BulkTask<'_> {
    /// The KEK that new values are made under: what is wrong with that one is wrong for all values.
    pub fn target(self, keyring: &Keyring) -> Option<&str> {
        match self.operation {
            BulkOperation::Migrate | BulkOperation::Rewrap => keyring.for_encrypting(self.key).ok(),
            BulkOperation::Downgrade | BulkOperation::Verify => None,
        }
        .map(|kek| kek.name.as_str())
    }
}

impl Session {
    /// Does the job's work on one value. Gives whether `sink` holds a new value; what needs none is not copied.
    pub fn convert<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        task: BulkTask<'_>,
        value: Value<'_>,
        aad: Option<&str>,
        version: Option<i32>,
        sink: &mut dyn Sink,
    ) -> Result<bool> {
        match task.operation {
            BulkOperation::Migrate => {
                if value.bytes().is_empty() || self.is_version_2(run, value)? {
                    return Ok(false);
                }
                let sealing = Sealing { key: task.key, context: task.context, aad };
                // What looks like ciphertext is never taken for plaintext by a guess: its legacy key may be missing.
                let refusing = Policy { plaintext_reads: PlaintextReads::Refuse, ..*run.policy };
                let may_be_direct = version.is_none() && direct_shape(value).is_ok();
                let policy = if may_be_direct { &refusing } else { run.policy };
                self.upgrade(&mut run.under(policy), value, sealing, version, sink).map(|_| true)
            }
            BulkOperation::Rewrap | BulkOperation::Downgrade if !self.is_version_2(run, value)? => Ok(false),
            BulkOperation::Rewrap => self.rewrap(run, value, task.key, sink),
            BulkOperation::Downgrade => self.downgrade(run, value, aad, None, sink).map(|_| true),
            BulkOperation::Verify => {
                let mut plaintext = Zeroizing::new(Vec::new());
                // An envelope says itself what it is.
                let version = version.filter(|_| matches!(self.is_version_2(run, value), Ok(false)));
                let reading = Reading { aad, context: None, version };
                Ok(self.decrypt(&mut run.moving(NOWHERE), value, reading, &mut plaintext).map(|_| false)?)
            }
        }
    }

    fn is_version_2<W>(&mut self, run: &Run<'_, W>, value: Value<'_>) -> Result<bool> {
        Ok(!matches!(self.heads.form(value, &run.policy.limits)?, Form::Other))
    }

    /// Whether the operation has something to do with a value. `newest` is what [`Session::newest_kek_id`] found.
    /// What claims to be an envelope and is malformed is due: it will be reported.
    pub fn is_due<W>(
        &mut self,
        run: &Run<'_, W>,
        operation: BulkOperation,
        value: Value<'_>,
        key: Option<&str>,
        newest: Option<&str>,
    ) -> Result<bool> {
        if operation == BulkOperation::Verify {
            return Ok(true);
        }
        let Ok(form) = self.heads.form(value, &run.policy.limits) else { return Ok(true) };
        Ok(match (operation, form) {
            (BulkOperation::Migrate, Form::Other) => !value.bytes().is_empty(),
            (BulkOperation::Migrate, _) => false,
            (BulkOperation::Rewrap, Form::Envelope(known)) => {
                let target = run.keyring.for_encrypting(key)?;
                let is_current = |kek_id: &str| target.provider.is_current(kek_id).unwrap_or(newest == Some(kek_id));
                !known.wraps.iter().any(|(name, kek_id)| *name == target.name && is_current(kek_id))
            }
            (_, form) => !matches!(form, Form::Other),
        })
    }

    /// What a stored value needs to be opened.
    pub fn stored_under<W>(&mut self, run: &Run<'_, W>, value: Value<'_>) -> Result<StoredUnder> {
        let Ok(form) = self.heads.form(value, &run.policy.limits) else {
            return Ok(StoredUnder { version: None, wraps: Vec::new() });
        };
        Ok(match form {
            Form::Envelope(known) => StoredUnder {
                version: Some(2),
                wraps: known.wraps.iter().map(|(key, kek_id)| (Some(key.clone()), Some(kek_id.clone()))).collect(),
            },
            Form::Literal(_) => StoredUnder { version: Some(2), wraps: vec![(None, None)] },
            Form::Other => StoredUnder { version: Some(self.version(run, value)?), wraps: Vec::new() },
        })
    }

    /// The KEK id of an envelope's wrap under the key, or else of its first one; `None` for what is no envelope.
    pub fn kek_id<W>(&mut self, run: &Run<'_, W>, value: Value<'_>, key: Option<&str>) -> Result<Option<String>> {
        let wraps = match self.heads.wraps(value) {
            Some(wraps) => wraps,
            None => match self.heads.form(value, &run.policy.limits)? {
                Form::Envelope(known) => known.wraps,
                _ => return Ok(None),
            },
        };
        let own = wraps.iter().find(|(name, _)| Some(name.as_str()) == key).or(wraps.first());
        Ok(own.map(|(_, kek_id)| kek_id.clone()))
    }

    /// What of a value a key service must see before it can be opened or rewrapped: what [`Session::prepare_heads`]
    /// takes. `None` for what is not version 2, or malformed.
    pub fn needed_head<W>(&mut self, run: &Run<'_, W>, value: Value<'_>) -> Option<Rc<[u8]>> {
        match self.heads.form(value, &run.policy.limits) {
            Ok(Form::Envelope(known)) => Some(known.header),
            Ok(Form::Literal(blob)) => Some(blob.into()),
            Ok(Form::Other) | Err(_) => None,
        }
    }

    /// The same for those who fetch many together: `None` also for what is too long to be held with others.
    pub fn fetchable_head<W>(&mut self, run: &Run<'_, W>, value: Value<'_>) -> Option<Rc<[u8]>> {
        self.needed_head(run, value).filter(|head| head.len() <= MOST_HEAD_BYTES)
    }

    /// The same, but `None` also for what was fetched: for those who go over many values under few DEKs.
    pub fn unfetched_head<W>(&mut self, run: &Run<'_, W>, value: Value<'_>) -> Option<Rc<[u8]>> {
        let head = self.fetchable_head(run, value)?;
        let opened = self.opened.get_young(&head, self.clock.now_ms(), &run.policy.limits, &mut self.stats);
        opened.is_none().then_some(head)
    }

    /// Has the key services do what the operation needs for all values with these headers (or these literal forms' blobs),
    /// many at a time, so that [`Session::convert`] and [`Session::assure`] call nothing. Gives by place what is wrong with
    /// single ones; an error is about more than that.
    pub fn prepare_heads<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        task: BulkTask<'_>,
        heads: &[&[u8]],
    ) -> Result<Vec<(usize, Error)>> {
        let asked = Asked::ByJob;
        let mut failures = Vec::new();
        let mut places: Vec<usize> = (0..heads.len()).collect();
        // As many at a time as the session keeps: each round takes one at least.
        while !places.is_empty() {
            let part: Vec<_> = places.iter().map(|&place| heads[place]).collect();
            let outcome = match task.operation {
                BulkOperation::Migrate => return Ok(failures),
                BulkOperation::Downgrade => self.fetch(&mut run.moving(LEGACY_KEY), asked, &part)?,
                BulkOperation::Verify => self.fetch(&mut run.moving(NOWHERE), asked, &part)?,
                BulkOperation::Rewrap => {
                    let to = Destination { key: task.key, asked, check_wraps: task.check_wraps };
                    self.move_ahead(run, to, &part)?
                }
            };
            failures.extend(outcome.failures.into_iter().map(|(at, error)| (places[at], error)));
            places = outcome.left_out.into_iter().map(|at| places[at]).collect();
        }
        Ok(failures)
    }

    /// Name of the KEK that encrypts, if it can be used with this context.
    pub fn target<W>(&self, run: &Run<'_, W>, key: Option<&str>, context: Option<&Context>) -> Result<String> {
        let kek = run.keyring.for_encrypting(key)?;
        run.gate.require(Privilege::Encrypt, &kek.name)?;
        kek.context.with(context.unwrap_or(&Context::empty()))?;
        Ok(kek.name.clone())
    }

    /// Fails where the caller cannot write version 1.
    pub fn check_way_back<W>(&self, run: &Run<'_, W>) -> Result<()> {
        run.keyring.legacy_required()?;
        run.gate.require(Privilege::Encrypt, LEGACY_KEY)
    }

    /// Name of the KEK that a rewrap is for; and where its configuration does not say which key it is (an alias), the
    /// key's id as the service gives it now.
    pub fn newest_kek_id<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        key: Option<&str>,
    ) -> Result<(String, Option<String>)> {
        let kek = run.keyring.for_encrypting(key)?;
        run.gate.require(Privilege::Rewrap, &kek.name)?;
        if kek.provider.is_current("").is_some() {
            return Ok((kek.name.clone(), None));
        }
        let (_, wrapped) = run.call(kek, kek.provider.generate(&kek.context))?;
        self.rewraps.note_newest(&kek.name, &wrapped.kek_id, self.clock.now_ms());
        Ok((kek.name.clone(), Some(wrapped.kek_id)))
    }

    /// With `check_wraps`, has the key service open the wrapped DEK of a new value, past every cache, to what the header
    /// commits to: a value that only this session's memory could open must not be stored. Once for each header.
    pub fn assure<W: Wait>(&mut self, run: &mut Run<'_, W>, task: BulkTask<'_>, value: Value<'_>) -> Result<()> {
        let Some(name) = head(value) else { return Ok(()) };
        if self.assured.knows(name, task.check_wraps) {
            return Ok(());
        }
        let Stored::Envelope { header, .. } = Stored::parse(value)? else { return Ok(()) };
        self.assure_header(run, task, &header)
    }

    pub(super) fn assure_header<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        task: BulkTask<'_>,
        header: &[u8],
    ) -> Result<()> {
        if self.assured.knows(header, task.check_wraps) {
            return Ok(());
        }
        let target = run.keyring.for_encrypting(task.key)?;
        let parsed = Header::parse(header)?;
        let wrap = parsed.wraps.iter().find(|wrap| wrap.key_name == target.name);
        let wrap = wrap.ok_or(Error::Unverified(Mismatch::RoundTrip))?;
        if task.check_wraps {
            let wrapped = WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek };
            unwrap_one(run, wrap.key_name, wrapped, &parsed)?;
        }
        self.assured.put(header, task.check_wraps, &run.policy.limits);
        Ok(())
    }
}
