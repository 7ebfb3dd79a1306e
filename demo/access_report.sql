-- What the application and somebody else get through the view, and what the audit says about it.
\pset footer off
SET vod_tender_crypto.audit = 'table';
\echo As demo_app, with the key:
SET ROLE demo_app;
UPDATE tokens SET access_token = 'demo-access-refreshed' WHERE provider = 'twitch' AND channel = 'lag_lounge';
SELECT channel, access_token, left(t.refresh_token, 16) || '...' AS refresh_token, encryption_version
FROM tokens t WHERE channel = 'lag_lounge';
\echo As demo_analyst, without:
SET ROLE demo_analyst;
\set ON_ERROR_STOP 0
SELECT count(*) AS rows_seen FROM tokens;
SELECT access_token FROM tokens;
\if :ERROR
\else
DO $$ BEGIN RAISE EXCEPTION 'somebody without the key has read tokens'; END $$;
\endif
\set ON_ERROR_STOP 1
RESET ROLE;
\echo
SELECT vod_tender_crypto.flush_audit()
\gset
SELECT outer_user_name AS who, function, operation, key, outcome, value_count FROM vod_tender_crypto.audit ORDER BY seq;
SELECT NOT EXISTS (SELECT FROM vod_tender_crypto.audit WHERE outer_user_name = 'demo_app' AND operation = 'decrypt') AS missing
\gset
\if :missing
DO $$ BEGIN RAISE EXCEPTION 'the audit does not know who has read'; END $$;
\endif
\echo Problems in the audit, whose records are a chain:
SELECT count(*) AS problems FROM vod_tender_crypto.verify_audit();
