//! `local://`: a 32-byte KEK in a file. For development, demonstration and tests. `docs/FORMAT.md`, section 4.

use std::any::Any;
use std::future::ready;
use std::path::PathBuf;

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use hkdf::Hkdf;
use sha2::Sha256;
use vod_tender_core::armor;
use vod_tender_core::context::Context;
use vod_tender_core::dek::{Dek, KEY_BYTES};
use vod_tender_core::provider::{Fault, KeyProvider, ProviderError, ProviderFuture, WrappedDek, WrappedRef};
use vod_tender_core::random::fill_from_system;
use vod_tender_core::stats::CallLog;
use vod_tender_secret_memory::burn_stack;
use zeroize::{Zeroize, Zeroizing};

use crate::secret_file;

const ID_INFO: &[u8] = b"vod_tender_crypto/local-kek/id";
const WRAP_INFO: &[u8] = b"vod_tender_crypto/local-kek/wrap";
const LAYOUT: u8 = 1;
const SALT_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const WRAPPED_BYTES: usize = 1 + SALT_BYTES + KEY_BYTES + TAG_BYTES;
const SERVICE: &str = "local";

type Result<T> = std::result::Result<T, ProviderError>;

/// A KEK in a file, read again for every DEK: nothing of it is kept, and a replaced file counts at once.
pub struct LocalKek {
    path: PathBuf,
    calls: CallLog,
}

impl LocalKek {
    /// The KEK at an absolute path. Reads nothing yet.
    pub fn new(path: PathBuf, calls: CallLog) -> Self {
        LocalKek { path, calls }
    }

    /// Reads the KEK as every use of it does, and keeps nothing: what is wrong with the file's content.
    pub fn check(&self) -> Result<()> {
        self.read().map(drop)
    }

    fn read(&self) -> Result<Kek> {
        let file = |problem: &dyn std::fmt::Display| {
            ProviderError::new(Fault::Misconfigured, format!("KEK file \"{}\" {problem}", self.path.display()))
        };
        let content = secret_file::read(&self.path).map_err(|error| file(&error))?;
        let line = content.strip_suffix(b"\n").unwrap_or(&content);
        let bytes = std::str::from_utf8(line).ok().and_then(|line| armor::decode(line).ok()).map(Zeroizing::new);
        let key = bytes.and_then(|bytes| Dek::copied(&bytes));
        let key = key.ok_or_else(|| file(&"does not hold base64 of 32 bytes"))?;
        Ok(Kek(key))
    }

    fn wrap_now(&self, dek: &Dek, context: &Context) -> Result<WrappedDek> {
        let kek = self.read()?;
        let mut bytes = vec![0; WRAPPED_BYTES];
        bytes[0] = LAYOUT;
        fill_from_system(&mut bytes[1..1 + SALT_BYTES]).map_err(no_random)?;
        let (head, sealed) = bytes.split_at_mut(1 + SALT_BYTES);
        let (body, tag_out) = sealed.split_at_mut(KEY_BYTES);
        body.copy_from_slice(dek.expose());
        let tag = kek.with_wrapping_key(&head[1..], |cipher, nonce| {
            cipher.encrypt_inout_detached(nonce, context.encoded(), body.into())
        });
        tag_out.copy_from_slice(&tag.expect("32 bytes are within GCM's limits"));
        Ok(WrappedDek { kek_id: kek.id(), bytes })
    }

    fn unwrap_now(&self, wrapped: WrappedRef<'_>, context: &Context) -> Result<Dek> {
        let kek = self.read()?;
        if wrapped.kek_id != Some(&kek.id()) {
            let recorded = wrapped.kek_id.unwrap_or("an unnamed key");
            let message = format!("the data key was wrapped under {recorded}, and the KEK file holds {}", kek.id());
            return Err(ProviderError::new(Fault::Unverified, message));
        }
        let unverified = || ProviderError::new(Fault::Unverified, "the wrapped data key does not verify");
        let sealed: &[u8; WRAPPED_BYTES] = wrapped.bytes.try_into().map_err(|_| unverified())?;
        let Some((&LAYOUT, sealed)) = sealed.split_first() else { return Err(unverified()) };
        let (salt, sealed) = sealed.split_at(SALT_BYTES);
        let (body, tag) = sealed.split_at(KEY_BYTES);
        let tag = Tag::try_from(tag).map_err(|_| unverified())?;
        Dek::filled(|dek| {
            dek.copy_from_slice(body);
            kek.with_wrapping_key(salt, |cipher, nonce| {
                cipher.decrypt_inout_detached(nonce, context.encoded(), dek.as_mut_slice().into(), &tag)
            })
            .map_err(|_| unverified())
        })
    }

    fn generate_now(&self, context: &Context) -> Result<(Dek, WrappedDek)> {
        let dek = Dek::filled(|bytes| fill_from_system(bytes)).map_err(no_random)?;
        let wrapped = self.wrap_now(&dek, context)?;
        Ok((dek, wrapped))
    }
}

