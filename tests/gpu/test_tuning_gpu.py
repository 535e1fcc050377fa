"""``tqcompile tune`` with the real kernel: what it keeps is correct and is what a launch then uses."""

import pytest
import torch

pytest.importorskip("triton")
from tqcompile import ops, tuner
from tqcompile.kernels import tuning, twin_gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def watch(patch: pytest.MonkeyPatch, name: str, used: list[dict]) -> None:
    """Append to ``used`` the configuration of every run of one of twin_gemm's kernels."""
    run = getattr(twin_gemm, name)

    def recorded(problem, config, *rest):
        used.append(config)
        run(problem, config, *rest)

    patch.setattr(twin_gemm, name, recorded)


@pytest.mark.parametrize("operand", [torch.int8, torch.bfloat16])
def test_tuned_configurations_are_kept_and_used(operand, tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    tuning.forget()
    some = twin_gemm.candidates
    monkeypatch.setattr(twin_gemm, "candidates", lambda *shape: some(*shape)[::8])  # each is compiled, for seconds
    problem = tuner.Problem(1536, 1024, 32, 128, operand)
    try:
        outcomes = tuner.run([problem], [1, 64])
        for outcome in outcomes:
            assert outcome.tried > 0, outcome.why
            assert outcome.config is not None
            assert outcome.us > 0
            args = tuner.twin_gemm_arguments(problem, outcome.tokens, 9)
            gpu = torch.cuda.get_device_name()
            found = tuning.config_for("twin_gemm", gpu, problem.n, problem.k, outcome.tokens, problem.form)
            assert dict(found) == outcome.config
            used: list[dict] = []
            with monkeypatch.context() as patch:
                watch(patch, f"_run_{outcome.config['kernel']}", used)
                y = torch.ops.tqcompile.twin_gemm(*args)
            assert [dict(config) for config in used] == [outcome.config]
            assert tuner.difference(y, ops.twin_gemm_reference(*args)) is None
    finally:
        tuning.forget()
