"""A process that has imported PyTorch once and forks for every script that is to be run in processes of its own.

python -m tests.harness.forking, then a line of JSON for each group: the arguments of `python`, folders to import from,
where to stand, and for each process its environment and what the names of the two files for what it writes begin with.
It answers with a line, the exit status of each.
"""

import json
import os
import runpy
import sys
import traceback
from typing import Any

import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import atma.train.loop  # noqa: F401


def run(arguments: list[str]) -> int:
    """As `python ARGUMENTS` does: a script, or a module after "-m", or code after "-c"."""
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(job: dict[str, Any], environment: dict[str, str], written: str) -> int:
    """The number of a new process that runs the script of a job."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(os.devnull) as nothing, open(f"{written}.out", "wb") as out, open(f"{written}.err", "wb") as err:
            for number, file in enumerate((nothing, out, err)):
                os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(job["where"])
        sys.path[:0] = job["paths"]
        status = run(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        children = [forked(job, *one) for one in zip(job["environments"], job["written"], strict=True)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()
