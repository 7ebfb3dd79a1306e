-- Fetching the data keys of a table's values before its rows are locked, or before a view over it is scanned.
SET LOCAL search_path = pg_catalog, pg_temp;

-- The query for what key services must see of a column's values: each distinct header once, and no more than the session
-- keeps data keys for. A data key has two headers, one of them for values with an aad; one more tells that there are too many.
CREATE FUNCTION vod_tender_crypto.heads_query(target regclass, "column" name, where_clause text) RETURNS text
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind "char" := (SELECT c.relkind FROM pg_class c WHERE c.oid = heads_query.target);
    table_name text;
    base_type oid;
BEGIN
    IF kind IS NULL OR kind NOT IN ('r', 'p', 'm', 'v', 'f') THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is no table and no view', coalesce(heads_query.target::text, 'NULL'));
    END IF;
    WITH RECURSIVE base(type, below) AS (
        SELECT a.atttypid, y.typbasetype FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
        WHERE a.attrelid = heads_query.target AND a.attname = heads_query."column" AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT y.oid, y.typbasetype FROM base JOIN pg_type y ON y.oid = base.below
    )
    SELECT base.type INTO base_type FROM base WHERE base.below = 0;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_column',
            MESSAGE = format('column %s of %s does not exist', coalesce(quote_ident(heads_query."column"), 'NULL'), heads_query.target);
    END IF;
    IF base_type NOT IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) THEN
        RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch',
            MESSAGE = format('column %I of %s is of type %s', heads_query."column", heads_query.target, base_type::regtype),
            HINT = 'Protected columns are of type text, varchar or bytea.';
    END IF;
    -- Locked, so that the name stays its own until the transaction ends.
    table_name := vod_tender_crypto.lock_readable(heads_query.target);
    -- The condition ends with its line, so that a comment in it hides nothing of what follows.
    RETURN format(
        'SELECT pg_catalog.array_agg(h.head)
         FROM (SELECT DISTINCT vod_tender_crypto.stored_head(CAST(t.%I AS pg_catalog.%s)) AS head
               FROM %s t%s LIMIT %s) h
         WHERE h.head IS NOT NULL',
        heads_query."column", CASE base_type WHEN 'bytea'::regtype THEN 'bytea' ELSE 'text' END,
        table_name, E'\nWHERE (' || heads_query.where_clause || E'\n)',
        2 * (current_setting('vod_tender_crypto.dek_cache_entries')::bigint + 1));
END
$$;

-- `where_clause` is the caller's own SQL and is run under the caller's path; nothing else is resolved there, for everything
-- around it is qualified and has no operator.
CREATE FUNCTION vod_tender_crypto.prefetch_stored(
    target regclass, "column" name, where_clause text, operation text, key text, caller_path text
) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    query text := vod_tender_crypto.heads_query(prefetch_stored.target, prefetch_stored."column", prefetch_stored.where_clause);
    -- A cursor takes a single query and nothing behind it.
    found_heads refcursor;
    heads bytea[];
BEGIN
    PERFORM set_config('search_path', prefetch_stored.caller_path, true);
    OPEN found_heads FOR EXECUTE query;
    FETCH found_heads INTO heads;
    CLOSE found_heads;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    RETURN vod_tender_crypto.prefetch_heads(heads, prefetch_stored.operation, prefetch_stored.key);
END
$$;

CREATE FUNCTION vod_tender_crypto.prefetch(
    target regclass, "column" name, where_clause text DEFAULT NULL, operation text DEFAULT 'decrypt', key text DEFAULT NULL
) RETURNS bigint
    LANGUAGE sql VOLATILE
RETURN vod_tender_crypto.prefetch_stored(prefetch.target, prefetch."column", prefetch.where_clause, prefetch.operation,
    prefetch.key, current_setting('search_path'));
COMMENT ON FUNCTION vod_tender_crypto.prefetch(regclass, name, text, text, text) IS
    'Fetches the data keys of a column''s stored values together, before they are decrypted (or rewrapped, with operation => ''rewrap''). where_clause is SQL, run with the caller''s rights: never build it from what outsiders say.';

SET LOCAL search_path = @extschema@, pg_temp;
