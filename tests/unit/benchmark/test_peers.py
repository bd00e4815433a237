"""Starting peers in turn and comparing them, with tiny commands in their place."""

import math
import os
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from lockstep.benchmark.launching import Ratio, measure_peers, summarise
from lockstep.benchmark.peer_commands import Peer, peers

DEFAULTS = {
    "LOCKSTEP_DEFAULTS": " OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM OMPI_MCA_rmaps_base_oversubscribe"
    " PRTE_MCA_rmaps_default_mapping_policy OMPI_MCA_mpi_yield_when_idle"
}
OVERSUBSCRIBE = {"OMPI_MCA_rmaps_base_oversubscribe", "PRTE_MCA_rmaps_default_mapping_policy"}
YIELD = "OMPI_MCA_mpi_yield_when_idle"
REPORT = """print('{"images_per_second": 100.0}')"""


def _python(code: str, name: str = "a peer", num_copies: int = 1, **environment: str | None) -> Peer:
    return Peer(name, (sys.executable, "-c", code), environment, num_copies)


def _measure(
    *competitors: Peer, num_rounds: int = 1, timeout_seconds: float = 30
) -> tuple[Mapping[str, list[float]], str]:
    """The rates, and all that was said."""
    said: list[str] = []
    rates = measure_peers(competitors, num_rounds, said.append, timeout_seconds)
    return rates, "\n".join(said)


def _runs(pid: int) -> bool:
    """Not so a process that has ended, which an init that is slow to notice still lists."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_peers_take_turns_in_an_order_that_rotates(tmp_path: Path) -> None:
    order = tmp_path / "order"
    competitors = [_python(f"open({str(order)!r}, 'a').write({name!r})\n{REPORT}", name) for name in "abc"]
    rates, said = _measure(*competitors, num_rounds=4)
    assert order.read_text() == "abcbcacababc"
    assert rates == {name: [100.0] * 4 for name in "abc"}
    assert "round 2 of 4: c: 100 images/s" in said


def test_a_result_is_found_behind_a_launchers_tag() -> None:
    code = """print("Hello {"); print('[1,0]<stdout>: {"images_per_second": 7.5, "num_ranks": 2}')"""
    assert _measure(_python(code))[0] == {"a peer": [7.5]}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; print('first words'); sys.exit('last words')", "it ended with exit code 1"),
        ("import os; print('first words', flush=True); os.kill(os.getpid(), 9)", "it ended with signal 9"),
        ("print('first words')", "it printed 0 results where one is expected"),
        (f"print('first words'); {REPORT}; {REPORT}", "it printed 2 results where one is expected"),
        ("print('first words', '\"images_per_second\"')", "its result cannot be read"),
        ("print('first words', '{\"images_per_second\": NaN}')", "its result is nan images/s"),
    ],
)
def test_a_peer_that_fails_is_told_once_and_drops_out(code: str, why: str) -> None:
    rates, said = _measure(_python(code, "the broken"), _python(REPORT, "the sound"), num_rounds=2)
    assert rates == {"the broken": [], "the sound": [100.0, 100.0]}
    assert said.count("the broken drops out: ") == said.count("the broken") == 1
    assert why in said
    assert "    | first words" in said
    assert "last words" in said or "last words" not in code
    assert [row.name for row in summarise(rates)] == ["the sound"]


def test_a_command_that_does_not_exist_says_how_to_get_it() -> None:
    rates, said = _measure(Peer("a peer", ("no-such-launcher",)))
    assert rates == {"a peer": []}
    assert "no-such-launcher" in said
    assert "env/run" in said


def test_a_peer_that_does_not_end_is_killed_with_its_whole_family(tmp_path: Path) -> None:
    """A child that defies SIGTERM, and an orphan in a session of its own, as launchers make them."""
    sleep = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    family = tmp_path / "family"
    code = f"""
import subprocess, sys, time
with open({str(family)!r}, "w") as output:
    child = [sys.executable, "-c", {sleep!r}]
    subprocess.Popen(child, stdout=output)
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    subprocess.run([sys.executable, "-c", parent, *child], stdout=output)
print("I wait", flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    rates, said = _measure(_python(code), timeout_seconds=2)
    assert rates == {"a peer": []}
    assert "it did not end in 2 s" in said
    assert "    | I wait" in said
    assert time.monotonic() - started < 20
    members = [int(line) for line in family.read_text().split()]
    assert len(members) == 2
    assert not any(map(_runs, members))


def test_what_a_peer_leaves_behind_does_not_run_beside_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / "left"
    sleeper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL)"
    code = f"import subprocess, sys\nopen({str(left)!r}, 'w').write(str({sleeper}.pid))\n{REPORT}"
    assert _measure(_python(code))[0] == {"a peer": [100.0]}
    assert not _runs(int(left.read_text()))


