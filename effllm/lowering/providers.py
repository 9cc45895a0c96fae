"""Loads the providers of a device on first use, so that a CPU user never imports Triton and a GPU user never builds C++."""

from __future__ import annotations

import importlib

from effllm.errors import KernelError, nearest
from effllm.lowering.op import OPS, Problem, Provider, Verdict

_MODULES: dict[str, tuple[str, ...]] = {"cpu": ("effllm.kernels.cpu",), "cuda": ("effllm.kernels.triton", "effllm.kernels.semi_structured")}
_FAMILIES = (
    "norm",
    "glu",
    "rotate",
    "bipolar_linear",
    "attention",
    "prompt_attention",
    "lowrank_linear",
    "lowrank_bipolar_linear",
    "monarch_linear",
    "nm_linear",
    "sparse_linear",
    "sparse_bipolar_linear",
    "sparsify",
    "kv_cache",
    "pie",
    "packed_attention",
)
_loaded: set[str] = set()
_problems: dict[str, str] = {}  # device -> why its kernels are missing


def load(device: str) -> str:
    """Import the kernel package of a device type; returns why it is missing, or an empty string."""
    if device not in _loaded:
        _loaded.add(device)
        for family in _FAMILIES:  # define the ops that kernels register with
            importlib.import_module(f"effllm.lowering.{family}")
        for module in _MODULES.get(device, ()):
            try:
                importlib.import_module(module).register()
            except (ImportError, KernelError) as error:
                _problems[device] = str(error)
    return _problems.get(device, "")


def verdicts(problem: Problem) -> list[tuple[Provider, Verdict]]:
    """Every provider of the problem's op with its verdict, best first."""
    load(problem.device)
    rated = []
    for provider in OPS[problem.op].providers.values():
        if provider.device not in ("any", problem.device):
            verdict = Verdict(False, f"runs on {provider.device}, the weight is on {problem.device}")
        else:
            verdict = provider.supports(problem)
        rated.append((provider, verdict))
    return sorted(rated, key=lambda pv: (not pv[1].ok, -pv[0].rank))


def ready(provider: Provider) -> Verdict:
    """Build or load what the provider needs."""
    if provider.prepare is None:
        return Verdict(True)
    try:
        provider.prepare()
    except KernelError as error:
        return Verdict(False, f"[{error.code}] {error.cause.splitlines()[0]}")
    return Verdict(True)


def select(problem: Problem, wanted: str | None = None) -> tuple[Provider, str]:
    """The provider to use, and a line on why (with the reasons of the better ones that were refused). Builds only what it returns."""
    rated = verdicts(problem)
    if wanted is not None:
        for provider, verdict in rated:
            if provider.name == wanted:
                verdict = verdict and ready(provider)
                if verdict:
                    return provider, "as asked"
                raise KernelError("E-KRN-SUPPORT", f"kernel {wanted!r} refuses: {verdict.reason}", "choose another kernel or none")
        raise KernelError("E-KRN-NAME", f"unknown kernel {wanted!r}", nearest(wanted, [p.name for p, _ in rated]))
    refused = []
    for provider, verdict in sorted(rated, key=lambda pv: -pv[0].rank):
        verdict = verdict and ready(provider)
        if verdict:
            missing = _problems.get(problem.device)
            if missing and provider.device == "any":
                refused.append(f"no compiled kernels: {missing.splitlines()[0]}")
            return provider, "; ".join(refused) or "best supported"
        if provider.device == problem.device:
            refused.append(f"{provider.name}: {verdict.reason}")
    raise KernelError("E-KRN-NONE", f"no kernel for {problem.op}: {'; '.join(refused)}", "report this bug: the reference should take anything")
