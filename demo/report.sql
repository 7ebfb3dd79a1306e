-- What the table holds now, and whether every token still reads as it did.
\pset footer off
\set QUIET on
SELECT encryption_version,
       CASE encryption_version WHEN 0 THEN 'plaintext' WHEN 1 THEN 'direct AES-256-GCM' ELSE 'envelope' END AS stored_as,
       count(*) AS rows
FROM oauth_tokens GROUP BY 1 ORDER BY 1;

SELECT encryption_version AS v, left(access_token, 40) || ' ... ' || right(access_token, 24) AS "twitch/night_owl: the access token as stored",
       length(access_token) AS characters
FROM oauth_tokens WHERE (provider, channel) = ('twitch', 'night_owl');

SELECT count(*) AS rows,
       count(*) FILTER (WHERE access_sha256 = sha256(convert_to(access, 'UTF8'))
                          AND refresh_sha256 = sha256(convert_to(refresh, 'UTF8'))) AS same
FROM demo_digests LEFT JOIN (
    SELECT provider, channel,
           envelope_decrypt(access_token,  aad => provider || '/' || channel || '/access_token',
                            version => encryption_version) AS access,
           envelope_decrypt(refresh_token, aad => provider || '/' || channel || '/refresh_token',
                            version => encryption_version) AS refresh
    FROM oauth_tokens
) AS readable USING (provider, channel)
\gset
\echo :same of :rows rows: both tokens read exactly as before.
\if `test :same -ne :rows && echo yes || echo no`
DO $$ BEGIN RAISE EXCEPTION 'a token does not read as it did'; END $$;
\endif
