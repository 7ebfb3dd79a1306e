UPDATE oauth_tokens SET
    access_token  = rewrap(access_token, :key),
    refresh_token = rewrap(refresh_token, :key);

UPDATE oauth_tokens SET encryption_key_id = envelope_info(access_token) ->> 'kek_id';
