//! A server as the agent's engine: many requests under way, each trajectory going on as soon as its own completion or its
//! tool's answer is there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use mempo_agent::{Engine, Environment, Generated, Generation, Request};
use mempo_text::PromptBuilder;
use serde_json::Value;
use tracing::warn;

use super::protocol::{Protocol, Reply};
use crate::http::{Client, Failure};
use crate::watchdog::{SILENCE, Watchdog};

/// Requests in a row that may come to nothing, each after all its attempts, before the server is given up.
const GIVE_UP: usize = 16;
const NO_THREAD: &str = "no thread is left to ask the server";

/// A request of a run.
struct Question {
    run: u64,
    request: Request,
    /// Unparked by the answer.
    asker: Thread,
}

/// What came of a trajectory's request.
type Outcome = (usize, Result<Reply, Failure>);
/// The same, and of which run.
type Answer = (u64, Outcome);

/// A server that generates, and how it is asked.
pub(crate) struct Remote {
    pub(super) client: Client,
    pub(super) protocol: Box<dyn Protocol>,
    /// For the manifest: who generates.
    pub(crate) described: Value,
}

impl Remote {
    /// The agent's engine, with at most so many requests under way.
    pub(crate) fn engine<'a>(
        self,
        builder: &'a PromptBuilder,
        concurrency: usize,
        interrupted: &'a dyn Fn() -> bool,
    ) -> std::io::Result<ServerEngine<'a>> {
        ServerEngine::new(self.client, self.protocol, builder, concurrency, interrupted)
    }
}

/// Generates with a server's model.
pub(crate) struct ServerEngine<'a> {
    questions: Sender<Question>,
    answers: Receiver<Answer>,
    /// Number of the run under way: what is left of an earlier one is nobody's any more.
    run: Arc<AtomicU64>,
    url: String,
    /// How long nothing may finish before it is said.
    pub(super) silence: Duration,
    wants_messages: bool,
    /// Makes ids of texts.
    builder: &'a PromptBuilder,
    interrupted: &'a dyn Fn() -> bool,
}

impl<'a> ServerEngine<'a> {
    /// At most `concurrency` requests are under way. Once `interrupted` says so, every run ends at once with an error; what
    /// is under way then is left to itself.
    pub(crate) fn new(
        client: Client,
        protocol: Box<dyn Protocol>,
        builder: &'a PromptBuilder,
        concurrency: usize,
        interrupted: &'a dyn Fn() -> bool,
    ) -> std::io::Result<Self> {
        let (questions, open) = channel();
        let (done, answers) = channel();
        let (open, run) = (Arc::new(Mutex::new(open)), Arc::new(AtomicU64::new(0)));
        let (url, wants_messages) = (client.url().to_owned(), protocol.wants_messages());
        let (client, protocol): (_, Arc<dyn Protocol>) = (Arc::new(client), Arc::from(protocol));
        for _ in 0..concurrency {
            let (open, done, run) = (Arc::clone(&open), done.clone(), Arc::clone(&run));
            let (protocol, client) = (Arc::clone(&protocol), Arc::clone(&client));
            std::thread::Builder::new().spawn(move || work(&open, &done, &run, &*protocol, &client))?;
        }
        Ok(Self { questions, answers, run, url, silence: SILENCE, wants_messages, builder, interrupted })
    }

    fn ask(&self, run: u64, requests: Vec<Request>) -> Result<usize, String> {
        let count = requests.len();
        for request in requests {
            let question = Question { run, request, asker: std::thread::current() };
            self.questions.send(question).map_err(|_| NO_THREAD.to_owned())?;
        }
        Ok(count)
    }

    /// The answers that are there.
    fn answered(&self, run: u64) -> Result<Vec<Outcome>, String> {
        let mut found = Vec::new();
        loop {
            match self.answers.try_recv() {
                Ok((of, outcome)) => found.extend((of == run).then_some(outcome)),
                Err(TryRecvError::Empty) => return Ok(found),
                Err(TryRecvError::Disconnected) => return Err(NO_THREAD.to_owned()),
            }
        }
    }
}

/// Asks for one completion after another until there is no engine any more.
fn work(
    open: &Mutex<Receiver<Question>>,
    done: &Sender<Answer>,
    current: &AtomicU64,
    protocol: &dyn Protocol,
    client: &Client,
) {
    loop {
        let next = open.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Question { run, request, asker }) = next else { return };
        if run != current.load(Ordering::Relaxed) {
            continue;
        }
        let ask = || client.ask(protocol.path(), Some(&protocol.question(&request)), |answer| protocol.reply(answer));
        let result = catch_unwind(AssertUnwindSafe(ask));
        let result = result.unwrap_or_else(|_| Err(Failure::One("asking for it panicked".to_owned())));
        if done.send((run, (request.trajectory, result))).is_err() {
            return;
        }
        asker.unpark();
    }
}

impl Engine for ServerEngine<'_> {
    fn wants_messages(&self) -> bool {
        self.wants_messages
    }

    fn run(&mut self, requests: Vec<Request>, environment: &mut dyn Environment) -> Result<(), String> {
        let run = self.run.fetch_add(1, Ordering::Relaxed) + 1;
        let mut under_way = self.ask(run, requests)?;
        let (mut in_vain, mut watchdog) = (0, Watchdog::new(self.silence));
        while under_way > 0 || !environment.waiting().is_empty() {
            if (self.interrupted)() {
                return Err("interrupted".to_owned());
            }
            let answers = self.answered(run)?;
            under_way -= answers.len();
            let mut finished = Vec::with_capacity(answers.len());
            for (trajectory, result) in answers {
                in_vain = if result.is_ok() { 0 } else { in_vain + 1 };
                finished.push((trajectory, self.generation(result, in_vain)?));
            }
            let is_idle = finished.is_empty();
            let next = environment.next(finished);
            if is_idle && next.is_empty() {
                let waiting = || environment.waiting().len();
                watchdog.look(|| {
                    let url = &self.url;
                    format!("{under_way} requests to {url} are under way, {} trajectories wait for a tool", waiting())
                });
                environment.wait();
            } else {
                watchdog.finished();
            }
            under_way += self.ask(run, next)?;
        }
        Ok(())
    }
}

impl ServerEngine<'_> {
    /// A completion, or why there is none; an error once the server is of no use, after so many requests `in_vain` in a row.
    fn generation(&self, result: Result<Reply, Failure>, in_vain: usize) -> Result<Generated, String> {
        let problem = match result {
            Ok(Reply::Ids(generation)) => return Ok(Ok(generation)),
            Ok(Reply::Text(text, stop_reason)) => {
                let ids = self.builder.completion_ids_from_text(&text);
                return Ok(Ok(Generation { logprobs: vec![f32::NAN; ids.len()], ids, stop_reason }));
            }
            Err(Failure::Final(problem)) => return Err(format!("{}: {problem}", self.url)),
            Err(Failure::Passing(problem, _) | Failure::Refused(problem) | Failure::One(problem)) => problem,
        };
        warn!("{}: {problem}", self.url);
        if in_vain >= GIVE_UP {
            return Err(format!("{}: {in_vain} requests in a row came to nothing, the last by {problem}", self.url));
        }
        Ok(Err(problem))
    }
}
