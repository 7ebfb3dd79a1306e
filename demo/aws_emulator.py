"""AWS KMS for the demo where there is no AWS account: moto's server, on loopback, in memory.

    aws_emulator.py serve ALIAS             serves until it is stopped; prints its URL and the key's ARN
    aws_emulator.py rotate URL ALIAS        points the alias to a new key; prints that key's ARN
"""

import os
import signal
import sys

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

REGION = "eu-west-1"


def kms(url):
    """A client of the emulator, which takes any credentials. It is on this machine: no proxy leads to it."""
    return boto3.client(
        "kms", endpoint_url=url, region_name=REGION, aws_access_key_id="demo", aws_secret_access_key="demo",
        config=Config(proxies={}),
    )


def new_key(client):
    return client.create_key(Description="vod_tender_crypto demo")["KeyMetadata"]["Arn"]


def serve(alias):
    stop = {signal.SIGTERM, signal.SIGINT}
    # Blocked before the server's threads start, so that none of them takes what sigwait() waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    arn = new_key(kms(url))
    kms(url).create_alias(AliasName=alias, TargetKeyId=arn)
    print(url, arn, flush=True)
    signal.sigwait(stop)
    server.stop()


def rotate(url, alias):
    arn = new_key(kms(url))
    kms(url).update_alias(AliasName=alias, TargetKeyId=arn)
    print(arn)


if __name__ == "__main__":
    # Nothing of the caller's own AWS set-up, a profile for example, may lead elsewhere.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    {"serve": serve, "rotate": rotate}[sys.argv[1]](*sys.argv[2:])
