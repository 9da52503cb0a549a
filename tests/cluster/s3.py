"""A real S3 server, SeaweedFS, that can be killed and started again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import free_port

KEY, SECRET, BUCKET = "planted-key", "planted-secret-of-s3", "rotssl"
PORTS = ("master", "volume", "filer", "s3", "master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")
PORTS += ("s3.port.iceberg", "s3.port.lance")


def program():
    """Path of the server's program, or None."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class Server:
    """A server with one bucket, whose objects outlive it.

    Args:
        folder: for its files.
    """

    def __init__(self, folder):
        self.folder, self.process = folder, None
        self.ports = {name: free_port() for name in PORTS}
        rights = ["Admin", "Read", "List", "Tagging", "Write"]
        user = {"name": "tester", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": rights}
        (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
        (folder / "data").mkdir()
        self.env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}

    def address(self, name):
        """The address of a prefix of the bucket."""
        return f"s3://{BUCKET}/{name}?endpoint_override=127.0.0.1:{self.ports['s3']}&scheme=http"

    def start(self):
        """Start it, and wait until it answers."""
        ports = [f"-{name if 'port' in name else f'{name}.port'}={port}" for name, port in self.ports.items()]
        command = [program(), "-logtostderr", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *ports]
        command += [f"-dir={self.folder}/data", f"-s3.config={self.folder}/s3.json", "-volume.max=20"]
        command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.2)

    def _answers(self):
        from pyarrow import fs

        where = f"127.0.0.1:{self.ports['s3']}"
        login = {"access_key": KEY, "secret_key": SECRET, "region": "us-east-1"}
        system = fs.S3FileSystem(**login, endpoint_override=where, scheme="http", allow_bucket_creation=True)
        with contextlib.suppress(OSError):
            system.create_dir(BUCKET)
            with system.open_output_stream(f"{BUCKET}/ready") as stream:  # the volumes come last
                stream.write(b"x")
            return True
        return False

    def kill(self):
        """End it as a loss of power does."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
