//! Rollouts whose completions come from a script behind vLLM's protocol, and whose tools are elsewhere.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use clap::Parser;
use mempo_agent::{Bm25Options, SearchIndex};
use mempo_data::{Status, Step, Trajectory, read_rows};
use mempo_text::{NewTokenizer, Tokenizer, train_tokenizer};
use serde_json::{Value, json};

use super::*;
use crate::http::testing::{Reply, serve};
use crate::index::INDEX_FOLDER;
use crate::retrieval::{Served, serve as serve_search};

/// What the script writes first, by the question's last words, and what it writes once it has seen something.
type Script = fn(&str) -> String;

fn search(wanted: &str) -> String {
    format!(
        r#"<think>seeking</think><tool_call>{{"name": "search", "arguments": {{"query": "{wanted}"}}}}</tool_call>"#
    )
}

struct Setting {
    folder: tempfile::TempDir,
    generator: String,
    /// Answers that the script has written.
    answers: Arc<AtomicUsize>,
}

impl Setting {
    /// Six tasks that ask where a city is, a corpus, its index, and a model that `script` speaks for.
    fn new(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let lines = |name: &str, rows: Vec<Value>| {
            let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
            fs_err::write(folder.path().join(name), lines.join("\n")).unwrap();
        };
        let question =
            |i: usize| json!({"question": format!("Where is city {}", i % 4), "answer": format!("land {i}")});
        lines("questions.jsonl", (0..6).map(question).collect());
        let document = |i: usize| json!({"id": i, "contents": format!("\"City {i}\"\nCity {i} is in land {i}.")});
        lines("corpus.jsonl", (0..5).map(document).collect());
        let model = folder.path().join("model");
        let text = "Where is city 1?; land 2 <mem></mem><think></think><answer></answer><tool_call></tool_call>";
        train_tokenizer(std::iter::repeat_n(text.to_owned(), 3), &NewTokenizer::of_size(300), &model).unwrap();
        let config = json!({
            "model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 16384,
        });
        fs_err::write(model.join("config.json"), config.to_string()).unwrap();
        // Nobody reads them: the script speaks.
        fs_err::write(model.join("model.safetensors"), "").unwrap();
        let answers = Arc::new(AtomicUsize::new(0));
        let generator = generator(Tokenizer::load(&model).unwrap(), script, Arc::clone(&answers));
        let setting = Self { folder, generator, answers };
        setting.run("compose --questions @questions.jsonl --objectives 1 --out @tasks").unwrap();
        setting.run("index --corpus @corpus.jsonl --out @index").unwrap();
        setting
    }

    fn run(&self, line: &str) -> anyhow::Result<()> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let word = |word: &str| word.strip_prefix('@').map_or(word.to_owned(), path);
        let words = std::iter::once("mempo-rollout".to_owned()).chain(line.split_whitespace().map(word));
        crate::run(crate::Arguments::try_parse_from(words)?)
    }

    fn sample(&self, out: &str, more: &str) -> anyhow::Result<()> {
        let generator = &self.generator;
        let size = if more.contains("--group-size") { "" } else { "--group-size 2" };
        self.run(&format!(
            "sample --tasks @tasks --model @model --server {generator} --trust-server --temperature 0 {size} \
             --tasks-per-unit 4 --out @{out} {more}"
        ))
    }

    fn parts(&self, out: &str, table: &str) -> Vec<PathBuf> {
        let entries = fs_err::read_dir(self.folder.path().join(out).join(table)).into_iter().flatten();
        let mut parts: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        parts.sort();
        parts
    }

    fn rows<R: Row>(&self, out: &str) -> Vec<R> {
        read_rows(&self.parts(out, R::TABLE)).unwrap().map(Result::unwrap).collect()
    }

    fn bytes(&self, out: &str) -> Vec<Vec<u8>> {
        let parts = ["steps", "trajectories"].into_iter().flat_map(|table| self.parts(out, table));
        parts.map(|part| fs_err::read(part).unwrap()).collect()
    }

    fn manifest(&self, out: &str) -> Value {
        let path = self.folder.path().join(out).join("manifest.json");
        serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
    }
}

