"""llama.cpp as a peer, by llama-cpp-python's bindings of its C interface. Runs in an environment of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf_file
import lines
import llama_cpp
import numpy as np

BATCH = 512  # tokens of one call, llama.cpp's own default


def start(options: argparse.Namespace) -> tuple[dict[str, str], lines.Generate]:
    path = options.model / "model.gguf"
    if not path.is_file():
        part = path.with_suffix(".part")
        gguf_file.write(options.model, part)
        part.replace(path)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path.name}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = options.sequences * ((options.positions + 255) // 256 * 256)  # rounded up by llama.cpp anyhow
    params.n_batch = params.n_ubatch = BATCH
    params.n_seq_max = options.sequences
    params.n_threads = params.n_threads_batch = options.threads
    if options.dtype == "float32":  # keys and values in float16 otherwise, its default
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp makes no context")
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(items: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """(token, position, sequence, whether its logits are wanted): the largest of each wanted row."""
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        batch.n_tokens = len(items)
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode ended with {code}")
        rows = sum(wanted for *_, wanted in items)
        if not rows:
            return np.empty(0, dtype=np.int64)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(rows, vocabulary))
        return logits.argmax(axis=1)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        out: list[list[int]] = [[] for _ in prompts]
        waiting = [
            (token, at, i, at == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for first in range(0, len(waiting), BATCH):
            part = waiting[first : first + BATCH]
            ends = [sequence for _, _, sequence, last in part if last]
            for sequence, token in zip(ends, decode(part).tolist(), strict=True):
                out[sequence].append(token)
        for step in range(tokens - 1):
            items = [(out[i][-1], len(prompt) + step, i, True) for i, prompt in enumerate(prompts)]
            for sequence, token in zip(out, decode(items).tolist(), strict=True):
                sequence.append(token)
        return out

    said = llama_cpp.llama_print_system_info().decode()
    return {"version": llama_cpp.__version__, "notes": said}, generate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True, help="at once")
    parser.add_argument("--positions", type=int, required=True, help="of each sequence")
    lines.serve(lambda: start(parser.parse_args()))
