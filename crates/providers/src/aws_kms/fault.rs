//! What an error of the AWS SDK means. No part of a request gets into the result.

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use vod_tender_core::provider::{Fault, ProviderError};

/// In place of an error code, where the answer could not be read.
const UNREADABLE: &str = "unreadable answer";
/// Longest part of a service's message that is passed on.
const MAX_MESSAGE: usize = 300;

pub(super) fn from_sdk<E>(operation: &str, error: SdkError<E, HttpResponse>) -> ProviderError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let request_id = error.request_id().map(clean);
    let with_id = |text: String| match &request_id {
        Some(id) => format!("{text}; request id {id}"),
        None => text,
    };
    match &error {
        SdkError::ServiceError(answer) => {
            let code = answer.err().code().unwrap_or(UNREADABLE).to_owned();
            let message = answer.err().message();
            let fault = from_code(&code, message, answer.raw().status().is_server_error());
            ProviderError {
                fault,
                message: format!("AWS KMS {} {operation}", verb(fault)),
                // The request of Encrypt holds a DEK, which a service might quote.
                trace: Some(with_id(service_text(&code, message.filter(|_| operation != "Encrypt")))),
            }
        }
        SdkError::TimeoutError(_) => unreachable(operation, "did not answer in time", None),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => {
            unreachable(operation, "did not answer in time", None)
        }
        SdkError::DispatchFailure(failure) if failure.is_io() => {
            unreachable(operation, "could not be reached", Some(io_cause(&error)))
        }
        // The SDK reports missing credentials as a dispatch that failed.
        SdkError::DispatchFailure(_) if is_about_credentials(&error) => ProviderError {
            fault: Fault::Denied,
            message: format!("AWS KMS was not asked to {operation}: no usable AWS credentials were found"),
            trace: Some(
                "No credentials came from the environment, a profile, web identity, the container or the instance."
                    .into(),
            ),
        },
        SdkError::DispatchFailure(_) => unreachable(operation, "closed the connection", Some(io_cause(&error))),
        SdkError::ResponseError(_) => ProviderError {
            fault: Fault::Unreachable,
            message: format!("AWS KMS's answer to {operation} could not be read"),
            trace: request_id.as_ref().map(|id| format!("request id {id}")),
        },
        _ => ProviderError::new(Fault::Misconfigured, format!("the AWS KMS request {operation} could not be built")),
    }
}

fn unreachable(operation: &str, how: &str, cause: Option<String>) -> ProviderError {
    ProviderError { fault: Fault::Unreachable, message: format!("AWS KMS {how} for {operation}"), trace: cause }
}

fn is_about_credentials<E>(error: &E) -> bool
where
    E: std::error::Error + 'static,
{
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        if source.is::<CredentialsError>() {
            return true;
        }
        cause = source;
    }
    false
}

/// The system's word for why there is no connection, such as "Connection refused".
fn io_cause<E>(error: &E) -> String
where
    E: std::error::Error + 'static,
{
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        if let Some(io) = source.downcast_ref::<std::io::Error>() {
            return clean(&io.to_string());
        }
        cause = source;
    }
    "The connection failed.".into()
}

fn from_code(code: &str, message: Option<&str>, server_error: bool) -> Fault {
    match code {
        "AccessDeniedException"
        | "AccessDenied"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "RequestExpired"
        | "NotAuthorized"
        | "OptInRequired"
        | "InvalidGrantTokenException" => Fault::Denied,
        "ThrottlingException"
        | "Throttling"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "LimitExceededException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "SlowDown" => Fault::Throttled,
        "DisabledException" => Fault::Disabled,
        "KMSInvalidStateException" | "InvalidKeyUsageException" | "UnsupportedOperationException" => {
            Fault::InvalidState
        }
        "NotFoundException" => Fault::NotFound,
        "InvalidCiphertextException" | "IncorrectKeyException" => Fault::Unverified,
        "InvalidArnException" | "ValidationException" | "ValidationError" => {
            // A malformed blob is reported as a validation error too; it says which member it means.
            if message.is_some_and(|message| message.to_ascii_lowercase().contains("ciphertext")) {
                Fault::Unverified
            } else {
                Fault::Misconfigured
            }
        }
        "KeyUnavailableException" | "DependencyTimeoutException" | "KMSInternalException" => Fault::Unreachable,
        _ if server_error => Fault::Unreachable,
        UNREADABLE => Fault::Unreachable,
        // A refusal that this code does not know: trying again would not help.
        _ => Fault::Misconfigured,
    }
}

fn verb(fault: Fault) -> &'static str {
    match fault {
        Fault::Denied => "refused",
        Fault::Throttled => "throttled",
        Fault::Disabled => "has the key disabled for",
        Fault::InvalidState => "has the key in a state that forbids",
        Fault::NotFound => "does not know the key for",
        Fault::Unverified => "could not verify the wrapped data key for",
        Fault::Misconfigured => "rejected the request for",
        _ => "failed to",
    }
}

/// The service's own words, where they cannot hold a part of the request: a signature error quotes the canonical
/// request, session token included.
fn service_text(code: &str, message: Option<&str>) -> String {
    let quotes_request = code.contains("Signature") || code.contains("Token") || code.contains("Client");
    match message {
        Some(message) if !quotes_request && !message.is_empty() => format!("{}: {}", clean(code), clean(message)),
        _ => clean(code),
    }
}

/// One line of printable text, not too long.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart() {
        for (code, fault) in [
            ("AccessDeniedException", Fault::Denied),
            ("ThrottlingException", Fault::Throttled),
            ("DisabledException", Fault::Disabled),
            ("KMSInvalidStateException", Fault::InvalidState),
            ("NotFoundException", Fault::NotFound),
            ("InvalidCiphertextException", Fault::Unverified),
            ("IncorrectKeyException", Fault::Unverified),
            ("KMSInternalException", Fault::Unreachable),
        ] {
            assert_eq!(from_code(code, None, false), fault, "{code}");
        }
        assert_eq!(from_code("ValidationException", Some("'ciphertextBlob' failed"), false), Fault::Unverified);
        assert_eq!(from_code("BrandNewException", None, true), Fault::Unreachable);
        assert_eq!(from_code("BrandNewException", None, false), Fault::Misconfigured);
        assert_eq!(from_code("ValidationException", Some("'keyId' failed"), false), Fault::Misconfigured);
    }

    #[test]
    fn a_signature_error_does_not_quote_the_request() {
        let quoted = "The Canonical String for this request should have been x-amz-security-token:SECRET";
        assert_eq!(service_text("InvalidSignatureException", Some(quoted)), "InvalidSignatureException");
        assert_eq!(service_text("AccessDeniedException", Some("no\nway")), "AccessDeniedException: no way");
        assert_eq!(clean(&"x".repeat(1000)).len(), MAX_MESSAGE);
    }
}
