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
    failure record;
    block bigint;
    most_blocks CONSTANT bigint := 256;
    blocks bigint;
    heads_sql text;
    heads bytea[];
    -- Half of what the session keeps, so that nothing goes before it is used; of up to 16 KB each.
    most_heads integer;
    unopened bigint := 0;
BEGIN
    j.operation := 'verify';
    j.target := verify.target;
    j.set_columns := '{}';
    j.percent := 100;
    j.triggers := 'skip';
    j.check_wraps := false;
    SELECT array_agg(r.column_name), array_agg(coalesce(verify.aad, r.aad)), array_agg(coalesce(verify.version, r.version))
    INTO j.columns, j.aads, j.versions
    FROM vod_tender_crypto.registered(verify.target, verify.columns) r;
    PERFORM vod_tender_crypto.check_target(j.target, j.columns, false);
    FOR relation IN SELECT vod_tender_crypto.storing_relations(j.target) LOOP
        plan := vod_tender_crypto.plan_job(j, relation);
        -- No more than tells that there are too many: an array of all of them may not fit into memory.
        SELECT format('SELECT array_agg(f.head)
                       FROM (SELECT DISTINCT h.head FROM ONLY %s t CROSS JOIN LATERAL (VALUES %s) h(head)
                             WHERE t.ctid >= $1 AND t.ctid < $2 AND h.head IS NOT NULL LIMIT $3) f', plan.table_name,
            string_agg(format('(vod_tender_crypto.unfetched_head(%s))', vod_tender_crypto.stored_expression(a.attname, a.atttypid)), ', '))
        INTO heads_sql
        FROM pg_attribute a WHERE a.attrelid = verify.relation AND a.attname = ANY (j.columns);
        -- Known by now: the library is loaded.
        most_heads := least(greatest(current_setting('vod_tender_crypto.dek_cache_entries')::integer / 2, 1), 8192);
        block := 0;
        blocks := most_blocks;
        WHILE block * current_setting('block_size')::bigint < pg_relation_size(relation) LOOP
            -- What these blocks need from key services, all together.
            EXECUTE heads_sql INTO heads USING format('(%s,0)', block)::tid, format('(%s,0)', block + blocks)::tid,
                most_heads + 1;
            IF cardinality(heads) > most_heads AND blocks > 1 THEN
                blocks := blocks / 2;
                CONTINUE;
            END IF;
            PERFORM vod_tender_crypto.prepare_batch(vod_tender_crypto.job_task(j, false), heads, 0, 0);
            FOR failure IN EXECUTE plan.fail_sql
                USING format('(%s,0)', block)::tid, format('(%s,65535)', block + blocks - 1)::tid
            LOOP
                row_key := failure.row_key;
                column_name := failure.column_name;
                sqlstate := failure.code;
                unopened := unopened + 1;
                RETURN NEXT;
            END LOOP;
            block := block + blocks;
            blocks := least(blocks * 2, most_blocks);
        END LOOP;
    END LOOP;
    -- What was refused is not kept any longer.
    PERFORM vod_tender_crypto.prepare_batch(vod_tender_crypto.job_task(j, false), NULL, 0, 0);
    RAISE NOTICE '%: % values do not open', j.target, unopened;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.verify(regclass, name[], text, text) IS
    'Opens every value of the registered columns of a table (or of those given) and returns those that do not open: where they are and the SQLSTATE, never the value. No rows: all is well.';

SET LOCAL search_path = @extschema@, pg_temp;
