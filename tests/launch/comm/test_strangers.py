"""Another user of the same machine, who reads what everyone may and talks to every port, and gets nowhere."""

import base64
import os
import pickle
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from lockstep.comm.rendezvous import JOB_SECRET
from tests.launch.comm.test_elastic import HOSTS, SMALL, TRAIN, ElasticJob, elastic_job
from tests.launching import ENVIRONMENT, ROOT, across_nodes, launch, running, slowness
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
STRANGER = "setpriv --reuid 65534 --regid 65534 --clear-groups"
TOKEN = "a-token-that-nobody-else-may-read"
READ_COMMAND_LINES = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"
ANYWHERE = ("0.0.0.0", "::")
LONG = "--data.name synthetic --data.num_samples 640 --data.batch_size 16 --num_epochs 1000"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the owner's environment, as that of a logger would be."""
    monkeypatch.setitem(ENVIRONMENT, "WANDB_API_KEY", TOKEN)


def as_stranger(script: str) -> str:
    """What a line of bash says to another user."""
    finished = launch(f"{STRANGER} bash -c {shlex.quote(script)}", cwd=Path("/"))
    return finished.output


def request_as_stranger(port: int, method: str, path: str, body: str = "", header: str = "") -> str:
    """The first line of the answer."""
    lines = [f"{method} /{path} HTTP/1.1", "Host: me", f"Content-Length: {len(body)}", *([header] if header else [])]
    text = "\\r\\n".join(lines) + "\\r\\n\\r\\n" + body
    said = as_stranger(f"exec 3<>/dev/tcp/127.0.0.1/{port}; printf {shlex.quote(text)} >&3; cat <&3")
    print(f"{method} /{path}: {said.strip()}")
    return said.splitlines()[0].strip()


class _Harm:
    """What is unpickled to a command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def _attack(job: ElasticJob, folder: Path) -> None:
    """All that was once possible, and is refused."""
    _, pid = min(job.workers())
    variables = psutil.Process(pid).environ()
    secret, port = variables[JOB_SECRET], int(variables["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    assert variables["WANDB_API_KEY"] == TOKEN
    lines = as_stranger(READ_COMMAND_LINES)
    assert "train.py" in lines
    assert not [known for known in (TOKEN, secret, "HOROVOD_GLOO_RENDEZVOUS") if known in lines]
    refused = as_stranger(f"cat /proc/{pid}/environ")
    print(refused.strip())
    assert "Permission denied" in refused
    harm = base64.b64encode(pickle.dumps(_Harm(f"id > {folder}/owned"))).decode()
    host = variables["HOROVOD_HOSTNAME"]
    requests = [
        ("PUT", f"worker_addresses/{host}:0", harm),
        ("PUT", "lockstep/over", "5"),
        ("DELETE", "lockstep/here0", ""),
        ("GET", "hosts.sh", ""),
        ("GET", f"rank_and_size/{host}:0", ""),
        ("HEAD", "hosts.sh", ""),
        ("HEAD", "", ""),
    ]
    for method, path, body in requests:
        for header in ("", "Authorization: Bearer guessed"):
            assert request_as_stranger(port, method, path, body, header).split()[1] == "403"
    known = f"Authorization: Bearer {secret}"
    assert request_as_stranger(port, "GET", "lockstep/over", "", known).split()[1] == "404", "it has changed nothing"
    for method in ("HEAD", "POST"):
        assert request_as_stranger(port, method, "hosts.sh", "", known).split()[1] == "501", "no file, for nobody"
    assert not (folder / "owned").exists()


@pytest.mark.thorough
def test_an_elastic_job_is_its_owners_alone(tmp_path: Path) -> None:
    """Only on this machine does anything listen; and it loses a worker, and goes on."""
    with elastic_job(tmp_path, HOSTS, f"{SMALL} --num_epochs 1000", "--blacklist-cooldown-range 1 2") as job:
        job.wait_for_updates()
        found = _listeners(job.process)
        for _, description in sorted(found):
            print(f"elastic: {description}")
        assert {listener for listener, _ in found} == {("horovodrun", "loopback"), ("rank", "loopback")}
        _attack(job, tmp_path)
        secret = psutil.Process(min(job.workers())[1]).environ()[JOB_SECRET]
        os.kill(max(job.workers())[1], signal.SIGKILL)
        job.wait_until(lambda: len(job.generations) > 1)
        job.wait_for_updates()
        job.stop()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "environment.json" for path in written)
    assert not [path for path in written if secret.encode() in path.read_bytes() or TOKEN.encode() in path.read_bytes()]


@pytest.mark.thorough
@across_nodes
def test_ranks_on_two_nodes_get_their_environment_and_nobody_else(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Over ssh: as standard input."""
    ready = launch("env/run true", timeout_seconds=800)  # if anything is to be built, then not where no network is
    assert ready.returncode == 0, ready.output
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "value with a line").write_text("one's own\n$(id) `id`\n")
    over = shlex.quote(f"{tmp_path}/over")
    spy = f"while [ ! -e {over} ]; do {STRANGER} bash -c {shlex.quote(READ_COMMAND_LINES)}; sleep 0.1; done"
    program = (
        "import os, runpy, sys; assert os.environ['WANDB_API_KEY'] == open(sys.argv[1] + '/token').read(); "
        "assert os.environ['MANY_LINES'] + chr(10) == open(sys.argv[1] + '/value with a line').read(); "
        "sys.argv[1:2] = []; sys.path.insert(0, 'app'); runpy.run_path('app/train.py', run_name='__main__')"
    )
    settings = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1"
    folder = shlex.quote(str(tmp_path))
    # From the first node, since the launcher's networks are among those that all have in common.
    (tmp_path / "job.sh").write_text(
        f"export WANDB_API_KEY=$(<{folder}/token) MANY_LINES=\"$(<{folder}/'value with a line')\"\n"
        f"cd {shlex.quote(str(ROOT))} && exec env/run horovodrun --gloo -np 4 -H n1:2,n2:2 python -c "
        f"{shlex.quote(program)} {folder} {settings} --run_dir {folder}/run\n"
    )
    finished = slurm.run(
        f"({spy}) > {folder}/seen & code=0; ssh n1 bash {folder}/job.sh || code=$?; touch {over}; exit $code",
        ROOT,
        200,
    )
    assert finished.returncode == 0, finished.output
    assert "4 rank(s) on 2 node(s)" in finished.stdout
    seen = (tmp_path / "seen").read_text(errors="replace")
    assert " n2 " in seen
    assert not [name for name in (TOKEN, JOB_SECRET, "HOROVOD_GLOO_RENDEZVOUS", "WANDB_API_KEY=") if name in seen]
    probes = set(re.findall(r"-m horovod\.runner\.task_fn ([\w+/= ]*)", seen))
    assert probes, "it has asked both nodes for their networks"
    for argument in {word for probe in probes for word in probe.split()}:
        with suppress(ValueError):
            assert b"settings" not in base64.b64decode(argument), "the key of the probe is among them"


