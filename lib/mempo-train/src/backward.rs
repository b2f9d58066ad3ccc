//! Gradient of a loss over chosen log-probabilities by all parameters, micro-batch by micro-batch.
//!
//! Shapes as in [`crate::batch`] and [`crate::head`].

use mempo_model::{Model, Pieces};
use tch::{Kind, Tensor, no_grad_guard};

use crate::Error;
use crate::batch::{Arrangement, MicroBatch, Sequence};
use crate::flat::Layout;
use crate::head::{Chunk, Coefficients, Head};

/// A model and the place where its gradient is summed.
pub(crate) struct Backward<'a> {
    /// The model, `leaves` included.
    pub(crate) model: &'a Model,
    /// What is trained, as leaves of autograd.
    pub(crate) leaves: &'a [Tensor],
    /// Where each leaf's gradient lies.
    pub(crate) layout: &'a Layout,
    /// Flat buffer that is added to, in the optimizer's type.
    pub(crate) gradient: &'a Tensor,
    /// Position of the head's weight among the leaves, if it is trained.
    pub(crate) head_slot: Option<usize>,
    /// How sequences lie in a micro-batch.
    pub(crate) arrangement: Arrangement,
    /// What a micro-batch costs beside its tokens, in tokens.
    pub(crate) overhead: usize,
    /// Whether to keep only the layers' inputs.
    pub(crate) recompute: bool,
}

/// How the sequences are run.
pub(crate) struct Pass {
    /// Logits are divided by this.
    pub(crate) temperature: f64,
    /// Budget of padded tokens of a micro-batch.
    pub(crate) tokens_per_micro_batch: usize,
    /// Whether the loss wants entropies.
    pub(crate) entropy: bool,
}

impl Backward<'_> {
    /// Adds the gradient of the loss over all `sequences`. For each chunk of rows `loss` gets the chunk and its
    /// columns `[C, K]` and returns its derivatives.
    pub(crate) fn run(
        &self,
        sequences: &[Sequence],
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Coefficients,
    ) -> Result<(), Error> {
        let lengths: Vec<usize> = sequences.iter().map(Sequence::input_length).collect();
        // A gradient that is to be the same for any cut is that of the one cut there always is: into single sequences.
        let budget = if self.model.runtime().deterministic { 0 } else { pass.tokens_per_micro_batch };
        for members in self.arrangement.micro_batches(&lengths, budget, self.overhead) {
            let batch = MicroBatch::new(sequences, &members, self.arrangement, self.gradient.device());
            self.run_micro_batch(&batch, pass, loss)?;
        }
        Ok(())
    }

    fn run_micro_batch(
        &self,
        batch: &MicroBatch,
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Coefficients,
    ) -> Result<(), Error> {
        if self.recompute {
            return self.run_in_pieces(batch, pass, loss);
        }
        let hidden_rd = target_hidden(self.model, batch);
        let gradient_rd = self.head_gradient(&hidden_rd.detach(), batch, pass, loss);
        self.propagate(&hidden_rd, &gradient_rd, None, |_| true).map(drop)
    }

    /// The same with only the input of each layer kept; the rest of a layer is computed again when its gradient is
    /// (Chen et al. 2016, arXiv 1604.06174, one segment a layer).
    fn run_in_pieces(
        &self,
        batch: &MicroBatch,
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Coefficients,
    ) -> Result<(), Error> {
        let pieces = self.model.pieces(&batch.ids_bt);
        let leaf = |hidden: &Tensor| hidden.detach().set_requires_grad(true);
        let (inputs, last_btd) = layer_inputs(&pieces, self.model.config().num_hidden_layers);
        let last_btd = leaf(&last_btd);
        let hidden_rd = at_targets(&pieces.norm(&last_btd), batch);
        let gradient_rd = self.head_gradient(&hidden_rd.detach(), batch, pass, loss);
        let mut gradient_btd =
            self.propagate(&hidden_rd, &gradient_rd, Some(&last_btd), |name| name == "model.norm.weight")?;
        for (layer, input) in inputs.iter().enumerate().rev() {
            let input = leaf(input);
            let prefix = format!("model.layers.{layer}.");
            let output = pieces.layer(layer, &input);
            gradient_btd = self.propagate(&output, &gradient_btd, Some(&input), |name| name.starts_with(&prefix))?;
        }
        let embedded = pieces.embed();
        self.propagate(&embedded, &gradient_btd, None, |name| name == "model.embed_tokens.weight").map(drop)
    }

    /// Gradient `[R, D]` of the loss by the hidden states at the targets; that by the head's weight is added.
    fn head_gradient(
        &self,
        hidden_rd: &Tensor,
        batch: &MicroBatch,
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Coefficients,
    ) -> Tensor {
        let head = Head {
            weight_vd: self.model.head_weight(),
            runtime: self.model.runtime(),
            temperature: pass.temperature,
            entropy: pass.entropy,
        };
        let mut head_gradient_vd = self.head_slot.map(|slot| self.layout.slots[slot].view(self.gradient));
        head.backward(hidden_rd, &batch.targets_r, head_gradient_vd.as_mut(), &mut |chunk| {
            let columns_ck = batch.columns_rk.narrow(0, chunk.rows.start, chunk.rows.end - chunk.rows.start);
            loss(chunk, &columns_ck)
        })
    }

    /// From the gradient of `output`: adds that of the leaves `of`, and gives that of `input` (or anything, where
    /// there is none).
    fn propagate(
        &self,
        output: &Tensor,
        gradient: &Tensor,
        input: Option<&Tensor>,
        of: impl Fn(&str) -> bool,
    ) -> Result<Tensor, Error> {
        // The gradient of this number by the output is what was asked for; the number itself means nothing.
        let carrier = (output * gradient).sum(Kind::Float);
        let chosen = || self.layout.slots.iter().zip(self.leaves).filter(|(slot, _)| of(&slot.name));
        let mut leaves: Vec<&Tensor> = chosen().map(|(_, leaf)| leaf).collect();
        leaves.extend(input);
        if leaves.is_empty() {
            return Ok(Tensor::default());
        }
        let mut gradients = Tensor::f_run_backward(&[carrier], &leaves, false, false)?;
        let by_input = if input.is_some() { gradients.pop().unwrap_or_default() } else { Tensor::default() };
        for ((slot, _), gradient) in chosen().zip(gradients) {
            // An untied head takes no part in the body.
            if gradient.defined() {
                let _ = slot.view(self.gradient).g_add_(&gradient);
            }
        }
        Ok(by_input)
    }
}

/// What goes into each layer, and what comes out of the last.
fn layer_inputs(pieces: &Pieces, layers: usize) -> (Vec<Tensor>, Tensor) {
    let _no_grad = no_grad_guard();
    let mut inputs = Vec::with_capacity(layers);
    let mut hidden_btd = pieces.embed();
    for layer in 0..layers {
        let next = pieces.layer(layer, &hidden_btd);
        inputs.push(std::mem::replace(&mut hidden_btd, next));
    }
    (inputs, hidden_btd)
}

/// Hidden states `[R, D]` at the positions that predict the targets.
pub(crate) fn target_hidden(model: &Model, batch: &MicroBatch) -> Tensor {
    at_targets(&model.pieces(&batch.ids_bt).whole(), batch)
}

fn at_targets(hidden_btd: &Tensor, batch: &MicroBatch) -> Tensor {
    let width = *hidden_btd.size().last().expect("hidden states have dimensions");
    hidden_btd.view([-1, width]).index_select(0, &batch.rows_r)
}
