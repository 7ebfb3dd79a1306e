//! The payload: key derivation, commitment and AES-256-GCM. `docs/FORMAT.md`, section 3.

use hkdf::Hkdf;
use sha2::Sha256;
use subtle::ConstantTimeEq;
use vod_tender_secret_memory::burn_stack;
use zeroize::Zeroize;

use crate::dek::{Dek, KEY_BYTES};
use crate::envelope::{COMMITMENT_BYTES, NONCE_BYTES, PAYLOAD_OVERHEAD, SUITE};
use crate::error::{Error, Mismatch, Result};
use crate::random::SessionRandom;

pub use vod_tender_aead::{ExpandedKey, Sealed, TagMismatch};

const PAYLOAD_KEY_INFO: &[u8] = b"vod_tender_crypto/v2/payload-key";
const COMMITMENT_INFO: &[u8] = b"vod_tender_crypto/v2/commitment";

/// What a DEK derives to: the payload's key, and the public commitment to the DEK.
pub struct Derived {
    /// Opens and seals payloads.
    pub payload_key: ExpandedKey,
    /// Goes into the header.
    pub commitment: [u8; COMMITMENT_BYTES],
}

impl Derived {
    /// Derives both from a DEK.
    pub fn from_dek(dek: &Dek) -> Self {
        let hkdf = Hkdf::<Sha256>::new(None, dek.expose());
        let mut payload_key = [0; KEY_BYTES];
        let mut commitment = [0; COMMITMENT_BYTES];
        expand(&hkdf, PAYLOAD_KEY_INFO, &mut payload_key);
        expand(&hkdf, COMMITMENT_INFO, &mut commitment);
        let derived = Derived { payload_key: ExpandedKey::new(&payload_key), commitment };
        payload_key.zeroize();
        drop(hkdf);
        burn_stack();
        derived
    }

    /// Whether the DEK is the one a header commits to. Obligation: ask it, or call [`Derived::committed`], before opening
    /// anything.
    pub fn is_committed(&self, commitment: &[u8; COMMITMENT_BYTES]) -> bool {
        self.commitment.ct_eq(commitment).into()
    }

    /// The payload key, when the DEK is the one a header commits to. Obligation: call it before opening anything.
    pub fn committed(self, commitment: &[u8; COMMITMENT_BYTES]) -> Result<ExpandedKey> {
        if self.is_committed(commitment) { Ok(self.payload_key) } else { Err(Error::Unverified(Mismatch::Commitment)) }
    }
}

fn expand(hkdf: &Hkdf<Sha256>, info: &[u8], out: &mut [u8; 32]) {
    hkdf.expand_multi_info(&[info, &[SUITE]], out).expect("32 bytes are within HKDF's limit");
}

/// Writes nonce ‖ ciphertext ‖ tag into `out`, which is [`PAYLOAD_OVERHEAD`] bytes longer than `plaintext`.
pub(crate) fn write_payload(
    key: &ExpandedKey,
    random: &mut SessionRandom,
    associated: &[u8],
    plaintext: &[u8],
    out: &mut [u8],
) -> Result<()> {
    debug_assert_eq!(out.len(), plaintext.len() + PAYLOAD_OVERHEAD);
    let nonce = random.nonce();
    let (nonce_out, rest) = out.split_at_mut(NONCE_BYTES);
    let (body, tag_out) = rest.split_at_mut(plaintext.len());
    nonce_out.copy_from_slice(&nonce);
    body.copy_from_slice(plaintext);
    // A failure must not leave the plaintext where ciphertext was to be.
    let tag = key.seal(&nonce, associated, body).map_err(|_| {
        body.zeroize();
        Error::TooLarge
    })?;
    tag_out.copy_from_slice(&tag);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commitment_tells_deks_apart() {
        let one = Derived::from_dek(&Dek::copied(&[1; 32]).unwrap());
        let two = Derived::from_dek(&Dek::copied(&[2; 32]).unwrap());
        let commitment = one.commitment;
        assert!(matches!(two.committed(&commitment), Err(Error::Unverified(Mismatch::Commitment))));
        assert!(one.committed(&commitment).is_ok());
    }
}
