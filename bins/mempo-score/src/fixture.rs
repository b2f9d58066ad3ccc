//! A small chain of finished stages for tests: a tiny random model, tasks, and a rollout of it.

use std::path::{Path, PathBuf};

use clap::Parser;
use mempo_agent::{ContextPolicy, Mempo, Past, row_segments};
use mempo_data::{Objective, Row, SegmentKind, Status, Step, StopReason, Task, Trajectory, read_rows, write_rows};
use mempo_model::{Config, DeviceOptions, Model, ScoreOptions, ScoredSequence};
use mempo_run::{Failure, Input, Stage, StageArgs};
use mempo_text::{NewTokenizer, Profile, PromptBuilder, ToolSpec, parse_completion, train_tokenizer};
use serde_json::json;
use tempfile::TempDir;

use crate::normalise::{Combine, Estimator, MemoryApply, MemoryScope, MemorySteps, NormaliseOptions};

/// One more than a unit, so that there are two.
pub(crate) const TASKS: usize = 17;
const COLOURS: [&str; 5] = ["red", "blue", "green", "white", "black"];

/// A trajectory with the given exact matches, 100 tokens in all.
pub(crate) fn trajectory(task_id: &str, trajectory_index: i32, exact_match: &[f32]) -> Trajectory {
    let right = exact_match.iter().all(|&value| value >= 1.0);
    Trajectory {
        task_id: task_id.to_owned(),
        trajectory_index,
        step_count: 0,
        status: Status::Ok,
        answer: None,
        format_valid: true,
        exact_match: exact_match.to_vec(),
        f1: exact_match.to_vec(),
        reward: Some(f32::from(u8::from(right))),
        generated_tokens: 10,
        processed_tokens: 100,
        unique_tokens: 50,
        peak_tokens: 40,
        tool_calls: 2,
        error: None,
        policy: "policy".to_owned(),
        seed: 0,
    }
}

/// Finished stages in a temporary folder: `model`, `tasks`, `rollouts`.
pub(crate) struct Chain {
    directory: TempDir,
    pub(crate) tasks: Vec<Task>,
    pub(crate) trajectories: Vec<Trajectory>,
    pub(crate) steps: Vec<Step>,
}

impl Chain {
    /// Two trajectories a task, right and wrong by turns; the last task's second one is broken by its engine.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_model(&directory.path().join("model"), 1);
        make_profile(&directory.path().join("profile"));
        let mut chain = Self { directory, tasks: vec![], trajectories: vec![], steps: vec![] };
        let builder = chain.builder();
        let digest = Input::model("model", &chain.path("model")).unwrap().digest().to_owned();
        for task in 0..TASKS {
            let task = make_task(task);
            for trajectory_index in 0..2 {
                let steps = make_steps(&builder, &task, trajectory_index);
                let right = (trajectory_index as usize + chain.tasks.len()).is_multiple_of(2);
                let mut row = trajectory(&task.task_id, trajectory_index, &[1.0, f32::from(u8::from(right))]);
                row.step_count = steps.len() as i32;
                row.policy = digest.clone();
                chain.trajectories.push(row);
                chain.steps.extend(steps);
            }
            chain.tasks.push(task);
        }
        let last = chain.trajectories.last_mut().unwrap();
        (last.reward, last.status) = (None, Status::EngineError);
        chain.sample_logprobs();
        chain.write();
        chain
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn builder(&self) -> PromptBuilder {
        let profile = Profile::load(&self.path("profile").display().to_string()).unwrap();
        PromptBuilder::load(&self.path("model"), profile, &[ToolSpec::search()]).unwrap()
    }

    pub(crate) fn model(&self) -> Model {
        Model::load(&self.path("model"), &device().resolve().unwrap()).unwrap()
    }

    /// Log-probabilities of `answer` after `context`, scored alone.
    pub(crate) fn logprobs(model: &Model, context: &[i32], answer: &[i32]) -> Vec<f32> {
        let ids = [context, answer].concat();
        let sequence = ScoredSequence { targets: context.len()..ids.len(), ids };
        let options = ScoreOptions { temperature: 1.0, tokens_per_batch: 1 };
        model.completion_logprobs(&[sequence], &options).unwrap().remove(0)
    }

    fn sample_logprobs(&mut self) {
        let model = self.model();
        for step in &mut self.steps {
            step.sampling_logprobs = Self::logprobs(&model, &step.prompt_ids, &step.completion_ids);
        }
    }

