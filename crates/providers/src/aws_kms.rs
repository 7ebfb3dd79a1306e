//! `aws-kms://`: AWS KMS.

mod clients;
mod fault;

pub use clients::Clients;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;

use aws_sdk_kms::Client;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::primitives::Blob;
use tokio::time::Instant;
use vod_tender_core::context::Context;
use vod_tender_core::dek::{Dek, KEY_BYTES};
use vod_tender_core::provider::{Fault, KeyProvider, ProviderError, ProviderFuture, WrappedDek, WrappedRef};
use vod_tender_core::stats::CallLog;
use vod_tender_secret_memory::burn_stack;
use zeroize::Zeroizing;

use crate::CallLimits;
use crate::aws_key::{AwsKey, KeyArn};

const SERVICE: &str = "aws-kms";

type Result<T> = std::result::Result<T, ProviderError>;

/// A KEK in AWS KMS.
pub struct AwsKms {
    key: AwsKey,
    clients: Rc<Clients>,
    limits: Rc<Cell<CallLimits>>,
    calls: CallLog,
    /// The key that an alias was seen to stand for.
    target: RefCell<Option<KeyArn>>,
}

impl AwsKms {
    /// The KEK `key`. Calls nothing.
    pub fn new(key: AwsKey, clients: Rc<Clients>, limits: Rc<Cell<CallLimits>>, calls: CallLog) -> Self {
        AwsKms { key, clients, limits, calls, target: RefCell::default() }
    }

    async fn client(&self) -> Result<Client> {
        self.clients.client(&self.key, self.limits.get()).await
    }

    /// When a call that begins now must be over, with all that it takes.
    fn deadline(&self) -> Instant {
        Instant::now() + self.limits.get().overall
    }

