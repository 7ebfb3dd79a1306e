//! AES-256-GCM by RustCrypto.

use std::mem::MaybeUninit;
use std::{ptr, slice};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use vod_tender_secret_memory::{Locked, burn_stack};
use zeroize::Zeroize;

use crate::{KEY_BYTES, NONCE_BYTES, NotSealed, Sealed, TAG_BYTES, TagMismatch};

/// A key, expanded once, in locked memory.
pub struct ExpandedKey(Locked<Aes256Gcm>);

impl ExpandedKey {
    /// Expands 32 key bytes.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let expanded = ExpandedKey(Locked::new(Aes256Gcm::new(key.into())));
        burn_stack();
        expanded
    }

    /// Bytes of locked memory that `count` keys take.
    pub const fn locked_bytes(count: usize) -> usize {
        vod_tender_secret_memory::locked_bytes::<Aes256Gcm>(count)
    }

    /// Encrypts `buffer` in place and gives the tag. Obligation: `nonce` was never used with this key before.
    pub fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        buffer: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], NotSealed> {
        self.0
            .encrypt_inout_detached(&Nonce::from(*nonce), associated, buffer.into())
            .map(Into::into)
            .map_err(|_| NotSealed)
    }

    /// Decrypts `buffer` in place. When the tag does not fit, `buffer` is overwritten with zeros.
    pub fn open(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), TagMismatch> {
        let opened =
            self.0.decrypt_inout_detached(&Nonce::from(*nonce), associated, (&mut *buffer).into(), &(*tag).into());
        opened.map_err(|_| {
            buffer.zeroize();
            TagMismatch
        })
    }

    /// Decrypts into `out`, which has as many bytes as the ciphertext. When the tag does not fit, `out` is overwritten with zeros.
    pub fn open_into<'a>(
        &self,
        sealed: Sealed<'_>,
        out: &'a mut [MaybeUninit<u8>],
    ) -> Result<&'a mut [u8], TagMismatch> {
        let Sealed { nonce, associated, ciphertext, tag } = sealed;
        assert_eq!(ciphertext.len(), out.len(), "a plaintext is as long as its ciphertext");
        let start = out.as_mut_ptr().cast::<u8>();
        // SAFETY: both have that many bytes, and do not overlap: one of them is borrowed mutably. All are initialised then.
        let buffer = unsafe {
            ptr::copy_nonoverlapping(ciphertext.as_ptr(), start, out.len());
            slice::from_raw_parts_mut(start, out.len())
        };
        self.open(nonce, associated, buffer, tag)?;
        Ok(buffer)
    }
}
