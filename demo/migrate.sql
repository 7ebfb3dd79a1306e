UPDATE oauth_tokens SET
    access_token  = envelope_upgrade(access_token,  aad => provider || '/' || channel || '/access_token',
                                     version => encryption_version),
    refresh_token = envelope_upgrade(refresh_token, aad => provider || '/' || channel || '/refresh_token',
                                     version => encryption_version),
    encryption_version = 2
WHERE encryption_version < 2;

UPDATE oauth_tokens SET encryption_key_id = envelope_info(access_token) ->> 'kek_id'
WHERE encryption_key_id IS NULL;