    /// Writes (again) the stages `tasks` and `rollouts` from the rows.
    pub(crate) fn write(&self) {
        write_stage(&self.path("tasks"), &json!({}), &[], |stage| write_table(stage, &self.tasks));
        self.write_rollouts("rollouts");
    }

    /// Writes the rows as a rollout of that name.
    pub(crate) fn write_rollouts(&self, name: &str) {
        self.write_rollouts_with(name, None);
    }

    /// The same of a rollout whose memories were capped.
    pub(crate) fn write_rollouts_with(&self, name: &str, max_memory_tokens: Option<usize>) {
        let profile = self.path("profile");
        let arguments = json!({
            "profile": profile, "context": "mempo", "temperature": 1.0, "top_p": 1.0, "group_size": 2,
            "max_memory_tokens": max_memory_tokens,
        });
        write_stage(&self.path(name), &arguments, &[], |stage| {
            write_table(stage, &self.trajectories);
            write_table(stage, &self.steps);
        });
    }

    /// Writes two continuations from every memory of the rollout, with the rewards of `reward` by trajectory; `option` is one
    /// more option that they were sampled with.
    pub(crate) fn write_continuations(&self, name: &str, option: [&str; 2], reward: impl Fn(i32) -> f32) {
        let from = Input::stage("from", &self.path("rollouts")).unwrap();
        let [option, value] = option;
        let arguments = json!({"group_size": 2, "max_steps": 8, option: value});
        let remembers = |step: &&Step| step.segments.iter().any(|segment| segment.kind == SegmentKind::Memory);
        let rows: Vec<Trajectory> = self
            .steps
            .iter()
            .filter(remembers)
            .flat_map(|step| {
                let first = (step.trajectory_index * 8 + step.step_index) * 2;
                let value = reward(step.trajectory_index);
                (first..first + 2).map(move |index| trajectory(&step.task_id, index, &[value, 1.0]))
            })
            .collect();
        write_stage(&self.path(name), &arguments, &[&from], |stage| write_table(stage, &rows));
    }

    /// Runs `mempo-score` with words split on white space; `@` is the folder.
    pub(crate) fn run(&self, line: &str) -> anyhow::Result<()> {
        crate::run(crate::Arguments::try_parse_from(self.words(line)).unwrap())
    }

    fn words(&self, line: &str) -> Vec<String> {
        let folder = format!("{}/", self.directory.path().display());
        let words = line.split_whitespace().map(|word| word.replace('@', &folder));
        std::iter::once("mempo-score".to_owned()).chain(words).collect()
    }

    /// The rows of a table of a finished stage.
    pub(crate) fn rows<R: Row>(&self, stage: &str) -> Vec<R> {
        let input = Input::stage("test", &self.path(stage)).unwrap();
        read_rows(&input.table(R::TABLE).unwrap()).unwrap().collect::<Result<_, _>>().unwrap()
    }

    /// What `evaluate` reports as JSON.
    pub(crate) fn report(&self, line: &str) -> serde_json::Value {
        self.run(&format!("evaluate {line} --json --out @report.json")).unwrap();
        serde_json::from_str(&fs_err::read_to_string(self.path("report.json")).unwrap()).unwrap()
    }

    pub(crate) fn summary(&self, stage: &str) -> serde_json::Value {
        let text = fs_err::read_to_string(self.path(stage).join("manifest.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["summary"].clone()
    }
}

/// The failure an error carries, and its text.
pub(crate) fn failure(error: &anyhow::Error) -> (&Failure, String) {
    let failure = error.chain().find_map(|cause| cause.downcast_ref()).expect("an error of a known kind");
    (failure, format!("{error:#}"))
}

/// The defaults of the command line.
pub(crate) fn normalise_options() -> NormaliseOptions {
    NormaliseOptions {
        estimator: Estimator::Mempo,
        combine: Combine::Advantages,
        alpha_end: None,
        progress: 0.0,
        memory_scope: MemoryScope::PerStep,
        memory_apply: MemoryApply::All,
        memory_steps: MemorySteps::All,
        min_memory_group: 4,
        alpha: 1.0,
        std_floor: 1e-6,
        memory_std_floor: 0.05,
        no_std: false,
    }
}

/// One thread of the CPU, in float32.
pub(crate) fn device() -> DeviceOptions {
    DeviceOptions { device: "cpu".to_owned(), dtype: "f32".to_owned(), threads: Some(1), deterministic: false }
}

/// A tiny model with random weights and a tokenizer of the fixture's own words.
pub(crate) fn make_model(directory: &Path, seed: u64) {
    fs_err::create_dir_all(directory).unwrap();
    let words = "<mem>red = blue; green</mem><think>next</think><tool_call>{\"name\": \"search\"}</tool_call><answer>white; black</answer>";
    train_tokenizer(std::iter::repeat_n(words.to_owned(), 4), &NewTokenizer::of_size(300), directory).unwrap();
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.4, "torch_dtype": "float32"
    });
    fs_err::write(directory.join("config.json"), config.to_string()).unwrap();
    let runtime = device().resolve().unwrap();
    let model = Model::initialise(Config::load(directory).unwrap(), seed, &runtime).unwrap();
    model.save_weights(directory, runtime.kind).unwrap();
}

