-- Who used which key for what. Written by a background worker alone; each record is chained to the one before it.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TABLE vod_tender_crypto.audit_record (
    seq    bigint PRIMARY KEY,
    at     timestamptz NOT NULL,
    source text NOT NULL,
    number bigint NOT NULL,
    entry  json NOT NULL,
    hash   bytea NOT NULL,
    UNIQUE (source, number)
);
COMMENT ON TABLE vod_tender_crypto.audit_record IS
    'Audit records as written: number "number" of the queue file "source". hash covers all other columns and the hash before.';
CREATE INDEX ON vod_tender_crypto.audit_record (at);
SELECT pg_extension_config_dump('vod_tender_crypto.audit_record', '');

-- Where the chain begins and ends: what is missing at an end would not show in the records that are left.
CREATE TABLE vod_tender_crypto.audit_chain (
    only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    first_seq  bigint NOT NULL DEFAULT 1,
    first_hash bytea NOT NULL DEFAULT '',
    last_seq   bigint NOT NULL DEFAULT 0,
    last_hash  bytea NOT NULL DEFAULT ''
);
COMMENT ON TABLE vod_tender_crypto.audit_chain IS
    'Where the audit''s chain begins (the first record''s number, and the hash before it) and where it ends.';
SELECT pg_extension_config_dump('vod_tender_crypto.audit_chain', '');

CREATE FUNCTION vod_tender_crypto.audit_hash(
    previous bytea, seq bigint, at_us bigint, source text, number bigint, entry json
) RETURNS bytea
    LANGUAGE sql IMMUTABLE
RETURN sha256(audit_hash.previous || convert_to(concat_ws(' ', audit_hash.seq, audit_hash.at_us, audit_hash.source, audit_hash.number,
                                                          audit_hash.entry::text), 'UTF8'));

CREATE FUNCTION vod_tender_crypto.unix_us(at timestamptz) RETURNS bigint
    LANGUAGE sql STABLE
RETURN (extract(epoch FROM unix_us.at) * 1000000)::bigint;

-- Called by the background worker. What is stored already is left out: the worker reads its files again after a crash.
CREATE FUNCTION vod_tender_crypto.store_audit(sources text[], numbers bigint[], times bigint[], entries text[]) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    chain vod_tender_crypto.audit_chain;
    fresh record;
    next_hash bytea;
    stored bigint := 0;
BEGIN
    INSERT INTO vod_tender_crypto.audit_chain DEFAULT VALUES ON CONFLICT ON CONSTRAINT audit_chain_pkey DO NOTHING;
    SELECT c.* INTO STRICT chain FROM vod_tender_crypto.audit_chain c FOR UPDATE;
    FOR fresh IN
        SELECT e.source, e.number, e.entry::json AS entry,
               coalesce(to_timestamp(e.at_us::numeric / 1000000), clock_timestamp()) AS at
        FROM unnest(store_audit.sources, store_audit.numbers, store_audit.times, store_audit.entries)
            WITH ORDINALITY e(source, number, at_us, entry, place)
        ORDER BY e.place
    LOOP
        next_hash := vod_tender_crypto.audit_hash(chain.last_hash, chain.last_seq + 1, vod_tender_crypto.unix_us(fresh.at),
                                                  fresh.source, fresh.number, fresh.entry);
        INSERT INTO vod_tender_crypto.audit_record (seq, at, source, number, entry, hash)
        VALUES (chain.last_seq + 1, fresh.at, fresh.source, fresh.number, fresh.entry, next_hash)
        ON CONFLICT ON CONSTRAINT audit_record_source_number_key DO NOTHING;
        IF FOUND THEN
            chain.last_seq := chain.last_seq + 1;
            chain.last_hash := next_hash;
            stored := stored + 1;
        END IF;
    END LOOP;
    UPDATE vod_tender_crypto.audit_chain c SET last_seq = chain.last_seq, last_hash = chain.last_hash;
    RETURN stored;
END
$$;

CREATE VIEW vod_tender_crypto.audit AS
    SELECT r.seq, r.at,
           r.entry ->> 'database' AS database,
           r.entry ->> 'session_user_name' AS session_user_name,
           r.entry ->> 'outer_user_name' AS outer_user_name,
           r.entry ->> 'current_user_name' AS current_user_name,
           r.entry ->> 'application_name' AS application_name,
           r.entry ->> 'client' AS client,
           (r.entry ->> 'pid')::integer AS pid,
           r.entry ->> 'function' AS function,
           r.entry ->> 'operation' AS operation,
           r.entry ->> 'key' AS key,
           (r.entry -> 'context')::jsonb AS context,
           r.entry ->> 'outcome' AS outcome,
           r.entry ->> 'sqlstate' AS sqlstate,
           (r.entry ->> 'value_count')::bigint AS value_count,
           (r.entry ->> 'committed')::boolean AS committed,
           to_timestamp((r.entry ->> 'transaction_us')::numeric / 1000000) AS transaction_start,
           (r.entry ->> 'query_id')::bigint AS query_id,
           (r.entry -> 'key_service_requests')::jsonb AS key_service_requests
    FROM vod_tender_crypto.audit_record r;
