-- Values that no application reads: whoever asks for one has no reason to.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TABLE vod_tender_crypto.honey (
    mark       bytea PRIMARY KEY CHECK (length(mark) = 28),
    label      text,
    planted_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE vod_tender_crypto.honey IS
    'Honey values by nonce and tag of their payload, which stay when a value is rewrapped. Whoever can read this table can tell them from others.';
SELECT pg_extension_config_dump('vod_tender_crypto.honey', '');

CREATE TRIGGER honey_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON vod_tender_crypto.honey
    FOR EACH STATEMENT EXECUTE FUNCTION vod_tender_crypto.kek_changed();
CREATE TRIGGER honey_row_changed
    AFTER INSERT OR UPDATE OR DELETE ON vod_tender_crypto.honey
    FOR EACH ROW EXECUTE FUNCTION vod_tender_crypto.kek_changed();
ALTER TABLE vod_tender_crypto.honey ENABLE ALWAYS TRIGGER honey_changed;
ALTER TABLE vod_tender_crypto.honey ENABLE ALWAYS TRIGGER honey_row_changed;

CREATE FUNCTION vod_tender_crypto.watch_honey(value text, label text DEFAULT NULL) RETURNS text
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    INSERT INTO vod_tender_crypto.honey (mark, label) VALUES (vod_tender_crypto.honey_mark(watch_honey.value), watch_honey.label)
    ON CONFLICT DO NOTHING;
    SELECT watch_honey.value;
END;
COMMENT ON FUNCTION vod_tender_crypto.watch_honey(text, text) IS
    'Makes an encrypted value a honey value, wherever it is stored, and gives it back.';

CREATE FUNCTION vod_tender_crypto.watch_honey(value bytea, label text DEFAULT NULL) RETURNS bytea
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    INSERT INTO vod_tender_crypto.honey (mark, label) VALUES (vod_tender_crypto.honey_mark(watch_honey.value), watch_honey.label)
    ON CONFLICT DO NOTHING;
    SELECT watch_honey.value;
END;
COMMENT ON FUNCTION vod_tender_crypto.watch_honey(bytea, text) IS
    'Makes an encrypted value a honey value, wherever it is stored, and gives it back.';

-- A row of honey in a table with registered columns.
CREATE FUNCTION vod_tender_crypto.plant_honey(
    target regclass, "row" jsonb, columns name[] DEFAULT NULL, plaintext text DEFAULT NULL, label text DEFAULT NULL
) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    col record;
    table_name text;
    given name[];
    items text[] := '{}';
    extension_schema name := (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
                              WHERE e.extname = 'vod_tender_crypto');
BEGIN
    PERFORM vod_tender_crypto.check_target(plant_honey.target, coalesce(plant_honey.columns,
        ARRAY(SELECT r.column_name FROM vod_tender_crypto.registered(plant_honey.target, NULL) r)), false);
    IF jsonb_typeof(plant_honey."row") IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'row is not a JSON object',
            HINT = 'It gives the row''s other columns, for example: {"provider": "twitch", "channel": "archive"}.';
    END IF;
    table_name := vod_tender_crypto.lock_relation(plant_honey.target, true);
    given := ARRAY(SELECT jsonb_object_keys(plant_honey."row"));
    FOR col IN
        SELECT r.*, a.atttypid = 'bytea'::regtype AS is_bytea
        FROM vod_tender_crypto.registered(plant_honey.target, plant_honey.columns) r
        JOIN pg_attribute a ON a.attrelid = plant_honey.target AND a.attname = r.column_name
    LOOP
        given := array_remove(given, col.column_name);
        items := items || format('%I', col.column_name) || format(
            'vod_tender_crypto.watch_honey(%I.envelope_encrypt(%s, key => %L, context => %L, aad => %s), %L)',
            extension_schema,
            CASE WHEN col.is_bytea THEN 'convert_to(coalesce($2, md5(gen_random_uuid()::text)), ''UTF8'')'
                 ELSE 'coalesce($2, md5(gen_random_uuid()::text))' END,
            col.key, col.context,
            CASE WHEN col.aad IS NULL THEN 'NULL'
                 ELSE '(' || vod_tender_crypto.checked_expression(plant_honey.target, col.aad, 'aad', col.column_name, '{}') || ')' END,
            plant_honey.label);
    END LOOP;
    EXECUTE format('INSERT INTO %s (%s) SELECT %s FROM jsonb_populate_record(NULL::%s, $1) t', table_name,
        (SELECT string_agg(format('%I', n), ', ') FROM unnest(given) n) || (SELECT string_agg(', ' || items[i], '') FROM generate_series(1, cardinality(items), 2) i),
        (SELECT string_agg(format('t.%I', n), ', ') FROM unnest(given) n) || (SELECT string_agg(', ' || items[i], '') FROM generate_series(2, cardinality(items), 2) i),
        table_name)
    USING plant_honey."row", plant_honey.plaintext;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.plant_honey(regclass, jsonb, name[], text, text) IS
    'Inserts a row whose protected columns hold honey values: asking for one raises an alarm. "row" gives the other columns.';

SET LOCAL search_path = @extschema@, pg_temp;
