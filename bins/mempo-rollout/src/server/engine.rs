//! A server as the agent's engine: many requests under way, each trajectory going on as soon as its own completion is there.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mempo_agent::{Engine, Generation, Next, Request};
use mempo_data::StopReason;
use tracing::warn;

use super::client::{Client, Failure};
use super::protocol::Asking;

/// Requests in a row that may come to nothing, each after all its attempts, before the server is given up.
const GIVE_UP: usize = 16;
/// How long nothing may come before it is said.
const SILENCE: Duration = Duration::from_mins(1);
const TICK: Duration = Duration::from_millis(100);

type Answer = (usize, Result<Generation, Failure>);

/// Generates with a server's model.
pub(crate) struct ServerEngine<'a> {
    questions: Sender<Request>,
    answers: Receiver<Answer>,
    url: String,
    interrupted: &'a dyn Fn() -> bool,
}

impl<'a> ServerEngine<'a> {
    /// At most `concurrency` requests are under way. Once `interrupted` says so, every run ends at once with an error; what
    /// is under way then is left to itself.
    pub(crate) fn new(
        client: &Arc<Client>,
        asking: Asking,
        concurrency: usize,
        interrupted: &'a dyn Fn() -> bool,
    ) -> Self {
        let (questions, open) = channel();
        let (done, answers) = channel();
        let (open, asking) = (Arc::new(Mutex::new(open)), Arc::new(asking));
        let url = client.url().to_owned();
        for _ in 0..concurrency {
            let (open, done, asking, client) =
                (Arc::clone(&open), done.clone(), Arc::clone(&asking), Arc::clone(client));
            std::thread::spawn(move || work(&open, &done, &asking, &client));
        }
        Self { questions, answers, url, interrupted }
    }

    fn ask(&self, requests: Vec<Request>) -> Result<usize, String> {
        let count = requests.len();
        for request in requests {
            self.questions.send(request).map_err(|_| "no thread is left to ask the server".to_owned())?;
        }
        Ok(count)
    }

    /// The next answer; none for the time being.
    fn wait(&self) -> Result<Option<Answer>, String> {
        match self.answers.recv_timeout(TICK) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err("no thread is left to ask the server".to_owned()),
        }
    }
}

/// Asks for one completion after another until there is no engine any more.
fn work(open: &Mutex<Receiver<Request>>, done: &Sender<Answer>, asking: &Asking, client: &Client) {
    loop {
        let next = open.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(request) = next else { return };
        let result = client.ask(asking.path(), Some(&asking.body(&request, 0)), |answer| asking.generation(answer));
        if done.send((request.trajectory, result)).is_err() {
            return;
        }
    }
}

impl Engine for ServerEngine<'_> {
    fn run(&mut self, requests: Vec<Request>, next: &mut Next<'_>) -> Result<(), String> {
        let mut under_way = self.ask(requests)?;
        let (mut in_vain, mut last) = (0, Instant::now());
        while under_way > 0 {
            if (self.interrupted)() {
                return Err("interrupted".to_owned());
            }
            let Some((trajectory, result)) = self.wait()? else {
                if last.elapsed() >= SILENCE {
                    warn!("{}: no answer for {SILENCE:?}; {under_way} requests are under way", self.url);
                    last = Instant::now();
                }
                continue;
            };
            (under_way, last) = (under_way - 1, Instant::now());
            let generation = match result {
                Ok(generation) => {
                    in_vain = 0;
                    generation
                }
                Err(Failure::Final(problem)) => return Err(format!("{}: {problem}", self.url)),
                Err(Failure::Passing(problem, _)) => {
                    warn!("{}: {problem}", self.url);
                    in_vain += 1;
                    if in_vain == GIVE_UP {
                        return Err(format!(
                            "{}: {GIVE_UP} requests in a row came to nothing, the last by {problem}",
                            self.url
                        ));
                    }
                    Generation { ids: Vec::new(), logprobs: Vec::new(), stop_reason: StopReason::Error }
                }
            };
            under_way += self.ask(next(vec![(trajectory, generation)]))?;
        }
        Ok(())
    }
}
