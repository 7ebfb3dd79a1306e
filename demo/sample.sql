-- Twelve rows as an application may have them: four in plaintext (v0), eight in its own AES-256-GCM format (v1).
-- The first four v1 rows were encrypted by the application (tests/vectors/v1.json, given as :vectors); the others
-- are encrypted here, in the same format and with the same key.
CREATE TEMP TABLE sample (provider text, channel text, access text, refresh text, stored_access text, stored_refresh text);

INSERT INTO sample VALUES
    ('twitch',  'arcade_alley',   'demo-access-arcade-alley-0001',   'demo-refresh-arcade-alley-0001'),
    ('twitch',  'bitrate_bistro', 'demo-access-bitrate-bistro-0002', 'demo-refresh-bitrate-bistro-0002'),
    ('youtube', 'cutscene_club',  'demo-access-cutscene-club-0003',  'demo-refresh-cutscene-club-0003'),
    ('youtube', 'dpad_diaries',   'demo-access-dpad-diaries-0004',   '');

INSERT INTO sample
SELECT names.provider, names.channel, a ->> 'plaintext', r ->> 'plaintext', a ->> 'stored', r ->> 'stored'
FROM (VALUES
    ('twitch',  'night_owl',    0, 1),
    ('twitch',  'emote_engine', 3, 6),
    ('youtube', 'frame_perfect', 7, 5),
    ('youtube', 'glitch_garden', 4, 2)
) AS names (provider, channel, access_at, refresh_at),
LATERAL (SELECT :'vectors'::jsonb -> 'values' -> access_at, :'vectors'::jsonb -> 'values' -> refresh_at) AS stored (a, r);

INSERT INTO sample
SELECT provider, channel, access, refresh,
       envelope_downgrade(access, version => 0), envelope_downgrade(refresh, version => 0)
FROM (VALUES
    ('twitch',  'hitbox_hotel',   'demo-access-hitbox-hotel-0005',   'demo-refresh-hitbox-hotel-0005'),
    ('twitch',  'idle_island',    'demo-access-idle-island-0006',    'demo-refresh-idle-island-0006'),
    ('youtube', 'joystick_jazz',  'demo-access-joystick-jazz-0007',  'demo-refresh-joystick-jazz-0007'),
    ('youtube', 'keyframe_kafe',  'demo-access-keyframe-kafe-0008',  'demo-refresh-keyframe-kafe-0008')
) AS legacy (provider, channel, access, refresh);

INSERT INTO oauth_tokens (provider, channel, access_token, refresh_token, expires_at, scope, encryption_version)
SELECT provider, channel, coalesce(stored_access, access), coalesce(stored_refresh, refresh),
       now() + interval '4 hours', 'chat:read', CASE WHEN stored_access IS NULL THEN 0 ELSE 1 END
FROM sample;

INSERT INTO demo_digests
SELECT provider, channel, sha256(convert_to(access, 'UTF8')), sha256(convert_to(refresh, 'UTF8')) FROM sample;
