//! What the doctor cannot see with SQL: the server process's limits, its environment, and files of keys.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use std::io::ErrorKind;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use pgrx::JsonB;
    use pgrx::prelude::*;
    use rustix::process::{Resource, getrlimit};
    use serde_json::{Value, json};
    use vod_tender_core::legacy::LegacyKeys;
    use vod_tender_core::seal::ExpandedKey;
    use vod_tender_core::stats::CallLog;
    use vod_tender_providers::KekUri;
    use vod_tender_providers::local::LocalKek;
    use vod_tender_providers::secret_file;
    use vod_tender_providers::secret_path::open_directory;

    use crate::arguments::TextIn;
    use crate::{audit, configuration, settings};

    /// What PostgreSQL itself would show of the environment at log_min_messages = debug3, and nobody may see.
    const SECRETS: [&str; 3] = ["ENCRYPTION_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
    /// Regions that are locked beside the cache: data keys on their way, and the random generator.
    const OTHER_LOCKED_BYTES: usize = 2 * ExpandedKey::locked_bytes(1);
    const CAP_IPC_LOCK: u32 = 14;

    /// The server process as the doctor needs to know it; of the environment the names only. Limits are in bytes, and
    /// NULL where there is none.
    #[pg_extern(volatile, parallel_restricted)]
    fn server_facts() -> JsonB {
        let needed = ExpandedKey::locked_bytes(settings::policy().limits.cache_entries) + OTHER_LOCKED_BYTES;
        JsonB(json!({
            "core_limit": getrlimit(Resource::Core).current,
            "locked_memory_limit": if may_lock_all() { None } else { getrlimit(Resource::Memlock).current },
            "locked_memory_needed": needed,
            "secrets_in_environment": SECRETS.iter().filter(|name| is_set(name)).collect::<Vec<_>>(),
            "kek_in_environment": is_set("KMS_KEY_ID"),
            "environment_problems": environment_problems(),
        }))
    }

    /// What of the audit's queue nobody has stored for a minute, in bytes.
    #[pg_extern(volatile, parallel_restricted)]
    fn audit_waiting_bytes() -> i64 {
        audit::waiting_bytes(std::time::Duration::from_secs(60)) as i64
    }

    /// What is wrong with the file behind a `local://` URI, as `[{"finding": ..., "saw": ...}]`; nothing for others.
    #[pg_extern(volatile, parallel_restricted)]
    fn kek_problems(uri: TextIn<'_>) -> JsonB {
        JsonB(uri_problems(KekUri::parse(uri.as_str())))
    }

    /// The same for a file of legacy keys.
    #[pg_extern(volatile, parallel_restricted)]
    fn legacy_file_problems(path: TextIn<'_>) -> JsonB {
        let path = Path::new(path.as_str());
        let content = || match secret_file::read(path) {
            Err(error) => Some(error.to_string()),
            Ok(content) if configuration::legacy_keys_in(&content).is_none() => {
                Some("does not hold base64 of 32 bytes on every line".to_owned())
            }
            Ok(_) => None,
        };
        // Not by its name: a key that was set by mistake instead of a path must not be shown.
        JsonB(Value::Array(file_problems(path, "the file", content)))
    }

    fn is_set(name: &str) -> bool {
        std::env::var_os(name).is_some_and(|value| !value.is_empty())
    }

    /// A process with this capability is not bound by its limit.
    fn may_lock_all() -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        effective
            .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
            .is_some_and(|bits| bits & (1 << CAP_IPC_LOCK) != 0)
    }

    fn environment_problems() -> Vec<Value> {
        let mut problems = Vec::new();
        if let Some(value) = std::env::var_os("ENCRYPTION_KEY").filter(|value| !value.is_empty())
            && !value.to_str().is_some_and(|value| LegacyKeys::default().add_base64(value.trim_end()))
        {
            problems.push(json!({"subject": "ENCRYPTION_KEY", "finding": "key_unusable",
                                 "saw": "it is not base64 of 32 bytes"}));
        }
        if let Some(value) = std::env::var_os("KMS_KEY_ID").filter(|value| !value.is_empty()) {
            let found = uri_problems(KekUri::parse_environment(&value.to_string_lossy()));
            for mut problem in found.as_array().cloned().unwrap_or_default() {
                problem["subject"] = json!("KMS_KEY_ID");
                problems.push(problem);
            }
        }
        problems
    }

    fn uri_problems(uri: Result<KekUri, vod_tender_providers::UriError>) -> Value {
        Value::Array(match uri {
            Err(error) => vec![problem("key_unusable", format!("its URI cannot be used: {error}"))],
            Ok(KekUri::Local(path)) => file_problems(&path, &path.display().to_string(), || {
                LocalKek::new(path.clone(), CallLog::default()).check().err().map(|error| error.message.to_string())
            }),
            Ok(_) => Vec::new(),
        })
    }

    /// `content` says why the file cannot be used; it is asked only when nothing about the file itself explains that.
    fn file_problems(path: &Path, shown: &str, content: impl FnOnce() -> Option<String>) -> Vec<Value> {
        let mut problems = Vec::new();
        match std::fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                problems.push(problem("key_file_missing", format!("{shown} does not exist")));
            }
            Err(error) => problems.push(problem("key_file_unusable", format!("{shown} cannot be looked at: {error}"))),
            Ok(found) => {
                if found.uid() != rustix::process::geteuid().as_raw() {
                    problems.push(problem("key_file_owner", format!("{shown} belongs to user id {}", found.uid())));
                }
                if found.mode() & 0o077 != 0 {
                    let mode = found.mode() & 0o7777;
                    problems.push(problem("key_file_exposed", format!("{shown} has mode {mode:04o}")));
                }
                if problems.is_empty()
                    && let Some(why) = content()
                {
                    problems.push(problem("key_file_unusable", format!("{shown}: {why}")));
                }
            }
        }
        if let Some(open) = open_directory(path) {
            problems.push(problem("key_directory_open", format!("{} {}", open.path.display(), open.why)));
        }
        problems
    }

    fn problem(finding: &str, saw: String) -> Value {
        json!({"finding": finding, "saw": saw})
    }
}
