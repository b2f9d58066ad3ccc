//! What is said to a server and what it answers: token ids in, token ids with log-probabilities out. (What speaks in texts is
//! asked in [`super::teacher`].)
//!
//! vLLM: `POST /v1/completions` of its OpenAI-compatible server, with `return_token_ids` (0.10.2 or newer). SGLang:
//! `POST /generate` of its native one. Text is never encoded again: a server that gives no ids is refused.

use mempo_agent::{Generation, Request, SamplingOptions};
use mempo_data::StopReason;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::http::Failure;

/// What an answer holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    /// Token ids with log-probabilities.
    Ids(Generation),
    /// Text alone: ids are made of it here, and their log-probabilities nobody knows.
    Text(String, StopReason),
}

/// How completions are asked for and read.
pub(crate) trait Protocol: Send + Sync {
    /// Where a completion is asked for.
    fn path(&self) -> &'static str;
    /// The body that asks for one.
    fn question(&self, request: &Request) -> Value;
    /// What an answer holds.
    fn reply(&self, answer: &Value) -> Result<Reply, Failure>;
    /// Whether requests are to hold their prompts as messages.
    fn wants_messages(&self) -> bool {
        false
    }
}

impl Protocol for Asking {
    fn path(&self) -> &'static str {
        match self.kind {
            Kind::Vllm => "/v1/completions",
            Kind::Sglang => "/generate",
        }
    }

    fn question(&self, request: &Request) -> Value {
        self.body(request, 0)
    }

    fn reply(&self, answer: &Value) -> Result<Reply, Failure> {
        self.generation(answer).map(Reply::Ids)
    }
}

/// The two protocols that carry ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// vLLM, or what speaks as it does.
    Vllm,
    /// SGLang.
    Sglang,
}

/// What is the same in all requests.
#[derive(Debug, Clone)]
pub(crate) struct Asking {
    pub(crate) kind: Kind,
    /// What vLLM calls the model.
    pub(crate) model: String,
    /// What SGLang has to call its weights, unless it is trusted.
    pub(crate) weights: Option<String>,
    pub(crate) sampling: SamplingOptions,
    /// Texts that end a completion; they stay in it.
    pub(crate) stop: Vec<String>,
    pub(crate) end_ids: Vec<i32>,
    /// Never to be sampled.
    pub(crate) banned_ids: Vec<i32>,
    /// Ids are below.
    pub(crate) vocabulary_size: usize,
}

impl Asking {
    /// The body that asks for one completion, with log-probabilities of the `alternatives` most probable tokens beside.
    ///
    /// What changes the distribution is said even where it changes nothing: servers take what is not said from the model's
    /// `generation_config.json`.
    pub(crate) fn body(&self, request: &Request, alternatives: usize) -> Value {
        let SamplingOptions { temperature, top_p, max_completion_tokens } = &self.sampling;
        let bias: Map<String, Value> = self.banned_ids.iter().map(|id| (id.to_string(), json!(-100))).collect();
        match self.kind {
            Kind::Vllm => json!({
                "model": self.model,
                "prompt": request.prompt_ids,
                "max_tokens": max_completion_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "logit_bias": bias,
                // Signed 64 bits hold it.
                "seed": request.seed >> 1,
                "logprobs": alternatives,
                "return_token_ids": true,
                "return_tokens_as_token_ids": true,
                "add_special_tokens": false,
                "skip_special_tokens": false,
                "stop": self.stop,
                "stop_token_ids": self.end_ids,
                "include_stop_str_in_output": true,
            }),
            Kind::Sglang => json!({
                "input_ids": request.prompt_ids,
                "sampling_params": {
                    "max_new_tokens": max_completion_tokens,
                    "temperature": temperature,
                    "top_p": top_p,
                    "top_k": -1,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "presence_penalty": 0.0,
                    "frequency_penalty": 0.0,
                    "logit_bias": bias,
                    "sampling_seed": request.seed >> 33,
                    "stop": self.stop,
                    "stop_token_ids": self.end_ids,
                    "skip_special_tokens": false,
                    "no_stop_trim": true,
                },
                "return_logprob": true,
                "logprob_start_len": -1,
                "top_logprobs_num": alternatives,
            }),
        }
    }

    /// The completion that an answer holds.
    pub(crate) fn generation(&self, answer: &Value) -> Result<Generation, Failure> {
        self.check_weights(answer)?;
        if self.finish(answer).0 == "abort" {
            return Err(Failure::Passing("it broke off a completion".to_owned(), None));
        }
        self.read(answer).map_err(Failure::One)
    }

