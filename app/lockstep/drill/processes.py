"""Find a job's processes that still run on this node: `python -m lockstep.drill.processes TEXT`.

It prints one line for each process whose command line contains TEXT: node, id, command. It imports nothing but psutil,
and can be started under any launcher.
"""

import os
import platform
import sys

import psutil

PROGRAM = "lockstep.drill.processes"


def running_processes(text: str) -> list[str]:
    """Node, process id and command line of every process here whose command line contains `text`.

    This program and the launcher that started it are left out.
    """
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        is_own = process.info["pid"] == os.getpid() or PROGRAM in command
        if text in command and not is_own and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{platform.node()} {process.info['pid']} {command[:120]}")
    return found


if __name__ == "__main__":
    print(*running_processes(sys.argv[1]), sep="\n")
