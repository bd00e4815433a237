"""The command `lockstep COMMAND ...`; `python -m lockstep COMMAND ...` is the same."""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "train": "train over every rank of the job, then merge the model on rank 0",
    "evaluate": "score the merged model of a run, alone or over ranks",
    "merge": "merge a checkpoint into one file, offline",
    "export": "write the merged model as torch.export and ONNX",
    "verify": "check checkpoints and ledger; --resume: certify that a killed run is one that never stopped",
    "report": "put runs on one page; --table: many runs in a table",
    "postmortem": "tell what each rank of a run was doing when it was last heard of",
    "doctor": "look at this machine, or at every node of a job, for what would spoil a training",
    "drill": "inject real faults into real jobs, and tell what came of each",
    "benchmark": "measure speed beside the limit and beside peers",
}
USAGE = "usage: lockstep COMMAND ...\n\n" + "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())
PROGRAMS = str(Path(__file__).parents[1])
EXIT_USAGE = 2  # as ExitCode.SETTINGS; `lockstep --help` needs this file alone


def main(command: str | None = None) -> None:
    """Run `command`, or the one that the command line names first; the rest of the command line is for it."""
    put_programs_last()
    arguments = sys.argv[1:]
    if command is None:
        command, arguments = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if command in ("-h", "--help"):
            print(USAGE + "\n\nEach tells more with --help.")
            return
        if command not in COMMANDS:
            print(f"lockstep: there is no command {command!r}\n{USAGE}", file=sys.stderr)
            sys.exit(EXIT_USAGE)
        sys.argv[:] = [f"lockstep {command}", *arguments]
    import_module(f"lockstep.commands.{command}").main()


def old_program(command: str) -> None:
    """Run `command` for someone who has typed `python app/COMMAND.py`, and say what to type from now on."""
    from lockstep.runtime.launcher import this_process_reports

    if this_process_reports():
        old = Path(sys.argv[0]).name
        print(f"lockstep: python app/{old} is now `lockstep {command}`; the old one goes soon", file=sys.stderr)
    main(command)


def put_programs_last() -> None:
    """Take the folder of this program, or with `-m` the working folder, from the head of `sys.path`.

    Nothing in it then hides a module of the standard library or of an installed package; the programs beside this
    package (train, report, ...) hide no module of a user's own, which comes before them (runtime/importing.py).
    """
    if not sys.flags.safe_path:
        sys.path.pop(0)
    if PROGRAMS not in sys.path:
        sys.path.append(PROGRAMS)


if __name__ == "__main__":
    main()
