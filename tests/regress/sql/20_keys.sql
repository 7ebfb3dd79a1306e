-- Configuring keys: what is accepted, and how what is not is refused.
\set VERBOSITY verbose
\set SHOW_CONTEXT never
SELECT vod_tender_crypto.add_key('main', 'aws-kms://alias/vod-tender-prod?region=eu-west-1', '{"tenant": "a"}');
SELECT vod_tender_crypto.add_key('by-arn', 'aws-kms://arn:aws:kms:eu-west-1:111122223333:key/0a1b');
SELECT vod_tender_crypto.add_key('by.id', 'aws-kms://0a1b2c3d-0000-4000-8000-000000000000');
SELECT vod_tender_crypto.add_key('file_1', 'local:///etc/kek.b64');
SELECT name, uri, context, state FROM vod_tender_crypto.kek ORDER BY name COLLATE "C";
\set VERBOSITY default
SELECT vod_tender_crypto.add_key('a b', 'local:///x');
SELECT vod_tender_crypto.add_key('a', 'x');
SELECT vod_tender_crypto.add_key('a', 'vault://x');
SELECT vod_tender_crypto.add_key('a', 'local://x');
SELECT vod_tender_crypto.add_key('a', 'aws-kms://');
SELECT vod_tender_crypto.add_key('a', 'aws-kms://alias/x?endpoint=http://kms.example.com');
SELECT vod_tender_crypto.add_key('a', 'aws-kms://arn:aws:kms:eu-west-1:1:key/x?region=us-east-1');
SELECT vod_tender_crypto.add_key('a', 'local:///x', '{"a": 1}');
SELECT vod_tender_crypto.add_key('a', NULL);
SELECT vod_tender_crypto.set_key_state('main', 'decrypt_only');
SELECT vod_tender_crypto.set_key_state('main', 'asleep');
SELECT vod_tender_crypto.set_key_state('nope', 'active');
SELECT vod_tender_crypto.drop_key('nope');
SELECT vod_tender_crypto.drop_key(name) FROM vod_tender_crypto.kek;
SELECT count(*) FROM vod_tender_crypto.kek;
