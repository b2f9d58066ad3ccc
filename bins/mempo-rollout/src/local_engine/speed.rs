//! How fast trajectories go on beside others whose tool host hangs. The demo's base model decodes; since it has not learnt to
//! call tools, a script says what it wrote.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use mempo_agent::{
    Agent, Environment, Generated, LimitOptions, Mempo, OnToolFailure, RewardKind, Start, Tool, Toolbox,
};
use mempo_data::{Status, Task};
use mempo_model::DeviceOptions;
use mempo_text::Profile;
use serde_json::json;

use super::*;
use crate::http::Limits;
use crate::http::testing::{answer, serve};
use crate::http_tool::HttpTool;

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../pipelines/demo/base");
const HOSTS: usize = 4;
const TRAJECTORIES: usize = 64;
/// Calls of a trajectory, each before another completion.
const CALLS: usize = 3;

/// An engine whose model does all its work, and whose completions are then those of the script.
struct Scripted<'a> {
    engine: LocalEngine<'a>,
    tokenizer: &'a Tokenizer,
    /// Of each trajectory the host that it calls, and its completions so far.
    hosts: Vec<(usize, usize)>,
    start: Instant,
    /// Seconds until all ended that do not call host 0.
    seconds: f64,
    /// Set then.
    done: Arc<AtomicBool>,
}

impl Engine for Scripted<'_> {
    fn run(&mut self, requests: Vec<Request>, environment: &mut dyn Environment) -> Result<(), String> {
        let Self { engine, tokenizer, hosts, start, seconds, done } = self;
        engine.run(requests, &mut Replaced { environment, tokenizer, hosts, start: *start, seconds, done })
    }
}

struct Replaced<'e> {
    environment: &'e mut dyn Environment,
    tokenizer: &'e Tokenizer,
    hosts: &'e mut Vec<(usize, usize)>,
    start: Instant,
    seconds: &'e mut f64,
    done: &'e AtomicBool,
}

impl Environment for Replaced<'_> {
    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<Request> {
        let replaced = finished.into_iter().map(|(trajectory, generated)| {
            let (host, count) = &mut self.hosts[trajectory];
            *count += 1;
            let text = if *count <= CALLS {
                format!("<mem>m</mem><tool_call>{{\"name\": \"host{host}\", \"arguments\": {{}}}}</tool_call>")
            } else {
                "<mem>m</mem><answer>red</answer>".to_owned()
            };
            let ids = self.tokenizer.encode_plain(&text);
            let scripted = |_| Generation { logprobs: vec![0.0; ids.len()], ids, stop_reason: StopReason::StopString };
            (trajectory, generated.map(scripted))
        });
        let replaced = replaced.collect();
        if self.hosts.iter().all(|(host, count)| *host == 0 || *count > CALLS)
            && !self.done.swap(true, Ordering::Relaxed)
        {
            *self.seconds = self.start.elapsed().as_secs_f64();
        }
        self.environment.next(replaced)
    }

    fn waiting(&self) -> Vec<usize> {
        self.environment.waiting()
    }
}

/// A tool a host. Hosts think for 20 ms; host 0, if it hangs, until the trajectories that call others are done.
fn tools(hangs: bool, done: &Arc<AtomicBool>) -> Vec<Box<dyn Tool>> {
    let limit = Duration::from_mins(5);
    let limits =
        Limits { attempt: limit, call: None, retries: 0, answer_bytes: 1000, per_minute: None, leaves_alone: true };
    let tool = |host: usize| -> Box<dyn Tool> {
        let done = Arc::clone(done);
        let url = serve(move |_, _| {
            std::thread::sleep(Duration::from_millis(20));
            while hangs && host == 0 && !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            answer("200 OK", "", "It is red.")
        });
        let named = json!({"name": format!("host{host}"), "description": "Tells.", "parameters": {}, "url": url});
        Box::new(HttpTool::new(serde_json::from_value(named).unwrap(), limits.clone()))
    };
    (0..HOSTS).map(tool).collect()
}

/// Seconds that the trajectories take that do not call host 0.
fn seconds(model: &Model, hosts: &[usize], hangs: bool) -> f64 {
    let done = Arc::new(AtomicBool::new(false));
    let tools = tools(hangs, &done);
    let specs: Vec<_> = tools.iter().map(|tool| tool.spec()).collect();
    let profile = Profile::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../../pipelines/demo/profiles/mempo")).unwrap();
    let builder = PromptBuilder::load(BASE.as_ref(), profile, &specs).unwrap();
    let sampling = SamplingOptions { temperature: 1.0, top_p: 1.0, max_completion_tokens: 48 };
    let task = Task {
        task_id: "a".to_owned(),
        source: String::new(),
        split: String::new(),
        question: "What colour is it?".to_owned(),
        objectives: Vec::new(),
        document: None,
        document_ref: None,
        metadata: None,
    };
    let agent = Agent {
        builder: &builder,
        context: &Mempo { carry: mempo_agent::Carry::Step, steps: 1, max_memory_tokens: None },
        toolbox: &Toolbox::new(tools, 0).unwrap(),
        limits: &LimitOptions {
            max_steps: CALLS + 1,
            max_prompt_tokens: 1900,
            max_observation_tokens: 100,
            max_tool_calls: None,
            on_tool_failure: OnToolFailure::Stop,
            top_k: 1,
        },
        reward: RewardKind::default(),
        policy: String::new(),
        seed: 1,
        seed_of: &|_, trajectory, step| (trajectory * 100 + step) as u64,
    };
    let engine = LocalEngine::new(model, &builder, &sampling, TRAJECTORIES, &|| false);
    let start = Instant::now();
    let hosts_and_counts = hosts.iter().map(|host| (*host, 0)).collect();
    let tokenizer = builder.tokenizer();
    let mut engine = Scripted { engine, tokenizer, hosts: hosts_and_counts, start, seconds: f64::NAN, done };
    let starts = (0..hosts.len() as i32).map(|trajectory_index| Start {
        task: &task,
        trajectory_index,
        steps: &[],
        document: &[],
    });
    let unit = agent.run(&mut engine, starts.collect()).unwrap();
    assert!(unit.trajectories.iter().all(|row| (row.status, row.tool_calls as usize) == (Status::Ok, CALLS)));
    engine.seconds
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    device: DeviceOptions,
}

#[test]
#[ignore = "measures speed: `cargo test -- --ignored hung_host`"]
#[expect(clippy::print_stdout, reason = "the figures are what it is run for")]
fn a_hung_host_leaves_trajectories_that_call_others_their_speed() {
    let device = Line::parse_from(["speed", "--device", "cpu"]).device;
    let model = Model::load(BASE.as_ref(), &device.resolve().unwrap()).unwrap();
    let all: Vec<usize> = (0..TRAJECTORIES).map(|trajectory| trajectory % HOSTS).collect();
    let others: Vec<usize> = all.iter().copied().filter(|host| *host > 0).collect();
    let (mut well, mut alone, mut beside) = (0.0, 0.0, 0.0);
    seconds(&model, &all, false);
    // In turns, so that whatever else the machine does falls on all.
    for _ in 0..3 {
        well += seconds(&model, &all, false);
        alone += seconds(&model, &others, false);
        beside += seconds(&model, &all, true);
    }
    println!("{well:.3} s all well, {alone:.3} s the others alone, {beside:.3} s beside a host that hangs");
    // Alone they lack what the hung ones write before their first call.
    assert!(well / beside >= 0.95, "{well:.3} {alone:.3} {beside:.3}");
}