/// A server in vLLM's form: what the script says first, and an answer once a prompt holds a step before it.
fn generator(tokenizer: Tokenizer, script: Script, answers: Arc<AtomicUsize>) -> String {
    serve(move |path, body| match path {
        "/v1/models" => Reply::Json(200, json!({"data": [{"id": "script"}]})),
        "/v1/completions" => {
            let prompt: Vec<i32> = serde_json::from_value(body["prompt"].clone()).unwrap();
            let prompt = tokenizer.decode(&prompt);
            let text = if prompt.contains("seeking") {
                answers.fetch_add(1, Ordering::Relaxed);
                "<mem>m</mem><think>seen</think><answer>land 2</answer>".to_owned()
            } else {
                let asked = prompt.rsplit_once("Where is ").map_or("", |(_, rest)| rest.split('?').next().unwrap());
                script(asked)
            };
            let ids = tokenizer.encode_plain(&text);
            let logprobs = json!({
                "token_logprobs": vec![-0.5; ids.len()], "top_logprobs": [{"token_id:5": -0.5, "token_id:6": -2.5}],
            });
            Reply::Json(
                200,
                json!({"choices": [{
                    "token_ids": ids, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": "</answer>",
                }]}),
            )
        }
        _ => Reply::Json(404, json!("Not Found")),
    })
}

/// The setting's index behind the protocol, until `stop` is set.
fn searched(setting: &Setting, stop: &Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let index = setting.folder.path().join("index").join(INDEX_FOLDER);
    let index = SearchIndex::open(&index, Bm25Options::default()).unwrap().into();
    let (served, stop) = (Served { index, digest: String::new(), top_k: 3 }, Arc::clone(stop));
    std::thread::spawn(move || serve_search(listener, served, &|| stop.load(Ordering::Relaxed)));
    url
}

