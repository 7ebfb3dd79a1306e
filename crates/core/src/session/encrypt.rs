//! Encrypting: an envelope under a DEK of this session, or direct under the legacy key.

use std::rc::Rc;

use crate::access::Privilege;
use crate::armor;
use crate::cache::{KekIdentity, MadeFor, SealingKey};
use crate::context::Context;
use crate::dek::Dek;
use crate::envelope::{PAYLOAD_OVERHEAD, Wrap, bound_prefix, write_header};
use crate::error::{Error, Result};
use crate::keyring::{Kek, LEGACY_KEY};
use crate::policy::WriteFormat;
use crate::provider::{Wait, WrappedDek};
use crate::seal::{Derived, write_payload};
use crate::session::{Run, Session, bind};
use crate::sink::Sink;
use crate::stored::{Kind, Value, is_envelope};

/// What the caller says about the value to encrypt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sealing<'a> {
    /// Name of the KEK; the default one when there is none.
    pub key: Option<&'a str>,
    /// Pairs beside the KEK's own.
    pub context: Option<&'a Context>,
    /// The row's identity, to bind the payload to.
    pub aad: Option<&'a str>,
}

impl Session {
    /// Encrypts a value that is not an envelope, in the format that the policy says.
    pub fn encrypt<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        plaintext: Value<'_>,
        sealing: Sealing<'_>,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        if is_envelope(plaintext) {
            return Err(Error::AlreadyEnvelope);
        }
        match chosen_format(run, sealing.key)? {
            Format::Direct => self.seal_direct(run, plaintext.bytes(), plaintext.kind(), sink),
            Format::Envelope => self.seal_envelope(run, plaintext.bytes(), plaintext.kind(), sealing, sink),
        }
    }

    /// Version 1 under the first legacy key. It has no place for an aad or a context.
    pub(super) fn seal_direct<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        plaintext: &[u8],
        kind: Kind,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let keys = run.keyring.legacy_required()?;
        let admitted = run.gate.admit(&self.legacy_sealed, Privilege::Encrypt, LEGACY_KEY, &Context::empty())?;
        let length = plaintext.len() + PAYLOAD_OVERHEAD;
        match kind {
            Kind::Bytes => keys.seal(&mut self.random, plaintext, sink.buffer(length)?)?,
            Kind::Text => {
                armor::resize(&mut self.sealed, length).ok_or(Error::TooLarge)?;
                keys.seal(&mut self.random, plaintext, &mut self.sealed)?;
                let out = sink.buffer(armor::armored_length("", length)?)?;
                armor::write_armored("", &self.sealed, out);
            }
        }
        self.trim();
        run.gate.done(admitted);
        self.stats.values_encrypted += 1;
        Ok(())
    }

    /// Version 2.
    pub(super) fn seal_envelope<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        plaintext: &[u8],
        kind: Kind,
        sealing: Sealing<'_>,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let kek = run.keyring.for_encrypting(sealing.key)?;
        let empty = Context::empty();
        let own_context = sealing.context.unwrap_or(&empty);
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        // Looked up twice because a borrow that is returned cannot be given up again.
        self.make_ready(run, kek, own_context, plaintext.len(), now)?;
        let key = self.sealing.get(&kek.name, own_context, 0, now, &limits).ok_or(Error::TooLarge)?;
        let admitted = run.gate.admit(&key.seen, Privilege::Encrypt, &key.kek.name, &key.context)?;
        key.count(plaintext.len());
        let bound = usize::from(sealing.aad.is_some());
        bind(&mut self.associated, bound_prefix(&key.headers[bound]), sealing.aad.unwrap_or(""))?;
        let length = plaintext.len() + PAYLOAD_OVERHEAD;
        match kind {
            Kind::Bytes => {
                let header = &key.headers[bound];
                let out = sink.buffer(header.len().checked_add(length).ok_or(Error::TooLarge)?)?;
                let (start, payload) = out.split_at_mut(header.len());
                start.copy_from_slice(header);
                write_payload(&key.key, &mut self.random, &self.associated, plaintext, payload)?;
            }
            Kind::Text => {
                let head = &key.armored[bound];
                let out = sink.buffer(armor::armored_length(head, length)?)?;
                armor::resize(&mut self.sealed, length).ok_or(Error::TooLarge)?;
                write_payload(&key.key, &mut self.random, &self.associated, plaintext, &mut self.sealed)?;
                armor::write_armored(head, &self.sealed, out);
            }
        }
        self.trim();
        run.gate.done(admitted);
        self.stats.values_encrypted += 1;
        Ok(())
    }
}

/// What encrypts with a fresh DEK.
pub(super) fn sealing_key(
    kek: &Kek,
    context: Context,
    dek: Dek,
    wrapped: &WrappedDek,
    now_ms: u64,
    made_for: MadeFor,
) -> Result<SealingKey> {
    let derived = Derived::from_dek(&dek);
    drop(dek);
    let wraps = [Wrap { key_name: &kek.name, kek_id: &wrapped.kek_id, wrapped_dek: &wrapped.bytes }];
    let header = |has_aad| write_header(has_aad, &context, &wraps, &derived.commitment);
    let headers = [header(false)?, header(true)?];
    let (key, kek) = (Rc::new(derived.payload_key), KekIdentity::of(kek));
    Ok(SealingKey::new(key, headers, (kek, &wrapped.kek_id), context, now_ms, made_for))
}

enum Format {
    Envelope,
    Direct,
}

fn chosen_format<W>(run: &Run<'_, W>, key: Option<&str>) -> Result<Format> {
    match run.policy.write_format {
        WriteFormat::Envelope => Ok(Format::Envelope),
        // It has no use for the key, but a name that is not configured is a mistake in every format.
        WriteFormat::Direct if key.is_some_and(|name| !run.keyring.is_configured(name)) => Err(Error::UnknownGivenKey),
        WriteFormat::Direct => Ok(Format::Direct),
        WriteFormat::Auto if key.is_some() || !run.keyring.keks.is_empty() => Ok(Format::Envelope),
        WriteFormat::Auto if run.keyring.legacy()?.is_some() => Ok(Format::Direct),
        WriteFormat::Auto => Err(Error::NothingConfigured),
    }
}
