//! Moving a stored value between versions: up to the envelope, and back to the application's own format.

use zeroize::Zeroizing;

use crate::error::{Error, Mismatch, Result};
use crate::keyring::LEGACY_KEY;
use crate::provider::Wait;
use crate::session::decrypt::{check_version, copy};
use crate::session::legacy::Plain;
use crate::session::{ReadAs, Reading, Run, Sealing, Session};
use crate::sink::Sink;
use crate::stored::{Kind, Stored, Value};

impl Session {
    /// Any version in, version 2 out. Version 2 comes back as it is, so that it can be run twice.
    pub fn upgrade<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        sealing: Sealing<'_>,
        version: Option<i32>,
        sink: &mut dyn Sink,
    ) -> Result<ReadAs> {
        check_version(version)?;
        let Stored::Other(other) = Stored::parse(value)? else {
            return copy(value.bytes(), sink).map(|()| ReadAs::Envelope);
        };
        // What a legacy key opens is no plaintext, whatever its row says: sealing it would hide the ciphertext.
        if version == Some(0) && self.version(run, value)? == 1 {
            return Err(Error::StatedPlaintext);
        }
        let mut plaintext = Zeroizing::new(Vec::new());
        // Where there is none, sealing says so: what is wrong with the value itself comes first.
        let to = run.keyring.for_encrypting(sealing.key).map_or("", |kek| &kek.name);
        let read_as = self.read_other(&mut run.moving(to), other, version, Plain::Stated, &mut plaintext)?;
        let mut sealed = Vec::new();
        self.seal_envelope(run, &plaintext, value.kind(), sealing, &mut sealed)?;
        let reading = Reading { aad: sealing.aad, context: None, version: Some(2) };
        self.check_round_trip(run, &plaintext, &sealed, value.kind(), reading)?;
        copy(&sealed, sink)?;
        Ok(read_as)
    }

    /// Any version in, version 1 out: the way back. Version 1 comes back as it is.
    pub fn downgrade<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        aad: Option<&str>,
        version: Option<i32>,
        sink: &mut dyn Sink,
    ) -> Result<ReadAs> {
        check_version(version)?;
        let mut plaintext = Zeroizing::new(Vec::new());
        let mut moving = run.moving(LEGACY_KEY);
        let read_as = match Stored::parse(value)? {
            Stored::Other(other) => self.read_other(&mut moving, other, version, Plain::Stated, &mut plaintext)?,
            _ => self.decrypt(&mut moving, value, Reading { aad, context: None, version: None }, &mut plaintext)?,
        };
        if read_as == ReadAs::Direct {
            return copy(value.bytes(), sink).map(|()| read_as);
        }
        let mut sealed = Vec::new();
        self.seal_direct(run, &plaintext, value.kind(), &mut sealed)?;
        self.check_round_trip(
            run,
            &plaintext,
            &sealed,
            value.kind(),
            Reading { version: Some(1), ..Reading::default() },
        )?;
        copy(&sealed, sink)?;
        Ok(read_as)
    }

    /// Opens what was just sealed and compares: a conversion replaces the only copy of a value.
    fn check_round_trip<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        plaintext: &[u8],
        sealed: &[u8],
        kind: Kind,
        reading: Reading<'_>,
    ) -> Result<()> {
        let value = match kind {
            Kind::Bytes => Value::Bytes(sealed),
            Kind::Text => Value::Text(std::str::from_utf8(sealed).map_err(|_| Error::NotText)?),
        };
        let mut opened = Zeroizing::new(Vec::new());
        // The caller decrypted nothing, so nothing is counted.
        let counters = self.stats.clone();
        self.decrypt(&mut run.checking(), value, reading, &mut opened)?;
        self.stats = counters;
        if *opened == plaintext { Ok(()) } else { Err(Error::Unverified(Mismatch::RoundTrip)) }
    }
}