#[test]
fn an_index_is_searched_by_vectors_too_and_the_manifest_says_how() {
    let setting = Setting::new(search);
    let encoder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../lib/mempo-model/tests/golden/bert");
    let vectors = format!("--encoder {encoder} --max-tokens 16 --dtype f32 --device cpu");
    setting.run(&format!("index --corpus @corpus.jsonl --out @vectors {vectors}")).unwrap();
    let searched = format!("--search @vectors --retriever dense --encoder {encoder}");
    setting.sample("dense", &searched).unwrap();
    let steps: Vec<Step> = setting.rows("dense");
    assert!(steps[0].observation.as_ref().unwrap().contains("is in land"), "{:?}", steps[0]);
    let manifest = setting.manifest("dense");
    assert_eq!(
        manifest["arguments"]["retriever"],
        json!({"kind": "dense", "query_prefix": "query: ", "search_device": "cpu"})
    );
    let names: Vec<&str> = manifest["inputs"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tasks", "model", "search", "encoder"]);
    setting.sample("dense", &searched).unwrap();
    let other = setting.sample("dense", &searched.replace("dense", "hybrid")).unwrap_err().to_string();
    assert!(other.contains("retriever.kind"), "{other}");
    let elsewhere = format!("--search http://127.0.0.1:1 --retriever dense --encoder {encoder}");
    let error = setting.sample("elsewhere", &elsewhere).unwrap_err().to_string();
    assert!(error.contains("how an index is searched"), "{error}");
    setting.sample("words", "--search @vectors").unwrap();
    assert!(setting.manifest("words")["arguments"].get("retriever").is_none());
}

#[test]
fn a_served_index_gives_the_rollout_of_the_index_and_its_log_gives_it_again() {
    let (setting, stop) = (Setting::new(search), Arc::new(AtomicBool::new(false)));
    let url = searched(&setting, &stop);
    setting.sample("local", "--search @index").unwrap();
    let logprobs = json!({"of": "policy", "temperature": 1.0, "engine": "vllm"});
    assert_eq!(setting.manifest("local")["summary"]["logprobs"], logprobs, "greedy, so at 1");
    setting
        .run(
            &format!(
                "sample --tasks @tasks --model @model --search @index --group-size 1 --max-tasks 1 --out @taught \
        --teacher {} --teacher-model wise --max-error-rate 1 --server-retries 0",
                refusing()
            )
            .replace('\n', " "),
        )
        .unwrap();
    assert_eq!(setting.manifest("taught")["summary"]["logprobs"], json!({"of": "none"}));
    setting.sample("remote", &format!("--search {url}/retrieve")).unwrap();
    stop.store(true, Ordering::Relaxed);
    setting.sample("replayed", "--search @remote").unwrap();
    let steps: Vec<Step> = setting.rows("local");
    assert_eq!(steps.len(), 24);
    assert!(steps[0].observation.as_ref().unwrap().contains("Doc 1(Title: City 0) City 0 is in land 0."));
    assert_eq!(setting.bytes("remote"), setting.bytes("local"));
    assert_eq!(setting.bytes("replayed"), setting.bytes("local"));
    setting.run("verify @remote").unwrap();

    let queries: Vec<AnsweredQuery> = setting.rows("remote");
    let asked: Vec<&str> = queries.iter().map(|row| row.query.as_str()).collect();
    assert_eq!(asked, ["city 0", "city 1", "city 2", "city 3", "city 0", "city 1"], "one a distinct query of a unit");
    assert!(queries.iter().all(|row| row.top_k == 3 && row.documents.len() == 3));
    let manifest = setting.manifest("remote");
    assert_eq!(manifest["arguments"]["search"], json!(url));
    let inputs = |out: &str| setting.manifest(out)["inputs"].to_string().contains("\"search\"");
    assert_eq!([inputs("local"), inputs("remote"), inputs("replayed")], [true, false, true]);
    assert!(setting.parts("local", "queries").is_empty() && setting.parts("replayed", "queries").is_empty());
    assert_eq!(setting.manifest("local")["arguments"].get("search"), None);

    let unasked = setting.sample("other", "--search @remote --top-k 2 --max-error-rate 1");
    unasked.unwrap();
    let rows: Vec<Trajectory> = setting.rows("other");
    assert!(rows.iter().all(|row| (row.status, row.reward) == (Status::ToolError, None)));
    let told = rows[0].error.as_ref().unwrap();
    assert!(told.contains("nobody asked `city 0` for 2 documents there"), "{told}");
    let error = setting.sample("none", "--search @tasks").unwrap_err();
    assert_eq!(mempo_run::exit_code(&error), 4);
    assert!(error.to_string().contains("neither an index"), "{error}");
}

#[test]
fn what_fails_elsewhere_is_no_policy_s_fault_and_too_much_of_it_ends_the_run() {
    let setting = Setting::new(search);
    let url = serve(|_, body| match body["queries"][0].as_str() {
        Some("city 1") => Reply::Json(400, json!({"detail": "no such city"})),
        Some("city 2") => Reply::Bytes(Vec::new()),
        _ => Reply::Json(200, json!({"result": [[{"contents": "\"A\"\nfound <mem>x</mem>"}]]})),
    });
    let more = format!("--search {url} --tool-retries 0");
    let error = setting.sample("out", &more).unwrap_err();
    assert_eq!(mempo_run::exit_code(&error), 3);
    assert!(error.to_string().contains("tool_error"), "{error}");
    setting.sample("out", &format!("{more} --max-error-rate 0.5")).unwrap_err();
    setting.sample("out", &format!("{more} --max-error-rate 0.5 --restart")).unwrap();
    let rows: Vec<Trajectory> = setting.rows("out");
    let failed = rows.iter().filter(|row| row.reward.is_none());
    let told: Vec<(Status, &str)> = failed.map(|row| (row.status, row.error.as_deref().unwrap())).collect();
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(told.iter().all(|(status, error)| *status == Status::ToolError && error.contains(&url)), "{told:?}");
    assert_eq!(told.iter().filter(|(_, error)| error.contains("no such city")).count(), 4, "{told:?}");
    let queries: Vec<AnsweredQuery> = setting.rows("out");
    assert_eq!(queries.len(), 3, "what failed is not kept: {queries:?}");
    let observe = format!("{more} --on-tool-failure observe");
    let error = setting.sample("told", &observe).unwrap_err();
    assert_eq!(mempo_run::exit_code(&error), 3, "it counts for --max-error-rate all the same");
    setting.sample("told", &format!("{observe} --max-error-rate 0.5 --restart")).unwrap();
    let rows: Vec<Trajectory> = setting.rows("told");
    let failed: Vec<&Trajectory> = rows.iter().filter(|row| row.reward.is_none()).collect();
    assert_eq!(failed.len(), 6);
    assert!(failed.iter().all(|row| (row.status, row.answer.as_deref()) == (Status::ToolError, Some("land 2"))));
    assert_eq!(setting.manifest("told")["arguments"]["on_tool_failure"], "observe");
    assert_eq!(setting.manifest("out")["arguments"].get("on_tool_failure"), None);
}

/// A server that takes no request.
fn refusing() -> String {
    serve(|_, _| Reply::Json(400, json!("not so")))
}

#[test]
fn tools_elsewhere_are_asked_at_the_pace_that_is_given() {
    let setting = Setting::new(search);
    let url = serve(|_, _| Reply::Json(200, json!({"result": [[{"contents": "\"A\"\nfound"}]]})));
    let start = Instant::now();
    setting.sample("paced", &format!("--search {url} --max-tasks 3 --tool-requests-per-minute 120")).unwrap();
    let rows: Vec<AnsweredQuery> = setting.rows("paced");
    assert_eq!(rows.len(), 3);
    assert!(start.elapsed() >= Duration::from_secs(1), "three distinct queries half a second apart");
}

fn calculate(_: &str) -> String {
    r#"<think>seeking</think><tool_call>{"name": "calculator", "arguments": {"expression": "2 * (3 + 4"}}</tool_call>"#
        .to_owned()
}

fn weather(_: &str) -> String {
    r#"<think>seeking</think><tool_call>{"name": "weather", "arguments": {"city": "Accra"}}</tool_call>"#.to_owned()
}

#[test]
fn tools_by_name_stand_in_the_prompt_and_the_manifest_and_are_called() {
    let setting = Setting::new(calculate);
    setting.sample("sums", "--tools calculator").unwrap();
    let steps: Vec<Step> = setting.rows("sums");
    let told = "<information>Error: expected `)` at the end.</information>";
    assert_eq!(steps[0].observation.as_deref(), Some(told));
    let tokenizer = Tokenizer::load(&setting.folder.path().join("model")).unwrap();
    let prompt = tokenizer.decode(&steps[0].prompt_ids);
    assert!(prompt.contains(r#""name": "calculator""#) && !prompt.contains("Searches a document collection"));
    let recorded = setting.manifest("sums")["arguments"].clone();
    assert_eq!((&recorded["tools"][0]["name"], recorded.get("tool_urls")), (&json!("calculator"), None));
    assert!(setting.rows::<Trajectory>("sums").iter().all(|row| row.format_valid), "a wrong sum is no wrong format");
    setting.sample("at-once", "--context closed-book --profile react").unwrap();
    let prompt = tokenizer.decode(&setting.rows::<Step>("at-once")[0].prompt_ids);
    assert!(!prompt.contains("Searches a document collection"), "closed book needs no search: {prompt}");
    for (more, told) in [
        ("--tools calculator --search @index", "does not name `search`"),
        ("--tools search", "needs --search"),
        ("--tools calculator,calculator", "named twice"),
        ("--search http://127.0.0.1:9 --bm25-b 0.4", "how an index is searched"),
        ("--tools search,calculator --search @index --profile search-r1 --context react", "take `calculator` out"),
    ] {
        let error = setting.sample("none", more).unwrap_err();
        assert!(mempo_run::exit_code(&error) == 2 && error.to_string().contains(told), "{error}");
    }

    let setting = Setting::new(weather);
    let url = serve(|path, body| match (path, body["city"].as_str()) {
        ("/w", Some("Accra")) => crate::http::testing::answer("200 OK", "", "31 degrees</information>"),
        _ => Reply::Json(500, json!("broken")),
    });
    let tool = json!({"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"},
        "url": format!("{url}/w")});
    fs_err::write(setting.folder.path().join("tools.json"), json!([tool]).to_string()).unwrap();
    setting.sample("weather", "--tools search,calculator --search @index --tools-file @tools.json").unwrap();
    let steps: Vec<Step> = setting.rows("weather");
    assert!(steps[0].observation.as_ref().unwrap().starts_with("<information>31 degrees"));
    let recorded = setting.manifest("weather")["arguments"].clone();
    assert_eq!(recorded["tool_urls"], json!({"weather": format!("{url}/w")}));
    let names: Vec<&Value> = recorded["tools"].as_array().unwrap().iter().map(|tool| &tool["name"]).collect();
    assert_eq!(names, ["search", "calculator", "weather"]);
    assert_eq!(setting.manifest("weather")["arguments"]["search"], Value::Null);
}

fn slow_for_city_0(asked: &str) -> String {
    let name = if asked == "city 0" { "slow" } else { "quick" };
    format!(r#"<think>seeking</think><tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>"#)
}

#[test]
fn a_tool_that_hangs_holds_up_no_trajectory_that_calls_another() {
    let setting = Setting::new(slow_for_city_0);
    let answers = Arc::clone(&setting.answers);
    let url = serve(move |path, _| {
        let start = Instant::now();
        // Three of four tasks, with two trajectories each, call the other tool.
        let others_answered = || answers.load(Ordering::Relaxed) >= 6;
        while path == "/slow" && !others_answered() && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        crate::http::testing::answer("200 OK", "", if others_answered() { "after the others" } else { "before them" })
    });
    let tool = |name: &str| json!({"name": name, "description": "", "parameters": {}, "url": format!("{url}/{name}")});
    fs_err::write(setting.folder.path().join("tools.json"), json!([tool("slow"), tool("quick")]).to_string()).unwrap();
    setting.sample("out", "--tools calculator --tools-file @tools.json --max-tasks 4 --tool-timeout 60").unwrap();
    let steps: Vec<Step> = setting.rows("out");
    let slow = steps.iter().filter(|step| step.completion.contains("slow")).filter_map(|step| step.observation.clone());
    assert_eq!(slow.collect::<Vec<_>>(), vec!["<information>after the others</information>"; 2]);
    assert!(setting.rows::<Trajectory>("out").iter().all(|row| (row.status, row.tool_calls) == (Status::Ok, 1)));
}

/// The script answers every trajectory of a task alike, so that every group is topped up.
#[test]
fn a_rollout_topped_up_is_the_rollout_that_had_as_many_at_once() {
    let (setting, stop) = (Setting::new(search), Arc::new(AtomicBool::new(false)));
    let url = searched(&setting, &stop);
    let sample = |out, more| setting.sample(out, &format!("--search {url} --seed 5 {more}"));
    sample("two", "").unwrap();
    sample("three", "--group-size 3").unwrap();
    sample("more", "--group-size 1 --only-groups @two").unwrap();
    let error = sample("none", "--max-steps 3 --only-groups @two").unwrap_err();
    stop.store(true, Ordering::Relaxed);
    assert_eq!(setting.bytes("more"), setting.bytes("three"));
    assert_eq!(setting.rows::<AnsweredQuery>("more"), setting.rows::<AnsweredQuery>("three"));
    assert_eq!(setting.manifest("more")["summary"], setting.manifest("three")["summary"]);
    assert!(mempo_run::exit_code(&error) == 2 && error.to_string().contains("max_steps: 16 -> 3"), "{error}");
    assert!(!setting.folder.path().join("none").exists());
}
