-- Compares with what rotation_begin.sql noted: the part after the last colon is the sealed payload.
\pset footer off
SELECT count(*) AS rows,
       count(*) FILTER (WHERE split_part(access_token, ':', 4) = access_payload
                          AND split_part(refresh_token, ':', 4) = refresh_payload) AS payload_unchanged,
       count(*) FILTER (WHERE encryption_key_id <> kek_id) AS kek_changed
FROM oauth_tokens JOIN demo_before USING (provider, channel)
\gset
\echo Rows :rows, payload unchanged in :payload_unchanged, KEK changed in :kek_changed
\if `test :rows -ne :payload_unchanged -o :rows -ne :kek_changed && echo yes || echo no`
DO $$ BEGIN RAISE EXCEPTION 'the rotation did not do what it should'; END $$;
\endif
\echo
SELECT DISTINCT kek_id AS kek_before, encryption_key_id AS kek_now
FROM oauth_tokens JOIN demo_before USING (provider, channel);
DROP TABLE demo_before;