impl KeyProvider for LocalKek {
    fn generate<'a>(&'a self, context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)> {
        Box::pin(ready(self.calls.begin(SERVICE, "GenerateDataKey").end(self.generate_now(context))))
    }

    fn unwrap<'a>(&'a self, wrapped: WrappedRef<'a>, context: &'a Context) -> ProviderFuture<'a, Dek> {
        Box::pin(ready(self.calls.begin(SERVICE, "Decrypt").end(self.unwrap_now(wrapped, context))))
    }

    fn wrap<'a>(&'a self, dek: &'a Dek, context: &'a Context) -> ProviderFuture<'a, WrappedDek> {
        Box::pin(ready(self.calls.begin(SERVICE, "Encrypt").end(self.wrap_now(dek, context))))
    }

    fn rewrap_from<'a>(
        &'a self,
        _source: &'a dyn KeyProvider,
        _wrapped: WrappedRef<'a>,
        _context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>> {
        Box::pin(ready(Ok(None)))
    }

    fn is_current(&self, kek_id: &str) -> Option<bool> {
        self.read().ok().map(|kek| kek.id() == kek_id)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The bytes of a KEK, in locked memory, for the length of one operation.
struct Kek(Dek);

impl Kek {
    /// Tells keys apart and reveals nothing of them.
    fn id(&self) -> String {
        let mut id = [0; 8];
        let hkdf = Hkdf::<Sha256>::new(None, self.0.expose());
        hkdf.expand(ID_INFO, &mut id).expect("8 bytes are within HKDF's limit");
        burn_stack();
        id.iter().fold("local:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
    }

    /// Runs `work` with the key and the nonce that belong to one salt; both are used for that one wrapped DEK.
    fn with_wrapping_key<T>(
        &self,
        salt: &[u8],
        work: impl FnOnce(&Aes256Gcm, &Nonce<aes_gcm::aead::consts::U12>) -> T,
    ) -> T {
        let mut derived = [0; KEY_BYTES + 12];
        let hkdf = Hkdf::<Sha256>::new(Some(salt), self.0.expose());
        hkdf.expand(WRAP_INFO, &mut derived).expect("44 bytes are within HKDF's limit");
        let (key, nonce) = derived.split_at(KEY_BYTES);
        let cipher = Aes256Gcm::new_from_slice(key).expect("the key has 32 bytes");
        let nonce = Nonce::try_from(nonce).expect("the nonce has 12 bytes");
        let result = work(&cipher, &nonce);
        derived.zeroize();
        drop((cipher, hkdf));
        burn_stack();
        result
    }
}

fn no_random(_: vod_tender_core::Error) -> ProviderError {
    ProviderError::new(Fault::Misconfigured, "the system's random source failed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    struct TestKek {
        kek: LocalKek,
        _dir: tempfile::TempDir,
    }

    fn kek_with(content: &str, mode: u32) -> TestKek {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek.b64");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        TestKek { kek: LocalKek::new(path, CallLog::default()), _dir: dir }
    }

    fn kek(byte: u8) -> TestKek {
        kek_with(&format!("{}\n", armor::encode(&[byte; 32])), 0o600)
    }

    fn wrapped(dek: &WrappedDek) -> WrappedRef<'_> {
        WrappedRef { kek_id: Some(&dek.kek_id), bytes: &dek.bytes }
    }

    fn fault<T>(result: Result<T>) -> Fault {
        result.err().expect("a failure").fault
    }

    #[test]
    fn a_wrapped_dek_opens_under_its_kek_and_context_only() {
        let (first, two) = (kek(1), kek(2));
        let one = &first.kek;
        let context = Context::from_json(r#"{"a":"b"}"#).unwrap();
        let (dek, sealed) = one.generate_now(&context).unwrap();
        assert_eq!(sealed.bytes.len(), WRAPPED_BYTES);
        assert_eq!(one.unwrap_now(wrapped(&sealed), &context).unwrap().expose(), dek.expose());
        assert_eq!(fault(one.unwrap_now(wrapped(&sealed), &Context::empty())), Fault::Unverified);
        assert_eq!(fault(two.kek.unwrap_now(wrapped(&sealed), &context)), Fault::Unverified);
        for at in 0..sealed.bytes.len() {
            let mut changed = sealed.clone();
            changed.bytes[at] ^= 1;
            assert_eq!(fault(one.unwrap_now(wrapped(&changed), &context)), Fault::Unverified, "{at}");
        }
        let short = WrappedRef { kek_id: Some(&sealed.kek_id), bytes: &sealed.bytes[..80] };
        assert_eq!(fault(one.unwrap_now(short, &context)), Fault::Unverified);
        assert_eq!(one.is_current(&sealed.kek_id), Some(true));
        assert_eq!(two.kek.is_current(&sealed.kek_id), Some(false));
    }

    #[test]
    fn a_recorded_id_that_is_not_the_files_is_refused() {
        let one = kek(1);
        let (_, mut sealed) = one.kek.generate_now(&Context::empty()).unwrap();
        sealed.kek_id.pop();
        assert_eq!(fault(one.kek.unwrap_now(wrapped(&sealed), &Context::empty())), Fault::Unverified);
        let unnamed = WrappedRef { kek_id: None, bytes: &sealed.bytes };
        assert_eq!(fault(one.kek.unwrap_now(unnamed, &Context::empty())), Fault::Unverified);
    }

    #[test]
    fn loose_or_wrong_files_are_refused() {
        let good = armor::encode(&[1; 32]);
        let (short, long) = (armor::encode(&[1; 31]), armor::encode(&[1; 33]));
        let double = format!("{good}\n\n");
        for (content, mode) in
            [(&good, 0o644), (&good, 0o640), (&short, 0o600), (&long, 0o600), (&double, 0o600), (&String::new(), 0o600)]
        {
            let error = kek_with(content, mode).kek.generate_now(&Context::empty()).unwrap_err();
            assert_eq!(error.fault, Fault::Misconfigured);
            assert!(!content.contains(&*error.message) && !error.message.contains(&good), "{}", error.message);
        }
        assert!(kek_with(&good, 0o400).kek.generate_now(&Context::empty()).is_ok());
        let missing = LocalKek::new("/nonexistent/kek".into(), CallLog::default());
        assert_eq!(fault(missing.generate_now(&Context::empty())), Fault::Misconfigured);
    }
}
