//! Decrypting, in dual mode: envelopes, direct ciphertext, and plaintext where the policy lets it.

use std::rc::Rc;

use zeroize::Zeroize;

use crate::access::{Admitted, Seen};
use crate::cache::{KekIdentity, OpenedKey};
use crate::context::Context;
use crate::envelope::{FLAG_AAD, FLAGS_AT, Header, Payload, Wrap, bound_prefix};
use crate::error::{Error, Mismatch, Result};
use crate::keyring::Kek;
use crate::provider::{Wait, WrappedRef};
use crate::seal::{Derived, ExpandedKey, Sealed};
use crate::session::legacy::Plain;
use crate::session::{KEPT_BYTES, Purpose, Run, Session, bind};
use crate::sink::Sink;
use crate::stored::{Kind, Stored, Value};

/// What the caller says about the value to read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading<'a> {
    /// The row's identity. It says nothing about versions 0 and 1, which cannot be bound to it.
    pub aad: Option<&'a str>,
    /// Pairs that the envelope's context must include.
    pub context: Option<&'a Context>,
    /// The version, when the caller knows it: then nothing is guessed.
    pub version: Option<i32>,
}

/// As what a value was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAs {
    /// Version 2.
    Envelope,
    /// Version 1.
    Direct,
    /// Version 0.
    Plaintext,
    /// Version 0, and the policy wants a warning.
    PlaintextWithWarning,
}

