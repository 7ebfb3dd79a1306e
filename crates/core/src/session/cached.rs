//! Decrypting an envelope whose DEK is at hand, as that of most values of a table is. It is asked the same as any other
//! value, by the same functions, with less moved about between them.

use std::rc::Rc;

use crate::access::Admitted;
use crate::armor;
use crate::cache::{OpenedKey, is_young};
use crate::error::{Error, Result};
use crate::provider::Wait;
use crate::session::{Reading, Run, Session};
use crate::sink::Sink;
use crate::stored::{Kind, bytes_head};

/// Whether the value was decrypted. The error is boxed: a large one would be moved about also where there is none.
type Decrypted = std::result::Result<bool, Box<Error>>;

impl Session {
    /// Decrypts an envelope whose DEK is cached, and known by the header as it is stored. A text need not be known to
    /// be text. `false` is for [`Session::decrypt_any`]: the DEK is not at hand or too old, the caller may not use it
    /// through the wrap that it came by, or the value is malformed or watched; the sink holds nothing then.
    #[inline(always)]
    pub fn decrypt_cached<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        kind: Kind,
        stored: &[u8],
        reading: Reading<'_>,
        sink: &mut S,
    ) -> Decrypted {
        if !matches!(reading.version, None | Some(2)) {
            return Ok(false);
        }
        match kind {
            Kind::Bytes => {
                let found = match self.opened.latest(stored) {
                    Some(latest) => Some(latest),
                    None => bytes_head(stored).and_then(|header| Some((header, self.opened.get(header)?))),
                };
                let Some((header, opened)) = found else { return Ok(false) };
                self.open_cached(run, &opened, header, &stored[header.len()..], reading, kind, sink)
            }
            Kind::Text => {
                let Some((seen, payload)) = self.heads.armored(stored) else { return Ok(false) };
                let Some(opened) = seen.opened(&mut self.opened) else { return Ok(false) };
                let header = Rc::clone(seen.header());
                let mut sealed = std::mem::take(&mut self.sealed);
                let decrypted = match armor::decode_payload_into(payload, &mut sealed) {
                    Ok(()) => self.open_cached(run, &opened, &header, &sealed, reading, kind, sink),
                    Err(_) => Ok(false),
                };
                self.sealed = sealed;
                self.trim();
                decrypted
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an envelope's parts and what is said about them")]
    #[inline(always)]
    fn open_cached<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        opened: &OpenedKey,
        header: &[u8],
        payload: &[u8],
        reading: Reading<'_>,
        kind: Kind,
        sink: &mut S,
    ) -> Decrypted {
        if run.keyring.honey.has(payload) || !is_young(opened.born_ms, self.clock.now_ms(), &run.policy.limits) {
            return Ok(false);
        }
        let Some(admitted) = self.admit_cached(run, opened)? else { return Ok(false) };
        self.open_envelope(opened, header, payload, reading, kind, sink)?;
        run.gate.done(admitted);
        Ok(true)
    }

    /// Lets the caller use a cached DEK; `None` where it came through a wrap that is not for this caller. Another wrap
    /// may be: it must open the DEK itself, because a header may name wraps that hold nothing.
    #[inline(always)]
    pub(super) fn admit_cached<W>(&mut self, run: &mut Run<'_, W>, opened: &OpenedKey) -> Result<Option<Admitted>> {
        match run.admit_opening(&opened.seen, &opened.kek.name, &opened.owners, &opened.context) {
            Ok(admitted) => {
                self.stats.cache_hits += 1;
                Ok(Some(admitted))
            }
            Err(Error::NotGranted { .. }) => Ok(None),
            Err(other) => Err(other),
        }
    }
}
