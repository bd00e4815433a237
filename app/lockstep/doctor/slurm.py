"""What Slurm says of this job and of itself."""

import subprocess

from lockstep.doctor.commands import output_of, output_or_nothing
from lockstep.doctor.facts import Slurm, Unknown


def ask_slurm(job: str) -> Slurm | Unknown:
    try:
        about_job = parse_words(output_of(("scontrol", "--oneliner", "show", "job", job)))
        partition = parse_words(output_of(("scontrol", "--oneliner", "show", "partition", about_job["Partition"])))
        config = parse_lines(output_of(("scontrol", "show", "config")))
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        return Unknown(f"scontrol fails: {error}")
    script = output_or_nothing(("scontrol", "write", "batch_script", job, "-"))
    return Slurm(about_job, config, partition, script, parse_mpi_types(output_or_nothing(("srun", "--mpi=list"))))


def parse_words(line: str) -> dict[str, str]:
    """What `scontrol --oneliner show` says: `A=1 B=2`, where a value may have blanks in it."""
    pairs: dict[str, str] = {}
    last = ""
    for word in line.split():
        name, equals, value = word.partition("=")
        if equals and name[:1].isupper():
            last = name
            pairs[name] = value
        elif last:
            pairs[last] += f" {word}"
    return pairs


def parse_lines(text: str) -> dict[str, str]:
    """What `scontrol show config` says: `A   = 1` on each line."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_mpi_types(text: str) -> list[str]:
    """What `srun --mpi=list` says: a heading, then a name on each line; in newer versions another heading follows."""
    lines = [line.split() for line in text.splitlines()]
    return [words[0] for words in lines if len(words) == 1]
