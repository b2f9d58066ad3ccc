//! Log-probabilities of many short continuations of one sequence in one pass: the sequence is run once, and every
//! branch attends to the part of it that it continues.
//!
//! Letters beside the crate's: `S` tokens of the trunk, `N` branches, `A` tokens of the longest branch.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::score::logprobs_at;
use crate::{Error, Model};

/// Attention weights of branches that exist at a time, in elements: 256 MB in float32; few in tests, so that there are parts.
const MOST_WEIGHTS: i64 = if cfg!(test) { 1 << 14 } else { 1 << 26 };

/// A sequence and what may follow parts of it.
#[derive(Debug, Clone)]
pub struct Trunk {
    /// The ids that the branches share.
    pub ids: Vec<i32>,
    /// What follows a part of them.
    pub branches: Vec<Branch>,
}

/// A continuation of the first `at` ids of a trunk.
#[derive(Debug, Clone)]
pub struct Branch {
    /// Ids of the trunk that come before; at least 1.
    pub at: usize,
    /// The ids that follow them.
    pub ids: Vec<i32>,
    /// Places in `ids` that are scored, each given the trunk's first `at` ids and the branch's ids before it.
    pub targets: Range<usize>,
}

impl Model {
    /// Natural log-probabilities of each branch's targets, in the order given, equal (but for their last bits) to those
    /// of the whole sequences one by one. A temperature of 0 (greedy) counts as 1.
    pub fn branch_logprobs(&self, trunk: &Trunk, temperature: f64) -> Result<Vec<Vec<f32>>, Error> {
        self.check_trunk(trunk)?;
        let scored: Vec<&Branch> = trunk.branches.iter().filter(|branch| !branch.targets.is_empty()).collect();
        let mut found = Vec::new();
        if !scored.is_empty() {
            let _guard = tch::no_grad_guard();
            let layout = Layout::new(trunk, &scored);
            found = self.scored_logprobs(&layout, temperature);
        }
        let mut found = found.into_iter();
        Ok(trunk.branches.iter().map(|branch| found.by_ref().take(branch.targets.len()).collect()).collect())
    }

    fn check_trunk(&self, trunk: &Trunk) -> Result<(), Error> {
        self.check_ids(0, &trunk.ids)?;
        for (row, branch) in trunk.branches.iter().enumerate() {
            let (Range { start, end }, length) = (branch.targets.clone(), branch.ids.len());
            if branch.at < 1 || branch.at > trunk.ids.len() || start > end || end > length {
                let problem = format!(
                    "continues {} of {} ids with {length}, of which {start}..{end} are scored; expected 1 <= at <= ids \
                     and targets among its own",
                    branch.at,
                    trunk.ids.len()
                );
                return Err(Error::Sequence { row, problem });
            }
            if length > 0 {
                self.check_ids(row, &branch.ids)?;
            }
            let window = self.config().max_position_embeddings;
            if branch.at + length > window {
                let problem = format!("ends at position {}; the model's window is {window}", branch.at + length);
                return Err(Error::Sequence { row, problem });
            }
        }
        Ok(())
    }

    fn scored_logprobs(&self, layout: &Layout, temperature: f64) -> Vec<f32> {
        let device = self.runtime().device;
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let trunk = layout.trunk as i64;
        let hidden_parts = Tensor::from_slice(&layout.hidden_columns()).to_device(device);
        let hidden_parts = hidden_parts.view([layout.branches() as i64, 1, (layout.trunk + layout.width) as i64]);
        let future = Tensor::ones([layout.width as i64; 2], (Kind::Bool, device)).triu(1);
        let hidden = self.forward(
            &on_device(&layout.ids).unsqueeze(0),
            &on_device(&layout.positions).unsqueeze(0),
            &mut |_, q, k, v| {
                let parts = |x: &Tensor| (x.narrow(2, 0, trunk), x.narrow(2, trunk, x.size()[2] - trunk));
                let ((q, q_own), (k, k_own), (v, v_own)) = (parts(&q), parts(&k), parts(&v));
                let mut attended = vec![self.kernels().causal_attention(&q, &k, &v)];
                attended.extend(layout.attend(&q_own, (&k, &k_own), (&v, &v_own), &hidden_parts, &future));
                Tensor::cat(&attended, 2)
            },
        );
        let places = hidden.flatten(0, 1).index_select(0, &on_device(&layout.places));
        let logprobs = logprobs_at(self, &places, &on_device(&layout.targets), temperature);
        Vec::<f32>::try_from(&logprobs).expect("a one-dimensional float tensor is a vector of f32")
    }
}

/// Trunk and branches as one row of tokens: the trunk, then every branch padded to the longest.
struct Layout {
    /// Tokens of the trunk that some branch continues.
    trunk: usize,
    /// Tokens of a branch that are inputs, at most.
    width: usize,
    /// Of each branch, how much of the trunk it sees.
    at: Vec<usize>,
    ids: Vec<i64>,
    positions: Vec<i64>,
    /// Where in the row the hidden state stands that predicts each target.
    places: Vec<i64>,
    targets: Vec<i64>,
}

