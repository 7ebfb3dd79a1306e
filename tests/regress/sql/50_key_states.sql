-- What each state of a key allows, from the next statement on; and that a key's cached data keys do not outlive it.
\getenv keys VOD_TENDER_KEYS
\set one 'local://' :keys '/one.b64'
\set two 'local://' :keys '/two.b64'
DELETE FROM vod_tender_crypto.kek;
SELECT vod_tender_crypto.add_key('a', :'one'), vod_tender_crypto.add_key('b', :'two');
SET vod_tender_crypto.default_key = 'a';
SELECT envelope_encrypt('secret') AS sealed \gset

\set VERBOSITY sqlstate
-- decrypt_only
SELECT vod_tender_crypto.set_key_state('a', 'decrypt_only');
SELECT envelope_decrypt(:'sealed');
SELECT envelope_encrypt('secret');
-- Away from it, but not to it.
SELECT envelope_info(rewrap(:'sealed', 'b')) ->> 'key' AS key;
SELECT rewrap(envelope_encrypt('secret', 'b'), 'a');

-- disabled
SELECT vod_tender_crypto.set_key_state('a', 'disabled');
SELECT envelope_decrypt(:'sealed');
SELECT envelope_encrypt('secret');
SELECT rewrap(:'sealed', 'b');
-- What needs no key is still there.
SELECT envelope_version(:'sealed') AS version, envelope_info(:'sealed') ->> 'key' AS key;

-- A change goes with its transaction.
BEGIN;
SELECT vod_tender_crypto.set_key_state('a', 'active');
SELECT envelope_decrypt(:'sealed');
ROLLBACK;
SELECT envelope_decrypt(:'sealed');
BEGIN;
SAVEPOINT s;
SELECT vod_tender_crypto.set_key_state('a', 'active');
ROLLBACK TO s;
SELECT envelope_decrypt(:'sealed');
ROLLBACK;
SELECT vod_tender_crypto.set_key_state('a', 'active');
SELECT envelope_decrypt(:'sealed');

-- Dropped, and added back under its name.
SELECT vod_tender_crypto.drop_key('a');
SELECT envelope_decrypt(:'sealed');
SELECT vod_tender_crypto.add_key('a', :'one');
SELECT envelope_decrypt(:'sealed');
-- Another key under its name is asked, and cannot open it.
UPDATE vod_tender_crypto.kek SET uri = :'two' WHERE name = 'a';
SELECT envelope_decrypt(:'sealed');

-- The table itself keeps out what is no key.
INSERT INTO vod_tender_crypto.kek (name, uri) VALUES ('x', 'nonsense');
INSERT INTO vod_tender_crypto.kek (name, uri, state) VALUES ('x', 'local:///x', 'open');
UPDATE vod_tender_crypto.kek SET uri = 'nonsense';
SELECT vod_tender_crypto.add_key('a', :'one');
SELECT vod_tender_crypto.set_key_state('a', NULL);
\set VERBOSITY default

-- A context of the key's own: added when encrypting, asked for when decrypting, not for the caller to change.
SELECT vod_tender_crypto.add_key('tenant', :'one', '{"tenant": "a"}');
SELECT envelope_info(envelope_encrypt('secret', 'tenant', '{"app": "x"}')) -> 'context' AS context;
\set VERBOSITY sqlstate
SELECT envelope_encrypt('secret', 'tenant', '{"tenant": "b"}');
SELECT rewrap(:'sealed', 'tenant');
\set VERBOSITY default

DELETE FROM vod_tender_crypto.kek;
RESET vod_tender_crypto.default_key;