# -- what listens ------------------------------------------------------------------------------------------------------

PLAIN, MPI, GLOO = "python", "mpirun -np 2 python", "horovodrun --gloo -np 2 python"
Listener = tuple[str, str]  # whose it is; "loopback", or "anywhere"
# Whose, where it listens, and what asks: see docs/promises.md. A rank's sockets are MPI's and Gloo's.
ASKS = {
    ("horovodrun", "loopback"): "the secret of the job, in every request",
    ("mpirun", "loopback"): "PMIx: the user's id, which the kernel tells",
    ("mpirun", "anywhere"): "PRRTE: the name of the job; no secret",
    ("rank", "loopback"): "nothing: only this machine gets there (elastic: an HMAC of each message)",
    ("rank", "anywhere"): "nothing: MPI's data",
}
EXPECTED: dict[str, set[Listener]] = {
    PLAIN: set(),
    MPI: {("mpirun", "loopback"), ("mpirun", "anywhere"), ("rank", "anywhere")},
    "horovodrun -np 2 python": {("mpirun", "loopback"), ("mpirun", "anywhere"), ("rank", "anywhere")},
    GLOO: {("horovodrun", "loopback")},  # Gloo's own sockets listen only while the ranks meet
}


def _listeners(parent: psutil.Process) -> set[tuple[Listener, str]]:
    """Of a process and all below it, each with its address."""
    found = set()
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            who = "mpirun" if re.search(r"\b(mpirun|prterun|prted)\b", process.name()) else "rank"
            who = "horovodrun" if "horovodrun" in line and who != "mpirun" else who
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    where = "loopback" if re.match(r"127\.|::1$", socket.laddr.ip) else "anywhere"
                    found.add(((who, where), f"{who}: {socket.laddr.ip}"))
    return found


@contextmanager
def _job(command: str, folder: Path) -> Iterator[psutil.Process]:
    """A job that trains for as long as it is looked at."""
    with (folder / "said").open("w") as said:
        process = psutil.Popen(
            shlex.split(f"{command} {TRAIN} {LONG} --run_dir run"),
            cwd=folder,
            env={**ENVIRONMENT, "TMPDIR": str(folder / "temporary")},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        deadline = time.monotonic() + 120 * slowness()
        while not (folder / "run" / "metrics.jsonl").exists() or not (folder / "run" / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.1)
        yield process
    finally:
        for member in [*process.children(recursive=True), process] if process.is_running() else []:
            with suppress(psutil.Error):
                member.kill()
        process.wait(10)


@pytest.mark.parametrize(
    "command",
    [pytest.param(each, marks=[] if each == GLOO else pytest.mark.thorough) for each in EXPECTED],
)
def test_what_listens_is_known_and_temporary_files_are_ones_own(command: str, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with _job(command, tmp_path) as process:
        found = _listeners(process)
        for _, description in sorted(found):
            print(f"{command}: {description}")
        assert {listener for listener, _ in found} == EXPECTED[command]
        assert EXPECTED[command] <= ASKS.keys()
        open_to_others = [path for path in temporary.iterdir() if path.lstat().st_mode & 0o077]
        assert not open_to_others, "a file or folder that others can enter"
        ranks = running(process, ROOT / "app" / "train.py") or [process]
        mapped = {Path(file.path) for rank in ranks for file in rank.memory_maps() if "/dev/shm/" in file.path}
        shared = [path for path in mapped if path.exists() and path.stat().st_mode & 0o077]
        assert not shared, "shared memory that others can read"
