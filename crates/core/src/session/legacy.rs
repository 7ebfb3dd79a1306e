//! Versions 0 and 1: plaintext where the policy lets it, and direct ciphertext under the legacy keys.

use zeroize::Zeroize;

use crate::context::Context;
use crate::envelope::Payload;
use crate::error::{Error, Malformed, Mismatch, Result};
use crate::keyring::LEGACY_KEY;
use crate::policy::PlaintextReads;
use crate::session::decrypt::{ReadAs, check_text, copy, watch};
use crate::session::{Run, Session};
use crate::sink::Sink;
use crate::stored::{Kind, Stored, Value, direct_shape};

/// Whether plaintext is read by the policy, or because the caller converts it and stated version 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    ByPolicy,
    Stated,
}

impl Session {
    /// The version of a value, found without a key service: 0, 1 or 2.
    pub fn version<W>(&self, run: &Run<'_, W>, value: Value<'_>) -> Result<i32> {
        let Stored::Other(value) = Stored::parse(value)? else {
            return Ok(2);
        };
        let sealed = match direct_shape(value) {
            Err(Error::Malformed(_)) => return Ok(0),
            shape => shape?,
        };
        match run.keyring.legacy()? {
            Some(keys) => keys.opens(Payload::parse(&sealed)?).map(i32::from),
            None => Ok(0),
        }
    }

    /// Reads a value that is not version 2.
    pub(super) fn read_other<W>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        version: Option<i32>,
        plain: Plain,
        sink: &mut dyn Sink,
    ) -> Result<ReadAs> {
        // The legacy application stores empties as they are, whatever version their row states.
        if value.bytes().is_empty() {
            return copy(value.bytes(), sink).map(|()| ReadAs::Plaintext);
        }
        match version {
            Some(2) => Err(Malformed("not an envelope").into()),
            Some(1) => {
                let sealed = direct_shape(value)?;
                self.open_direct(run, &sealed, value.kind(), sink)
            }
            Some(_) => read_plaintext(run, value, plain, sink),
            None => {
                if let (Some(_), Ok(sealed)) = (run.keyring.legacy()?, direct_shape(value)) {
                    match self.open_direct(run, &sealed, value.kind(), sink) {
                        Err(Error::Unverified(Mismatch::Legacy)) => {}
                        other => return other,
                    }
                }
                read_plaintext(run, value, Plain::ByPolicy, sink)
            }
        }
    }

    fn open_direct<W>(
        &mut self,
        run: &mut Run<'_, W>,
        sealed: &[u8],
        kind: Kind,
        sink: &mut dyn Sink,
    ) -> Result<ReadAs> {
        let keys = run.keyring.legacy_required()?;
        let none = Context::empty();
        watch(run, sealed, LEGACY_KEY, &none);
        let payload = Payload::parse(sealed)?;
        let out = sink.buffer(payload.ciphertext.len())?;
        keys.open(payload, out)?;
        // Only now is it known that the key is used: what looks like ciphertext may be plaintext.
        let admitted = run.admit_opening(&self.legacy_opened, LEGACY_KEY, &[], &none).inspect_err(|_| out.zeroize())?;
        check_text(kind, out)?;
        run.gate.done(admitted);
        self.stats.values_decrypted += 1;
        Ok(ReadAs::Direct)
    }
}

fn read_plaintext<W>(run: &Run<'_, W>, value: Value<'_>, plain: Plain, sink: &mut dyn Sink) -> Result<ReadAs> {
    let read_as = match (plain, run.policy.plaintext_reads) {
        (Plain::Stated, _) | (_, PlaintextReads::Allow) => ReadAs::Plaintext,
        (_, PlaintextReads::Warn) => ReadAs::PlaintextWithWarning,
        (_, PlaintextReads::Refuse) if direct_shape(value).is_ok() => return Err(Error::DirectOrPlaintextRefused),
        (_, PlaintextReads::Refuse) => return Err(Error::PlaintextRefused),
    };
    copy(value.bytes(), sink)?;
    Ok(read_as)
}
