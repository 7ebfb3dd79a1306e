-- The functions on values, with KEKs in files.
\getenv keys VOD_TENDER_KEYS
SELECT vod_tender_crypto.add_key('one', 'local://' || :'keys' || '/one.b64');
SELECT vod_tender_crypto.add_key('two', 'local://' || :'keys' || '/two.b64');
-- No default key yet, then one.
SELECT envelope_encrypt('token');
SET vod_tender_crypto.default_key = 'one';
SELECT envelope_encrypt('token', aad => 'row 1', context => '{"tenant": "a"}') AS v \gset
SELECT envelope_encrypt('\x0001ff'::bytea, key => 'two') AS b \gset
SELECT left(:'v', 7), envelope_decrypt(:'v', aad => 'row 1'), envelope_decrypt(:'b'::bytea);
SELECT envelope_info(:'v') - 'kek_id' - 'wraps' - 'stored_bytes' AS info;
SELECT envelope_version(:'v'), envelope_version('plain'), envelope_version(:'b'::bytea), is_envelope(:'v'), is_envelope('x');
-- Refusals.
SELECT envelope_decrypt(:'v');
SELECT envelope_decrypt(:'v', aad => 'row 2');
SELECT envelope_decrypt(:'v', aad => 'row 1', context => '{"tenant": "b"}');
SELECT envelope_decrypt(:'v', aad => 'row 1', version => 1);
SELECT envelope_decrypt(:'v', aad => 'row 1', version => 4);
SELECT envelope_decrypt('kms:v2:AAAA');
SELECT envelope_decrypt('\x8f565432'::bytea);
SELECT envelope_decrypt('plain');
SELECT envelope_encrypt(:'v');
SELECT envelope_encrypt('token', key => 'three');
SELECT envelope_downgrade(:'v', aad => 'row 1');
-- Rewrapping keeps the payload.
SELECT rewrap(:'v', 'two') AS w \gset
SELECT split_part(:'v', ':', 4) = split_part(:'w', ':', 4) AS payload, :'v' <> :'w' AS header,
       envelope_info(:'w')->>'key' AS key, envelope_decrypt(:'w', aad => 'row 1'), rewrap(:'w', 'two') = :'w' AS again;
-- A table that admits envelopes only; converting it twice is converting it once.
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO t VALUES (1, 'plain 1'), (2, ''), (3, NULL), (4, 'plain 4');
UPDATE t SET v = envelope_upgrade(v, aad => id::text, version => 0);
CREATE TABLE before AS TABLE t;
UPDATE t SET v = envelope_upgrade(v, aad => id::text, version => 0);
SELECT count(*) FILTER (WHERE t.v IS NOT DISTINCT FROM before.v) FROM t JOIN before USING (id);
ALTER TABLE t ADD CHECK (is_envelope(v));
INSERT INTO t VALUES (5, 'plain 5');
SELECT id, envelope_decrypt(v, aad => id::text) FROM t ORDER BY id;
-- A view decrypts only what a query selects: the second column would not open.
CREATE VIEW w AS SELECT id, envelope_decrypt(v, aad => id::text) AS v, envelope_decrypt(v, aad => 'wrong') AS x FROM t;
SELECT id, v FROM w WHERE id = 1;
SELECT x FROM w WHERE id = 1;
-- A role without rights.
CREATE ROLE regress_vod_tender;
SET ROLE regress_vod_tender;
SELECT envelope_decrypt('x');
SELECT envelope_encrypt('x');
SELECT rewrap('x');
SELECT envelope_upgrade('x');
SELECT envelope_downgrade('x');
SELECT vod_tender_crypto.add_key('x', 'local:///x');
TABLE vod_tender_crypto.kek;
SET vod_tender_crypto.plaintext_reads = 'allow';
SELECT is_envelope('x'), envelope_version('x');
RESET ROLE;
DROP ROLE regress_vod_tender;
SELECT (vod_tender_crypto.session_stats()->>'deks_made')::int AS deks_made;
