//! AES-256-GCM by AWS-LC.

use std::ptr;

use aws_lc_sys::{
    EVP_AEAD_CTX, EVP_AEAD_CTX_cleanup, EVP_AEAD_CTX_init, EVP_AEAD_CTX_open_gather, EVP_AEAD_CTX_seal_scatter,
    EVP_aead_aes_256_gcm,
};
use vod_tender_secret_memory::{Locked, burn_stack};
use zeroize::Zeroize;

use crate::{KEY_BYTES, NONCE_BYTES, NotSealed, TAG_BYTES, TagMismatch};

/// A key, expanded once, in locked memory. AWS-LC keeps all of an AES-GCM key in this struct and nothing elsewhere.
pub struct ExpandedKey(Locked<Context>);

struct Context(EVP_AEAD_CTX);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context was initialised, or is all zeros, which this function takes too.
        unsafe { EVP_AEAD_CTX_cleanup(&mut self.0) };
    }
}

/// Whether a function of AWS-LC did what it should.
const DONE: i32 = 1;

impl ExpandedKey {
    /// Expands 32 key bytes.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        // SAFETY: a struct of integers and pointers, for which zeros are AWS-LC's own "not initialised".
        let mut context = Locked::new(Context(unsafe { std::mem::zeroed() }));
        // SAFETY: the key has as many bytes as stated; the context is expanded in place, where it stays.
        let done = unsafe {
            EVP_AEAD_CTX_init(
                &mut context.0,
                EVP_aead_aes_256_gcm(),
                key.as_ptr(),
                KEY_BYTES,
                TAG_BYTES,
                ptr::null_mut(),
            )
        };
        assert_eq!(done, DONE, "AES-256-GCM takes a key of 32 bytes and a tag of 16");
        burn_stack();
        ExpandedKey(context)
    }

    /// Bytes of locked memory that `count` keys take.
    pub const fn locked_bytes(count: usize) -> usize {
        vod_tender_secret_memory::locked_bytes::<Context>(count)
    }

    /// Encrypts `buffer` in place and gives the tag. Obligation: `nonce` was never used with this key before.
    pub fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        buffer: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], NotSealed> {
        let mut tag = [0; TAG_BYTES];
        let mut tag_bytes = 0;
        // SAFETY: every pointer goes with its length; input and output are the same, which is allowed.
        let done = unsafe {
            EVP_AEAD_CTX_seal_scatter(
                &self.0.0,
                buffer.as_mut_ptr(),
                tag.as_mut_ptr(),
                &mut tag_bytes,
                TAG_BYTES,
                nonce.as_ptr(),
                NONCE_BYTES,
                buffer.as_ptr(),
                buffer.len(),
                ptr::null(),
                0,
                associated.as_ptr(),
                associated.len(),
            )
        };
        if (done, tag_bytes) == (DONE, TAG_BYTES) { Ok(tag) } else { Err(NotSealed) }
    }

    /// Decrypts `buffer` in place. When the tag does not fit, `buffer` is overwritten with zeros.
    pub fn open(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), TagMismatch> {
        // SAFETY: as in `seal`.
        let done = unsafe {
            EVP_AEAD_CTX_open_gather(
                &self.0.0,
                buffer.as_mut_ptr(),
                nonce.as_ptr(),
                NONCE_BYTES,
                buffer.as_ptr(),
                buffer.len(),
                tag.as_ptr(),
                TAG_BYTES,
                associated.as_ptr(),
                associated.len(),
            )
        };
        if done == DONE {
            return Ok(());
        }
        // AWS-LC does so by itself; that it decrypts before it compares is no reason to rely on it.
        buffer.zeroize();
        Err(TagMismatch)
    }
}
