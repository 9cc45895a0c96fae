"""Candidates run in a process of their own, so that a crash, a hang or a lack of memory is a candidate's result and not the end of a run.

The process (worker_main.py) is a fresh interpreter with this one's path and number of threads. It lives for many candidates and is
started again after a crash. Requests and answers are lines of JSON over pipes:

    {"do": "hello", "threads": 2, "modules": [...], "seconds": null, "slack": 0.4}        -> {"ok": true}
    {"do": "check", "provider": "cpu-avx2", "problem": {...}, "config": {...}}            -> {"status": "ok", "reason": ""}
    {"do": "time", "provider": ..., "problem": ..., "configs": [...]}                     -> {"timings": [[s, spread, n], ...], "refused": "", ...}
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import torch

from effllm.autotune.measure import SLACK, Outcome, Session, Timing
from effllm.errors import TuneError
from effllm.lowering.op import Config, Problem, Provider

_START = 180.0  # s to import torch on a busy machine
_TIMEOUT = 60.0  # s for a candidate
_STUCK = "E-TUN-WORKER"


def problem_to_dict(problem: Problem) -> dict[str, Any]:
    """A problem in JSON: dtypes by name."""
    values = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in values.items()}


def problem_from_dict(values: Mapping[str, Any]) -> Problem:
    """The inverse of `problem_to_dict`."""
    detail = tuple((str(k), v) for k, v in values.get("detail", ()))
    return Problem(**{k: getattr(torch, v) if k.endswith("dtype") else v for k, v in values.items()} | {"detail": detail})


class _Gone(Exception):
    """The process ended or did not answer; `outcome` is what that means for the candidate."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Worker:
    """Verifies and times candidates in a worker process; close it, or use it as a context.

    `modules` are imported there first and their `register()` called: it adds providers from outside of effllm. `seconds` of timing per candidate and `slack`
    are those of measure.time_interleaved.
    """

    def __init__(self, modules: Sequence[str] = (), *, timeout: float = _TIMEOUT, seconds: float | None = None, slack: float | None = SLACK) -> None:
        self._hello = {"do": "hello", "threads": torch.get_num_threads(), "modules": list(modules), "seconds": seconds, "slack": slack}
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def check(self, provider: Provider, problem: Problem, config: Config, timeout: float | None = None) -> Outcome:
        """What became of a candidate within `timeout` seconds (default 60). Raises TuneError where the problem itself cannot be run."""
        request = {"do": "check", "provider": provider.name, "problem": problem_to_dict(problem), "config": dict(config)}
        try:
            answer = self._ask(request, timeout or self._timeout)
        except _Gone as gone:
            return gone.outcome
        return Outcome(answer["status"], answer["reason"])

    def time(self, provider: Provider, problem: Problem, configs: Sequence[Config], timeout: float | None = None) -> Session:
        """The times of candidates that were checked; failed where the process did not survive it."""
        request = {"do": "time", "provider": provider.name, "problem": problem_to_dict(problem), "configs": [dict(c) for c in configs]}
        try:
            answer = self._ask(request, timeout or self._timeout * max(1, len(configs)))
        except _Gone as gone:
            return Session(failed=gone.outcome)
        if "status" in answer:
            return Session(failed=Outcome(answer["status"], answer["reason"]))
        return Session(tuple(Timing(*t) for t in answer["timings"]), answer["refused"], answer["windows"], answer["dropped"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    # what was not sent yet cannot be flushed into a pipe without a reader
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        answer = self._exchange(request, timeout)
        if "code" in answer:
            raise TuneError(answer["code"], answer["cause"], answer["next_step"])
        return answer

    def _start(self) -> None:
        path = os.pathsep.join(p for p in sys.path if p) or os.getcwd()
        command = [sys.executable, "-m", "effllm.autotune.worker_main"]
        try:
            # a session of its own: what a candidate starts ends with it, and Ctrl-C reaches only the run
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}, start_new_session=True
            )
        except OSError as error:
            raise TuneError(_STUCK, f"cannot start a worker process: {error}", "free memory or processes, and run again: what was measured is kept") from error
        self.starts += 1
        self._rest = b""
        try:
            answer = self._exchange(self._hello, _START)
        except _Gone as gone:
            raise TuneError(_STUCK, f"the worker process did not start: {gone.outcome.reason}", "see its message above") from gone
        if not answer.get("ok"):
            raise TuneError(_STUCK, f"the worker process did not start: {answer.get('error')}", "see its message above")

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise _Gone(self._ended()) from None
        found: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout, timeout))
        return found

    def _line(self, deadline: float, timeout: float) -> bytes:
        process = self._process
        assert process is not None and process.stdout is not None
        handle = process.stdout.fileno()
        with selectors.DefaultSelector() as waiting:
            waiting.register(handle, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise _Gone(Outcome("timeout", f"no answer within {timeout:.3g} s"))
                read = os.read(handle, 1 << 16)
                if not read:
                    raise _Gone(self._ended())
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> Outcome:
        """The outcome of a candidate under which the process ended by itself."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code == -signal.SIGKILL:  # nobody here sent it: the kernel does where memory runs out
            return Outcome("oom", "the worker process was killed, most likely for its memory")
        if code is not None and code < 0:
            return Outcome("error", f"the worker process died of {signal.Signals(-code).name}")
        return Outcome("error", f"the worker process ended with code {code}")
