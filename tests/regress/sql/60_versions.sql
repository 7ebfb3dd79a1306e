-- Versions 0 and 1 beside version 2: reading, converting and writing, with the legacy key in a file.
\getenv keys VOD_TENDER_KEYS
DELETE FROM vod_tender_crypto.kek;
SELECT vod_tender_crypto.add_key('a', 'local://' || :'keys' || '/one.b64');
SET vod_tender_crypto.default_key = 'a';

-- Key and value of tests/vectors/v1.json; the file is the server's user's own.
\set file :keys '/legacy.b64'
\set write 'umask 077; cat >"' :file '"'
COPY (SELECT 'OXacWz3NhNNayfchvrpnDNOn5xDNKDAu6UVgzXxDGm8=') TO PROGRAM :'write';
SET vod_tender_crypto.legacy_key_file = :'file';
\set v1 'VEzpbXxvtvABJHHeDeRLEBgPL9/3MSVKmmrsp0nAJg/lZj4Giz+aX6AmmaWGrKtAegpoGLy/qoWK74bHXDhEcw=='

-- Version 1: recognised or stated. An aad is ignored, because nothing of it is bound.
SELECT envelope_version(:'v1') AS version, envelope_decrypt(:'v1') AS recognised, envelope_decrypt(:'v1', version => 1) AS stated,
       envelope_decrypt(:'v1', aad => 'row 1', version => 1) = envelope_decrypt(:'v1') AS with_aad,
       envelope_decrypt(decode(:'v1', 'base64')) = convert_to(envelope_decrypt(:'v1'), 'UTF8') AS bytea;
\set VERBOSITY sqlstate
-- A stated version is not guessed: what does not fit it is an error, and never plaintext.
SELECT envelope_decrypt(overlay(:'v1' placing 'AAAA' from 5), version => 1);
SELECT envelope_decrypt('token', version => 1);
SELECT envelope_decrypt('', version => 2);
SELECT envelope_decrypt(:'v1', version => 2);
SELECT envelope_decrypt(:'v1', version => 3);
SELECT envelope_decrypt(:'v1', version => -1);

-- Version 0: refused, read with a warning, or read.
SELECT envelope_decrypt('token');
SELECT envelope_decrypt('token', version => 0);
SELECT envelope_decrypt('token'::bytea);
-- A version 1 value that was damaged is not taken for plaintext either.
SELECT envelope_decrypt(overlay(:'v1' placing 'AAAA' from 5));
\set VERBOSITY default
SET vod_tender_crypto.plaintext_reads = warn;
SELECT envelope_decrypt('token');
SET vod_tender_crypto.plaintext_reads = allow;
SELECT envelope_decrypt('token'), envelope_decrypt('token', version => 0) AS stated, envelope_decrypt('token'::bytea) AS bytea;
RESET vod_tender_crypto.plaintext_reads;

-- Up. Twice is once.
SELECT envelope_upgrade(:'v1', aad => 'row 1', version => 1) AS up \gset
SELECT envelope_version(:'up') AS version, envelope_decrypt(:'up', aad => 'row 1') AS reads,
       envelope_upgrade(:'up', aad => 'row 1', version => 1) = :'up' AS idempotent;
SELECT envelope_decrypt(envelope_upgrade('token', version => 0)) AS text, envelope_decrypt(envelope_upgrade('token'::bytea, version => 0)) AS bytea,
       envelope_decrypt(envelope_upgrade('', version => 0)) = '' AS empty, envelope_upgrade(NULL::text) IS NULL AS nothing;
\set VERBOSITY sqlstate
SELECT envelope_upgrade('token');
SELECT envelope_upgrade(overlay(:'v1' placing 'AAAA' from 5), version => 1);

-- Down: the way back.
SELECT envelope_downgrade(:'up', aad => 'row 1') AS down \gset
SELECT envelope_version(:'down') AS version, envelope_decrypt(:'down', version => 1) AS reads,
       envelope_downgrade(:'down') = :'down' AS idempotent;
SELECT envelope_downgrade(:'up', aad => 'row 2');
SELECT envelope_downgrade('token');

-- What is written. Never plaintext.
SET vod_tender_crypto.write_format = direct;
SELECT envelope_version(envelope_encrypt('token')) AS version, envelope_version(envelope_upgrade(:'v1')) AS upgraded;
SET vod_tender_crypto.write_format = auto;
SELECT envelope_version(envelope_encrypt('token')) AS version;
SELECT vod_tender_crypto.drop_key('a');
SELECT envelope_version(envelope_encrypt('token')) AS version;
SET vod_tender_crypto.write_format = envelope;
SELECT envelope_encrypt('token');
RESET vod_tender_crypto.write_format;
RESET vod_tender_crypto.legacy_key_file;
SELECT envelope_encrypt('token');
SELECT envelope_decrypt(:'v1', version => 1);

-- A key file that others can read is not used.
\set write 'chmod 644 "' :file '"; cat'
COPY (SELECT) TO PROGRAM :'write';
SET vod_tender_crypto.legacy_key_file = :'file';
SELECT envelope_decrypt(:'v1', version => 1);
RESET vod_tender_crypto.legacy_key_file;
RESET vod_tender_crypto.default_key;
