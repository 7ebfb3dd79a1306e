-- What is wrong, or would go wrong, around the extension.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.doctor(scan boolean DEFAULT true)
    RETURNS TABLE (severity text, finding text, subject text, saw text, mend text)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    part text;
    seen vod_tender_crypto.doctor_finding[];
    found vod_tender_crypto.doctor_finding[] := '{}';
BEGIN
    IF NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = current_user) THEN
        found := found || ROW('notice', 'not_looked_at', 'doctor', format('%I is not a superuser', current_user),
            'Run it as a superuser: others do not see all settings, keys and values.')::vod_tender_crypto.doctor_finding;
    END IF;
    FOREACH part IN ARRAY ARRAY['doctor_logging', 'doctor_own_settings', 'doctor_process', 'doctor_statements', 'doctor_keys',
                                'doctor_rights', 'doctor_access', 'doctor_decrypting', 'doctor_shadows', 'doctor_columns', 'doctor_jobs',
                                'doctor_clock'] || CASE WHEN doctor.scan THEN ARRAY['doctor_values'] ELSE '{}' END
    LOOP
        BEGIN
            EXECUTE format('SELECT array_agg(f) FROM vod_tender_crypto.%I() f', part) INTO seen;
            found := found || seen;
        EXCEPTION WHEN OTHERS THEN
            -- The message may quote what it met; the SQLSTATE cannot.
            found := found || ROW('notice', 'not_looked_at', part, format('it ended with SQLSTATE %s', SQLSTATE),
                format('SELECT * FROM vod_tender_crypto.%I() shows the error.', part))::vod_tender_crypto.doctor_finding;
        END;
    END LOOP;
    RETURN QUERY
        SELECT f.severity, f.finding, f.subject, f.saw, f.mend FROM unnest(found) f
        ORDER BY array_position(ARRAY['critical', 'warning', 'notice'], f.severity), f.finding, f.subject, f.saw;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.doctor(boolean) IS
    'What is wrong around the extension, and how to mend it: settings, rights, keys, columns and, with scan, values. '
    'No rows: all is well. Shows no value and no key.';

SET LOCAL search_path = @extschema@, pg_temp;
