#!/usr/bin/env bash
# Holds `mempo-rollout sample` by a server to the engine here: the same greedy trajectories, log-probabilities that
# `mempo-score` confirms, and of a server of texts the same first tokens.
#
#   tools/peers/serving.sh reference|vllm|llama PORT
set -euo pipefail
kind=$1 port=$2 data=runs/demo-1 model=pipelines/demo/base out=runs/serving
rollout=target/debug/mempo-rollout url=http://127.0.0.1:$port
python=.tools/python/bin/python
if [ ! -f $data/index/manifest.json ]; then MEMPO_SEED=1 ./just demo data; fi

sample() { # NAME TEMPERATURE MORE
    $rollout sample --tasks $data/tasks-dev --model $model --search $data/index --profile pipelines/demo/profiles/mempo --max-tasks 6 --group-size 1 --max-steps 4 --max-completion-tokens 64 --temperature "$2" --dtype f32 --device cpu --restart --out $out/"$1" "${@:3}"
}

serve() { # PORT COMMAND
    "${@:2}" &
    trap 'kill $(jobs -pr) 2> /dev/null || true' EXIT
    until (echo > /dev/tcp/127.0.0.1/"$1") 2> /dev/null; do kill -0 $!; sleep 1; done
}

same() { # NAME
    cmp $out/here/trajectories/part-00000.parquet $out/"$1"/trajectories/part-00000.parquet
    echo "the same trajectories here and by $1"
}

# vLLM's protocol at temperatures 0 and 0.7.
hold_vllm() {
    sample here 0
    sample vllm 0 --server $url
    same vllm
    sample warm 0.7 --server $url
    target/debug/mempo-score logprobs --rollouts $out/warm --model $model --dtype f32 --device cpu --restart --out $out/logprobs
}

case $kind in
reference)
    serve "$port" $python tools/peers/serve.py $model vllm "$port" "$($rollout served-name --model $model)"
    hold_vllm
    other=$((port + 1)) url=http://127.0.0.1:$((port + 1))
    serve $other $python tools/peers/serve.py $model sglang $other another
    if sample sglang 0 --server $url; then echo "other weights were not noticed" >&2; exit 1; fi
    sample sglang 0 --server $url --update-server
    same sglang
    ;;
vllm)
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
    serve "$port" .tools/vllm/bin/python -m vllm.entrypoints.openai.api_server --model "$PWD/$model" --served-model-name "$($rollout served-name --model $model)" --logprobs-mode processed_logprobs --dtype float32 --max-model-len 2048 --max-num-seqs 16 --enforce-eager --host 127.0.0.1 --port "$port"
    hold_vllm
    if sample cut 0.7 --top-p 0.9 --server $url; then echo "log-probabilities of another distribution were not noticed" >&2; exit 1; fi
    ;;
llama)
    model=runs/smollm2/model
    .tools/gguf/bin/python tools/peers/unquantise.py .tools/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $out/smollm2-f32.gguf
    sample llama-here 0
    serve "$port" .tools/llama/bin/python -m llama_cpp.server --model $out/smollm2-f32.gguf --model_alias smollm2 --n_ctx 2048 --host 127.0.0.1 --port "$port"
    for interface in completions chat; do
        sample llama-$interface 0 --teacher $url --teacher-model smollm2 --teacher-interface $interface --teacher-fields '{"repeat_penalty": 1.0}' --concurrency 1
        $python tools/peers/beginnings.py $out/llama-here $out/llama-$interface 32
    done
    ;;
esac
