"""Every kernel compiles for every card with NVRTC alone, and what runs in a step's time keeps to its registers."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_kernels_arithmetic import DTYPES, LIMITS

from hexgen.errors import EngineError
from hexgen.worker.kernels.arithmetic import attention_kernel, tiling
from hexgen.worker.kernels.nvrtc import Nvrtc, choose_library, load_libraries
from hexgen.worker.kernels.source import KernelSpec, Source, read_source, source_directory

HEADS = (64, 80, 96, 128, 256)
SMALL = ("attention_reduce", "rope_kv_write", "rms_norm", "silu_mul", "candidates")


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    try:
        return choose_library(load_libraries(), (7, 0), 12)[0]
    except EngineError as error:
        pytest.skip(f"{error}")


def spec_of(file: str, dtype: str, head: int, arch: int) -> KernelSpec:
    if file.endswith("_attention"):
        decode = file == "decode_attention"
        return attention_kernel(dtype, head, 16, tiling(dtype, head, LIMITS[arch], decode, 4), decode)
    return KernelSpec.make(file, file, dtype, head=head)


def faults(nvrtc: Nvrtc, file: str, dtype: str, head: int, arch: int) -> str:
    """What ptxas says of stack and spills, where it is not nothing."""
    log = nvrtc.compile(spec_of(file, dtype, head, arch), read_source(file), arch).log
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found, f"ptxas has not reported on {file}:\n{log}"
    bad = [entry for entry in found if entry != ("0", "0", "0")]
    return f"{file} {dtype} {head} sm_{arch}: {bad}" if bad else ""


def all_faults(nvrtc: Nvrtc, instances: list[tuple[str, str, int, int]]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return [fault for fault in pool.map(lambda i: faults(nvrtc, *i), instances) if fault]


def test_every_source_compiles_for_every_card(nvrtc: Nvrtc) -> None:
    """One instance each; no stack, no spills. All sources there are, not those that somebody remembered."""
    files = sorted(path.stem for path in source_directory().glob("*.cu"))
    assert set(files) == {"decode_attention", "prefill_attention", *SMALL}
    dtypes = itertools.cycle(DTYPES)
    instances = [(file, next(dtypes), 64, arch) for arch in LIMITS for file in files]
    assert all_faults(nvrtc, instances) == []


@pytest.mark.long
@pytest.mark.parametrize("arch", LIMITS)
def test_long_heads_keep_to_their_registers(nvrtc: Nvrtc, arch: int) -> None:
    """128 is what most models have, 256 what needs most registers; the other sizes once each."""
    kind = "float16" if arch < 80 else "bfloat16"
    files = ("decode_attention", "prefill_attention")
    instances = [(file, kind, head, arch) for file in files for head in (128, 256)]
    instances += [(file, "float32", (128, 256)[arch % 2], arch) for file in files]
    instances += [(file, "float16", (80, 96)[arch // 10 % 2], arch) for file in files]
    assert all_faults(nvrtc, instances) == []


def test_an_error_carries_the_compilers_words(nvrtc: Nvrtc) -> None:
    broken = Source("KERNEL void rms_norm() { undeclared(); }", read_source("rms_norm").headers)
    with pytest.raises(EngineError, match=r"rms_norm\.cu") as caught:
        nvrtc.compile(KernelSpec.make("rms_norm", "rms_norm", "float32"), broken, 90)
    assert "sm_90" in str(caught.value)
    assert "error" in str(caught.value)
