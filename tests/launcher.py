"""Runs of the scripts in processes of their own, without the seconds that each of them would spend on imports.

One process imports a script and does nothing else but fork: every child is a real process, with its own signals,
limits and exit code, that executes the script's own `if __name__ == "__main__":` block. `Launcher` is the tests' side.
"""

import ast
import atexit
import contextlib
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# What a script imports later than its module does; not huggingface_hub, which reads the environment at that time.
IMPORTED = {"distill_training": (), "data": ("pandas.util", "pyarrow.csv", "pyarrow.dataset", "pyarrow.json", "tqdm")}


class Run:
    """One run, of one process or of several ranks, all of one process group. Every rank has a log of its own."""

    def __init__(self, launcher: "Launcher", pids: list[int], logs: list[Path]) -> None:
        self.launcher, self.pids, self.logs = launcher, pids, logs

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def steps(self, rank: int = 0) -> int:
        """Optimiser steps taken, as the progress bar shows them."""
        return max([0, *(int(step) for step in re.findall(r"\| *(\d+)/\d+ \[", self.log(rank)))])

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """What `condition` gives as soon as it is true; an error where the run ends before, with its log."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > deadline or self.codes() != [None] * len(self.pids):
                found = condition()
                assert found, f"{self.codes()}\n" + "\n".join(self.log(rank)[-3000:] for rank in range(len(self.pids)))
                return found
            time.sleep(0.005)
        return found

    def codes(self) -> list[int | None]:
        """The exit code of every rank: None where it runs, -N where signal N ended it."""
        return self.launcher.ask("codes", pids=self.pids)

    def wait(self, timeout: float = 120) -> list[int]:
        deadline = time.monotonic() + timeout
        while None in (codes := self.codes()):
            if time.monotonic() > deadline:
                self.kill_group()
                raise AssertionError(f"still running after {timeout} s: {codes}\n{self.log()[-3000:]}")
            time.sleep(0.02)
        return codes

    def kill(self, number: int = signal.SIGKILL, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)  # still a child, be it a dead one: its number is not given to another

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """To all ranks and all their workers, as Ctrl-C or a scheduler does."""
        os.killpg(self.pids[0], number)

    def group_is_gone(self) -> bool:
        try:
            os.killpg(self.pids[0], 0)
        except ProcessLookupError:
            return True
        return False


class Launcher:
    def __init__(self, script: str = "distill_training") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.started: list[Run] = []

    def ask(self, name: str, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps({"name": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        flags: Sequence[str],
        log: Path,
        *,
        ranks: int = 1,
        before: str = "",
        out: str = "",
        **environment: object,
    ) -> Run:
        """Run the script with `flags`. `before` is Python code that each child executes first; it knows `dt`.

        Standard output goes to the log too, or to the file `out`. More ranks than one find each other as under
        `torch.distributed.run`.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        logs = [log.with_name(f"{log.name}-{rank}") for rank in range(ranks)]
        shared = {}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {key: str(value) for key, value in environment.items()}
        for path in logs:
            path.write_bytes(b"")
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        children = [
            {"argv": list(flags), "log": str(path), "environment": shared | extra, "before": before, "out": out}
            for path, extra in zip(logs, own, strict=True)
        ]
        run = Run(self, self.ask("start", children=children), logs)
        self.started.append(run)
        return run

    def finish(self, flags: Sequence[object], log: Path, **settings: object) -> subprocess.CompletedProcess[str]:
        """`start`, and wait for its end: what it wrote is `stderr`, and `stdout` what went to `out`."""
        run = self.start([str(flag) for flag in flags], log, **settings)
        code, out = run.wait(300)[0], settings.get("out")
        stdout = Path(out).read_text(errors="replace") if out else None
        return subprocess.CompletedProcess(flags, code, stdout=stdout, stderr=run.log())

    def close(self) -> None:
        for run in self.started:
            if None in run.codes():
                with contextlib.suppress(ProcessLookupError):
                    run.kill_group()
        self.process.stdin.close()
        self.process.wait()


def run_child(script: Any, child: dict[str, Any], group: int) -> NoReturn:
    """In the child: become a run of the script, a module."""
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptors = [os.open(child["out"] or child["log"], append), os.open(child["log"], append)]
    for target, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors]):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.update(child["environment"])
    sys.argv = [script.__file__, *child["argv"]]
    code = 0
    try:
        exec(child["before"], {"dt": script, "__name__": "before"})
        last = ast.parse(Path(script.__file__).read_text()).body[-1]
        assert isinstance(last, ast.If)
        exec(compile(ast.Module(last.body, []), script.__file__, "exec"), vars(script))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking the interpreter apart would take longer than the run


def serve() -> None:
    """Fork a child for every request, until the tests close the pipe."""
    sys.path[:0] = [str(ROOT)]
    script = importlib.import_module(sys.argv[1])  # what takes so long
    for name in IMPORTED[sys.argv[1]]:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        script.PATH_STEPS = 12  # as in conftest.py
        sys.modules["datasets"].config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # as in conftest.py
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    codes: dict[int, int | None] = {}
    gc.freeze()  # children then leave the pages as they are
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if request["name"] == "start":
            answer: list[int | None] = []
            for child in request["children"]:
                pid = os.fork()
                if pid == 0:
                    os.close(replies.fileno())
                    run_child(script, child, answer[0] if answer else 0)
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(pid, answer[0] if answer else pid)
                answer.append(pid)
                codes[pid] = None
        else:
            for pid in request["pids"]:
                if codes[pid] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    codes[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = [codes[pid] for pid in request["pids"]]
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