    /// The same; the error says what is lacking.
    fn read(&self, answer: &Value) -> Result<Generation, String> {
        let (ids, logprobs) = match self.kind {
            Kind::Vllm => {
                let choice = &answer["choices"][0];
                (numbers(&choice["token_ids"]), numbers(&choice["logprobs"]["token_logprobs"]))
            }
            Kind::Sglang => {
                let logprobs = answer["meta_info"]["output_token_logprobs"].as_array();
                let first = |pairs: &Vec<Value>| pairs.iter().map(|pair| pair[0].as_f64()).collect();
                (numbers(&answer["output_ids"]), logprobs.and_then(first))
            }
        };
        let ids = ids.ok_or("it gives no token ids (vLLM does from 0.10.2 on)")?;
        let logprobs = logprobs.ok_or("it gives no log-probabilities")?;
        if ids.len() != logprobs.len() {
            return Err(format!("it gives {} token ids and {} log-probabilities", ids.len(), logprobs.len()));
        }
        let ids: Vec<i32> = ids.into_iter().map(|id| self.known(id)).collect::<Result<_, _>>()?;
        if let Some(found) = logprobs.iter().find(|logprob| !(logprob.is_finite() && **logprob <= 1e-3)) {
            return Err(format!("it gives {found} as a log-probability"));
        }
        let logprobs = logprobs.into_iter().map(|logprob| logprob.min(0.0) as f32).collect();
        Ok(Generation { stop_reason: self.stop_reason(answer, &ids)?, ids, logprobs })
    }

    fn known(&self, id: f64) -> Result<i32, String> {
        let is_known = id.fract() == 0.0 && id >= 0.0 && id < self.vocabulary_size as f64;
        if is_known { Ok(id as i32) } else { Err(format!("it gives {id} as a token id of {}", self.vocabulary_size)) }
    }

    /// SGLang says with every answer which weights it has.
    fn check_weights(&self, answer: &Value) -> Result<(), Failure> {
        let found = &answer["meta_info"]["weight_version"];
        match &self.weights {
            Some(expected) if found != expected.as_str() => {
                Err(Failure::Final(format!("its weights are {found}, not \"{expected}\": give --update-server")))
            }
            _ => Ok(()),
        }
    }

    /// How a completion ended, and what ended it.
    fn finish<'v>(&self, answer: &'v Value) -> (&'v Value, &'v Value) {
        match self.kind {
            Kind::Vllm => {
                let choice = &answer["choices"][0];
                (&choice["finish_reason"], &choice["stop_reason"])
            }
            Kind::Sglang => {
                let finish = &answer["meta_info"]["finish_reason"];
                (&finish["type"], &finish["matched"])
            }
        }
    }

    fn stop_reason(&self, answer: &Value, ids: &[i32]) -> Result<StopReason, String> {
        let (finish, matched) = self.finish(answer);
        match finish.as_str() {
            Some("length") => Ok(StopReason::MaxTokens),
            Some("stop") if ids.last().is_some_and(|id| self.end_ids.contains(id)) => Ok(StopReason::Eos),
            Some("stop") if matched.is_string() => Ok(StopReason::StopString),
            Some("stop") => Ok(StopReason::Eos),
            _ => Err(format!("it ended a completion with {finish}")),
        }
    }

    /// The log-probabilities of the most probable first tokens of an answer with alternatives, the highest first.
    pub(crate) fn most_probable(&self, answer: &Value) -> Vec<f64> {
        let mut found: Vec<f64> = match self.kind {
            Kind::Vllm => {
                let first = answer["choices"][0]["logprobs"]["top_logprobs"][0].as_object();
                first.into_iter().flat_map(Map::values).filter_map(Value::as_f64).collect()
            }
            Kind::Sglang => {
                let first = answer["meta_info"]["output_top_logprobs"][0].as_array();
                first.into_iter().flatten().filter_map(|pair| pair[0].as_f64()).collect()
            }
        };
        found.sort_by(|one, other| other.total_cmp(one));
        found
    }
}