    /// Counts one request and bounds its time, including what the SDK does before it sends (credentials, region).
    async fn call<T>(
        &self,
        operation: &'static str,
        deadline: Instant,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let call = self.calls.begin(SERVICE, operation);
        let result = tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| {
            let overall = self.limits.get().overall.as_millis();
            let message = format!("AWS KMS did not answer {operation} within {overall} ms");
            Err(ProviderError::new(Fault::Unreachable, message))
        });
        call.end(result)
    }

    /// What AWS KMS answered, after noting under which id it logged the request.
    fn answer<O: RequestId, E>(
        &self,
        operation: &'static str,
        sent: std::result::Result<O, SdkError<E, HttpResponse>>,
    ) -> Result<O>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let id = match &sent {
            Ok(answer) => answer.request_id(),
            Err(error) => error.request_id(),
        };
        id.into_iter().for_each(|id| self.calls.note_request(&fault::clean(id)));
        sent.map_err(|error| fault::from_sdk(operation, error))
    }

    async fn generate_now(&self, context: &Context) -> Result<(Dek, WrappedDek)> {
        self.call("GenerateDataKey", self.deadline(), async {
            let request = self
                .client()
                .await?
                .generate_data_key()
                .key_id(self.key.id())
                .number_of_bytes(KEY_BYTES as i32)
                .set_encryption_context(encryption_context(context));
            let answer = self.answer("GenerateDataKey", request.send().await)?;
            let dek = take_dek(answer.plaintext)?;
            Ok((dek, self.take_wrapped(answer.key_id, answer.ciphertext_blob)?))
        })
        .await
    }

    async fn encrypt_now(&self, dek: &Dek, context: &Context) -> Result<WrappedDek> {
        self.call("Encrypt", self.deadline(), async {
            let request = self
                .client()
                .await?
                .encrypt()
                .key_id(self.key.id())
                .plaintext(Blob::new(dek.expose().as_slice()))
                .set_encryption_context(encryption_context(context));
            let answer = self.answer("Encrypt", request.send().await)?;
            self.take_wrapped(answer.key_id, answer.ciphertext_blob)
        })
        .await
    }

    /// Asks about a wrapped DEK under exactly one key: the configured one. Where that is an alias that stands for
    /// another key by now, the recorded key is asked instead, provided that it is in the alias's own account and region.
    async fn ask_pinned<T, F: Future<Output = Result<T>>>(
        &self,
        wrapped: WrappedRef<'_>,
        deadline: Instant,
        ask: impl Fn(String) -> F,
    ) -> Result<T> {
        let pin = self.pin(wrapped.kek_id)?;
        let unasked = self.unasked(&pin, wrapped.kek_id);
        match (ask(pin).await, unasked) {
            (Err(error), Some(recorded)) if matches!(error.fault, Fault::Unverified | Fault::Denied) => {
                match self.moved_from(&recorded, deadline).await {
                    true => ask(recorded.to_string()).await,
                    false => Err(error),
                }
            }
            (result, _) => result,
        }
    }

    async fn decrypt_now(&self, wrapped: WrappedRef<'_>, context: &Context) -> Result<Dek> {
        let deadline = self.deadline();
        self.ask_pinned(wrapped, deadline, |pin| self.decrypt_pinned(pin, deadline, wrapped, context)).await
    }

    async fn decrypt_pinned(
        &self,
        pin: String,
        deadline: Instant,
        wrapped: WrappedRef<'_>,
        context: &Context,
    ) -> Result<Dek> {
        self.call("Decrypt", deadline, async {
            let request = self
                .client()
                .await?
                .decrypt()
                .key_id(pin)
                .ciphertext_blob(Blob::new(wrapped.bytes))
                .set_encryption_context(encryption_context(context));
            let answer = self.answer("Decrypt", request.send().await)?;
            let dek = take_dek(answer.plaintext)?;
            let used = self.check_used(answer.key_id.as_deref())?;
            match wrapped.kek_id {
                Some(recorded) if !used.is_same_key(recorded) => {
                    Err(ProviderError::new(Fault::Unverified, "the data key is not wrapped under the recorded key"))
                }
                _ => Ok(dek),
            }
        })
        .await
    }

    /// `None` across regions, which ReEncrypt does not reach.
    async fn reencrypt_now(
        &self,
        source: &AwsKms,
        wrapped: WrappedRef<'_>,
        context: &Context,
    ) -> Result<Option<WrappedDek>> {
        if !self.clients.are_beside(&source.key, &self.key).await {
            return Ok(None);
        }
        let deadline = self.deadline();
        let ask = |pin| self.reencrypt_pinned(pin, deadline, wrapped, context);
        source.ask_pinned(wrapped, deadline, ask).await.map(Some)
    }

    async fn reencrypt_pinned(
        &self,
        pin: String,
        deadline: Instant,
        wrapped: WrappedRef<'_>,
        context: &Context,
    ) -> Result<WrappedDek> {
        self.call("ReEncrypt", deadline, async {
            let context = encryption_context(context);
            let request = self
                .client()
                .await?
                .re_encrypt()
                .source_key_id(pin)
                .destination_key_id(self.key.id())
                .ciphertext_blob(Blob::new(wrapped.bytes))
                .set_source_encryption_context(context.clone())
                .set_destination_encryption_context(context);
            let answer = self.answer("ReEncrypt", request.send().await)?;
            match (answer.source_key_id.as_deref().and_then(KeyArn::parse), wrapped.kek_id) {
                (Some(source), Some(recorded)) if source.is_same_key(recorded) => {}
                (Some(_), None) => {}
                _ => return Err(bad_answer("it rewrapped from another key than the recorded one")),
            }
            self.take_wrapped(answer.key_id, answer.ciphertext_blob)
        })
        .await
    }

    /// Which key a wrapped DEK is asked under. Fails without a call when the recorded key cannot be this KEK's.
    fn pin(&self, recorded: Option<&str>) -> Result<String> {
        let Some(recorded) = recorded else { return Ok(self.key.id().to_owned()) };
        let recorded =
            KeyArn::parse(recorded).filter(|recorded| self.key.may_have_been(recorded)).ok_or_else(|| {
                ProviderError::new(Fault::Unverified, "the data key was not wrapped under the key that is configured")
            })?;
        match self.target.borrow().as_ref() {
            Some(target) if self.key.is_alias() && !target.is_same_key(recorded.as_str()) => {
                if target.is_neighbour(&recorded) {
                    Ok(recorded.to_string())
                } else {
                    Err(ProviderError::new(
                        Fault::Unverified,
                        "the recorded key is not in the alias's account and region",
                    ))
                }
            }
            _ => Ok(self.key.id().to_owned()),
        }
    }

    /// The recorded key, when an alias was asked and may have stood for it once.
    fn unasked(&self, pin: &str, recorded: Option<&str>) -> Option<KeyArn> {
        (self.key.is_alias() && pin == self.key.id()).then(|| KeyArn::parse(recorded?)).flatten()
    }

    /// Whether the alias stands for another key of the same account and region than the recorded one. Asks AWS KMS;
    /// where it must not ask (kms:DescribeKey), the answer is no.
    async fn moved_from(&self, recorded: &KeyArn, deadline: Instant) -> bool {
        let described = self.call("DescribeKey", deadline, async {
            let request = self.client().await?.describe_key().key_id(self.key.id());
            let answer = self.answer("DescribeKey", request.send().await)?;
            self.check_used(answer.key_metadata.as_ref().and_then(|key| key.arn()))
        });
        described.await.is_ok_and(|target| target.is_neighbour(recorded) && !target.is_same_key(recorded.as_str()))
    }

    /// The key that AWS KMS says it used: a key ARN that fits the configured key.
    fn check_used(&self, key_id: Option<&str>) -> Result<KeyArn> {
        let used = key_id.and_then(KeyArn::parse).ok_or_else(|| bad_answer("it named no key ARN"))?;
        if !self.key.may_have_been(&used) {
            return Err(bad_answer("it used another key than the configured one"));
        }
        Ok(used)
    }

    fn take_wrapped(&self, key_id: Option<String>, blob: Option<Blob>) -> Result<WrappedDek> {
        let used = self.check_used(key_id.as_deref())?;
        let blob = blob.ok_or_else(|| bad_answer("it sent no wrapped data key"))?;
        let kek_id = used.to_string();
        *self.target.borrow_mut() = Some(used);
        Ok(WrappedDek { kek_id, bytes: blob.into_inner() })
    }
}

