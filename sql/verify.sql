-- Opens everything that a table's protected columns hold. Reads only: it works on a standby too.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.verify(
    target regclass, columns name[] DEFAULT NULL, aad text DEFAULT NULL, version text DEFAULT NULL
) RETURNS TABLE (relation regclass, row_key jsonb, column_name name, sqlstate text)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    j vod_tender_crypto.job;
    plan vod_tender_crypto.job_plan;
    batch vod_tender_crypto.job_batch;
    converted vod_tender_crypto.job_converted;
    failure record;
    n integer;
    block bigint;
    blocks bigint;
    opened bigint := 0;
    unopened bigint := 0;
BEGIN
    j.operation := 'verify';
    j.target := verify.target;
    j.set_columns := '{}';
    j.percent := 100;
    j.triggers := 'skip';
    j.check_wraps := false;
    SELECT array_agg(r.column_name), array_agg(coalesce(verify.aad, r.aad)), coalesce(verify.version, min(r.version))
    INTO j.columns, j.aads, j.version
    FROM vod_tender_crypto.registered(verify.target, verify.columns) r;
    PERFORM vod_tender_crypto.check_target(j.target, j.columns, false);
    FOR relation IN SELECT vod_tender_crypto.storing_relations(j.target) LOOP
        plan := vod_tender_crypto.plan_job(j, relation);
        block := 0;
        blocks := 16;
        WHILE block * current_setting('block_size')::bigint < pg_relation_size(relation) LOOP
            batch := vod_tender_crypto.job_read(
                plan, format('(%s,0)', block)::tid, format('(%s,0)', block + blocks)::tid, NULL);
            block := block + blocks;
            n := coalesce(cardinality(batch.tids), 0);
            CONTINUE WHEN n = 0;
            converted := vod_tender_crypto.job_convert(j, plan, n, batch.texts, batch.bytes, batch.aads, batch.versions);
            opened := opened + n * cardinality(plan.columns);
            FOR failure IN
                SELECT f.code, (f.place - 1) % n + 1 AS row_at, (f.place - 1) / n + 1 AS column_at
                FROM unnest(converted.failed) WITH ORDINALITY f(code, place) WHERE f.code IS NOT NULL
            LOOP
                EXECUTE plan.key_sql INTO row_key USING batch.tids[failure.row_at], batch.xmins[failure.row_at];
                column_name := plan.columns[failure.column_at];
                sqlstate := failure.code;
                opened := opened - 1;
                unopened := unopened + 1;
                RETURN NEXT;
            END LOOP;
        END LOOP;
    END LOOP;
    RAISE NOTICE '%: % values open, % do not', j.target, opened, unopened;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.verify(regclass, name[], text, text) IS
    'Opens every value of the registered columns of a table (or of those given) and returns those that do not open: where they are and the SQLSTATE, never the value. No rows: all is well.';

SET LOCAL search_path = @extschema@, pg_temp;
