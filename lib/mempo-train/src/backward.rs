//! Gradient of a loss over chosen log-probabilities by all parameters, micro-batch by micro-batch.
//!
//! Shapes as in [`crate::batch`] and [`crate::head`].

use mempo_model::Model;
use tch::{Kind, Tensor};

use crate::Error;
use crate::batch::{MicroBatch, Sequence, micro_batches};
use crate::flat::Layout;
use crate::head::{Chunk, Head};

/// A model and the place where its gradient is summed.
pub(crate) struct Backward<'a> {
    /// Whose parameters are leaves of autograd.
    pub(crate) model: &'a Model,
    /// Where each parameter's gradient lies.
    pub(crate) layout: &'a Layout,
    /// Flat fp32 buffer that is added to.
    pub(crate) gradient: &'a Tensor,
    /// Position of the head's weight among the parameters.
    pub(crate) head_slot: usize,
    /// What a micro-batch costs beside its tokens, in tokens.
    pub(crate) overhead: usize,
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
    /// columns `[C, K]` and returns `dL/dlogprob`, `[C]` fp32.
    pub(crate) fn run(
        &self,
        sequences: &[Sequence],
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Tensor,
    ) -> Result<(), Error> {
        let lengths: Vec<usize> = sequences.iter().map(Sequence::input_length).collect();
        for members in micro_batches(&lengths, pass.tokens_per_micro_batch, self.overhead) {
            let batch = MicroBatch::new(sequences, &members, self.gradient.device());
            self.run_micro_batch(&batch, pass, loss)?;
        }
        Ok(())
    }

    fn run_micro_batch(
        &self,
        batch: &MicroBatch,
        pass: &Pass,
        loss: &mut dyn FnMut(&Chunk, &Tensor) -> Tensor,
    ) -> Result<(), Error> {
        let hidden_rd = target_hidden(self.model, batch);
        let head = Head { weight_vd: self.model.head_weight(), temperature: pass.temperature, entropy: pass.entropy };
        let mut head_gradient_vd = self.layout.slots[self.head_slot].view(self.gradient);
        let gradient_rd = head.backward(&hidden_rd.detach(), &batch.targets_r, &mut head_gradient_vd, &mut |chunk| {
            let columns_ck = batch.columns_rk.narrow(0, chunk.rows.start, chunk.rows.end - chunk.rows.start);
            loss(chunk, &columns_ck)
        });
        // The gradient of this number by the hidden states is what the head asks for; the number itself means
        // nothing.
        let carrier = (hidden_rd * gradient_rd).sum(Kind::Float);
        let leaves: Vec<&Tensor> = self.model.parameters().iter().map(|(_, tensor)| tensor).collect();
        let gradients = Tensor::f_run_backward(&[carrier], &leaves, false, false)?;
        for (slot, gradient) in self.layout.slots.iter().zip(gradients) {
            // An untied head takes no part in the body.
            if gradient.defined() {
                let _ = slot.view(self.gradient).g_add_(&gradient);
            }
        }
        Ok(())
    }
}

/// Hidden states `[R, D]` at the positions that predict the targets.
pub(crate) fn target_hidden(model: &Model, batch: &MicroBatch) -> Tensor {
    let hidden_btd = model.hidden(&batch.ids_bt);
    let width = *hidden_btd.size().last().expect("hidden states have dimensions");
    hidden_btd.view([-1, width]).index_select(0, &batch.rows_r)
}
