//! Calls to tools elsewhere, each on a thread of its own: who waits for one host holds up nobody else.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Thread;

use mempo_text::ToolCall;
use serde_json::Value;

use crate::{Tool, ToolFailure};

/// Calls to one tool that are under way at a time; further ones wait for their turn.
const MOST_UNDER_WAY: usize = 64;

/// What a tool call came to.
pub(crate) type Answer = Result<String, ToolFailure>;

/// The open calls of one run. What is under way when it is dropped is left to itself.
pub(crate) struct Calls {
    /// By the tool's name.
    lines: HashMap<String, Line>,
    done: Sender<Done>,
    answers: Receiver<Done>,
    /// Unparked by every answer.
    caller: Thread,
}

/// Calls to one tool.
struct Line {
    tool: Arc<dyn Tool>,
    under_way: usize,
    /// Trajectory and arguments of those that are not yet made.
    queue: VecDeque<(usize, Value)>,
}

struct Done {
    tool: String,
    trajectory: usize,
    answer: Answer,
}

impl Calls {
    /// None as yet. The thread that asks for this is the one that is unparked.
    pub(crate) fn new() -> Self {
        let (done, answers) = channel();
        Self { lines: HashMap::new(), done, answers, caller: std::thread::current() }
    }

    /// Makes a trajectory's call, as soon as it is its turn.
    pub(crate) fn start(&mut self, tool: &Arc<dyn Tool>, trajectory: usize, call: &ToolCall) {
        let ToolCall { name, arguments } = call;
        let line = self.lines.entry(name.clone());
        let line = line.or_insert_with(|| Line { tool: Arc::clone(tool), under_way: 0, queue: VecDeque::new() });
        line.queue.push_back((trajectory, arguments.clone()));
        self.start_queued(name);
    }

    /// The answers that are there, with their trajectories.
    pub(crate) fn take(&mut self) -> Vec<(usize, Answer)> {
        let mut found = Vec::new();
        while let Ok(Done { tool, trajectory, answer }) = self.answers.try_recv() {
            found.push((trajectory, answer));
            if let Some(line) = self.lines.get_mut(&tool) {
                line.under_way -= 1;
            }
            self.start_queued(&tool);
        }
        found
    }

    fn start_queued(&mut self, name: &str) {
        let Some(line) = self.lines.get_mut(name) else { return };
        while line.under_way < MOST_UNDER_WAY {
            let Some((trajectory, arguments)) = line.queue.pop_front() else { return };
            line.under_way += 1;
            let failed = |problem: String| Err(ToolFailure::Failed(problem));
            let (tool, done, caller) = (Arc::clone(&line.tool), self.done.clone(), self.caller.clone());
            let tool_name = name.to_owned();
            let call = move || {
                let answer = catch_unwind(AssertUnwindSafe(|| tool.call(&arguments)));
                let answer = answer.unwrap_or_else(|_| failed("calling it panicked".to_owned()));
                if done.send(Done { tool: tool_name, trajectory, answer }).is_ok() {
                    caller.unpark();
                }
            };
            if let Err(error) = std::thread::Builder::new().spawn(call) {
                let answer = failed(format!("no thread is left to call it on: {error}"));
                let unmade = Done { tool: name.to_owned(), trajectory, answer };
                self.done.send(unmade).expect("the receiver is kept beside the sender");
            }
        }
    }
}
