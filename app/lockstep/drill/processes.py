"""Which processes of a job are left on this node: `python -m lockstep.drill.processes WORD` prints those whose command
line has WORD in it, one a line, with the node. Needs nothing but psutil, and can be started under any launcher.
"""

import os
import platform
import sys

import psutil

PROGRAM = "lockstep.drill.processes"


def left_behind(word: str) -> list[str]:
    """Node, process and command line of what still runs here and has `word` in its command line; not this program, nor
    the launcher that started it.
    """
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        mine = process.info["pid"] == os.getpid() or PROGRAM in command
        if word in command and not mine and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{platform.node()} {process.info['pid']} {command[:120]}")
    return found


if __name__ == "__main__":
    print(*left_behind(sys.argv[1]), sep="\n")