fn numbers(list: &Value) -> Option<Vec<f64>> {
    list.as_array()?.iter().map(Value::as_f64).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn asking(kind: Kind) -> Asking {
        Asking {
            kind,
            model: "mempo-1".to_owned(),
            weights: (kind == Kind::Sglang).then(|| "mempo-1".to_owned()),
            sampling: SamplingOptions { temperature: 0.7, top_p: 1.0, max_completion_tokens: 9 },
            stop: vec!["</answer>".to_owned()],
            end_ids: vec![2],
            banned_ids: vec![1, 7],
            vocabulary_size: 100,
        }
    }

    /// An answer of a server in its own form.
    pub(crate) fn answer(kind: Kind, ids: &[i32], finish: &str, matched: &Value) -> Value {
        let logprobs: Vec<f64> = ids.iter().map(|id| -f64::from(*id) / 64.0).collect();
        match kind {
            Kind::Vllm => json!({"choices": [{
                "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish, "stop_reason": matched,
            }]}),
            Kind::Sglang => {
                let pairs: Vec<Value> =
                    ids.iter().zip(logprobs).map(|(id, logprob)| json!([logprob, id, null])).collect();
                json!({"output_ids": ids, "meta_info": {
                    "output_token_logprobs": pairs, "finish_reason": {"type": finish, "matched": matched},
                    "weight_version": "mempo-1",
                }})
            }
        }
    }

    #[test]
    fn answers_become_generations() {
        for kind in [Kind::Vllm, Kind::Sglang] {
            let read = |ids: &[i32], finish: &str, matched: Value| {
                asking(kind)
                    .generation(&answer(kind, ids, finish, &matched))
                    .map(|found| (found.ids, found.stop_reason))
            };
            assert_eq!(read(&[5, 6], "length", json!(null)), Ok((vec![5, 6], StopReason::MaxTokens)));
            assert_eq!(read(&[5, 6], "stop", json!("</answer>")), Ok((vec![5, 6], StopReason::StopString)));
            assert_eq!(read(&[5, 2], "stop", json!(2)), Ok((vec![5, 2], StopReason::Eos)));
            assert_eq!(read(&[], "stop", json!(null)), Ok((vec![], StopReason::Eos)));
            let found = asking(kind).generation(&answer(kind, &[0, 32], "length", &json!(null))).unwrap();
            assert_eq!(found.logprobs, [0.0, -0.5]);
            let odd = Failure::One("it gives 100 as a token id of 100".to_owned());
            assert_eq!(read(&[100], "stop", json!(null)), Err(odd));
            assert!(matches!(read(&[5], "abort", json!(null)), Err(Failure::Passing(..))));
            assert!(matches!(read(&[5], "moved", json!(null)), Err(Failure::One(_))));
        }
    }

    #[test]
    fn nothing_of_the_distribution_is_left_to_the_server() {
        let request = Request { trajectory: 0, prompt_ids: vec![5], messages: Vec::new(), seed: u64::MAX };
        let vllm = asking(Kind::Vllm).body(&request, 0);
        let sglang = asking(Kind::Sglang).body(&request, 0)["sampling_params"].clone();
        assert_eq!((&vllm["top_k"], &sglang["top_k"]), (&json!(0), &json!(-1)));
        for said in [vllm, sglang] {
            assert_eq!(said["logit_bias"], json!({"1": -100, "7": -100}));
            for (name, neutral) in
                [("min_p", 0.0), ("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)]
            {
                assert_eq!(said[name], json!(neutral), "{name}");
            }
            assert_eq!(said["temperature"], json!(0.7));
        }
    }

    #[test]
    fn answers_that_lack_something_are_refused() {
        let refused = |kind: Kind, pointer: &str, value: Value, told: &str| {
            let mut answer = answer(kind, &[5, 6], "length", &json!(null));
            *answer.pointer_mut(pointer).unwrap() = value;
            let (Failure::One(error) | Failure::Final(error)) = asking(kind).generation(&answer).unwrap_err() else {
                panic!("it will not pass")
            };
            assert!(error.contains(told), "{error}");
        };
        refused(Kind::Vllm, "/choices/0/token_ids", json!(null), "no token ids (vLLM does from 0.10.2 on)");
        refused(Kind::Vllm, "/choices/0/logprobs", json!(null), "no log-probabilities");
        refused(Kind::Vllm, "/choices/0/token_ids", json!([5]), "1 token ids and 2 log-probabilities");
        refused(Kind::Vllm, "/choices/0/logprobs/token_logprobs/0", json!(0.5), "0.5 as a log-probability");
        refused(Kind::Vllm, "/choices", json!([]), "no token ids");
        refused(Kind::Sglang, "/meta_info/weight_version", json!("default"), "its weights are \"default\"");
        refused(Kind::Sglang, "/meta_info/output_token_logprobs/1", json!([null, 6, "x"]), "no log-probabilities");
    }

    #[test]
    fn the_most_probable_tokens_are_found() {
        let vllm = json!({"choices": [{"logprobs": {"top_logprobs": [{"token_id:7": -3.0, "token_id:9": -0.1}]}}]});
        assert_eq!(asking(Kind::Vllm).most_probable(&vllm), [-0.1, -3.0]);
        let sglang = json!({"meta_info": {"output_top_logprobs": [[[-0.1, 9, null], [-3.0, 7, null]]]}});
        assert_eq!(asking(Kind::Sglang).most_probable(&sglang), [-0.1, -3.0]);
        assert!(asking(Kind::Sglang).most_probable(&vllm).is_empty());
    }
}
