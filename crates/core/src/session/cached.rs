//! Decrypting an envelope whose DEK is at hand: what most values of a table are. All that may keep it from being opened is
//! asked as for any other value; only how it is told is left to [`Session::decrypt_any`].

use std::rc::Rc;

use crate::armor;
use crate::cache::{OpenedKey, is_young};
use crate::provider::Wait;
use crate::session::{ReadAs, Reading, Run, Session};
use crate::sink::Sink;
use crate::stored::{Kind, binary_head};

impl Session {
    /// Decrypts an envelope whose header was seen before and whose DEK is cached. `None` says nothing about the value: it is for
    /// [`Session::decrypt_any`], which finds the same again and says what is wrong. A stored text need not be known to be text.
    #[inline(always)]
    pub fn decrypt_cached<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        kind: Kind,
        stored: &[u8],
        reading: Reading<'_>,
        sink: &mut S,
    ) -> Option<ReadAs> {
        if !matches!(reading.version, None | Some(2)) {
            return None;
        }
        match kind {
            Kind::Bytes => self.decrypt_cached_bytes(run, stored, reading, sink),
            Kind::Text => self.decrypt_cached_text(run, stored, reading, sink),
        }
    }

    #[inline(always)]
    fn decrypt_cached_bytes<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        stored: &[u8],
        reading: Reading<'_>,
        sink: &mut S,
    ) -> Option<ReadAs> {
        let (header, opened) = match self.opened.latest(stored) {
            Some(latest) => latest,
            None => {
                let header = binary_head(stored)?;
                (header, self.opened.get(header)?)
            }
        };
        self.open_cached(run, &opened, header, &stored[header.len()..], reading, Kind::Bytes, sink)
    }

    #[inline(always)]
    fn decrypt_cached_text<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        stored: &[u8],
        reading: Reading<'_>,
        sink: &mut S,
    ) -> Option<ReadAs> {
        let (known, payload) = self.heads.armored(stored)?;
        let header = Rc::clone(&known.header);
        let opened = self.opened.get_known(&header, &known.opened)?;
        let mut sealed = std::mem::take(&mut self.sealed);
        let read_as = match armor::decode_payload_into(payload, &mut sealed) {
            Ok(()) => self.open_cached(run, &opened, &header, &sealed, reading, Kind::Text, sink),
            Err(_) => None,
        };
        self.sealed = sealed;
        self.trim();
        read_as
    }

    #[expect(clippy::too_many_arguments, reason = "an envelope's parts and what is said about them")]
    #[inline(always)]
    fn open_cached<W: Wait, S: Sink>(
        &mut self,
        run: &mut Run<'_, W>,
        opened: &Rc<OpenedKey>,
        header: &[u8],
        payload: &[u8],
        reading: Reading<'_>,
        kind: Kind,
        sink: &mut S,
    ) -> Option<ReadAs> {
        if run.keyring.honey.has(payload) || !is_young(opened.born_ms, self.clock.now_ms(), &run.policy.limits) {
            return None;
        }
        let admitted = run.admit_opening(&opened.seen, &opened.kek.name, &opened.owners, &opened.context).ok()?;
        self.open_envelope(opened, header, payload, reading, kind, sink).ok()?;
        self.stats.cache_hits += 1;
        run.gate.done(admitted);
        Some(ReadAs::Envelope)
    }
}