def test_copies_run_at_once_know_their_place_and_are_added(tmp_path: Path) -> None:
    """Each waits for the other's file, so that they could not end one after the other."""
    code = f"""
import json, os, pathlib, time
rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
folder = pathlib.Path({str(tmp_path)!r})
(folder / str(rank)).touch()
while len(list(folder.iterdir())) < size:
    time.sleep(0.01)
print(json.dumps({{"images_per_second": 10.0 ** rank}}))
"""
    assert _measure(_python(code, num_copies=3))[0] == {"a peer": [111.0]}


def test_a_copy_that_fails_ends_all_copies() -> None:
    code = "import os, sys, time; sys.exit('mine alone') if os.environ['LOCAL_RANK'] == '0' else time.sleep(60)"
    rates, said = _measure(_python(code, num_copies=2))
    assert rates == {"a peer": []}
    assert said.count("mine alone") == 2  # in the command and in the output


def test_a_peer_has_the_environment_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TEST_GONE", "1")
    monkeypatch.setenv("LOCKSTEP_TEST_KEPT", "2")
    expected = {"LOCKSTEP_TEST_KEPT": "2", "LOCKSTEP_TEST_NEW": "3"}
    code = f"""
import os
assert {{name: value for name, value in os.environ.items() if name.startswith("LOCKSTEP_TEST")}} == {expected!r}
{REPORT}"""
    rates, said = _measure(_python(code, LOCKSTEP_TEST_GONE=None, LOCKSTEP_TEST_NEW="3"))
    assert rates == {"a peer": [100.0]}, said
    assert os.environ["LOCKSTEP_TEST_GONE"] == "1"


def test_peers_as_written_run_without_the_environments_settings_and_pinned_ones_yield() -> None:
    environments = {peer.name: peer.environment for peer in peers(2, num_cores=2, environment=DEFAULTS)}
    unset = {name for name, value in environments["Horovod example"].items() if value is None}
    assert unset == {*OVERSUBSCRIBE, YIELD}
    assert environments["Horovod example, pinned"][YIELD] == "1"
    assert None not in environments["Lockstep"].values()


def test_more_ranks_than_cores_keep_what_lets_them_start() -> None:
    environments = {peer.name: peer.environment for peer in peers(4, num_cores=2, environment=DEFAULTS)}
    unset = {name for name, value in environments["Horovod example"].items() if value is None}
    assert unset == {YIELD}


def test_every_peer_can_be_started_on_any_number_of_ranks() -> None:
    for peer in peers(3, num_cores=4, environment={}, launcher="mpirun -np {ranks}"):
        assert not [part for part in peer.command if "{" in part]
        assert all(find_spec(part) for part in peer.command if part.startswith("lockstep."))
        assert (peer.num_copies == 3) == ("never talk" in peer.name)


def test_a_row_has_the_median_and_the_ratio_within_the_rounds() -> None:
    """The machine halves its speed in the second round: the ratios do not see it, the medians' ratio would."""
    rates = {
        "Lockstep": [200.0, 100.0, 220.0],
        "Lockstep, bf16": [400.0, 150.0, 330.0],
        "Lockstep, one rank": [110.0, 55.0],
        "PyTorch DDP (gloo)": [100.0, 50.0, 100.0],
        "plain PyTorch, one process": [100.0, 50.0, 90.0],
        "plain PyTorch, one process, pinned": [110.0],
        "gone": [],
    }
    rows = {row.name: row for row in summarise(rates)}
    assert list(rows) == list(rates)[:-1]
    assert (rows["Lockstep"].median, rows["Lockstep"].lowest, rows["Lockstep"].highest) == (200.0, 100.0, 220.0)
    assert (rows["Lockstep"].num_rounds, rows["Lockstep, one rank"].num_rounds) == (3, 2)
    assert rows["Lockstep"].ratio is rows["Lockstep, one rank"].ratio is None
    assert rows["PyTorch DDP (gloo)"].ratio == Ratio("Lockstep", "PyTorch DDP (gloo)", 2.0, 2.0, 2.2)
    assert rows["Lockstep, bf16"].ratio == Ratio("Lockstep, bf16", "Lockstep", 1.5, 1.5, 2.0)
    alone = rows["plain PyTorch, one process"].ratio
    assert alone is not None
    assert (alone.of, alone.to) == ("Lockstep, one rank", "plain PyTorch, one process")
    assert math.isclose(alone.median, 1.1)
    assert rows["plain PyTorch, one process, pinned"].ratio == Ratio(
        "Lockstep, one rank", "plain PyTorch, one process, pinned", 1.0, 1.0, 1.0
    )


def test_without_lockstep_there_are_no_ratios() -> None:
    (row,) = summarise({"Lockstep": [], "PyTorch DDP (gloo)": [3.0, 1.0]})
    assert (row.median, row.ratio) == (2.0, None)
