"""The optimizer of preset full-12gb, its kernels and the benchmark that measures it."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backend.config import REPO_ROOT
from backend.training import lowmem, philox
from backend.training.lowmem import BLOCK, FusedFactoredAdam, dequantized, quantized, stochastically_rounded


def optimizer_over(
    parameters: dict[str, nn.Parameter], *, rate: float = 1e-2, weight_decay: float = 0.0, clip_norm: float | None = None
) -> FusedFactoredAdam:
    return FusedFactoredAdam([(n, p, rate) for n, p in parameters.items()], weight_decay=weight_decay, seed=1, clip_norm=clip_norm)


def run(optimizer: FusedFactoredAdam, parameters: dict[str, nn.Parameter], gradients: list[torch.Tensor], update: int) -> None:
    optimizer.begin(update, 1.0)
    torch.stack([(p.float() * g).sum() for p, g in zip(parameters.values(), gradients, strict=True)]).sum().backward()
    optimizer.end()


# ---- random numbers and rounding ----


def test_philox_is_the_published_generator() -> None:
    """The known answer of philox4x32-7 in the authors' Random123 (kat_vectors) for key and counter zero."""
    assert [f"{int(v):08x}" for v in philox.noise(4, 0, 0)] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_philox_numbers_depend_on_key_counter_and_number_alone() -> None:
    long, short = philox.noise(300_001, 5 << 40, 3), philox.noise(10, 5 << 40, 3)
    assert torch.equal(long[:10], short)
    assert int(long.min()) >= 0 and int(long.max()) < 2**32
    assert abs(float(long.double().mean()) / 2**31 - 1) < 0.01
    for other in (philox.noise(10, 6 << 40, 3), philox.noise(10, 5 << 40, 4)):
        assert not torch.equal(other, short)


def test_stochastic_rounding_keeps_the_mean() -> None:
    value = 1.0 + 2.0**-10  # an eighth of the way from 1 to the next bfloat16
    rounded = stochastically_rounded(torch.full((200_000,), value), philox.noise(200_000, 9, 0) & 0xFFFF).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    share = float((rounded > 1).double().mean())
    assert abs(share - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / 200_000)


def test_quantization_is_unbiased_within_a_step() -> None:
    values = torch.linspace(-1, 1, 256).repeat(2000)
    steps, scale = quantized(values, philox.noise(values.numel(), 11, 0) >> 16)
    back = dequantized(steps, scale, values.shape)
    assert float((back - values).abs().max()) <= 1 / 127 + 1e-6
    bias = (back - values).view(2000, 256).mean(dim=0)
    assert float(bias.abs().max()) < 5 * (1 / 127) / math.sqrt(4 * 2000)


# ---- the update ----


def test_the_first_update_by_hand() -> None:
    """At the first update the second moments are the gradient's own; a rank-one gradient is normalised to its signs."""
    parameters = {"w": nn.Parameter(torch.full((2, 2), 0.5))}
    run(optimizer_over(parameters, rate=0.1, weight_decay=0.2), parameters, [torch.tensor([[1.0, -2.0], [3.0, -6.0]])], 0)
    # momentum = 0.1 * sign, weight - 0.1 * (momentum + 0.2 * weight)
    expected = torch.tensor([[0.48, 0.50], [0.48, 0.50]])
    assert torch.allclose(parameters["w"].detach(), expected, atol=1e-6)


def test_an_update_larger_than_its_bound_is_cut_to_it() -> None:
    """The second moment of many small gradients makes one large gradient's update large: its root mean square is bounded by 1."""
    parameters = {"w": nn.Parameter(torch.zeros(8, 16))}
    optimizer = optimizer_over(parameters, rate=1.0)
    for update in range(20):
        run(optimizer, parameters, [torch.full((8, 16), 1e-3)], update)
    before = parameters["w"].detach().clone()
    run(optimizer, parameters, [torch.full((8, 16), 10.0)], 20)
    moved = (parameters["w"].detach() - before).abs()
    assert float(moved.max()) < 1.0 + 1e-3  # 0.9 * old momentum (at most 1) + 0.1 * 1; unclipped it would be above 1


