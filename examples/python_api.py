"""The Python API, as users of vLLM expect it. Without a model it runs the bundled one on this machine.

python examples/python_api.py
python examples/python_api.py --model DIR --plan plan.yaml
"""

from __future__ import annotations

import argparse

from hexgen import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="a Hugging Face directory (default: the bundled model)")
    parser.add_argument("--plan", default=None, help="a plan file (default: planned over this machine)")
    options = parser.parse_args()

    prompts = ["import os\nimport sys\n\n", "class Stack:\n    def push(self", "def read_lines(path):\n"]
    with LLM(options.model, plan=options.plan) as llm:
        # Greedy: the same tokens as transformers' generate, whatever the plan.
        for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32)):
            print(f"--- {output.prompt!r}\n{output.outputs[0].text}")

        # Sampled: the same seed gives the same text, whatever else is in the batch.
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, n=2, max_tokens=24)
        for choice in llm.generate("def main():\n", params)[0].outputs:
            print(f"--- choice {choice.index} ({choice.finish_reason})\n{choice.text}")


if __name__ == "__main__":
    main()
