INSERT INTO demo_digests
VALUES (:'provider', :'channel', sha256(convert_to(:'access', 'UTF8')), sha256(convert_to(:'refresh', 'UTF8')));
