//! AES-256-GCM by AWS-LC.

use std::mem::MaybeUninit;
use std::{ptr, slice};

use aws_lc_sys::{
    EVP_AEAD_CTX, EVP_AEAD_CTX_cleanup, EVP_AEAD_CTX_init, EVP_AEAD_CTX_open_gather, EVP_AEAD_CTX_seal_scatter,
    EVP_aead_aes_256_gcm,
};
use vod_tender_secret_memory::{Locked, burn_stack};
use zeroize::Zeroize;

use crate::{KEY_BYTES, NONCE_BYTES, NotSealed, Sealed, TAG_BYTES, TagMismatch};

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
        // SAFETY: the buffer holds as many bytes as are decrypted; input and output are the same, which is allowed.
        let opened =
            unsafe { self.open_at(nonce, associated, buffer.as_ptr(), buffer.len(), tag, buffer.as_mut_ptr()) };
        // AWS-LC does so by itself; that it decrypts before it compares is no reason to rely on it.
        opened.inspect_err(|_| buffer.zeroize())
    }

    /// Decrypts into `out`, which has as many bytes as the ciphertext, without a copy between. When the tag does not fit, `out` is
    /// overwritten with zeros.
    #[inline(always)]
    pub fn open_into<'a>(
        &self,
        sealed: Sealed<'_>,
        out: &'a mut [MaybeUninit<u8>],
    ) -> Result<&'a mut [u8], TagMismatch> {
        let Sealed { nonce, associated, ciphertext, tag } = sealed;
        assert_eq!(ciphertext.len(), out.len(), "a plaintext is as long as its ciphertext");
        let (start, length) = (out.as_mut_ptr().cast::<u8>(), out.len());
        // SAFETY: both have that many bytes, and do not overlap: one of them is borrowed mutably.
        let opened = unsafe { self.open_at(nonce, associated, ciphertext.as_ptr(), length, tag, start) };
        if opened.is_err() {
            // SAFETY: as above. Zeros first, so that there is something to overwrite for the compiler.
            unsafe {
                ptr::write_bytes(start, 0, length);
                slice::from_raw_parts_mut(start, length).zeroize();
            }
        }
        // SAFETY: AWS-LC wrote every byte when it succeeded.
        opened.map(|()| unsafe { slice::from_raw_parts_mut(start, length) })
    }

    /// # Safety
    /// `from` and `to` have `length` bytes each; they are the same or do not overlap.
    #[inline(always)]
    unsafe fn open_at(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        from: *const u8,
        length: usize,
        tag: &[u8; TAG_BYTES],
        to: *mut u8,
    ) -> Result<(), TagMismatch> {
        // SAFETY: every pointer goes with its length, and the rest is as promised by the caller.
        let done = unsafe {
            EVP_AEAD_CTX_open_gather(
                &self.0.0,
                to,
                nonce.as_ptr(),
                NONCE_BYTES,
                from,
                length,
                tag.as_ptr(),
                TAG_BYTES,
                associated.as_ptr(),
                associated.len(),
            )
        };
        if done == DONE { Ok(()) } else { Err(TagMismatch) }
    }
}
