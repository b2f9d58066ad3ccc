//! What `sample` needs where tasks come with a document to read.

use std::path::Path;

use anyhow::anyhow;
use mempo_agent::{ContextPolicy, LimitOptions, SamplingOptions};
use mempo_data::{Task, read_document};
use mempo_run::ResultExt;
use mempo_text::{Carried, PromptBuilder};
use rayon::prelude::*;

/// Refuses a task without the document that the policy is to read.
pub(crate) fn check_document(context: &dyn ContextPolicy, task: &Task) -> anyhow::Result<()> {
    let is_there = task.document_ref.is_some() || task.document.as_deref().is_some_and(|text| !text.is_empty());
    if context.reads_documents() && !is_there {
        return Err(without_document(context, task)).bad_input();
    }
    Ok(())
}

fn without_document(context: &dyn ContextPolicy, task: &Task) -> anyhow::Error {
    let (id, name) = (&task.task_id, context.name());
    anyhow!("task `{id}` has no document, which --context {name} is to read: see `compose --document`")
}

/// Refuses chunks that, with the longest memory and a task's question, no prompt has room for: its trajectories would end at
/// once.
pub(crate) fn check_chunks(
    context: &dyn ContextPolicy,
    builder: &PromptBuilder,
    sampling: &SamplingOptions,
    limits: &LimitOptions,
    task: &Task,
) -> anyhow::Result<()> {
    let Some(chunk) = context.chunk_tokens() else { return Ok(()) };
    let empty = Carried { chunk: Some((&[][..]).into()), memory: Some((&[][..]).into()), ..Carried::default() };
    let words = builder.prompt(&task.question, &empty).bad_input()?.len();
    let (memory, most) = (sampling.max_completion_tokens, limits.max_prompt_tokens);
    if words + memory + chunk > most {
        return Err(anyhow!(
            "task `{}`: --chunk-tokens {chunk}, a memory of --max-completion-tokens {memory} and {words} tokens of question and \
             profile around them are more than the {most} that a prompt may have",
            task.task_id
        ))
        .usage();
    }
    Ok(())
}

/// What there is to read, task by task; nothing for a policy that searches.
pub(crate) fn documents(
    context: &dyn ContextPolicy,
    builder: &PromptBuilder,
    tasks_dir: &Path,
    tasks: &[Task],
) -> anyhow::Result<Vec<Vec<i32>>> {
    if !context.reads_documents() {
        return Ok(vec![Vec::new(); tasks.len()]);
    }
    let read = |task: &Task| {
        let text = read_document(tasks_dir, task).bad_input()?;
        let text = text.filter(|text| !text.is_empty()).ok_or_else(|| without_document(context, task));
        Ok(context.prepare(builder.tokenizer().encode_untrusted(&text.bad_input()?)))
    };
    tasks.par_iter().map(read).collect()
}
