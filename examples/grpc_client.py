"""A gRPC client that prints tokens as they are made: `hexgen serve` in one terminal, this in another.

    python examples/grpc_client.py --address 127.0.0.1:50051 --prompt "def main():"

The interface is `hexgen/proto/inference.proto`; the server also answers reflection, so grpcurl works too.
"""

from __future__ import annotations

import argparse

import grpc

from hexgen.proto import inference_pb2 as pb
from hexgen.proto import inference_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--prompt", default="def main():\n")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()

    with grpc.insecure_channel(options.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        model = stub.ModelInfo(pb.ModelInfoRequest())
        print(f"model: {model.name}, context {model.max_context} tokens")
        for route in stub.ClusterInfo(pb.ClusterInfoRequest()).routes:
            path = " -> ".join(f"{hop.stage}[{hop.first_layer}:{hop.end_layer}]" for hop in route.path)
            print(f"route {route.route}: {path}, {route.free_pages} of {route.total_pages} KV pages free")

        request = pb.GenerateRequest(
            text=options.prompt,
            sampling=pb.Sampling(max_tokens=options.max_tokens, temperature=options.temperature),
        )
        for response in stub.Generate(request):  # cancelling the call aborts the request
            for delta in response.deltas:
                print(delta.text, end="", flush=True)
            if response.finished:
                timing, usage = response.timing, response.usage
                print(
                    f"\n{usage.output_tokens} tokens; first after {timing.ttft_s * 1e3:.0f} ms, "
                    f"all after {timing.total_s * 1e3:.0f} ms"
                )


if __name__ == "__main__":
    main()
