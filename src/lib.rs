//! The SQL surface of `vod_tender_crypto`: unboxes arguments, calls the core, boxes results.
//!
//! Only this crate knows PostgreSQL. The formats and their cryptography are in `vod_tender_core`, the key services in
//! `vod_tender_providers`.

mod administration;
mod arguments;
mod audit;
mod backend;
mod bulk;
mod bulk_task;
mod callers;
mod catalog;
mod census;
mod configuration;
mod data_path;
mod doctor;
mod errors;
mod fetch;
mod prefetch;
mod process;
mod results;
mod row_expression;
mod server_log;
mod settings;
mod signals;
mod transactions;
mod wait;

::pgrx::pg_module_magic!(name, version);

// What the key services' clients leave in freed memory (answers hold DEKs) is overwritten when it is freed.
#[global_allocator]
static WIPED_ON_FREE: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

/// Runs when PostgreSQL loads the library, under `shared_preload_libraries` in the postmaster: so it makes nothing
/// secret, random or threaded. All that is made on first use, in the backend.
#[pgrx::pg_guard]
#[allow(non_snake_case)]
pub extern "C-unwind" fn _PG_init() {
    settings::define();
}

pgrx::extension_sql_file!(
    "../sql/catalog.sql",
    name = "catalog",
    requires = [administration::vod_tender_crypto::check_key, administration::vod_tender_crypto::kek_changed]
);
pgrx::extension_sql_file!("../sql/key_grant.sql", name = "key_grant", requires = ["catalog"]);
pgrx::extension_sql_file!("../sql/protected_column.sql", name = "protected_column", requires = ["catalog"]);
pgrx::extension_sql_file!("../sql/job_tables.sql", name = "job_tables", requires = ["protected_column"]);
pgrx::extension_sql_file!(
    "../sql/job_plan.sql",
    name = "job_plan",
    requires = [
        "job_tables",
        bulk::vod_tender_crypto::is_due_text,
        bulk::vod_tender_crypto::is_due_bytea,
        bulk::vod_tender_crypto::convert_value_text,
        bulk::vod_tender_crypto::convert_value_bytea,
        bulk::vod_tender_crypto::conversion_error_text,
        bulk::vod_tender_crypto::conversion_error_bytea,
        bulk::vod_tender_crypto::needed_head_text,
        bulk::vod_tender_crypto::needed_head_bytea,
        bulk::vod_tender_crypto::unfetched_head_text,
        bulk::vod_tender_crypto::unfetched_head_bytea,
        bulk::vod_tender_crypto::kek_id_text,
        bulk::vod_tender_crypto::kek_id_bytea,
        bulk::vod_tender_crypto::prepare_batch,
        bulk::vod_tender_crypto::job_key,
        transactions::vod_tender_crypto::check_may_commit,
        transactions::vod_tender_crypto::lock_relation,
        bulk::vod_tender_crypto::row_expression,
    ]
);
pgrx::extension_sql_file!("../sql/job_steps.sql", name = "job_steps", requires = ["job_plan"]);
pgrx::extension_sql_file!("../sql/job_run.sql", name = "job_run", requires = ["job_steps"]);
pgrx::extension_sql_file!("../sql/jobs.sql", name = "jobs", requires = ["job_run"]);
pgrx::extension_sql_file!(
    "../sql/decrypting_view_plan.sql",
    name = "decrypting_view_plan",
    requires = ["jobs", "key_grant", census::vod_tender_crypto::count_bound]
);
pgrx::extension_sql_file!(
    "../sql/decrypting_view_triggers.sql",
    name = "decrypting_view_triggers",
    requires = ["decrypting_view_plan"]
);
pgrx::extension_sql_file!(
    "../sql/decrypting_view.sql",
    name = "decrypting_view",
    requires = ["decrypting_view_triggers"]
);
pgrx::extension_sql_file!(
    "../sql/prefetch.sql",
    name = "prefetch",
    requires = [
        "catalog",
        prefetch::vod_tender_crypto::prefetch_heads,
        prefetch::vod_tender_crypto::stored_head_text,
        prefetch::vod_tender_crypto::stored_head_bytea,
        transactions::vod_tender_crypto::lock_readable
    ]
);
pgrx::extension_sql_file!("../sql/verify.sql", name = "verify", requires = ["jobs"]);
pgrx::extension_sql_file!(
    "../sql/census.sql",
    name = "census",
    requires = ["job_plan", census::vod_tender_crypto::count_stored]
);
pgrx::extension_sql_file!(
    "../sql/audit.sql",
    name = "audit",
    requires = ["catalog", administration::vod_tender_crypto::flush_audit]
);
pgrx::extension_sql_file!(
    "../sql/honey.sql",
    name = "honey",
    requires = [
        "jobs",
        "key_grant",
        administration::vod_tender_crypto::honey_mark_text,
        administration::vod_tender_crypto::honey_mark_bytea
    ]
);
pgrx::extension_sql_file!(
    "../sql/doctor_settings.sql",
    name = "doctor_settings",
    requires = [
        doctor::vod_tender_crypto::server_facts,
        doctor::vod_tender_crypto::audit_waiting_bytes,
        doctor::vod_tender_crypto::kek_problems,
        doctor::vod_tender_crypto::legacy_file_problems
    ]
);
pgrx::extension_sql_file!(
    "../sql/doctor_objects.sql",
    name = "doctor_objects",
    requires = ["doctor_settings", "key_grant"]
);
pgrx::extension_sql_file!(
    "../sql/doctor_values.sql",
    name = "doctor_values",
    requires = ["doctor_objects", "jobs", "census"]
);
pgrx::extension_sql_file!("../sql/doctor.sql", name = "doctor", requires = ["doctor_values"]);
pgrx::extension_sql_file!(
    "../sql/grants.sql",
    name = "grants",
    requires = ["verify", "census", "key_grant", "audit", "honey", "doctor", "decrypting_view", "prefetch"],
    finalize
);