impl KeyProvider for AwsKms {
    fn generate<'a>(&'a self, context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)> {
        Box::pin(self.generate_now(context))
    }

    fn unwrap<'a>(&'a self, wrapped: WrappedRef<'a>, context: &'a Context) -> ProviderFuture<'a, Dek> {
        Box::pin(self.decrypt_now(wrapped, context))
    }

    fn wrap<'a>(&'a self, dek: &'a Dek, context: &'a Context) -> ProviderFuture<'a, WrappedDek> {
        Box::pin(self.encrypt_now(dek, context))
    }

    fn rewrap_from<'a>(
        &'a self,
        source: &'a dyn KeyProvider,
        wrapped: WrappedRef<'a>,
        context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>> {
        match source.as_any().downcast_ref::<AwsKms>() {
            Some(source) => Box::pin(self.reencrypt_now(source, wrapped, context)),
            None => Box::pin(std::future::ready(Ok(None))),
        }
    }

    fn is_current(&self, kek_id: &str) -> Option<bool> {
        (!self.key.is_alias()).then(|| KeyArn::parse(kek_id).is_some_and(|arn| self.key.may_have_been(&arn)))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// `None` for no pairs: AWS KMS takes an absent context, not an empty one.
fn encryption_context(context: &Context) -> Option<HashMap<String, String>> {
    let pairs: HashMap<_, _> = context.to_map().into_iter().collect();
    (!pairs.is_empty()).then_some(pairs)
}

fn take_dek(plaintext: Option<Blob>) -> Result<Dek> {
    let bytes = Zeroizing::new(plaintext.map(Blob::into_inner).unwrap_or_default());
    let dek = Dek::copied(&bytes).ok_or_else(|| bad_answer("it sent a data key that is not 32 bytes long"));
    burn_stack();
    dek
}

fn bad_answer(why: &str) -> ProviderError {
    ProviderError::new(Fault::BadAnswer, format!("AWS KMS's answer is refused: {why}"))
}
