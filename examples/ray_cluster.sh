#!/usr/bin/env bash
# A Ray cluster of several machines, step by step.
#
# As it stands, this script plays all machines on this one, so that every step can be seen to work: three Ray nodes
# on loopback, called big, mid and small. On real machines, run each step where its comment says, with the head's
# own address in place of 127.0.0.1.
#
#     bash examples/ray_cluster.sh
#
# HEXGEN and RAY may name other installations; hexgen must be installed on every machine, in the same version,
# and the checkpoint must lie at the same path (the bundled model comes with the installation).
set -euo pipefail
cd "$(dirname "$0")/.."
HEXGEN=${HEXGEN:-.venv/bin/hexgen}
RAY=${RAY:-.venv/bin/ray}
HEAD=${HEAD:-127.0.0.1}
PORT=${PORT:-6399}

scratch=$(mktemp -d)
nodes=()
serve=
finish() {
    if [ -n "$serve" ]; then kill -INT "$serve" 2>/dev/null && wait "$serve" || true; fi
    # Step 7. A node started with --block ends with its command, as with Ctrl-C; otherwise it is `ray stop`.
    for ((i = ${#nodes[@]} - 1; i >= 0; i--)); do kill -TERM "${nodes[i]}" 2>/dev/null && wait "${nodes[i]}" || true; done
    rm -rf "$scratch"
}
trap finish EXIT

# Start one Ray node in the background: name, then the options of `ray start`.
node() {
    local name=$1
    shift
    "$RAY" start "$@" --node-ip-address "$HEAD" --labels "hexgen.node=$name" --disable-usage-stats --block \
        >"$scratch/$name.log" 2>&1 &
    nodes+=($!)
    for _ in $(seq 240); do
        grep -q "Ray runtime started" "$scratch/$name.log" && return
        kill -0 "${nodes[-1]}" 2>/dev/null || { cat "$scratch/$name.log"; exit 1; }
        sleep 0.5
    done
}

echo "--- 1. on the machine you will work from: one token that every machine must show"
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d " \n")
export RAY_AUTH_TOKEN

echo "--- 2. on the head: start Ray; the label ties this machine to the node called big in the cluster file"
node big --head --port "$PORT" --num-cpus 2 --include-dashboard false --temp-dir "$scratch/ray"

echo "--- 3. on every other machine, with the same token in the environment: join"
node mid --address "$HEAD:$PORT" --num-cpus 1
node small --address "$HEAD:$PORT" --num-cpus 1

echo "--- 4. on the head: plan (or let 'hexgen discover --ray-address $HEAD:$PORT' write the cluster file first)"
"$HEXGEN" plan cluster_specs/demo.yaml -o "$scratch/plan.yaml"

echo "--- 5. on the head: generate once, then serve"
"$HEXGEN" generate "$scratch/plan.yaml" --ray-address "$HEAD:$PORT" --prompt "import os" --max-tokens 16 --temperature 0
"$HEXGEN" serve "$scratch/plan.yaml" --ray-address "$HEAD:$PORT" --port 0 --grpc-port 0 >"$scratch/serve.out" &
serve=$!
for _ in $(seq 240); do
    grep -q ready "$scratch/serve.out" && break
    kill -0 "$serve"
    sleep 0.5
done
url=$(sed -n 's/^ready http=\([^ ]*\) .*/\1/p' "$scratch/serve.out")
echo "serving at http://$url"
curl --silent --fail "http://$url/v1/completions" -H 'content-type: application/json' \
    -d '{"model": "demo", "prompt": "def main(", "max_tokens": 16, "temperature": 0}'
echo
echo "--- 6. stop serving: Ctrl-C"
echo "--- 7. stop Ray: Ctrl-C on every 'ray start --block', or 'ray stop'"
