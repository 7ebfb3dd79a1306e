-- Views that show a table with its protected columns decrypted, and take plaintext for them: for applications that should
-- read and write as if the table held plaintext.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.create_decrypting_view(
    target regclass, view_name name, columns name[] DEFAULT NULL, aad text DEFAULT NULL, key text DEFAULT NULL,
    context jsonb DEFAULT NULL, readers regrole[] DEFAULT '{}', set_columns jsonb DEFAULT NULL
) RETURNS regclass
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v vod_tender_crypto.view_plan;
    relation regclass;
    owner regrole;
    reader regrole;
    col record;
BEGIN
    IF create_decrypting_view.target IS NULL OR create_decrypting_view.view_name IS NULL
       OR create_decrypting_view.readers IS NULL OR array_position(create_decrypting_view.readers, NULL) IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'table, view name and readers cannot be NULL';
    END IF;
    -- One at a time: what is checked here must still hold when it is written.
    LOCK TABLE vod_tender_crypto.protected_column IN SHARE ROW EXCLUSIVE MODE;
    v := vod_tender_crypto.plan_view(create_decrypting_view.target, create_decrypting_view.view_name,
        create_decrypting_view.columns, create_decrypting_view.aad, create_decrypting_view.key, create_decrypting_view.context,
        create_decrypting_view.set_columns);

    EXECUTE format('CREATE OR REPLACE VIEW %s WITH (security_barrier = true, security_invoker = true) AS %s',
                   v.view_name, vod_tender_crypto.view_query(v));
    relation := v.view_name::regclass;
    IF v.aad_name IS NULL THEN
        EXECUTE format('DROP FUNCTION IF EXISTS %s', v.aad_signature);
    ELSE
        -- Bound when it is made, so that a writer's search_path does not matter. It needs no secrecy and gives nothing away.
        EXECUTE format('CREATE OR REPLACE FUNCTION %s(t %s) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN ARRAY[%s]',
            v.aad_name, v.view_name, (SELECT string_agg(coalesce(a.aad, 'NULL::text'), ', ' ORDER BY a.place)
                                      FROM unnest(v.aads) WITH ORDINALITY a(aad, place)));
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', v.aad_signature);
    END IF;
    EXECUTE format('CREATE OR REPLACE FUNCTION %s() RETURNS trigger LANGUAGE plpgsql AS %L', v.write_name,
                   vod_tender_crypto.view_write_body(v));
    EXECUTE format('COMMENT ON FUNCTION %s() IS %L', v.write_name, 'Internal. set_columns ' || v.set_columns::text);
    -- Firing a trigger takes no right; making another trigger of it would.
    EXECUTE format('REVOKE ALL ON FUNCTION %s() FROM PUBLIC', v.write_name);
    EXECUTE format('CREATE OR REPLACE TRIGGER vod_tender_crypto_check BEFORE INSERT OR UPDATE OR DELETE ON %s
                    FOR EACH STATEMENT EXECUTE FUNCTION %s()', v.view_name, v.write_name);
    EXECUTE format('CREATE OR REPLACE TRIGGER vod_tender_crypto_write INSTEAD OF INSERT OR UPDATE OR DELETE ON %s
                    FOR EACH ROW EXECUTE FUNCTION %s()', v.view_name, v.write_name);
    FOR col IN SELECT * FROM vod_tender_crypto.view_column(v) LOOP
        EXECUTE format('ALTER VIEW %s ALTER COLUMN %I %s', v.view_name, col.column_name,
                       coalesce('SET DEFAULT ' || col.default_value, 'DROP DEFAULT'));
    END LOOP;

    SELECT c.relowner::regrole INTO owner FROM pg_class c WHERE c.oid = v.target;
    IF owner <> (SELECT c.relowner FROM pg_class c WHERE c.oid = relation) THEN
        EXECUTE format('ALTER VIEW %s OWNER TO %s', v.view_name, owner);
        EXECUTE format('ALTER FUNCTION %s() OWNER TO %s', v.write_name, owner);
        IF v.aad_name IS NOT NULL THEN
            EXECUTE format('ALTER FUNCTION %s OWNER TO %s', v.aad_signature, owner);
        END IF;
    END IF;
    FOREACH reader IN ARRAY create_decrypting_view.readers LOOP
        EXECUTE format('GRANT SELECT ON %s, %s TO %s', v.view_name, v.table_name, reader);
    END LOOP;
    RETURN relation;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.create_decrypting_view(regclass, name, name[], text, text, jsonb, regrole[], jsonb) IS
    'Makes, or makes again, a view of a table with its protected columns decrypted, through which rows can be written.';

CREATE FUNCTION vod_tender_crypto.drop_decrypting_view(view regclass) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    write_function regprocedure := vod_tender_crypto.view_function(drop_decrypting_view.view);
    aad_function regprocedure;
BEGIN
    IF write_function IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is not a decrypting view', coalesce(drop_decrypting_view.view::text, 'NULL')),
            HINT = 'Views made by vod_tender_crypto.create_decrypting_view() are.';
    END IF;
    SELECT f.oid INTO aad_function
    FROM pg_proc p JOIN pg_class c ON c.oid = drop_decrypting_view.view
    JOIN pg_proc f ON f.pronamespace = p.pronamespace AND f.proname = left(p.proname, -6) || '_aad'
         AND f.pronargs = 1 AND f.proargtypes[0] = c.reltype
    WHERE p.oid = write_function;
    IF FOUND THEN
        EXECUTE format('DROP FUNCTION %s', aad_function);
    END IF;
    EXECUTE format('DROP VIEW %s', drop_decrypting_view.view);
    EXECUTE format('DROP FUNCTION %s', write_function);
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.drop_decrypting_view(regclass) IS
    'Drops a decrypting view with its functions. The table and what is registered about it stay.';

SET LOCAL search_path = @extschema@, pg_temp;
