CREATE TABLE demo_before AS
SELECT provider, channel, split_part(access_token, ':', 4) AS access_payload,
       split_part(refresh_token, ':', 4) AS refresh_payload, encryption_key_id AS kek_id
FROM oauth_tokens;
