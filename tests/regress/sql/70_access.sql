-- Keys are granted, uses are recorded, a view decrypts for those who may.
\getenv keys VOD_TENDER_KEYS
SELECT vod_tender_crypto.add_key('access', 'local://' || :'keys' || '/one.b64');
SET vod_tender_crypto.default_key = 'access';
SET vod_tender_crypto.audit = 'table';
CREATE ROLE regress_vtc_app;
CREATE ROLE regress_vtc_other;
CREATE TABLE access_tokens (channel text PRIMARY KEY, token text, expires_at date DEFAULT '2030-01-01');
SELECT vod_tender_crypto.create_decrypting_view('access_tokens', 'access_clear', ARRAY['token'], aad => 'channel',
    readers => '{regress_vtc_app,regress_vtc_other}');
GRANT INSERT, UPDATE, DELETE ON access_tokens, access_clear TO regress_vtc_app;
SELECT vod_tender_crypto.grant_key('access', 'regress_vtc_app', ARRAY['encrypt', 'decrypt']);
SELECT key, role, privilege FROM vod_tender_crypto.key_grant ORDER BY privilege;

SET ROLE regress_vtc_app;
INSERT INTO access_clear (channel, token) VALUES ('one', 'first'), ('two', 'second') RETURNING *;
UPDATE access_clear SET token = 'another' WHERE channel = 'one' RETURNING token;
SELECT * FROM access_clear ORDER BY channel;
SELECT is_envelope(token) FROM access_tokens;

-- Another role sees envelopes, and what is not a token.
SET ROLE regress_vtc_other;
SELECT channel, expires_at FROM access_clear ORDER BY channel;
SELECT token FROM access_clear;
RESET ROLE;
SELECT vod_tender_crypto.grant_key('access', 'regress_vtc_other', ARRAY['encrypt']);
SET ROLE regress_vtc_other;
SELECT token FROM access_clear;
RESET ROLE;

-- Wrong arguments.
SELECT vod_tender_crypto.grant_key('absent', 'regress_vtc_app', ARRAY['decrypt']);
SELECT vod_tender_crypto.grant_key('access', 'regress_vtc_app', ARRAY['read']);
SELECT vod_tender_crypto.grant_key('access', 'regress_vtc_app', '{}');
SELECT vod_tender_crypto.add_key('legacy', 'local:///x');

-- Taking back takes the functions along.
SELECT vod_tender_crypto.revoke_key('access', 'regress_vtc_app', ARRAY['decrypt']);
SELECT has_function_privilege('regress_vtc_app', 'envelope_decrypt(text, text, jsonb, integer)', 'EXECUTE') AS decrypts,
       has_function_privilege('regress_vtc_app', 'envelope_encrypt(text, text, jsonb, text)', 'EXECUTE') AS encrypts;
SELECT vod_tender_crypto.revoke_key('access', 'regress_vtc_app');
SELECT vod_tender_crypto.revoke_key('access', 'regress_vtc_other');

-- The record.
SELECT vod_tender_crypto.flush_audit();
SELECT outer_user_name, function, operation, key, outcome, sqlstate, value_count, committed
FROM vod_tender_crypto.audit WHERE session_user_name = session_user ORDER BY seq;
SELECT * FROM vod_tender_crypto.verify_audit();

SELECT vod_tender_crypto.drop_decrypting_view('access_clear');
DROP TABLE access_tokens;
DELETE FROM vod_tender_crypto.protected_column;
SELECT vod_tender_crypto.drop_key('access');
DROP OWNED BY regress_vtc_app, regress_vtc_other;
DROP ROLE regress_vtc_app, regress_vtc_other;
