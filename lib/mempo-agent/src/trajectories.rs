//! The trajectories of a unit as the engine's environment.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::attempt::Attempt;
use crate::calls::{Answer, Calls};
use crate::{Agent, Environment, Error, Generated, Request};

/// What a trajectory was waiting for.
enum News {
    Completion(Generated),
    Answer(Answer),
}

/// Trajectories under way.
pub(crate) struct Trajectories<'r, 't> {
    agent: &'r Agent<'r>,
    attempts: Vec<Attempt<'t>>,
    calls: Calls,
    with_messages: bool,
    /// Why no trajectory can go on.
    unbuilt: Option<Error>,
}

impl<'r, 't> Trajectories<'r, 't> {
    pub(crate) fn new(agent: &'r Agent<'r>, attempts: Vec<Attempt<'t>>, with_messages: bool) -> Self {
        Self { agent, attempts, calls: Calls::new(), with_messages, unbuilt: None }
    }

    /// The attempts as far as they came, unless a prompt couldn't be built.
    pub(crate) fn into_attempts(self) -> Result<Vec<Attempt<'t>>, Error> {
        self.unbuilt.map_or(Ok(self.attempts), Err)
    }

    /// Lets trajectories act on their news, all at once, and gives the requests of those that go on. What is here is called
    /// and waited for; what is elsewhere is called, and answers at a later time.
    fn take_in(&mut self, mut news: HashMap<usize, News>) -> Result<Vec<Request>, Error> {
        let agent = self.agent;
        let concerned = self.attempts.iter_mut().enumerate();
        let concerned = concerned.filter_map(|(place, attempt)| Some((place, attempt, news.remove(&place)?)));
        let concerned: Vec<_> = concerned.filter(|(_, attempt, _)| attempt.is_active()).collect();
        let act = |attempt: &mut Attempt<'t>, news| match news {
            News::Completion(generation) => attempt.advance(agent, generation),
            News::Answer(answer) => attempt.resume(agent, answer),
        };
        let acted = concerned.into_par_iter().with_max_len(1).map(|(place, attempt, news)| {
            act(attempt, news);
            (place, attempt)
        });
        let acted: Vec<_> = agent.toolbox.side_by_side(|| acted.collect());
        let (waiting, ready): (Vec<_>, Vec<_>) =
            acted.into_iter().partition(|(_, attempt)| attempt.open_call().is_some());
        for (place, attempt) in waiting {
            let call = attempt.open_call();
            if let Some((tool, call)) = call.and_then(|call| Some((agent.toolbox.remote(&call.name)?, call))) {
                self.calls.start(tool, place, call);
            }
        }
        agent.requests(ready, self.with_messages)
    }
}

impl Environment for Trajectories<'_, '_> {
    fn next(&mut self, finished: Vec<(usize, Generated)>) -> Vec<Request> {
        let completions = finished.into_iter().map(|(place, generation)| (place, News::Completion(generation)));
        let answers = self.calls.take().into_iter().map(|(place, answer)| (place, News::Answer(answer)));
        let news: HashMap<usize, News> = completions.chain(answers).collect();
        if news.is_empty() || self.unbuilt.is_some() {
            return Vec::new();
        }
        self.take_in(news).unwrap_or_else(|error| {
            self.unbuilt = Some(error);
            Vec::new()
        })
    }

    fn waiting(&self) -> Vec<usize> {
        if self.unbuilt.is_some() {
            return Vec::new();
        }
        let attempts = self.attempts.iter().enumerate();
        attempts.filter(|(_, attempt)| attempt.open_call().is_some()).map(|(place, _)| place).collect()
    }
}
