INSERT INTO oauth_tokens (provider, channel, access_token, refresh_token, expires_at, scope,
                          encryption_version, encryption_key_id)
SELECT provider, channel, access, refresh, now() + interval '4 hours', 'chat:read',
       envelope_version(access), envelope_info(access) ->> 'kek_id'
FROM (SELECT :'provider' AS provider, :'channel' AS channel,
             envelope_encrypt(:'access',  aad => :'provider' || '/' || :'channel' || '/access_token')  AS access,
             envelope_encrypt(:'refresh', aad => :'provider' || '/' || :'channel' || '/refresh_token') AS refresh
      OFFSET 0) AS sealed;