/// Our profile with next to no rules: short prompts make quick tests.
fn make_profile(directory: &Path) {
    fs_err::create_dir_all(directory).unwrap();
    let profile = json!({
        "name": "short", "user": "{question}", "stop": ["</tool_call>", "</answer>"], "memory": "required",
        "observation": "<information>{results}</information>", "document": "{i} {title} {text}"
    });
    fs_err::write(directory.join("profile.json"), profile.to_string()).unwrap();
    fs_err::write(directory.join("system.txt"), "Answer.").unwrap();
}

fn make_task(number: usize) -> Task {
    let colour = |place: usize| COLOURS[(number + place) % COLOURS.len()];
    let objective = |place: usize| Objective {
        question: format!("Colour {place} of {number}?"),
        answers: vec![colour(place).to_owned(), "any".to_owned()],
    };
    Task {
        task_id: format!("task-{number:02}"),
        source: if number.is_multiple_of(2) { "even" } else { "odd" }.to_owned(),
        split: "train".to_owned(),
        question: format!("Colour 0 of {number}?; Colour 1 of {number}?"),
        objectives: vec![objective(0), objective(1)],
        document: None,
        document_ref: None,
        metadata: Some(json!({"entities": [format!("number-{}", number / 2)]}).to_string()),
    }
}

/// Three steps: nothing known, one colour known, both (in the second trajectory the wrong one).
fn make_steps(builder: &PromptBuilder, task: &Task, trajectory_index: i32) -> Vec<Step> {
    let call = "<tool_call>{\"name\": \"search\", \"arguments\": {\"query\": \"colour\"}}</tool_call>";
    let colour = |place: usize| &task.objectives[(place + trajectory_index as usize) % 2].answers[0];
    let texts = [
        format!("<mem></mem><think>first</think>{call}"),
        format!("<mem>0 = {}</mem><think>next</think>{call}", colour(0)),
        format!("<mem>0 = {}; 1 = {}</mem><answer>{}; {}</answer>", colour(0), colour(1), colour(0), colour(1)),
    ];
    let mut steps: Vec<Step> = Vec::new();
    for (step_index, text) in (0..).zip(texts) {
        let completion_ids = builder.completion_ids_from_text(&text);
        let parsed = parse_completion(builder.tokenizer(), &completion_ids, builder.profile());
        let last = step_index == 2;
        let past = Past { question: &task.question, steps: &steps, document: &[], builder };
        let prompt_ids = builder.prompt(&task.question, &Mempo::default().carried(&past)).unwrap();
        steps.push(Step {
            task_id: task.task_id.clone(),
            trajectory_index,
            step_index,
            prompt_ids,
            segments: row_segments(&parsed),
            completion: parsed.text,
            sampling_logprobs: vec![0.0; completion_ids.len()],
            completion_ids,
            observation: (!last).then(|| "found".to_owned()),
            observation_ids: (!last).then(|| builder.observation_ids("found", None)),
            stop_reason: StopReason::StopString,
        });
    }
    steps
}

/// Writes a finished stage, in place of one that is there.
fn write_stage(out: &Path, arguments: &serde_json::Value, inputs: &[&Input], write: impl FnOnce(&Stage)) {
    let arguments_of_stage = StageArgs { out: out.to_path_buf(), seed: 0, restart: true, shard: None };
    let stage = Stage::open("test", "test", &arguments_of_stage, arguments, inputs).unwrap().unwrap();
    write(&stage);
    stage.finish(&[], json!({})).unwrap();
}

fn write_table<R: Row>(stage: &Stage, rows: &[R]) {
    stage.write_part(R::TABLE, 0, |file| Ok(write_rows(rows, file).map(drop)?)).unwrap();
}
