//! The SQL surface of `vod_tender_crypto`: unboxes arguments, calls the core, boxes results.
//!
//! Only this crate knows PostgreSQL. The formats and their cryptography are in `vod_tender_core`, the key services in
//! `vod_tender_providers`.

mod administration;
mod arguments;
mod backend;
mod catalog;
mod configuration;
mod data_path;
mod errors;
mod process;
mod results;
mod settings;
mod signals;
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
pgrx::extension_sql_file!("../sql/grants.sql", name = "grants", requires = ["catalog"], finalize);
