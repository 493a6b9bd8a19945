"""OpenVINO as a peer: optimum-intel's graph, run by OpenVINO's own runtime. Runs in an environment of its own.

Nothing but the runtime is in a token's way: no transformers, no tokenizer, one argmax. As in openvino-genai, only
the last position of each sequence reaches the output head.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lines
import numpy as np
import openvino
from openvino import opset15 as ops

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def export(model: Path, to: Path) -> None:
    """Graph and weights, in the checkpoint's own dtype, keys and values kept inside (stateful)."""
    from optimum.intel import OVModelForCausalLM  # takes torch and half a minute: not when it was done before

    exported = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, use_cache=True, stateful=True, load_in_8bit=False
    )
    exported.save_pretrained(to)


def last_position_alone(model: openvino.Model) -> None:
    """The head multiplies the last position of each sequence, whatever the prompt's length."""
    product = model.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() == "Convert":
        product = product.input_value(0).get_node()
    if product.get_type_name() != "MatMul":
        raise RuntimeError(f"the exported graph ends in {product.get_type_name()}, not in a product with the head")
    one = [ops.constant(np.array([n]), dtype=np.int64) for n in (-1, np.iinfo(np.int64).max, 1, 1)]
    product.input(0).replace_source_output(ops.slice(product.input_value(0), *one).output(0))
    model.validate_nodes_and_infer_types()


def start(options: argparse.Namespace) -> tuple[dict[str, str], lines.Generate]:
    folder = options.model / "openvino"
    if not (folder / "openvino_model.xml").is_file():
        export(options.model, folder)
    core, precision = openvino.Core(), PRECISION[options.dtype]
    model = core.read_model(folder / "openvino_model.xml")
    last_position_alone(model)
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    matrices = (op for op in constants if len(op.get_output_shape(0)) == 2)
    weights = sorted({op.get_element_type().get_type_name() for op in matrices})
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision if precision == "f32" else "f16",  # 8 bits where nothing is said
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        },
    )
    request = compiled.create_infer_request()
    names = {name for port in compiled.inputs for name in port.get_names()}

    def step(ids: np.ndarray, seen: int) -> np.ndarray:
        """``ids`` ``[sequences, new]`` after ``seen`` positions each: the largest of each last row."""
        count, new = ids.shape
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((count, seen + new), dtype=np.int64),
            "position_ids": np.broadcast_to(np.arange(seen, seen + new), (count, new)).copy(),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        request.start_async({name: value for name, value in inputs.items() if name in names}, share_inputs=True)
        request.wait()
        return request.get_tensor("logits").data[:, -1].argmax(axis=1)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        request.reset_state()
        seen, ids, out = 0, np.array(prompts, dtype=np.int64), []
        for _ in range(tokens):
            chosen = step(ids, seen)
            seen += ids.shape[1]
            ids = chosen[:, None].astype(np.int64)
            out.append(chosen)
        return np.stack(out, axis=1).tolist()

    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    cache = compiled.get_property("KV_CACHE_PRECISION").to_string()
    notes = f"weights as {', '.join(weights)}; computes in {used}, cache in {cache}"
    return {"version": openvino.__version__, "notes": notes}, generate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(PRECISION), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, help="at once: of no use here")
    parser.add_argument("--positions", type=int, help="of each sequence: of no use here")
    lines.serve(lambda: start(parser.parse_args()))
