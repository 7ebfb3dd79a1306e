-- Which role may do what with which key. Read by every session through a direct scan, like the keys themselves.
SET LOCAL search_path = pg_catalog, pg_temp;

-- By the role's OID: a role that is dropped and made again under its name has none of the old one's rights. A dump
-- writes names, and only of roles that exist.
CREATE TABLE vod_tender_crypto.key_grant (
    key        text NOT NULL,
    role       regrole NOT NULL,
    privilege  text NOT NULL CHECK (privilege IN ('encrypt', 'decrypt', 'rewrap')),
    granted_by name NOT NULL DEFAULT current_user,
    granted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key, role, privilege)
);
COMMENT ON TABLE vod_tender_crypto.key_grant IS
    'Which role may encrypt, decrypt or rewrap with which key. The owner of the table kek may do everything.';
SELECT pg_extension_config_dump('vod_tender_crypto.key_grant', 'WHERE role::oid IN (SELECT r.oid FROM pg_catalog.pg_roles r)');

CREATE TRIGGER key_grant_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON vod_tender_crypto.key_grant
    FOR EACH STATEMENT EXECUTE FUNCTION vod_tender_crypto.kek_changed();
CREATE TRIGGER key_grant_row_changed
    AFTER INSERT OR UPDATE OR DELETE ON vod_tender_crypto.key_grant
    FOR EACH ROW EXECUTE FUNCTION vod_tender_crypto.kek_changed();
ALTER TABLE vod_tender_crypto.key_grant ENABLE ALWAYS TRIGGER key_grant_changed;
ALTER TABLE vod_tender_crypto.key_grant ENABLE ALWAYS TRIGGER key_grant_row_changed;

-- The schema that the extension was created in.
CREATE FUNCTION vod_tender_crypto.extension_schema() RETURNS name
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vod_tender_crypto';
END;

-- The functions on values, wherever the extension was created.
CREATE FUNCTION vod_tender_crypto.data_path() RETURNS TABLE (function oid, name name, schema oid, arguments oidvector)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT p.oid, p.proname, p.pronamespace, p.proargtypes
    FROM pg_extension e
    JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
    JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
    WHERE e.extname = 'vod_tender_crypto' AND p.pronamespace <> 'vod_tender_crypto'::regnamespace;
END;

-- The data-path functions that a privilege is for, and those that fetch data keys for them.
CREATE FUNCTION vod_tender_crypto.privilege_routine(privilege text) RETURNS SETOF regprocedure
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT f.function::regprocedure FROM vod_tender_crypto.data_path() f
    WHERE f.name = ANY (CASE privilege_routine.privilege
        WHEN 'encrypt' THEN ARRAY['envelope_encrypt', 'envelope_upgrade', 'envelope_downgrade']
        WHEN 'decrypt' THEN ARRAY['envelope_decrypt', 'envelope_prefetch', 'envelope_upgrade', 'envelope_downgrade']
        WHEN 'rewrap' THEN ARRAY['rewrap', 'envelope_prefetch', 'envelope_upgrade', 'envelope_downgrade'] END::name[])
    UNION ALL
    SELECT p.oid::regprocedure FROM pg_proc p
    WHERE p.pronamespace = 'vod_tender_crypto'::regnamespace AND privilege_routine.privilege IN ('decrypt', 'rewrap')
      AND p.proname IN ('prefetch', 'prefetch_stored', 'heads_query', 'lock_readable', 'stored_head', 'prefetch_heads');
END;

CREATE FUNCTION vod_tender_crypto.check_grant(key text, role regrole, privileges text[]) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF check_grant.key IS NULL OR check_grant.role IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'a grant has a key, a role and privileges';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = check_grant.role) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object', MESSAGE = format('role with OID %s does not exist', check_grant.role::oid);
    END IF;
    IF coalesce(cardinality(check_grant.privileges), 0) = 0
       OR EXISTS (SELECT FROM unnest(check_grant.privileges) p WHERE p IS NULL OR p NOT IN ('encrypt', 'decrypt', 'rewrap')) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'unusable privileges for a key',
            HINT = 'Privileges are encrypt, decrypt and rewrap.';
    END IF;
END
$$;

CREATE FUNCTION vod_tender_crypto.grant_key(key text, role regrole, privileges text[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    routine regprocedure;
    schema_name name := vod_tender_crypto.extension_schema();
BEGIN
    PERFORM vod_tender_crypto.check_grant(grant_key.key, grant_key.role, grant_key.privileges);
    IF grant_key.key NOT IN ('default', 'legacy')
       AND NOT EXISTS (SELECT FROM vod_tender_crypto.kek k WHERE k.name = grant_key.key) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('key "%s" is not configured', grant_key.key),
            HINT = 'Configured keys are in vod_tender_crypto.kek; the legacy keys are called legacy.';
    END IF;
    -- What dropped roles have left.
    DELETE FROM vod_tender_crypto.key_grant g WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = g.role);
    INSERT INTO vod_tender_crypto.key_grant (key, role, privilege)
    SELECT DISTINCT grant_key.key, grant_key.role, p FROM unnest(grant_key.privileges) p
    ON CONFLICT ON CONSTRAINT key_grant_pkey DO NOTHING;
    -- Without these the grant would be of no use; with these alone no key can be used.
    IF NOT has_schema_privilege(grant_key.role, schema_name, 'USAGE') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', schema_name, grant_key.role);
    END IF;
    FOR routine IN
        SELECT DISTINCT r FROM unnest(grant_key.privileges) p CROSS JOIN LATERAL vod_tender_crypto.privilege_routine(p) r
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', routine, grant_key.role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.grant_key(text, regrole, text[]) IS
    'Lets a role encrypt, decrypt or rewrap with a key (legacy: the legacy keys), and call the functions for it.';

CREATE FUNCTION vod_tender_crypto.revoke_key(
    key text, role regrole, privileges text[] DEFAULT ARRAY['encrypt', 'decrypt', 'rewrap']
) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    routine regprocedure;
BEGIN
    PERFORM vod_tender_crypto.check_grant(revoke_key.key, revoke_key.role, revoke_key.privileges);
    DELETE FROM vod_tender_crypto.key_grant g
    WHERE (g.key = revoke_key.key AND g.role = revoke_key.role AND g.privilege = ANY (revoke_key.privileges))
       OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = g.role);
    -- What no other key of the role needs.
    FOR routine IN
        SELECT DISTINCT r FROM unnest(revoke_key.privileges) p CROSS JOIN LATERAL vod_tender_crypto.privilege_routine(p) r
        WHERE NOT EXISTS (SELECT FROM vod_tender_crypto.key_grant g
                          WHERE g.role = revoke_key.role AND r IN (SELECT vod_tender_crypto.privilege_routine(g.privilege)))
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM %s', routine, revoke_key.role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.revoke_key(text, regrole, text[]) IS
    'Takes back what grant_key() gave. Takes effect with the next statement of every session.';

SET LOCAL search_path = @extschema@, pg_temp;
