-- Who may do what. PostgreSQL grants EXECUTE on every new function to PUBLIC; here it is taken back from all that
-- encrypt, decrypt, convert or administer. What stays public reads no secret: envelope_version, envelope_info and
-- is_envelope call no key service and show what is stored in clear (and whether a legacy key opens it); envelope_cache_clear and session_stats concern
-- the caller's own session.
DO $$
DECLARE
    extension_schema name := (SELECT n.nspname FROM pg_catalog.pg_extension e
                              JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) e.extnamespace
                              WHERE e.extname OPERATOR(pg_catalog.=) 'vod_tender_crypto');
    signature text;
BEGIN
    FOREACH signature IN ARRAY ARRAY[
        'envelope_encrypt(text, text, jsonb, text)', 'envelope_encrypt(bytea, text, jsonb, text)',
        'envelope_decrypt(text, text, jsonb, integer)', 'envelope_decrypt(bytea, text, jsonb, integer)',
        'rewrap(text, text)', 'rewrap(bytea, text)',
        'envelope_upgrade(text, text, jsonb, text, integer)', 'envelope_upgrade(bytea, text, jsonb, text, integer)',
        'envelope_downgrade(text, text, integer)', 'envelope_downgrade(bytea, text, integer)',
        'envelope_prefetch(text[], text, text)', 'envelope_prefetch(bytea[], text, text)'
    ] LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON FUNCTION %I.%s FROM PUBLIC', extension_schema, signature);
    END LOOP;
END
$$;

-- Keys: the owner only. Whoever may configure them owns them: a KEK's endpoint receives the server's signed requests.
-- Jobs, census and verify: whom grant_jobs() names, and on their own tables (row-level security of the jobs' tables).
REVOKE ALL ON ALL TABLES IN SCHEMA vod_tender_crypto FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA vod_tender_crypto FROM PUBLIC;
-- Reaching one's own counters.
GRANT EXECUTE ON FUNCTION vod_tender_crypto.session_stats() TO PUBLIC;
GRANT USAGE ON SCHEMA vod_tender_crypto TO PUBLIC;
-- What nobody needs to call by itself says so.
DO $$
DECLARE
    routine record;
BEGIN
    FOR routine IN
        SELECT p.oid::pg_catalog.regprocedure AS name FROM pg_catalog.pg_proc p
        WHERE p.pronamespace OPERATOR(pg_catalog.=) 'vod_tender_crypto'::pg_catalog.regnamespace
          AND pg_catalog.obj_description(p.oid, 'pg_proc') IS NULL
    LOOP
        EXECUTE pg_catalog.format('COMMENT ON ROUTINE %s IS %L', routine.name, 'Internal.');
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.session_stats() IS 'This session''s counters: cache, data keys, calls to key services by operation and outcome.';