def test_the_global_clip_uses_the_norm_of_the_update_before() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(4, 4)), "b": nn.Parameter(torch.zeros(4))}
    optimizer = optimizer_over(parameters, clip_norm=1.0)
    gradients = [torch.full((4, 4), 3.0), torch.full((4,), 4.0)]
    norm = math.sqrt(16 * 9 + 4 * 16)
    run(optimizer, parameters, gradients, 0)
    first = optimizer.tensors()["w|row"].clone()
    assert first.tolist() == pytest.approx([9.0] * 4)  # nothing known yet: not scaled
    assert float(optimizer.tensors()["clipping|previous_square"]) == pytest.approx(norm**2)
    run(optimizer, parameters, gradients, 1)
    blend = 2.0**-0.8
    assert optimizer.tensors()["w|row"].tolist() == pytest.approx([9.0 + blend * (9.0 / norm**2 - 9.0)] * 4, rel=1e-4)


def test_gradients_are_freed_and_small_updates_land() -> None:
    """bfloat16 weights near 1 move by 2e-5 a step in the mean, where rounding to the nearest would not move them at all."""
    parameters = {"w": nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))}
    optimizer = optimizer_over(parameters, rate=2e-5)
    for update in range(50):
        run(optimizer, parameters, [torch.ones(64, 64)], update)
    assert parameters["w"].grad is None
    intended = 2e-5 * sum(1 - 0.9 ** (update + 1) for update in range(50))
    assert float(1 - parameters["w"].detach().double().mean()) == pytest.approx(intended, rel=0.15)


