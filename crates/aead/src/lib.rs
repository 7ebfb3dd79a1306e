//! AES-256-GCM (NIST SP 800-38D, 96-bit nonces, 128-bit tags) with keys that are expanded once and live in locked memory.
//!
//! Two libraries do the work, with the same results: AWS-LC, and RustCrypto's `aes-gcm`. [`ExpandedKey`] is AWS-LC's,
//! which is the faster one (`docs/BENCHMARKS.md`), or RustCrypto's with the feature `rust-crypto`. This crate calls AWS-LC
//! through its C interface, because the Rust interface keeps keys in ordinary memory.

pub mod aws_lc;
pub mod rust_crypto;

#[cfg(not(feature = "rust-crypto"))]
pub use aws_lc::ExpandedKey;
#[cfg(feature = "rust-crypto")]
pub use rust_crypto::ExpandedKey;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 12;
/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;

/// What was encrypted.
#[derive(Debug, Clone, Copy)]
pub struct Sealed<'a> {
    /// The nonce.
    pub nonce: &'a [u8; NONCE_BYTES],
    /// The associated data.
    pub associated: &'a [u8],
    /// As many bytes as the plaintext has.
    pub ciphertext: &'a [u8],
    /// The tag.
    pub tag: &'a [u8; TAG_BYTES],
}

/// The tag does not fit key, nonce, ciphertext and associated data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagMismatch;

/// More bytes than may be sealed under one nonce, or no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotSealed;

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use proptest::prelude::*;

    use super::*;

    /// SP 800-38D's test case 16, from McGrew and Viega's submission.
    mod published {
        pub const KEY: &str = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308";
        pub const NONCE: &str = "cafebabefacedbaddecaf888";
        pub const PLAINTEXT: &str = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72\
                                     1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39";
        pub const ASSOCIATED: &str = "feedfacedeadbeeffeedfacedeadbeefabaddad2";
        pub const CIPHERTEXT: &str = "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa\
                                      8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662";
        pub const TAG: &str = "76fc6ece0f4e1768cddf8853bb2d551b";
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn array<const N: usize>(text: &str) -> [u8; N] {
        hex(text).try_into().unwrap()
    }

    macro_rules! for_each_library {
        ($key:ident => $body:block) => {{
            {
                use aws_lc::ExpandedKey as $key;
                $body
            }
            {
                use rust_crypto::ExpandedKey as $key;
                $body
            }
        }};
    }

    #[test]
    fn a_published_vector_is_sealed_and_opened() {
        for_each_library!(Key => {
            let key = Key::new(&array(published::KEY));
            let (nonce, associated) = (array(published::NONCE), hex(published::ASSOCIATED));
            let mut buffer = hex(published::PLAINTEXT);
            let tag = key.seal(&nonce, &associated, &mut buffer).unwrap();
            assert_eq!(buffer, hex(published::CIPHERTEXT));
            assert_eq!(tag, array(published::TAG));
            key.open(&nonce, &associated, &mut buffer, &tag).unwrap();
            assert_eq!(buffer, hex(published::PLAINTEXT));
        });
    }

    #[test]
    fn nothing_of_a_plaintext_is_left_where_the_tag_does_not_fit() {
        for_each_library!(Key => {
            let key = Key::new(&[1; 32]);
            for length in [1, 15, 16, 17, 200, 5000] {
                let plaintext = vec![0xA5; length];
                let mut sealed = plaintext.clone();
                let tag = key.seal(&[2; 12], b"bound", &mut sealed).unwrap();
                let mut wrong_tag = tag;
                wrong_tag[15] ^= 1;
                let mut wrong_body = sealed.clone();
                wrong_body[length - 1] ^= 1;
                for (nonce, associated, body, tag) in [
                    ([2; 12], &b"other"[..], &sealed, tag),
                    ([3; 12], b"bound", &sealed, tag),
                    ([2; 12], b"bound", &sealed, wrong_tag),
                    ([2; 12], b"bound", &wrong_body, tag),
                ] {
                    let mut buffer = body.clone();
                    assert_eq!(key.open(&nonce, associated, &mut buffer, &tag), Err(TagMismatch));
                    assert!(buffer.iter().all(|&byte| byte == 0));
                    let mut room = vec![MaybeUninit::new(0xFFu8); length];
                    let sealed = Sealed { nonce: &nonce, associated, ciphertext: body, tag: &tag };
                    assert!(key.open_into(sealed, &mut room).is_err());
                    // SAFETY: it was made of initialised bytes.
                    assert!(room.iter().all(|byte| unsafe { byte.assume_init() } == 0));
                }
                key.open(&[2; 12], b"bound", &mut sealed, &tag).unwrap();
                assert_eq!(sealed, plaintext);
            }
        });
    }

    proptest! {
        #[test]
        fn both_libraries_agree(
            key in any::<[u8; 32]>(),
            nonce in any::<[u8; 12]>(),
            associated in proptest::collection::vec(any::<u8>(), 0..100),
            plaintext in proptest::collection::vec(any::<u8>(), 0..3000),
        ) {
            let (one, two) = (aws_lc::ExpandedKey::new(&key), rust_crypto::ExpandedKey::new(&key));
            let (mut by_one, mut by_two) = (plaintext.clone(), plaintext.clone());
            let tag = one.seal(&nonce, &associated, &mut by_one).unwrap();
            prop_assert_eq!(two.seal(&nonce, &associated, &mut by_two).unwrap(), tag);
            prop_assert_eq!(&by_one, &by_two);
            let sealed = Sealed { nonce: &nonce, associated: &associated, ciphertext: &by_one, tag: &tag };
            let mut room = vec![MaybeUninit::uninit(); plaintext.len()];
            prop_assert_eq!(one.open_into(sealed, &mut room).unwrap(), &plaintext[..]);
            let mut room = vec![MaybeUninit::uninit(); plaintext.len()];
            prop_assert_eq!(two.open_into(sealed, &mut room).unwrap(), &plaintext[..]);
            prop_assert_eq!(two.open(&nonce, &associated, &mut by_one, &tag), Ok(()));
            prop_assert_eq!(one.open(&nonce, &associated, &mut by_two, &tag), Ok(()));
            prop_assert_eq!((&by_one, &by_two), (&plaintext, &plaintext));
        }
    }
}
