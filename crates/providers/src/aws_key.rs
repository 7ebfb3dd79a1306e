//! Names of AWS KMS keys: what a URI configures, and the key ARNs that AWS KMS answers with. Knows no SDK.

use std::fmt;

use crate::uri::UriError;

/// A configured key: which one, in which region, at which endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsKey {
    name: KeyName,
    /// Region, where neither the ARN nor the environment is to say.
    region: Option<String>,
    /// Endpoint, where it is not AWS's own.
    endpoint: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum KeyName {
    /// `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`
    KeyArn(KeyArn),
    /// `arn:PARTITION:kms:REGION:ACCOUNT:alias/NAME`
    AliasArn { arn: String, region: String, account: String },
    /// `alias/NAME`
    Alias(String),
    /// A key id.
    Id(String),
}

impl AwsKey {
    /// Parses what follows `aws-kms://`.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let (name, query) = text.split_once('?').unwrap_or((text, ""));
        let name = KeyName::parse(name)?;
        let mut key = AwsKey { name, region: None, endpoint: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("region", region)) if is_label(region) => key.region = Some(region.to_owned()),
                Some(("endpoint", endpoint)) => key.endpoint = Some(parse_endpoint(endpoint)?),
                _ => return Err(UriError("its query may hold region=REGION and endpoint=URL only")),
            }
        }
        match (&key.region, key.name.region()) {
            (Some(region), Some(own)) if region != own && !key.name.is_multi_region() => {
                Err(UriError("its region is not the one in its ARN"))
            }
            _ => Ok(key),
        }
    }

    /// What AWS KMS is given as `KeyId`.
    pub fn id(&self) -> &str {
        match &self.name {
            KeyName::KeyArn(arn) => arn.as_str(),
            KeyName::AliasArn { arn, .. } => arn,
            KeyName::Alias(name) | KeyName::Id(name) => name,
        }
    }

    /// Region, where the URI says it.
    pub fn region(&self) -> Option<&str> {
        self.region.as_deref().or(self.name.region())
    }

    /// Endpoint, where the URI says it.
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    /// Whether it is an alias, which may stand for another key tomorrow.
    pub fn is_alias(&self) -> bool {
        matches!(self.name, KeyName::Alias(_) | KeyName::AliasArn { .. })
    }

    /// Whether `arn` can be the key that this name stands for, or, for an alias, stood for.
    pub fn may_have_been(&self, arn: &KeyArn) -> bool {
        match &self.name {
            KeyName::KeyArn(own) => own.is_same_key(arn.as_str()),
            KeyName::AliasArn { region, account, .. } => arn.region() == region && arn.account() == account,
            KeyName::Alias(_) => true,
            KeyName::Id(id) => arn.key_id() == id,
        }
    }
}

impl KeyName {
    fn parse(name: &str) -> Result<Self, UriError> {
        if let Some(arn) = KeyArn::parse(name) {
            return Ok(KeyName::KeyArn(arn));
        }
        if name.starts_with("arn:") {
            let fields: Vec<_> = name.splitn(6, ':').collect();
            return match fields[..] {
                ["arn", partition, "kms", region, account, resource]
                    if is_label(partition) && is_label(region) && is_account(account) && is_alias(resource) =>
                {
                    Ok(KeyName::AliasArn { arn: name.into(), region: region.into(), account: account.into() })
                }
                _ => Err(UriError("it is not the ARN of an AWS KMS key or alias")),
            };
        }
        match name {
            _ if is_alias(name) => Ok(KeyName::Alias(name.into())),
            _ if is_label(name) => Ok(KeyName::Id(name.into())),
            _ => Err(UriError("it names no AWS KMS key: give a key ARN, a key id, alias/NAME or an alias ARN")),
        }
    }

    fn region(&self) -> Option<&str> {
        match self {
            KeyName::KeyArn(arn) => Some(arn.region()),
            KeyName::AliasArn { region, .. } => Some(region),
            KeyName::Alias(_) | KeyName::Id(_) => None,
        }
    }

    fn is_multi_region(&self) -> bool {
        matches!(self, KeyName::KeyArn(arn) if arn.is_multi_region())
    }
}

/// The ARN of a key: `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyArn {
    arn: String,
}

impl KeyArn {
    /// Parses the ARN of a key; `None` for everything else, aliases included.
    pub fn parse(arn: &str) -> Option<Self> {
        let fields: Vec<_> = arn.split(':').collect();
        let &["arn", partition, "kms", region, account, resource] = &fields[..] else { return None };
        let id = resource.strip_prefix("key/")?;
        (is_label(partition) && is_label(region) && is_account(account) && is_label(id))
            .then(|| KeyArn { arn: arn.to_owned() })
    }

    /// The ARN.
    pub fn as_str(&self) -> &str {
        &self.arn
    }

    fn field(&self, at: usize) -> &str {
        self.arn.split(':').nth(at).unwrap_or("")
    }

    fn region(&self) -> &str {
        self.field(3)
    }