impl Session {
    /// Decrypts a value into `sink`.
    #[inline(always)]
    pub fn decrypt<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        reading: Reading<'_>,
        sink: &mut S,
    ) -> std::result::Result<ReadAs, Box<Error>> {
        match self.decrypt_cached(run, value.kind(), value.bytes(), reading, sink)? {
            true => Ok(ReadAs::Envelope),
            false => Ok(self.decrypt_any(run, value, reading, sink)?),
        }
    }

    /// Decrypts any value, the slower way.
    #[inline(never)]
    pub fn decrypt_any<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        reading: Reading<'_>,
        sink: &mut dyn Sink,
    ) -> Result<ReadAs> {
        check_version(reading.version)?;
        match Stored::parse(value)? {
            Stored::Other(value) => self.read_other(run, value, reading.version, Plain::ByPolicy, sink),
            _ if matches!(reading.version, Some(0 | 1)) => {
                Err(Error::VersionMismatch(reading.version.unwrap_or_default()))
            }
            Stored::Envelope { header, payload } => {
                watch_envelope(run, &header, &payload)?;
                let (opened, admitted) = self.opened_key(run, &header)?;
                self.open_envelope(&opened, &header, &payload, reading, value.kind(), sink)?;
                run.gate.done(admitted);
                // Of a `bytea` the header itself is what is stored.
                if value.kind() == Kind::Text {
                    self.heads.remember(value, &header, &run.policy.limits)?;
                }
                Ok(ReadAs::Envelope)
            }
            Stored::Literal { blob, payload } => {
                watch(run, &payload, &run.keyring.default_key, &Context::empty());
                let (opened, admitted) = self.opened_literal(run, &blob)?;
                self.open_literal(&opened, &payload, reading, value.kind(), sink)?;
                run.gate.done(admitted);
                Ok(ReadAs::Envelope)
            }
        }
    }

    /// Opens an envelope's payload under its DEK, if the caller says of it what is so.
    #[inline(always)]
    pub(super) fn open_envelope<S: Sink + ?Sized>(
        &mut self,
        opened: &OpenedKey,
        header: &[u8],
        payload: &[u8],
        reading: Reading<'_>,
        kind: Kind,
        sink: &mut S,
    ) -> Result<()> {
        let aad = match (header[FLAGS_AT] & FLAG_AAD != 0, reading.aad) {
            (true, None) => return Err(Error::Unverified(Mismatch::AadMissing)),
            (false, Some(_)) => return Err(Error::Unverified(Mismatch::AadUnexpected)),
            (_, aad) => aad.unwrap_or(""),
        };
        check_expected(&opened.context, reading.context)?;
        let prefix = bound_prefix(header);
        let associated = match aad {
            "" => prefix,
            _ => bind(&mut self.associated, prefix, aad)?,
        };
        let was_opened = open_payload(&opened.key, associated, payload, kind, sink);
        if aad.len() > KEPT_BYTES {
            self.trim();
        }
        was_opened?;
        self.stats.values_decrypted += 1;
        Ok(())
    }

    fn open_literal(
        &mut self,
        opened: &OpenedKey,
        payload: &[u8],
        reading: Reading<'_>,
        kind: Kind,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        check_expected(&opened.context, reading.context)?;
        open_payload(&opened.key, &[], payload, kind, sink)?;
        self.stats.values_decrypted += 1;
        Ok(())
    }

    /// The DEK of a header, if the caller may decrypt with its KEK: out of the cache, or through the first wrap that opens.
    fn opened_key<W: Wait>(&mut self, run: &mut Run<'_, W>, header: &[u8]) -> Result<(Rc<OpenedKey>, Admitted)> {
        let (now, limits) = (self.clock.now_ms(), run.policy.limits);
        if let Some(opened) = self.opened.get_young(header, now, &limits, &mut self.stats)
            && let Some(admitted) = self.admit_cached(run, &opened)?
        {
            return Ok((opened, admitted));
        }
        self.unwrapped_key(run, header)
    }

    /// The DEK of a header through the first wrap that opens.
    fn unwrapped_key<W: Wait>(&mut self, run: &mut Run<'_, W>, header: &[u8]) -> Result<(Rc<OpenedKey>, Admitted)> {
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        self.stats.cache_misses += 1;
        let parsed = Header::parse(header)?;
        let mut failure = None;
        for wrap in &parsed.wraps {
            match self.open_wrap(run, wrap, &parsed, now) {
                Ok((opened, admitted)) => {
                    self.opened.put(header, Rc::clone(&opened), &limits, &mut self.stats);
                    return Ok((opened, admitted));
                }
                Err(error) => failure = Some(more_telling(failure, error)),
            }
        }
        Err(failure.expect("a header has at least one wrap"))
    }

    /// The DEK of a header through one of its wraps. The caller's right is asked for before the key service is.
    fn open_wrap<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        wrap: &Wrap<'_>,
        header: &Header<'_>,
        now_ms: u64,
    ) -> Result<(Rc<OpenedKey>, Admitted)> {
        // Of a key that is not configured nobody has rights: that it is not configured tells more.
        let kek = run.keyring.for_decrypting(wrap.key_name)?;
        let seen = Seen::default();
        let owners = run.keyring.owners(kek, wrap.kek_id, &header.context);
        let admitted = run.admit_opening(&seen, &kek.name, &owners, &header.context)?;
        let wrapped = WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek };
        let (key, kek) = unwrap_one(run, wrap.key_name, wrapped, header)?;
        let (key, context, kek_id) = (Rc::new(key), header.context.clone(), Some(wrap.kek_id.into()));
        Ok((Rc::new(OpenedKey { key, context, kek, kek_id, owners, born_ms: now_ms, seen }), admitted))
    }

    /// The DEK of a literal form, which names no KEK: the default one is asked.
    pub(super) fn opened_literal<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        blob: &[u8],
    ) -> Result<(Rc<OpenedKey>, Admitted)> {
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        if let Some(opened) = self.opened.get_young(blob, now, &limits, &mut self.stats) {
            let admitted = run.admit_opening(&opened.seen, &opened.kek.name, &[], &opened.context)?;
            self.stats.cache_hits += 1;
            return Ok((opened, admitted));
        }
        self.stats.cache_misses += 1;
        let kek = run.keyring.for_literal()?;
        let seen = Seen::default();
        let admitted = run.admit_opening(&seen, &kek.name, &[], &kek.context)?;
        let dek = run.call(kek, kek.provider.unwrap(WrappedRef { kek_id: None, bytes: blob }, &kek.context))?;
        let key = Rc::new(ExpandedKey::new(dek.expose()));
        let (context, kek, owners) = (kek.context.clone(), KekIdentity::of(kek), Vec::new());
        let opened = OpenedKey { key, context, kek, kek_id: None, owners, born_ms: now, seen };
        let opened = Rc::new(opened);
        self.opened.put(blob, Rc::clone(&opened), &limits, &mut self.stats);
        Ok((opened, admitted))
    }
}

/// Opens a payload in the sink's memory.
#[inline(always)]
fn open_payload<S: Sink + ?Sized>(
    key: &ExpandedKey,
    associated: &[u8],
    payload: &[u8],
    kind: Kind,
    sink: &mut S,
) -> Result<()> {
    let payload = Payload::parse(payload)?;
    let Payload { nonce, ciphertext, tag } = payload;
    check_text(kind, sink.opened(key, Sealed { nonce, associated, ciphertext, tag })?)
}