COMMENT ON VIEW vod_tender_crypto.audit IS
    'One row for each transaction, caller, function, operation, key, context and outcome; value_count says how many values. outcome: ok, failed (sqlstate says how), honey (an alarm), interrupted (the server stopped before the count was known), unreadable (a damaged queue file).';

CREATE FUNCTION vod_tender_crypto.verify_audit(anchor_seq bigint DEFAULT NULL, anchor_hash bytea DEFAULT NULL)
    RETURNS TABLE (seq bigint, problem text)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH chain AS (
        SELECT c.first_seq, c.first_hash, c.last_seq, c.last_hash FROM vod_tender_crypto.audit_chain c
        UNION ALL
        SELECT 1, '', 0, '' WHERE NOT EXISTS (SELECT FROM vod_tender_crypto.audit_chain)
    ), linked AS (
        SELECT r.seq, r.hash, r.at, r.entry, r.source, r.number,
               lag(r.seq, 1, c.first_seq - 1) OVER (ORDER BY r.seq) AS previous_seq,
               lag(r.hash, 1, c.first_hash) OVER (ORDER BY r.seq) AS previous_hash
        FROM vod_tender_crypto.audit_record r CROSS JOIN chain c
    )
    SELECT l.seq, 'removed: ' || (l.seq - l.previous_seq - 1) || ' records before this one are missing'
    FROM linked l WHERE l.seq <> l.previous_seq + 1
    UNION ALL
    SELECT l.seq, 'changed: the record does not fit its hash and the hash of the record before it'
    FROM linked l
    WHERE l.seq = l.previous_seq + 1
      AND l.hash <> vod_tender_crypto.audit_hash(l.previous_hash, l.seq, vod_tender_crypto.unix_us(l.at), l.source, l.number, l.entry)
    UNION ALL
    SELECT c.last_seq, 'removed: the last records are missing'
    FROM chain c WHERE c.last_seq <> coalesce((SELECT max(r.seq) FROM vod_tender_crypto.audit_record r), c.first_seq - 1)
    UNION ALL
    SELECT c.last_seq, 'changed: the last record is not the one that was written last'
    FROM chain c JOIN vod_tender_crypto.audit_record r ON r.seq = c.last_seq WHERE r.hash <> c.last_hash
    UNION ALL
    SELECT verify_audit.anchor_seq, CASE WHEN verify_audit.anchor_hash IS NULL THEN 'not checked: no hash was given with the number'
                                         WHEN verify_audit.anchor_seq IS NULL THEN 'not checked: no number was given with the hash'
                                         WHEN verify_audit.anchor_seq < c.first_seq THEN 'not checked: the record was pruned'
                                         ELSE 'changed or removed: the record is not the one that was noted' END
    FROM chain c
    WHERE (verify_audit.anchor_seq IS NOT NULL OR verify_audit.anchor_hash IS NOT NULL)
      AND NOT EXISTS (SELECT FROM vod_tender_crypto.audit_record r
                      WHERE r.seq = verify_audit.anchor_seq AND r.hash = verify_audit.anchor_hash)
    ORDER BY 1, 2;
END;
COMMENT ON FUNCTION vod_tender_crypto.verify_audit(bigint, bytea) IS
    'What is wrong with the audit''s chain of records; no row when nothing is. Note last_seq and last_hash of audit_chain elsewhere from time to time and pass them: whoever can write the tables could write the whole chain anew.';

CREATE FUNCTION vod_tender_crypto.prune_audit(before timestamptz) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    chain vod_tender_crypto.audit_chain;
    last record;
    pruned bigint;
BEGIN
    IF prune_audit.before IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'no time is given';
    END IF;
    SELECT c.* INTO chain FROM vod_tender_crypto.audit_chain c FOR UPDATE;
    -- Up to the first record that stays: the chain has no holes.
    SELECT r.seq, r.hash INTO last
    FROM vod_tender_crypto.audit_record r
    WHERE r.seq < coalesce((SELECT min(k.seq) FROM vod_tender_crypto.audit_record k WHERE k.at >= prune_audit.before), chain.last_seq + 1)
    ORDER BY r.seq DESC LIMIT 1;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    DELETE FROM vod_tender_crypto.audit_record r WHERE r.seq <= last.seq;
    GET DIAGNOSTICS pruned = ROW_COUNT;
    UPDATE vod_tender_crypto.audit_chain c SET first_seq = last.seq + 1, first_hash = last.hash;
    RETURN pruned;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.prune_audit(timestamptz) IS
    'Deletes the oldest audit records, up to the first one that is not before the given time. The rest still verifies.';

CREATE FUNCTION vod_tender_crypto.grant_audit(reader regrole) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF grant_audit.reader IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'no role is given';
    END IF;
    EXECUTE format('GRANT SELECT ON vod_tender_crypto.audit, vod_tender_crypto.audit_record, vod_tender_crypto.audit_chain TO %s', grant_audit.reader);
    EXECUTE format('GRANT EXECUTE ON FUNCTION vod_tender_crypto.verify_audit(bigint, bytea), vod_tender_crypto.flush_audit(),
                    vod_tender_crypto.audit_hash(bytea, bigint, bigint, text, bigint, json), vod_tender_crypto.unix_us(timestamptz) TO %s', grant_audit.reader);
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.grant_audit(regrole) IS 'Lets a role read and verify the audit.';

SET LOCAL search_path = @extschema@, pg_temp;