    fn account(&self) -> &str {
        self.field(4)
    }

    fn key_id(&self) -> &str {
        self.field(5).trim_start_matches("key/")
    }

    fn is_multi_region(&self) -> bool {
        self.key_id().starts_with("mrk-")
    }

    /// Whether `other` is this key, or its replica in another region.
    pub fn is_same_key(&self, other: &str) -> bool {
        self.arn == other
            || KeyArn::parse(other).is_some_and(|other| {
                self.is_multi_region()
                    && self.key_id() == other.key_id()
                    && self.account() == other.account()
                    && self.field(1) == other.field(1)
            })
    }

    /// Whether `other` is in the same partition, region and account.
    pub fn is_neighbour(&self, other: &KeyArn) -> bool {
        (1..5).all(|at| self.field(at) == other.field(at))
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.arn)
    }
}

/// HTTPS, or plain HTTP to this machine: DEKs travel in the answers.
fn parse_endpoint(url: &str) -> Result<String, UriError> {
    let host = |rest: &str| rest.split(['/', '?', '#']).next().unwrap_or("").to_owned();
    let authority = match url.split_once("://") {
        Some(("https", rest)) => host(rest),
        Some(("http", rest)) => {
            let authority = host(rest);
            let name = authority.rsplit_once(':').map_or(authority.as_str(), |(name, _)| name);
            if !matches!(name, "localhost" | "127.0.0.1" | "[::1]") {
                return Err(UriError("its endpoint is plain HTTP to another machine; use https"));
            }
            authority
        }
        _ => return Err(UriError("its endpoint is not an http or https URL")),
    };
    if authority.is_empty() || authority.contains('@') || !url.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(UriError("its endpoint is not a usable URL"));
    }
    Ok(url.to_owned())
}

fn is_label(text: &str) -> bool {
    !text.is_empty() && text.len() <= 256 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn is_account(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_alias(text: &str) -> bool {
    text.strip_prefix("alias/").is_some_and(|name| {
        (1..=250).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/_-".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000000";

    #[test]
    fn every_kind_of_name_is_understood() {
        for (text, id, region, alias) in [
            (ARN, ARN, Some("eu-west-1"), false),
            ("alias/vod-tender-prod", "alias/vod-tender-prod", None, true),
            ("0a1b2c3d-0000-4000-8000-000000000000", "0a1b2c3d-0000-4000-8000-000000000000", None, false),
            ("alias/x?region=us-east-1", "alias/x", Some("us-east-1"), true),
            ("arn:aws:kms:eu-west-1:1:alias/a/b", "arn:aws:kms:eu-west-1:1:alias/a/b", Some("eu-west-1"), true),
            ("k?endpoint=http://127.0.0.1:4566&region=r", "k", Some("r"), false),
            ("k?endpoint=https://kms.example.com/", "k", None, false),
        ] {
            let key = AwsKey::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((key.id(), key.region(), key.is_alias()), (id, region, alias), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "?region=x",
            "alias/",
            "a b",
            "alias/x?zone=y",
            "alias/x?region=",
            "alias/x?endpoint=ftp://x",
            "alias/x?endpoint=http://kms.example.com",
            "alias/x?endpoint=http://127.0.0.1@kms.example.com",
            "alias/x?endpoint=http://127.0.0.1.example.com:80",
            "alias/x?endpoint=https://",
            "arn:aws:s3:::bucket",
            "arn:aws:kms:eu-west-1:1:key/",
            &format!("{ARN}?region=us-east-1"),
        ] {
            assert!(AwsKey::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_key_is_told_from_its_neighbours() {
        let arn = KeyArn::parse(ARN).unwrap();
        let other = KeyArn::parse(&ARN.replace("0a1b", "ffff")).unwrap();
        let elsewhere = KeyArn::parse(&ARN.replace("111122223333", "444455556666")).unwrap();
        assert!(arn.is_neighbour(&other) && !arn.is_neighbour(&elsewhere));
        assert!(!arn.is_same_key(other.as_str()));
        let key = AwsKey::parse(ARN).unwrap();
        assert!(key.may_have_been(&arn) && !key.may_have_been(&other));
        let by_id = AwsKey::parse(arn.key_id()).unwrap();
        assert!(by_id.may_have_been(&arn) && !by_id.may_have_been(&other));
        let alias = AwsKey::parse("arn:aws:kms:eu-west-1:111122223333:alias/a").unwrap();
        assert!(alias.may_have_been(&other) && !alias.may_have_been(&elsewhere));
    }

    #[test]
    fn replicas_are_one_key() {
        let primary = KeyArn::parse("arn:aws:kms:eu-west-1:1:key/mrk-01").unwrap();
        assert!(primary.is_same_key("arn:aws:kms:us-east-1:1:key/mrk-01"));
        assert!(!primary.is_same_key("arn:aws:kms:us-east-1:2:key/mrk-01"));
        assert!(AwsKey::parse("arn:aws:kms:eu-west-1:1:key/mrk-01?region=us-east-1").is_ok());
    }
}
