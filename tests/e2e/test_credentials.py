"""The SDK's credential chain, as the server's environment offers it."""

from __future__ import annotations

import pytest

from helpers import one
from imds import Imds
from sqlstate import DENIED, NOT_READY, fails
from strict_kms import ACCESS_KEY, SECRET_KEY, Credential

WITHOUT_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


def encrypts(cluster, extension) -> bool:
    """Whether a fresh session encrypts under the environment's key."""
    with cluster.connect() as connection:
        connection.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}")
        return one(connection, "SELECT envelope_encrypt('token')").startswith("kms:v2:")


def test_a_profile(make_cluster, extension, kms):
    own = make_cluster()
    profile = f"[tokens]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    path = own.server_file("credentials", profile)
    own.environment.update({**kms.environment(), **WITHOUT_KEYS,
                            "AWS_SHARED_CREDENTIALS_FILE": path, "AWS_PROFILE": "tokens"})
    own.restart()
    assert encrypts(own, extension)


def test_an_instance_role(make_cluster, extension, kms):
    """Credentials out of the instance metadata service, session token included."""
    kms.credentials["AKIDROLE"] = Credential("AKIDROLE", "role secret", "role token")
    with Imds("AKIDROLE", "role secret", "role token") as imds:
        own = make_cluster(environment={**kms.environment(), **WITHOUT_KEYS, "AWS_EC2_METADATA_DISABLED": None,
                                        "AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.endpoint})
        assert encrypts(own, extension)
        assert imds.asked == 1 and kms.count("GenerateDataKey") == 1
        assert "role token" not in own.log_text() and "role secret" not in own.log_text()


@pytest.mark.parametrize("missing", ["credentials", "region"])
def test_what_is_missing_is_named(make_cluster, extension, kms, missing):
    environment = kms.environment("alias/e2e")
    if missing == "credentials":
        environment.update(WITHOUT_KEYS)
    else:
        environment["AWS_REGION"] = None
    with make_cluster(environment=environment).connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        connection.execute("SET vod_tender_crypto.kms_timeout = '10s'")
        state, saying = (DENIED, "no usable AWS credentials") if missing == "credentials" else (NOT_READY, "AWS region")
        with fails(state, saying):
            one(connection, "SELECT envelope_encrypt('token')")
    assert kms.count("GenerateDataKey") == 0
