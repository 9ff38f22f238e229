"""Run a program that a model wrote: in another process, with limits to time and memory, without files to write.

This keeps accidents out, not attackers: the program may read what the user may read and may use the network. Score models that you
do not trust on a machine that you can lose.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
SUCCESS = 77  # only a program that reaches its end exits so: exit(0) halfway is no success
_CHILD = f"""
import os, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
source = sys.stdin.read()
for what, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (limit, limit))
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
os._exit({SUCCESS})
"""


def code_of(output: str) -> str:
    """The program in a model's answer: its last fenced block, or all of it."""
    blocks = FENCE.findall(output)
    return blocks[-1] if blocks else output


def passes(program: str, seconds: int = 10, memory: int = 1 << 30) -> bool:
    """Whether a program runs to its end without an error.

    Args:
        seconds: of processor time, and of time on the clock.
        memory: bytes of address space.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(seconds), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(program.encode(), timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what the program started
        return child.wait() == SUCCESS
