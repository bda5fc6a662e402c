"""A real S3 server (moto's) on a port of its own, for tests that save to one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

BUCKET = "bucket"


@contextlib.contextmanager
def serve() -> Iterator[dict[str, str]]:
    """The server while the context lasts, with an empty bucket: the environment of a process that talks to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="key",
                     aws_secret_access_key="secret", region_name="us-east-1").create_bucket(Bucket=BUCKET)  # fmt: skip
        yield environment
    finally:
        server.stop()
