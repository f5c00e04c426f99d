"""Workers of Ray: their number, clusters that refuse, and Ray itself, where workers are killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest

from on_ray import NUM_ROWS, StandIn, journal, plain, read_parts, write_rows
from remora.config import PredictConfig
from remora.errors import ConfigError, ResourceError
from remora.serving import ray_workers
from service import write_adapter

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("runs") / "a", base, 1)


def test_the_number_of_workers_is_what_there_is_room_for(run: Path) -> None:
    ray = StandIn()

    def room(num_weights: int = 1000, **more: Any) -> Any:
        config = PredictConfig(run, "a.csv", output="o.csv", engine="ray", **more)
        return ray_workers.find_room(ray, config, num_weights)

    ray.resources = {"CPU": 16.0, "memory": 20e9}
    assert str(room()) == "4 workers, each with 4 cores"
    assert str(room(worker_cores=1)) == "16 workers, each with 1 core"
    assert str(room(workers=2)) == "2 workers, each with 4 cores"
    assert str(room(worker_cores=64)) == "1 worker, each with 16 cores"
    # 2 billion weights of 4 bytes, and 0.6 GB for each process
    assert room(2_000_000_000, precision="float32").num_workers == 2
    with pytest.raises(ResourceError, match=r"room for 2 of 3 workers, .* 8.60 GB of memory each"):
        room(2_000_000_000, precision="float32", workers=3)
    with pytest.raises(ResourceError, match=r"room for 0 of 1 workers, .*; give a smaller model"):
        room(6_000_000_000, precision="float32")
    ray.resources |= {"GPU": 2.0}
    assert str(room(6_000_000_000)) == "2 workers, each with a GPU"
    assert str(room(device="cpu")) == "4 workers, each with 4 cores"
    with pytest.raises(ResourceError, match=r"room for 2 of 3 workers, which need a GPU each"):
        room(device="cuda", workers=3)


def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "require", lambda: None)
    refused = pytest.raises(ConfigError, match=r"no Ray cluster answers at 127.0.0.1:1 .*--address")
    with refused, ray_workers.connected("127.0.0.1:1"):
        pass


@pytest.mark.parametrize(
    ("token", "said"), [(None, "asks for a token in"), ("b" * 64, "refuses the token in")]
)
def test_a_token_that_is_not_the_clusters(
    token: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray 2.60 writes that to standard error from C++, and raises that nothing answers."""

    def init(**_: Any) -> None:
        os.write(2, b"W gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken: missing\n")
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:6399")

    for name in ray_workers.TOKENS:
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setattr(ray_workers, "require", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        refused = pytest.raises(ConfigError, match=rf"{address} {said} RAY_AUTH_TOKEN; set RAY_A")
        with refused, ray_workers.connected(address):
            pass
    assert capfd.readouterr().err == ""


# By Ray itself

needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install 'remora[ray]'")


def command(run: Path, source: Path, out: Path, *more: str) -> list[str]:
    given = ["predict", str(run), str(source), "--engine", "ray", "--output", str(out)]
    return [sys.executable, "-m", "remora", *given, "--device", "cpu", "--worker-cores", "1", *more]


@needs_ray
def test_workers_of_ray_give_the_rows_of_predict(run: Path, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "a.csv"), tmp_path / "out.csv"
    done = subprocess.run(
        command(run, source, out, "--workers", "1"), capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "600 rows in 1 part in" in done.stderr
    assert read_parts(out) == plain(run, source, tmp_path)


def ray_processes(driver: int, what: str) -> list[int]:
    import psutil

    return [
        each.pid
        for each in psutil.Process(driver).children(recursive=True)
        if what in " ".join(each.cmdline())
    ]


def wait_for_parts(out: Path, number: int) -> None:
    until = time.monotonic() + 300
    while len(list(out.glob("part-*.csv"))) < number and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list(out.glob("part-*.csv"))) >= number


@needs_ray
@pytest.mark.durability
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_every_row_is_there_once_after_sigkill_of_a_worker_and_of_the_driver(
    run: Path, tmp_path: Path
) -> None:
    import psutil

    num_rows = 20_000
    source, out = write_rows(tmp_path / "a.csv", num_rows=num_rows), tmp_path / "out.csv"
    expected = plain(run, source, tmp_path)
    more = ("--workers", "2", "--part-rows", "1000")

    with subprocess.Popen(command(run, source, out, *more), stderr=subprocess.PIPE) as first:
        wait_for_parts(out, 2)
        worker = ray_processes(first.pid, "ray::_Actor")[0]
        os.kill(worker, signal.SIGKILL)
        wait_for_parts(out, 5)
        left = [psutil.Process(pid) for pid in ray_processes(first.pid, "ray::_Actor")]
        os.kill(first.pid, signal.SIGKILL)
        assert first.stderr is not None
        assert b"a worker died; another takes over its rows" in first.stderr.read()
    gone, alive = psutil.wait_procs(left, timeout=60)
    assert gone
    assert not alive  # no worker outlives its driver
    assert not journal(out)["finished"]
    num_before = len(journal(out)["parts"])
    again = subprocess.run(
        command(run, source, out, *more), capture_output=True, text=True, check=True
    )
    assert f"rows in {num_before} parts are there already; resuming after them" in again.stderr
    assert read_parts(out) == expected
    assert sorted(int(row[0]) for row in expected[1:]) == list(range(num_rows))


LISTENS = """
import socket, time
while True:
    try:
        socket.create_connection(("10.77.0.1", 6399)).close()
        break
    except OSError:
        time.sleep(0.2)
"""
HAS_TWO_HOSTS = """
import sys, time, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""


def start_host(name: str, number: int, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start Ray in a network namespace; it needs a short folder, since sockets are in it."""
    given = ["--block", "--num-cpus", "1", "--memory", "2000000000", *more]
    given += ["--object-store-memory", "80000000", "--temp-dir", str(folder)]
    given += ["--node-ip-address", f"10.77.0.{number + 1}"]
    line = [str(Path(sys.executable).with_name("ray")), "start", *given]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def stop_host(host: subprocess.Popen[bytes]) -> None:
    """Kill what was started; Ray itself would wait for half a minute."""
    import psutil

    for each in [*psutil.Process(host.pid).children(recursive=True), host]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    host.wait()


@needs_ray
@pytest.mark.durability
def test_every_row_is_there_once_when_a_worker_on_another_host_is_killed(
    run: Path, tmp_path: Path, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default they get what others leave
    num_rows = 12_000  # some seconds' work
    source, out = write_rows(tmp_path / "a.csv", num_rows=num_rows), tmp_path / "out.csv"
    expected = plain(run, source, tmp_path)
    address = "10.77.0.1:6399"
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    in_first = ["ip", "netns", "exec", hosts[0]]
    started = [
        start_host(
            hosts[0], 0, folder / "0", "--head", "--port", "6399", "--include-dashboard", "false"
        ),
    ]
    try:
        subprocess.run([*in_first, sys.executable, "-c", LISTENS], check=True, timeout=120)
        started.append(start_host(hosts[1], 1, folder / "1", "--address", address))
        both = [*in_first, sys.executable, "-c", HAS_TWO_HOSTS, address]
        subprocess.run(both, check=True, timeout=120, stderr=subprocess.DEVNULL)
        more = ("--address", address, "--workers", "2", "--part-rows", "256")
        line = [*in_first, *command(run, source, out, *more)]
        with subprocess.Popen(line, stderr=subprocess.PIPE) as predicting:
            wait_for_parts(out, 1)
            here, there = (ray_processes(host.pid, "ray::_Actor") for host in started)
            assert len(here) == len(there) == 1
            os.kill(there[0], signal.SIGKILL)
            assert predicting.stderr is not None
            told = predicting.stderr.read().decode()
        assert predicting.returncode == 0, told
        assert told.count("a worker died; another takes over its rows") == 1
    finally:
        for host in started:
            stop_host(host)
        shutil.rmtree(folder, ignore_errors=True)
    assert read_parts(out) == expected


@needs_ray
@pytest.mark.durability
def test_ray_data_maps_batches_by_the_predictor(run: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.csv")
    code = f"""
import ray, remora
ray.init(address="local", include_dashboard=False, num_cpus=2)
ray.data.read_csv({str(source)!r}).map_batches(
    remora.Predictor, fn_constructor_args=({str(run)!r},),
    fn_constructor_kwargs={{"device": "cpu", "precision": "float32"}}, batch_size=64,
    compute=ray.data.ActorPoolStrategy(size=1),
).write_parquet({str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    every = plain(run, source, tmp_path, "--precision", "float32")
    expected = {row[0]: row for row in every[1:]}
    assert len(found) == len(expected) == NUM_ROWS
    for row in found:
        _, _, _, label, probability = expected[str(row["id"])]
        assert (row["label"] or "") == label
        assert not label or row["probability"] == pytest.approx(float(probability), abs=0.01)