def test_restored_state_continues_bit_by_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(6, 5, 3, 3, generator=draw), torch.randn(6, generator=draw)] for _ in range(6)]
    results = []
    for stops in (False, True):
        start = torch.Generator().manual_seed(1)
        parameters = {"w": nn.Parameter(torch.randn(6, 5, 3, 3, generator=start).bfloat16()), "b": nn.Parameter(torch.zeros(6))}
        optimizer = optimizer_over(parameters, clip_norm=0.5)
        for update in range(6):
            if stops and update == 3:
                kept = {name: value.clone() for name, value in optimizer.tensors().items()}
                parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
                optimizer = optimizer_over(parameters, clip_norm=0.5)
                optimizer.restore(kept)
            run(optimizer, parameters, gradients[update], update)
        results.append({**{n: p.detach().float() for n, p in parameters.items()}, **optimizer.tensors()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_momentum_an_update_is_the_normalised_gradient_and_the_state_is_factored_alone() -> None:
    parameters = {"w": nn.Parameter(torch.full((2, 2), 0.5))}
    optimizer = FusedFactoredAdam([("w", parameters["w"], 0.1)], weight_decay=0.0, seed=1, momentum=False)
    run(optimizer, parameters, [torch.tensor([[1.0, -2.0], [3.0, -6.0]])], 0)
    assert torch.allclose(parameters["w"].detach(), torch.tensor([[0.4, 0.6], [0.4, 0.6]]), atol=1e-6)
    assert {name: value.numel() for name, value in optimizer.tensors().items() if value.ndim} == {
        "w|momentum": 0,
        "w|scale": 0,
        "w|row": 2,
        "w|column": 2,
    }


# ---- kernels and benchmark ----


def _python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO_ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_kernels_agree_with_their_eager_definition() -> None:
    """In Triton's interpreter, which replaces the compiler and must therefore be asked for before triton is imported."""
    pytest.importorskip("triton")
    done = _python("lowmem_check.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"agrees": true') == 3


@pytest.mark.long
@pytest.mark.parametrize("capability", [86, 89, 90, 120], ids=["RTX 3060", "RTX 4090", "H100", "RTX 5090"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_the_kernels_compile_for_cards_that_are_not_here(capability: int, bf16: bool) -> None:
    """Down to the card's own code, by the assembler that comes with triton; that they compute the right thing is tested above."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from backend.training import lowmem_kernels as kernels

    table, numbers, floats = "*i64", "*i32", "*fp32"
    tile = {"TILE_ROWS": kernels.TILE_ROWS, "TILE_COLUMNS": kernels.TILE_COLUMNS}
    kind = {"BF16": bf16, "ALIGNED": bf16}
    block = {"BLOCK": BLOCK, "BLOCKS": kernels.CHUNK_BLOCKS, "ROUNDS": kernels.CHUNK_ROUNDS, "PHILOX": kernels.PHILOX_ROUNDS}
    programs = [
        (kernels._statistics, [table, numbers, table, floats], tile | kind, 4),
        (kernels._second_moments, [table, numbers, *[floats] * 4, "fp32", "fp32"], tile | {"SEGMENT": kernels.SEGMENT}, 4),
        (kernels._excess, [table, numbers, table, *[floats] * 3], tile | kind, 4),
        (kernels._apply, [table, numbers, floats, table, *[floats] * 3, "i32", "fp32", "fp32", "fp32"],
         block | kind | {"CLIP": True, "KEPT": True}, 8),
    ]  # fmt: skip
    for program, types, constants, warps in programs:
        given = dict(zip(program.arg_names, types, strict=False))
        source = ASTSource(fn=program, signature=given | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert len(built.asm["cubin"]) > 1000, program.__name__


@pytest.mark.long
def test_the_benchmark_runs_the_product_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = _python("stage2_gpu.py", "--size", "miniature", "--arms", "ours", "--warmup", "1", "--steps", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    arm = json.loads(out.read_text())["arms"]["ours"]
    assert (arm["warmup_steps"], arm["timed_steps"], arm["arithmetic"]) == (1, 2, "eager")
    assert arm["samples_per_s"] > 0
    assert math.isfinite(arm["loss_last"])


@pytest.mark.long
@pytest.mark.parametrize("arm", ["ours-capped", "ours-vae", "reference-vae", "adafactor-hooks"])
def test_each_kind_of_arm_trains_two_steps(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO_ROOT))
    from benchmarks.stage2_arms import ARMS
    from benchmarks.stage2_meter import Setting
    from benchmarks.stage2_parts import SIZES

    result = ARMS[arm](Setting(SIZES["miniature"], torch.device("cpu"), warmup=1, steps=2, seconds=600, cap_gib=11.0, arithmetic="auto"))
    assert result["timed_steps"] == 2
    assert math.isfinite(result["loss_last"])
    if arm == "ours-capped":
        assert result["sample"]["finite"] and result["sample"]["shape"] == [1, 3, 64, 64]
        assert result["save"]["gib"] > 0


def test_the_benchmark_says_at_once_all_that_it_lacks() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    done = _python("stage2_gpu.py", "--arms", "ours,reference-vae")
    assert done.returncode == 2
    assert "CUDA card" in done.stderr
    assert "bitsandbytes" in done.stderr


# ---- memory ----


def test_parameters_and_state_leave_memory_with_the_optimizer() -> None:
    """A hook that knew the optimizer kept both on the card after training: 7 GiB at SDXL's size."""
    layer = nn.Linear(4, 4)
    optimizer = optimizer_over(dict(layer.named_parameters()))
    run(optimizer, dict(layer.named_parameters()), [torch.ones(4, 4), torch.ones(4)], 0)
    watched = [weakref.ref(layer.weight), weakref.ref(optimizer)]
    del layer, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_triton_that_cannot_build_is_said_once_and_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> int:
        raise RuntimeError("long story\nFailed to find C compiler")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=build))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    lowmem._triton_builds.cache_clear()
    try:
        assert not lowmem.triton_runs_on(torch.device("cuda"))
        assert not lowmem.triton_runs_on(torch.device("cuda"))
        assert caplog.text.count("Failed to find C compiler") == 1 and "apt install gcc" in caplog.text
        lowmem._triton_builds.cache_clear()
        driver.active.get_current_device = lambda: 0
        assert lowmem.triton_runs_on(torch.device("cuda"))
    finally:
        lowmem._triton_builds.cache_clear()
