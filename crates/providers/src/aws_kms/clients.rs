//! Clients for AWS KMS, made on first use and shared by the KEKs of one region and endpoint.

use std::cell::RefCell;
use std::collections::HashMap;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::{RetryPartition, TokenBucket};
use std::time::Duration;
use vod_tender_core::provider::{Fault, ProviderError};

use crate::CallLimits;
use crate::aws_key::AwsKey;

/// Longest pause between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// All clients of one session. Credentials come from the SDK's standard chain: environment, profile, web identity,
/// container, instance metadata.
#[derive(Default)]
pub struct Clients {
    /// What the SDK found, by region asked for: it holds the credentials' cache.
    found: RefCell<HashMap<Option<String>, SdkConfig>>,
    made: RefCell<HashMap<ClientKey, (CallLimits, Client)>>,
}

/// Region and endpoint, as configured.
type ClientKey = (Option<String>, Option<String>);

impl Clients {
    pub(super) async fn client(&self, key: &AwsKey, limits: CallLimits) -> Result<Client, ProviderError> {
        let name = (key.region().map(str::to_owned), key.endpoint().map(str::to_owned));
        if let Some((made_with, client)) = self.made.borrow().get(&name)
            && *made_with == limits
        {
            return Ok(client.clone());
        }
        let found = self.find(name.0.clone()).await;
        if found.region().is_none() {
            let message = "no AWS region is configured: give the key's ARN, or region=REGION in its URI, or AWS_REGION";
            return Err(ProviderError::new(Fault::Misconfigured, message));
        }
        let mut config = aws_sdk_kms::config::Builder::from(&found)
            .timeout_config(timeouts(limits))
            .retry_config(retries(limits))
            // The SDK's quota of retries for a whole client would run dry in a long session; each call has its bounds.
            .retry_partition(RetryPartition::custom("key service").token_bucket(TokenBucket::unlimited()).build());
        if let Some(endpoint) = &name.1 {
            config = config.endpoint_url(endpoint);
        }
        let client = Client::from_conf(config.build());
        self.made.borrow_mut().insert(name, (limits, client.clone()));
        Ok(client)
    }

    /// Whether both keys are asked at the same place, wherever their regions come from.
    pub(super) async fn are_beside(&self, one: &AwsKey, two: &AwsKey) -> bool {
        one.endpoint() == two.endpoint() && self.region(one).await == self.region(two).await
    }

    async fn region(&self, key: &AwsKey) -> Option<String> {
        match key.region() {
            Some(region) => Some(region.to_owned()),
            None => self.find(None).await.region().map(ToString::to_string),
        }
    }

    async fn find(&self, region: Option<String>) -> SdkConfig {
        if let Some(found) = self.found.borrow().get(&region) {
            return found.clone();
        }
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(region) = &region {
            loader = loader.region(Region::new(region.clone()));
        }
        let found = loader.load().await;
        // A region that could not be found now may be found later.
        if found.region().is_some() {
            self.found.borrow_mut().insert(region, found.clone());
        }
        found
    }

    /// Closes all connections and drops all credentials.
    pub fn forget(&self) {
        self.made.borrow_mut().clear();
        self.found.borrow_mut().clear();
    }
}

fn timeouts(limits: CallLimits) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(limits.connect)
        .operation_attempt_timeout(limits.attempt)
        .operation_timeout(limits.overall)
        .build()
}

fn retries(limits: CallLimits) -> RetryConfig {
    RetryConfig::standard()
        .with_max_attempts(limits.attempts.max(1))
        .with_initial_backoff(limits.backoff)
        .with_max_backoff(MAX_BACKOFF)
}
