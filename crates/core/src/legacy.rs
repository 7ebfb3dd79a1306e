//! Version 1, the application's direct AES-256-GCM: `docs/FORMAT.md`, section 5.

use zeroize::Zeroizing;

use crate::armor;
use crate::dek::KEY_BYTES;
use crate::envelope::Payload;
use crate::error::{Error, Mismatch, Result};
use crate::random::SessionRandom;
use crate::seal::{ExpandedKey, write_payload};

/// The legacy keys: all of them read, the first one writes.
#[derive(Default)]
pub struct LegacyKeys(Vec<ExpandedKey>);

impl LegacyKeys {
    /// Adds the key in one line: base64 of 32 bytes. `false` when it is not that.
    pub fn add_base64(&mut self, line: &str) -> bool {
        let Ok(bytes) = armor::decode(line) else {
            return false;
        };
        let bytes = Zeroizing::new(bytes);
        let Ok(key) = <&[u8; KEY_BYTES]>::try_from(bytes.as_slice()) else {
            return false;
        };
        self.0.push(ExpandedKey::new(key));
        true
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Opens nonce ‖ ciphertext ‖ tag into `out`, as long as the ciphertext, with whichever key fits.
    pub fn open(&self, payload: Payload<'_>, out: &mut [u8]) -> Result<()> {
        for key in &self.0 {
            out.copy_from_slice(payload.ciphertext);
            if key.open(payload.nonce, &[], out, payload.tag).is_ok() {
                return Ok(());
            }
        }
        Err(Error::Unverified(Mismatch::Legacy))
    }

    /// Whether one of the keys opens `payload`.
    pub fn opens(&self, payload: Payload<'_>) -> Result<bool> {
        let scratch = armor::zeroed(payload.ciphertext.len()).ok_or(Error::TooLarge)?;
        Ok(self.open(payload, &mut Zeroizing::new(scratch)).is_ok())
    }

    /// Seals `plaintext` under the first key into `out`, which has 28 bytes more.
    pub fn seal(&self, random: &mut SessionRandom, plaintext: &[u8], out: &mut [u8]) -> Result<()> {
        let key = self.0.first().ok_or(Error::LegacyKey("no legacy key is configured"))?;
        write_payload(key, random, &[], plaintext, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::PAYLOAD_OVERHEAD;

    #[test]
    fn keys_are_base64_of_32_bytes() {
        let mut keys = LegacyKeys::default();
        assert!(!keys.add_base64("short"));
        assert!(!keys.add_base64(&armor::encode(&[0; 31])));
        assert!(keys.is_empty());
        assert!(keys.add_base64(&armor::encode(&[0; 32])));
    }

    #[test]
    fn the_first_key_writes_and_all_read() {
        let mut random = SessionRandom::from_system().unwrap();
        let (old, new) = (armor::encode(&[1; 32]), armor::encode(&[2; 32]));
        let mut old_keys = LegacyKeys::default();
        assert!(old_keys.add_base64(&old));
        let mut both = LegacyKeys::default();
        assert!(both.add_base64(&new) && both.add_base64(&old));
        let mut sealed = vec![0; 5 + PAYLOAD_OVERHEAD];
        old_keys.seal(&mut random, b"token", &mut sealed).unwrap();
        assert!(both.opens(Payload::parse(&sealed).unwrap()).unwrap());
        both.seal(&mut random, b"token", &mut sealed).unwrap();
        assert!(!old_keys.opens(Payload::parse(&sealed).unwrap()).unwrap());
    }
}
