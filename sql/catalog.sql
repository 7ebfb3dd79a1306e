-- The configured keys. Read by every session through a direct scan, so that no role needs rights on it.
CREATE TABLE vod_tender_crypto.kek (
    name       text PRIMARY KEY,
    uri        text NOT NULL,
    context    jsonb NOT NULL DEFAULT '{}',
    state      text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'decrypt_only', 'disabled')),
    created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    CHECK (vod_tender_crypto.check_key(name, uri, context))
);
COMMENT ON TABLE vod_tender_crypto.kek IS 'Key-encryption keys: name, where they are, what they may be used for. Holds no secret.';

-- Part of a dump: without it a restored table could not be read.
SELECT pg_catalog.pg_extension_config_dump('vod_tender_crypto.kek', '');

CREATE TRIGGER kek_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON vod_tender_crypto.kek
    FOR EACH STATEMENT EXECUTE FUNCTION vod_tender_crypto.kek_changed();
-- Logical replication applies changes row by row and fires no statement triggers.
CREATE TRIGGER kek_row_changed
    AFTER INSERT OR UPDATE OR DELETE ON vod_tender_crypto.kek
    FOR EACH ROW EXECUTE FUNCTION vod_tender_crypto.kek_changed();
ALTER TABLE vod_tender_crypto.kek ENABLE ALWAYS TRIGGER kek_changed;
ALTER TABLE vod_tender_crypto.kek ENABLE ALWAYS TRIGGER kek_row_changed;

CREATE FUNCTION vod_tender_crypto.add_key(name text, uri text, context jsonb DEFAULT '{}') RETURNS void
    LANGUAGE sql VOLATILE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT vod_tender_crypto.check_key(add_key.name, add_key.uri, add_key.context);
    INSERT INTO vod_tender_crypto.kek (name, uri, context) VALUES (add_key.name, add_key.uri, add_key.context);
END;
COMMENT ON FUNCTION vod_tender_crypto.add_key(text, text, jsonb) IS 'Configures a key-encryption key. Calls no key service.';

CREATE FUNCTION vod_tender_crypto.set_key_state(name text, state text) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF set_key_state.state IS NULL OR set_key_state.state NOT IN ('active', 'decrypt_only', 'disabled') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'unusable state for a key',
            HINT = 'A state is active, decrypt_only or disabled.';
    END IF;
    UPDATE vod_tender_crypto.kek SET state = set_key_state.state WHERE kek.name = set_key_state.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('key "%s" is not configured', set_key_state.name),
            HINT = 'Configured keys are in vod_tender_crypto.kek.';
    END IF;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.set_key_state(text, text) IS 'Lets a key encrypt and decrypt (active), only decrypt (decrypt_only), or neither (disabled).';

CREATE FUNCTION vod_tender_crypto.drop_key(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM vod_tender_crypto.kek WHERE kek.name = drop_key.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('key "%s" is not configured', drop_key.name),
            HINT = 'Configured keys are in vod_tender_crypto.kek.';
    END IF;
    -- Another key may get the name: whom this one was for says nothing about that.
    DELETE FROM vod_tender_crypto.key_grant g WHERE g.key = drop_key.name;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.drop_key(text) IS 'Forgets a key-encryption key here, and who may use it; the key itself is untouched. Values wrapped under it can be read again once it is added back under its name.';