/// Raises the alarm when an envelope is watched.
fn watch_envelope<W>(run: &mut Run<'_, W>, header: &[u8], payload: &[u8]) -> Result<()> {
    if run.keyring.honey.has(payload) {
        let header = Header::parse(header)?;
        watch(run, payload, header.wraps[0].key_name, &header.context);
    }
    Ok(())
}

/// Raises the alarm when a value is watched: also when it will not open, because nobody has a reason to ask for it.
pub(super) fn watch<W>(run: &mut Run<'_, W>, payload: &[u8], key: &str, context: &Context) {
    if run.keyring.honey.has(payload) && run.gate.shows_plaintext() && !matches!(run.purpose, Purpose::Check) {
        run.gate.alarm(key, context);
    }
}

/// Unwraps a DEK through one KEK and checks it against the header's commitment.
pub(super) fn unwrap_one<W: Wait>(
    run: &mut Run<'_, W>,
    key_name: &str,
    wrapped: WrappedRef<'_>,
    header: &Header<'_>,
) -> Result<(ExpandedKey, KekIdentity)> {
    let kek = usable_kek(run, key_name, &header.context)?;
    let dek = run.call(kek, kek.provider.unwrap(wrapped, &header.context))?;
    let key = Derived::from_dek(&dek).committed(header.commitment)?;
    Ok((key, KekIdentity::of(kek)))
}

/// The configured KEK of that name, if it may open an envelope with this context.
pub(super) fn usable_kek<'a, W>(run: &Run<'a, W>, key_name: &str, context: &Context) -> Result<&'a Kek> {
    let kek = run.keyring.for_decrypting(key_name)?;
    check_kek_context(kek, context)?;
    Ok(kek)
}

pub(super) fn check_kek_context(kek: &Kek, context: &Context) -> Result<()> {
    match kek.requires_context && !context.includes(&kek.context) {
        true => Err(Error::Unverified(Mismatch::KeyContext)),
        false => Ok(()),
    }
}

/// Of two failures the one that helps more: a key that was asked tells more than one that is not for the caller, and
/// that more than one that is not configured.
pub(super) fn more_telling(first: Option<Error>, second: Error) -> Error {
    let weight = |error: &Error| match error {
        Error::UnknownKey(_) => 0,
        Error::NotGranted { .. } => 1,
        _ => 2,
    };
    match first {
        Some(first) if weight(&first) >= weight(&second) => first,
        _ => second,
    }
}

pub(super) fn check_version(version: Option<i32>) -> Result<()> {
    match version {
        None | Some(0..=2) => Ok(()),
        Some(_) => Err(Error::UnknownVersion),
    }
}

fn check_expected(own: &Context, expected: Option<&Context>) -> Result<()> {
    match expected {
        Some(expected) if !own.includes(expected) => Err(Error::Unverified(Mismatch::Context)),
        _ => Ok(()),
    }
}

/// A `text` result must be text: what is not is overwritten and refused.
#[inline]
pub(super) fn check_text(kind: Kind, out: &mut [u8]) -> Result<()> {
    // Most text is ASCII, and for that alone the check is the faster one.
    if kind == Kind::Bytes || is_ascii_without_zeros(out) {
        return Ok(());
    }
    if std::str::from_utf8(out).is_err() || out.contains(&0) {
        out.zeroize();
        return Err(Error::NotText);
    }
    Ok(())
}

/// In one pass, many bytes at a time: no byte has its high bit, and none gets it when one is taken from each.
pub(super) fn is_ascii_without_zeros(text: &[u8]) -> bool {
    const ONES: u64 = u64::MAX / 0xFF;
    let Some(last) = text.last_chunk() else { return text.iter().all(|byte| (1..0x80).contains(byte)) };
    let look = |bytes: &[u8; 8]| {
        let word = u64::from_ne_bytes(*bytes);
        word | word.wrapping_sub(ONES)
    };
    let (words, _) = text.as_chunks();
    // The last ones may be seen twice, because fewer cannot be looked at together.
    words.iter().fold(look(last), |seen, bytes| seen | look(bytes)) & (ONES << 7) == 0
}

pub(super) fn copy(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    sink.copied(bytes)?;
    Ok(())
}
