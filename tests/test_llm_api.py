"""The Python API on the real engine, and what a checkpoint without a tokenizer can do."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from oracle import greedy, make_checkpoint
from served import BUNDLED, engine, served

from hexgen import (
    LLM,
    CheckpointError,
    InfeasibleError,
    RequestError,
    SamplingParams,
    SpecError,
    UnavailableError,
)
from hexgen.coordinator.tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["import os\nimport sys\n\n", "class Stack:\n    def push(self", "x"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(BUNDLED), max_num_seqs=16) as llm:
        yield llm


def test_importing_hexgen_is_light() -> None:
    code = (
        "import sys, hexgen; from hexgen import SamplingParams, Plan, load_cluster, SpecError; "
        "print([m for m in ('torch', 'ray', 'transformers', 'grpc', 'fastapi') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    import hexgen

    assert all(getattr(hexgen, name) is not None for name in hexgen.__all__)
    with pytest.raises(AttributeError):
        _ = hexgen.no_such_name


def test_outputs_are_transformers_and_in_order(llm: LLM) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [o.prompt for o in outputs] == PROMPTS
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer.encode(prompt)
        assert output.prompt_token_ids == ids
        (choice,) = output.outputs
        assert list(choice.token_ids) == greedy(BUNDLED, ids, 12)
        assert choice.text == tokenizer.decode([*ids, *choice.token_ids])[len(prompt) :]
        assert choice.finish_reason == "length"
        assert output.timing is not None
        assert output.timing.ttft_s > 0


def test_prompts_in_all_their_shapes(llm: LLM) -> None:
    def tokens(prompts: Any) -> list[tuple[int, ...]]:
        return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]

    ids = [5, 6, 7]
    (one,) = tokens(ids)
    assert tokens([ids]) == [one]
    assert tokens({"prompt_token_ids": ids}) == [one]
    assert tokens([{"prompt_token_ids": ids}, {"prompt": "x"}]) == [one, tokens("x")[0]]
    assert tokens([]) == []


def test_parameters_for_each_prompt(llm: LLM) -> None:
    lengths = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, lengths)] == [1, 5, 3]
    with pytest.raises(RequestError, match="2 for 3"):
        llm.generate(PROMPTS, lengths[:2])


def test_n_seed_logprobs_and_stop(llm: LLM) -> None:
    params = SamplingParams(temperature=1, top_p=0.95, seed=3, n=3, max_tokens=10, logprobs=2, ignore_eos=True)
    (first,), (again,) = llm.generate(PROMPTS[0], params), llm.generate(PROMPTS[0], params)
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert len({c.token_ids for c in first.outputs}) > 1
    for choice in first.outputs:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == 10
        assert all(len(entry.top) == 2 for entry in choice.logprobs)
    text = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].text
    stop = text[4:7]
    stopped = SamplingParams(temperature=0, max_tokens=12, stop=stop, ignore_eos=True)
    choice = llm.generate(PROMPTS[1], stopped)[0].outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)


def test_more_prompts_than_fit_at_once(llm: LLM) -> None:
    prompts = [[i + 5, i + 6] for i in range(60)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert [list(o.prompt_token_ids) for o in outputs] == prompts


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(conversation, GREEDY)
    (raw,) = llm.generate("<|user|>hi<|end|><|assistant|>", GREEDY)
    assert one.outputs[0].token_ids == raw.outputs[0].token_ids
    assert len(llm.chat([conversation, conversation], GREEDY)) == 2


def test_a_stream_and_leaving_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    updates = list(llm.generate_stream(PROMPTS[0], GREEDY))
    assert "".join(d.text for u in updates for d in u.deltas) == whole.text
    assert updates[-1].finished
    for _ in llm.generate_stream(PROMPTS[0], SamplingParams(max_tokens=900, ignore_eos=True)):
        break
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0] == whole


def test_threads_share_one(llm: LLM) -> None:
    found: dict[int, tuple[int, ...]] = {}

    def ask(i: int) -> None:
        found[i] = llm.generate([5, 6, 7 + i], GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == [
        o.outputs[0].token_ids for o in llm.generate([[5, 6, 7 + i] for i in range(6)], GREEDY)
    ]


def test_progress_goes_to_standard_error(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY, use_tqdm=True)
    printed = capfd.readouterr()
    assert printed.out == ""


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ("", GREEDY),
        ([""], GREEDY),
        ([[]], GREEDY),
        ([4096], GREEDY),
        ([[1.5]], GREEDY),
        (5, GREEDY),
        ([None], GREEDY),
        ({"text": "x"}, GREEDY),
        ([1] * 2000, GREEDY),
        ("x", SamplingParams(temperature=-1)),
        ("x", SamplingParams(max_tokens=0)),
        ("x", SamplingParams(top_k=1.5)),  # type: ignore[arg-type]
    ],
)
def test_bad_requests(llm: LLM, prompts: Any, params: SamplingParams) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, params)
    with pytest.raises(RequestError):
        llm.generate(["fine", prompts] if not isinstance(prompts, int) else prompts, params)
    assert llm.generate("fine", SamplingParams(max_tokens=1))  # nothing is lost for others


def test_engine_options(tmp_path: Path) -> None:
    with LLM(str(BUNDLED), max_model_len=64, block_size=8, enable_prefix_caching=False) as llm:
        engine_options = llm.plan.engine
        assert (engine_options.max_context, engine_options.page_size, engine_options.prefix_cache) == (
            64,
            8,
            False,
        )
        with pytest.raises(RequestError, match="64"):
            llm.generate([[1] * 64], GREEDY)
    with pytest.raises(UnavailableError, match="closed"):
        llm.generate("x")
    with pytest.raises(SpecError, match="no_such_option"):
        LLM(str(BUNDLED), no_such_option=1)
    with pytest.raises(SpecError, match="backend"):
        LLM(str(BUNDLED), backend="magic")  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        LLM(str(tmp_path))
    with pytest.raises((SpecError, CheckpointError)):
        LLM("no-such-model")


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    LLM(str(BUNDLED)).close()
    assert {t for t in threading.enumerate() if "hexgen" in t.name} <= before


# ---- a checkpoint without a tokenizer -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bare"), "llama")


def test_token_ids_only(bare: Path) -> None:
    with LLM(str(bare)) as llm:
        assert llm.tokenizer is None
        output = llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0]
        assert list(output.token_ids) == greedy(bare, [5, 6, 7], 12)
        assert output.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate("text", GREEDY)
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY)
        with pytest.raises(RequestError, match="stop"):
            llm.generate([[5]], SamplingParams(stop="x"))


def test_token_ids_only_on_the_wire(bare: Path) -> None:
    with engine(bare, (((0, 4), 1),)) as deployment, served(deployment, bare) as server:

        def post(path: str, **fields: Any) -> httpx.Response:
            return httpx.post(server.http + path, json=fields, timeout=60)

        fields = {"max_tokens": 5, "temperature": 0, "return_token_ids": True, "ignore_eos": True, "logprobs": 1}
        choice = post("/v1/completions", prompt=[5, 6, 7], **fields).json()["choices"][0]
        assert choice["token_ids"] == greedy(bare, [5, 6, 7], 5)
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"][0] == f"token_id:{choice['token_ids'][0]}"
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [1], "stop": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            refused = post(path, **body)
            assert (refused.status_code, "tokenizer" in refused.json()["error"]["message"]) == (400, True)


def test_a_plan_that_does_not_fit_is_refused(bare: Path) -> None:
    from engine_client import cpu_cluster, make_plan

    plan = make_plan(cpu_cluster(1, memory_bytes=1000), str(bare), [((0, 4), 1)])
    with pytest.raises(InfeasibleError):
        LLM(str(bare), plan=plan)


# ---- the end ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_script_may_simply_end(interrupt: bool) -> None:
    code = f"""
import os, signal, threading
from hexgen import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits an ignored Ctrl-C
llm = LLM({str(BUNDLED)!r})
if {interrupt}:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        llm.generate(["x"] * 4, SamplingParams(max_tokens=1000, ignore_eos=True))
    except KeyboardInterrupt:
        print("interrupted")
print(len(llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split(), done.stderr) == (3, ["interrupted", "3"][not interrupt :], "")


@pytest.mark.slow
def test_a_plan_over_several_nodes_runs_on_ray(tmp_path: Path) -> None:
    from hexgen.cluster import load_cluster
    from hexgen.model import load_model
    from hexgen.plan import dump_plan
    from hexgen.scheduler import plan

    cluster = load_cluster(BUNDLED.parents[2] / "cluster_specs" / "demo.yaml")
    dump_plan(plan(cluster, load_model(BUNDLED)), tmp_path / "plan.yaml")
    with LLM(str(BUNDLED), plan=tmp_path / "plan.yaml") as llm:
        assert len(llm.plan.stages) > 1
        output = llm.generate([[5, 6, 7]], GREEDY)[0]
    assert list(output.outputs[0].token_ids) == greedy(BUNDLED, [5, 6, 7], 12)
