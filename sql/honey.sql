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
    INSERT INTO vod_tender_crypto.honey (mark, label)
    SELECT vod_tender_crypto.honey_mark(watch_honey.value), watch_honey.label WHERE watch_honey.value IS NOT NULL
    ON CONFLICT DO NOTHING;
    SELECT watch_honey.value;
END;
COMMENT ON FUNCTION vod_tender_crypto.watch_honey(text, text) IS
    'Makes an encrypted value a honey value, wherever it is stored, and gives it back.';

CREATE FUNCTION vod_tender_crypto.watch_honey(value bytea, label text DEFAULT NULL) RETURNS bytea
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    INSERT INTO vod_tender_crypto.honey (mark, label)
    SELECT vod_tender_crypto.honey_mark(watch_honey.value), watch_honey.label WHERE watch_honey.value IS NOT NULL
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
    aad text;
    is_unbound boolean;
    given name[];
    names text[];
    items text[];
BEGIN
    PERFORM vod_tender_crypto.check_target(plant_honey.target, coalesce(plant_honey.columns,
        ARRAY(SELECT r.column_name FROM vod_tender_crypto.registered(plant_honey.target, NULL) r)), false);
    IF jsonb_typeof(plant_honey."row") IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'row is not a JSON object',
            HINT = 'It gives the row''s other columns, for example: {"provider": "twitch", "channel": "archive"}.';
    END IF;
    table_name := vod_tender_crypto.lock_relation(plant_honey.target, true);
    given := ARRAY(SELECT k FROM jsonb_object_keys(plant_honey."row") k
                   WHERE k NOT IN (SELECT r.column_name FROM vod_tender_crypto.registered(plant_honey.target, plant_honey.columns) r));
    names := ARRAY(SELECT format('%I', g) FROM unnest(given) g);
    items := ARRAY(SELECT format('t.%I', g) FROM unnest(given) g);
    FOR col IN
        SELECT r.*, a.atttypid = 'bytea'::regtype AS is_bytea
        FROM vod_tender_crypto.registered(plant_honey.target, plant_honey.columns) r
        JOIN pg_attribute a ON a.attrelid = plant_honey.target AND a.attname = r.column_name
    LOOP
        aad := coalesce('(' || vod_tender_crypto.checked_expression(plant_honey.target, col.aad, 'aad', col.column_name, '{}') || ')',
                        'NULL');
        EXECUTE format('SELECT %s IS NULL FROM jsonb_populate_record(NULL::%s, $1) t', aad, table_name)
            INTO is_unbound USING plant_honey."row";
        IF is_unbound AND col.aad IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed',
                MESSAGE = format('the aad of column %I is NULL for this row', col.column_name),
                HINT = 'Give the columns that the aad is made of.';
        END IF;
        names := names || format('%I', col.column_name);
        items := items || format(
            'vod_tender_crypto.watch_honey(%I.envelope_encrypt(%s, key => %L, context => %L, aad => %s), $3)', vod_tender_crypto.extension_schema(),
            CASE WHEN col.is_bytea THEN 'convert_to(coalesce($2, md5(gen_random_uuid()::text)), ''UTF8'')'
                 ELSE 'coalesce($2, md5(gen_random_uuid()::text))' END,
            col.key, col.context, aad);
    END LOOP;
    EXECUTE format('INSERT INTO %s (%s) SELECT %s FROM jsonb_populate_record(NULL::%s, $1) t', table_name,
                   array_to_string(names, ', '), array_to_string(items, ', '), table_name)
    USING plant_honey."row", plant_honey.plaintext, plant_honey.label;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.plant_honey(regclass, jsonb, name[], text, text) IS
    'Inserts a row whose protected columns hold honey values: asking for one raises an alarm. "row" gives the other columns.';

SET LOCAL search_path = @extschema@, pg_temp;