impl Layout {
    fn new(trunk: &Trunk, branches: &[&Branch]) -> Self {
        let at: Vec<usize> = branches.iter().map(|branch| branch.at).collect();
        let shared = at.iter().copied().max().unwrap_or(0);
        // The last target is predicted from the id before it, so it is no input.
        let inputs = |branch: &Branch| branch.targets.end - 1;
        let width = branches.iter().map(|branch| inputs(branch)).max().unwrap_or(0).max(1);
        let mut ids: Vec<i64> = trunk.ids[..shared].iter().map(|id| i64::from(*id)).collect();
        let mut positions: Vec<i64> = (0..shared as i64).collect();
        let (mut places, mut targets) = (Vec::new(), Vec::new());
        for branch in branches {
            let start = ids.len();
            ids.extend(branch.ids[..inputs(branch)].iter().map(|id| i64::from(*id)));
            ids.resize(start + width, 0);
            // Padding stays where the window surely has positions.
            positions.extend((0..width).map(|index| (branch.at + index.min(inputs(branch))) as i64));
            places.extend(branch.targets.clone().map(|target| {
                let place = if target == 0 { branch.at - 1 } else { start + target - 1 };
                place as i64
            }));
            targets.extend(branch.ids[branch.targets.clone()].iter().map(|id| i64::from(*id)));
        }
        Self { trunk: shared, width, at, ids, positions, places, targets }
    }

    fn branches(&self) -> usize {
        self.at.len()
    }

    /// `[N, S + A]`: columns of the trunk that a branch does not continue. Its own padding comes after everything real.
    fn hidden_columns(&self) -> Vec<bool> {
        let columns = self.trunk + self.width;
        let hidden = |at: &usize| {
            let at = *at;
            (0..columns).map(move |column| at <= column && column < self.trunk)
        };
        self.at.iter().flat_map(hidden).collect()
    }

    /// Branches `[1,H,N A,d]` over keys and values of the trunk `[1,K,S,d]` and their own `[1,K,N A,d]` ->
    /// `[1,H,N A,d]` in parts, as many branches at a time as keep the weights few.
    fn attend(
        &self,
        q: &Tensor,
        (k, k_own): (&Tensor, &Tensor),
        (v, v_own): (&Tensor, &Tensor),
        hidden: &Tensor,
        future: &Tensor,
    ) -> Vec<Tensor> {
        let (width, columns) = (self.width as i64, (self.trunk + self.width) as i64);
        let branches = (MOST_WEIGHTS / (q.size()[1] * width * columns)).max(1);
        let cut = |x: &Tensor| x.split(branches * width, 2);
        let (q, k_own, v_own) = (cut(q), cut(k_own), cut(v_own));
        let parts = q.iter().zip(k_own.iter().zip(&v_own)).zip(hidden.split(branches, 0));
        parts
            .map(|((q, (k_own, v_own)), hidden)| self.attend_part(q, (k, k_own), (v, v_own), &hidden, future))
            .collect()
    }

    /// The same at once. Written out: the weights of so few queries are small, and no kernel takes two parts of keys.
    fn attend_part(
        &self,
        q: &Tensor,
        (k, k_own): (&Tensor, &Tensor),
        (v, v_own): (&Tensor, &Tensor),
        hidden: &Tensor,
        future: &Tensor,
    ) -> Tensor {
        let (branches, width, trunk) = (hidden.size()[0], self.width as i64, self.trunk as i64);
        let (_, heads, _, size) = q.size4().expect("q is [1,H,N A,d]");
        let groups = k.size()[1];
        let share = heads / groups;
        // [K, N, share A, d]: the heads of a group are rows of one product.
        let scaled = q * (size as f64).powf(-0.5);
        let q = scaled.view([groups, share, branches, width, size]).permute([0, 2, 1, 3, 4]);
        let q = q.reshape([groups, branches * share * width, size]);
        let own = |x: &Tensor| x.reshape([groups * branches, width, size]);
        let by_branch = |x: &Tensor, last: i64| x.reshape([groups * branches, share * width, last]);

        let trunk_scores = q.bmm(&k.squeeze_dim(0).transpose(1, 2)).view([groups, branches, share * width, trunk]);
        let own_scores = by_branch(&q, size).bmm(&own(k_own).transpose(1, 2));
        let own_scores =
            own_scores.view([groups, branches, share, width, width]).masked_fill(future, f64::NEG_INFINITY);
        let own_scores = own_scores.view([groups, branches, share * width, width]);
        let mut scores = Tensor::cat(&[trunk_scores, own_scores], -1);
        let weights = scores.masked_fill_(hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float).to_kind(q.kind());

        let over_trunk = weights.narrow(3, 0, trunk).reshape([groups, branches * share * width, trunk]);
        let over_trunk = over_trunk.bmm(&v.squeeze_dim(0));
        let over_own = by_branch(&weights.narrow(3, trunk, width).contiguous(), width).bmm(&own(v_own));
        let attended = over_trunk.view([groups, branches, share, width, size])
            + over_own.view([groups, branches, share, width, size]);
        attended.permute([0, 2, 1, 3, 4]).reshape([1, heads, branches * width, size])
    }
}
