//! KEK URIs, parsed once into what each provider needs.

use std::path::PathBuf;

#[cfg(feature = "aws-kms")]
use crate::aws_key::AwsKey;

/// Where a KEK is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KekUri {
    /// `local:///ABSOLUTE/PATH`: a file with base64 of 32 bytes.
    #[cfg(feature = "local")]
    Local(PathBuf),
    /// `aws-kms://KEY[?region=REGION&endpoint=URL]`.
    #[cfg(feature = "aws-kms")]
    AwsKms(AwsKey),
}

/// Why a text is not the URI of a KEK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UriError(pub &'static str);

impl KekUri {
    /// Parses a URI with its scheme.
    pub fn parse(uri: &str) -> Result<Self, UriError> {
        let (scheme, rest) = uri.split_once("://").ok_or(UriError("it has no scheme"))?;
        match scheme {
            #[cfg(feature = "local")]
            "local" => parse_path(rest).map(KekUri::Local),
            #[cfg(feature = "aws-kms")]
            "aws-kms" => AwsKey::parse(rest).map(KekUri::AwsKms),
            _ => Err(UriError("no provider of that scheme is built in")),
        }
    }

    /// Parses what `KMS_KEY_ID` may hold: a URI, or an AWS key id, key ARN, alias name or alias ARN.
    pub fn parse_environment(value: &str) -> Result<Self, UriError> {
        if value.contains("://") && !value.starts_with("arn:") {
            return Self::parse(value);
        }
        Self::parse(&format!("aws-kms://{value}"))
    }
}

#[cfg(feature = "local")]
fn parse_path(path: &str) -> Result<PathBuf, UriError> {
    if !path.starts_with('/') || path.ends_with('/') {
        return Err(UriError("its path must be absolute and name a file"));
    }
    Ok(path.into())
}

#[cfg(all(test, feature = "local"))]
mod tests {
    use super::*;

    #[test]
    fn local_paths_are_absolute() {
        assert_eq!(KekUri::parse("local:///etc/kek.b64"), Ok(KekUri::Local("/etc/kek.b64".into())));
        for uri in ["local://kek.b64", "local:///", "local://", "/etc/kek.b64", "vault:///x", ""] {
            assert!(KekUri::parse(uri).is_err(), "{uri}");
        }
    }
}
