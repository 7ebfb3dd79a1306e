-- What one session that reads every token did.
\pset footer off
SELECT count(envelope_decrypt(access_token,  aad => provider || '/' || channel || '/access_token',  version => 2)) +
       count(envelope_decrypt(refresh_token, aad => provider || '/' || channel || '/refresh_token', version => 2)) AS decrypted
FROM oauth_tokens
\gset
SELECT vod_tender_crypto.session_stats() AS stats
\gset
SELECT s ->> 'values_decrypted' AS values_decrypted, s ->> 'cache_hits' AS cache_hits,
       s ->> 'cache_misses' AS cache_misses, s ->> 'deks_made' AS deks_made
FROM (SELECT :'stats'::jsonb) AS stats (s);
SELECT service, operation, outcome, totals ->> 'calls' AS calls
FROM jsonb_each(:'stats'::jsonb -> 'calls') AS services (service, operations),
     jsonb_each(operations) AS operations (operation, outcomes),
     jsonb_each(outcomes) AS outcomes (outcome, totals);
