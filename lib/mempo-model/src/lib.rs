//! Decoder-only language models on libtorch: load and save Hugging Face directories, run them forward, generate with a
//! key-value cache, score completions. Beside them an encoder of texts (`bert`, `encoder`), and the search among its `vectors`.
//!
//! Takes and gives token ids; knows nothing of text, prompts, rewards or files other than a model's own. One file a
//! family (`qwen2`, `qwen3`, `llama`) in reading order, with Hugging Face's field names; `blocks` holds what they share.
//!
//! Shapes are written as letters: `B` rows of a batch, `T` tokens, `D` hidden size, `H` attention heads, `K` key-value
//! heads, `d` head size, `V` vocabulary.

mod adapter;
mod bert;
mod blocks;
mod branches;
mod builder;
mod cache;
mod checkpoint;
mod config;
mod encoder;
mod error;
mod generate;
mod initialise;
mod kernels;
mod libtorch;
mod llama;
mod model;
mod packed;
mod qwen2;
mod qwen3;
mod random;
mod rotary;
mod runtime;
mod sampler;
mod score;
mod share;
mod vectors;
mod weights;

pub use adapter::initial_adapter;
pub use bert::EncoderConfig;
pub use branches::{Branch, Trunk};
pub use checkpoint::save_checkpoint;
pub use config::{Config, Family};
pub use encoder::{EmbedOptions, Embeddings, Encoder, Pooling};
pub use error::Error;
pub use generate::{Finish, GenerateEvents, GenerateOptions, GenerateRequest, Generated, generate, generate_each};
pub use libtorch::Libtorch;
pub use model::{Model, Pieces, Rows};
pub use packed::Packed;
pub use random::{counter_hash, counter_uniform};
pub use runtime::{DeviceOptions, Runtime};
pub use score::{ScoreOptions, ScoredSequence, logprobs_at};
pub use vectors::{Vectors, write_vectors};
