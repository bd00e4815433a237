"""Runs a command on two simulated nodes of this machine, connected only by a link of known speed.

    env/run lockstep benchmark two_nodes --rate 1gbit -- lockstep benchmark comm --link_gbits 1

starts `mpirun` on node0 and one rank of the command on each of node0 and node1. A node has its own network, host name,
shared memory and temporary folder (`/dev/shm`), and half of the cores, so MPI and Horovod treat it as another machine.
The link is a pair of virtual network cards, each of which sends at `--rate`; a node has no other network. The file
system, the environment and the working directory are this machine's.

It ends with the command's exit code, with 2 if the nodes cannot be created, or with 124 at the timeout. Nothing is left
behind, even if this program is killed: everything runs in one PID namespace, which the kernel ends together with its
process 1 (KEEP_NODE on node1). Nothing has a name outside of it, so that several runs do not collide.

With a command that ends within a few milliseconds, such as `true`, Open MPI may wait until the timeout. Its warning
`setpgid ... failed in parent` is harmless: the daemon on node1 has started early.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from lockstep.runtime.command_line import command_parser

TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv", "taskset", "mpirun")
CLONE_NEWPID = 0x20000000  # linux/sched.h; os.unshare needs Python 3.12
GRACE_SECONDS = 5
EXIT_TIMEOUT = 124  # that of `timeout`

# Called by mpirun instead of ssh, as `AGENT node1 COMMAND...`. Process 1 is on node1. nsenter changes the directory.
AGENT = """#!/bin/sh
shift
exec nsenter --target 1 --net --uts --ipc --mount \
    sh -c 'cd "$0" && exec taskset --cpu-list "$TWO_NODES_CORES_1" sh -c "$*"' "$PWD" "$@"
"""

# Sets up a node in its namespaces; $0 is its name. The agent is on both: Open MPI's daemon on node1 crashes without it.
MAKE_NODE = """
set -e
trap 'echo "two_nodes: cannot make the nodes: see the message above" >&2; exit 2' EXIT
hostname "$0"
mount -t tmpfs two_nodes /dev/shm
printf '127.0.0.1 localhost\\n10.0.0.1 node0\\n10.0.0.2 node1\\n' > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
printf %s "$TWO_NODES_AGENT" > "$PRTE_MCA_plm_ssh_agent"
chmod +x "$PRTE_MCA_plm_ssh_agent"
ip link set lo up
"""

# Reports that node1 is set up, then keeps its namespaces alive.
KEEP_NODE = "echo made; exec sleep infinity"

# On node0, after node1 is set up: connects both, then becomes mpirun. Packets of up to 64 kB reach tbf in one piece and
# are segmented by the card, so a burst of 128 kB lets two of them pass at once. A queue of 20 ms holds all that TCP
# hands to its own card (with 5 ms some packets are dropped, which no real card does).
JOIN_NODES = """
in_node1() { nsenter --target 1 --net "$@"; }
ip link add eth0 type veth peer name eth0 netns 1
ip addr add 10.0.0.1/24 dev eth0
in_node1 ip addr add 10.0.0.2/24 dev eth0
for node in '' in_node1; do
    $node tc qdisc add dev eth0 root tbf rate "$TWO_NODES_RATE" burst 128kb latency 20ms
    $node ip link set eth0 up
done
exec taskset --cpu-list "$TWO_NODES_CORES_0" "$@"
"""


def main(arguments: Sequence[str]) -> None:
    options = parse_options(arguments)
    check_machine()
    # From here on, every child of this process is in a new PID namespace, with the first one as process 1.
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID):
        reason = os.strerror(ctypes.get_errno())
        fail(f"cannot create a PID namespace ({reason}): run it on the machine itself or in a privileged container")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        sys.exit(run(options.rate, options.ranks_per_node, options.timeout, options.command))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("benchmark two_nodes", __doc__)
    parser.usage = "lockstep benchmark two_nodes [OPTION...] -- COMMAND [ARGUMENT...]"
    parser.add_argument("--rate", default="1gbit", help="of the link, in units of tc (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=600, help="in seconds (default: %(default)s)")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    return parser.parse_args(arguments)


def check_machine() -> None:
    """Exit with a message if this machine cannot simulate nodes."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        fail("only root can create network namespaces: run it as root, or in a privileged container")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        fail(f"not found: {', '.join(missing)}; start it with env/run, and install iproute2 and util-linux")


def run(rate: str, ranks_per_node: int, timeout: float, command: list[str]) -> int:
    """Create the nodes, run the command on them and end both; return the command's exit code."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    half = len(cores) // 2
    settings = {
        "TWO_NODES_RATE": rate,
        "TWO_NODES_CORES_0": ",".join(cores[:half] or cores),
        "TWO_NODES_CORES_1": ",".join(cores[half : 2 * half] or cores),
        "TWO_NODES_AGENT": AGENT,
        "TMPDIR": "/dev/shm",
        "PRTE_MCA_plm_ssh_agent": "/dev/shm/two_nodes_agent",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "self,sm,tcp",
        "OMPI_MCA_btl_tcp_if_include": "eth0",
    }
    os.environ.update(settings)
    mpirun = ["mpirun", "--host", f"node0:{ranks_per_node},node1:{ranks_per_node}", "-np", str(2 * ranks_per_node)]
    mpirun += ["--bind-to", "none"]  # ranks inherit the cores of their node
    with start_node("node1", KEEP_NODE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as node1:
        try:
            assert node1.stdout
            if not node1.stdout.readline():
                return 2
            node0 = start_node("node0", JOIN_NODES, *mpirun, *command)
            try:
                code = node0.wait(timeout)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                print(f"two_nodes: stopped after {timeout:g} s; --timeout allows more", file=sys.stderr)
                return EXIT_TIMEOUT
            finally:
                end(node0)
        finally:
            node1.kill()


def start_node(
    name: str, script: str, *arguments: str, stdin: int | None = None, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that sets up a node in its own namespaces, then runs `script`; it dies with this process."""
    inside = ["unshare", "--net", "--uts", "--ipc", "--mount", "--mount-proc", "sh", "-c", MAKE_NODE + script, name]
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *inside, *arguments], stdin=stdin, stdout=stdout)


def end(mpirun: subprocess.Popen[bytes]) -> None:
    """End mpirun with its ranks, if it still runs. Any process left ends with node1."""
    mpirun.terminate()
    try:
        mpirun.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        mpirun.kill()


def stop(signal_number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + signal_number)


def fail(reason: str) -> NoReturn:
    print(f"two_nodes: {reason}", file=sys.stderr)
    sys.exit(2)
