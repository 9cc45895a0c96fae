"""The worker process behind worker.py: reads requests from standard input, answers on what standard output was at its start."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, BinaryIO

import torch

from effllm.autotune.measure import Local, failure
from effllm.autotune.worker import problem_from_dict
from effllm.errors import TuneError, nearest
from effllm.lowering import providers
from effllm.lowering.op import OPS, Problem, Provider


def _provider(name: str, problem: Problem) -> Provider:
    providers.load(torch.device(problem.device).type)
    if problem.op not in OPS:
        raise TuneError("E-TUN-OP", f"unknown op {problem.op!r}", nearest(problem.op, OPS))
    if name not in OPS[problem.op].providers:
        cause = f"the worker process has no kernel {name!r} for {problem.op}"
        raise TuneError("E-TUN-PROVIDER", cause, "give the worker the modules whose register() adds it")
    return OPS[problem.op].providers[name]


def _hello(request: dict[str, Any]) -> Local:
    torch.set_num_threads(request["threads"])
    for module in request["modules"]:
        importlib.import_module(module).register()
    return Local(request["seconds"], request["slack"])


def _answer(local: Local, request: dict[str, Any]) -> dict[str, Any]:
    problem = problem_from_dict(request["problem"])
    try:
        provider = _provider(request["provider"], problem)
        if request["do"] == "check":
            outcome = local.check(provider, problem, request["config"])
            return {"status": outcome.status, "reason": outcome.reason}
        session = local.time(provider, problem, request["configs"])
    except TuneError as error:  # of the problem, not of the candidate: nothing to store
        return {"code": error.code, "cause": error.cause, "next_step": error.next_step}
    except Exception as error:  # noqa: BLE001 - the candidate's own error is its result; the process lives on
        outcome = failure(error)
        return {"status": outcome.status, "reason": outcome.reason}
    timings = [[t.seconds, t.spread, t.n] for t in session.timings]
    return {"timings": timings, "refused": session.refused, "windows": session.windows, "dropped": session.dropped}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer line by line until the other side closes."""
    local = Local()
    with torch.inference_mode():
        for line in requests:
            request = json.loads(line)
            if request["do"] == "hello":
                local = _hello(request)
                reply: dict[str, Any] = {"ok": True}
            else:
                reply = _answer(local, request)
            answers.write(json.dumps(reply).encode() + b"\n")
            answers.flush()


def main() -> None:
    """Serve this process's parent."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a candidate prints must not mix with the answers
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
