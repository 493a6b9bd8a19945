"""The `openai` client against a hexgen server: `hexgen serve` in one terminal, this in another.

python examples/openai_client.py --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused", help="what `hexgen serve --api-key` was given")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key=options.api_key)
    model = client.models.list().data[0].id
    print(f"model: {model}")

    # A completion, streamed: each piece arrives as soon as its token is sampled.
    stream = client.completions.create(
        model=model, prompt="def fibonacci(n):\n", max_tokens=48, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()

    # A chat, not streamed, with the parameters of OpenAI's API and, in extra_body, those of vLLM's.
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
        max_tokens=32,
        temperature=0.8,
        seed=7,
        extra_body={"top_k": 40, "min_p": 0.02},
    )
    usage = answer.usage
    print(answer.choices[0].message.content)
    print(
        f"finish reason: {answer.choices[0].finish_reason}; tokens: {usage.total_tokens if usage else 'unknown'}"
    )


if __name__ == "__main__":
    main()
