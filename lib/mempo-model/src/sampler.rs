//! One id a row out of a batch of logits, by inverse CDF: the uniform number alone decides, so a row's draw does not
//! depend on the rows beside it.

use tch::{Kind, Tensor};

use crate::{Error, GenerateOptions, Model};

/// Draws ids from the head's distribution at one temperature.
pub(crate) struct Sampler {
    temperature: f64,
    top_p: f64,
    /// `[V]`: ids that are never sampled.
    forbidden: Tensor,
}

/// A sampled id and its natural log-probability.
pub(crate) type Draw = (i32, f32);

impl Sampler {
    pub(crate) fn new(model: &Model, options: &GenerateOptions) -> Result<Self, Error> {
        let (temperature, top_p) = (options.temperature, options.top_p);
        if !(temperature >= 0.0 && temperature.is_finite() && top_p > 0.0 && top_p <= 1.0) {
            let problem =
                format!("temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1");
            return Err(Error::Options(problem));
        }
        let size = model.config().vocab_size as usize;
        let mut forbidden = vec![false; size];
        forbidden.iter_mut().skip(options.vocabulary_limit).for_each(|id| *id = true);
        for id in &options.banned_ids {
            if let Some(id) = usize::try_from(*id).ok().and_then(|id| forbidden.get_mut(id)) {
                *id = true;
            }
        }
        if forbidden.iter().all(|id| *id) {
            return Err(Error::Options("banned_ids and vocabulary_limit leave no id to sample".to_owned()));
        }
        Ok(Self { temperature, top_p, forbidden: Tensor::from_slice(&forbidden).to_device(model.runtime().device) })
    }

    /// One draw a row from hidden states `[B,D]`. The log-probability is that of the whole vocabulary at the
    /// temperature (1 when greedy), whatever was forbidden or cut off.
    pub(crate) fn draw(&self, model: &Model, hidden: &Tensor, uniforms: &[f32]) -> Result<Vec<Draw>, Error> {
        self.draw_from(&model.logits(hidden, self.temperature), uniforms)
    }

    /// The same from logits `[B,V]` that were divided by the temperature.
    fn draw_from(&self, logits: &Tensor, uniforms: &[f32]) -> Result<Vec<Draw>, Error> {
        let logprobs = logits.log_softmax(-1, Kind::Float);
        // Before the softmax: what is allowed may be so improbable that nothing of it would be left beside the rest.
        let allowed = logits.masked_fill(&self.forbidden, f64::NEG_INFINITY);
        if self.temperature == 0.0 {
            return draws(&allowed.argmax(-1, true), &logprobs);
        }
        let probabilities = allowed.softmax(-1, Kind::Float);
        if self.top_p < 1.0 {
            let ids = Tensor::from_slice(&self.nucleus_ids(&probabilities, uniforms)).unsqueeze(1);
            return draws(&ids.to_device(logits.device()), &logprobs);
        }
        let cumulative = probabilities.cumsum(-1, Kind::Float);
        let size = cumulative.size()[1];
        let totals = cumulative.narrow(1, size - 1, 1);
        let points = Tensor::from_slice(uniforms).unsqueeze(1).to_device(logits.device()) * totals;
        // The first id whose cumulative probability exceeds the point has a probability above 0.
        let ids = points.searchsorted(&cumulative, false, true, "right", None::<Tensor>).clamp_max(size - 1);
        draws(&ids, &logprobs)
    }

    /// Ids drawn from the smallest sets of most probable ids that reach `top_p` (Holtzman et al. 2020), on the host.
    fn nucleus_ids(&self, probabilities: &Tensor, uniforms: &[f32]) -> Vec<i64> {
        let size = probabilities.size()[1] as usize;
        let flat = Vec::<f32>::try_from(probabilities.flatten(0, -1)).expect("a flat float tensor is a vector of f32");
        let mut candidates = Vec::new();
        let rows = flat.chunks(size).zip(uniforms);
        rows.map(|(row, uniform)| nucleus_id(row, self.top_p, *uniform, &mut candidates) as i64).collect()
    }
}

/// Ids `[B,1]` with their log-probabilities, in one transfer.
fn draws(ids: &Tensor, logprobs: &Tensor) -> Result<Vec<Draw>, Error> {
    let logprobs = logprobs.gather(1, ids, false);
    let both = Tensor::cat(&[ids.to_kind(Kind::Double), logprobs.to_kind(Kind::Double)], 1);
    let flat = Vec::<f64>::try_from(both.flatten(0, -1)).expect("a flat double tensor is a vector of f64");
    let draws: Vec<Draw> = flat.chunks(2).map(|pair| (pair[0] as i32, pair[1] as f32)).collect();
    match draws.iter().find(|(_, logprob)| !logprob.is_finite()) {
        None => Ok(draws),
        Some(_) => Err(Error::Options(
            "the model's logits are not finite; its weights are damaged or overflow this dtype".to_owned(),
        )),
    }
}

/// One id by inverse CDF, in the order of ids, over the nucleus of a row of (unnormalised) probabilities.
fn nucleus_id(row: &[f32], top_p: f64, uniform: f32, candidates: &mut Vec<(f32, usize)>) -> usize {
    let last = nucleus_end(row, top_p, candidates);
    let inside = |one: &(usize, &f32)| descending(&(*one.1, one.0), &last).is_le();
    let nucleus = || row.iter().enumerate().filter(inside);
    let mass: f64 = nucleus().map(|(_, p)| f64::from(*p)).sum();
    let mut point = f64::from(uniform) * mass;
    let chosen = nucleus().find(|(_, p)| {
        point -= f64::from(**p);
        point < 0.0
    });
    chosen.map_or(last.1, |(id, _)| id)
}

/// By probability from the highest, equal ones by id: the order in which a nucleus grows.
fn descending(a: &(f32, usize), b: &(f32, usize)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The least probable member of the nucleus, by halving instead of sorting: each round keeps the half it lies in.
fn nucleus_end(row: &[f32], top_p: f64, candidates: &mut Vec<(f32, usize)>) -> (f32, usize) {
    let total: f64 = row.iter().map(|p| f64::from(*p)).sum();
    // Ids below this make up less than 1 - top_p together, so the nucleus lies among the others.
    let least = (total * (1.0 - top_p) / row.len() as f64 * 0.999) as f32;
    candidates.clear();
    candidates.extend(row.iter().enumerate().filter(|(_, p)| **p > least).map(|(id, p)| (*p, id)));
    let mut missing = top_p * total;
    let mut rest = &mut candidates[..];
    while rest.len() > 1 {
        let half = rest.len() / 2;
        rest.select_nth_unstable_by(half, descending);
        let (likely, unlikely) = rest.split_at_mut(half);
        let mass: f64 = likely.iter().map(|(p, _)| f64::from(*p)).sum();
        if mass >= missing {
            rest = likely;
        } else {
            missing -= mass;
            rest = unlikely;
        }
    }
    rest.first().copied().unwrap_or((0.0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, with a full sort.
    fn brute_force(row: &[f32], top_p: f64) -> Vec<usize> {
        let mut ids: Vec<usize> = (0..row.len()).collect();
        ids.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
        let total: f64 = row.iter().map(|p| f64::from(*p)).sum();
        let mut mass = 0.0;
        let keep = ids.iter().take_while(|id| {
            let before = mass;
            mass += f64::from(row[**id]);
            before < top_p * total
        });
        keep.copied().collect()
    }

    #[test]
    fn a_nucleus_is_the_smallest_set_of_most_probable_ids() {
        for (seed, power) in [(1, 1), (2, 4), (3, 16), (4, 40)] {
            let row: Vec<f32> = (0..300).map(|i| crate::counter_uniform(seed, i).powi(power)).collect();
            for top_p in [0.01, 0.3, 0.9, 0.99] {
                let allowed = brute_force(&row, top_p);
                let mut candidates = Vec::new();
                let draw = |i| nucleus_id(&row, top_p, counter(i), &mut candidates);
                let drawn: std::collections::BTreeSet<usize> = (0..3000).map(draw).collect();
                assert!(drawn.iter().all(|id| allowed.contains(id)), "{seed} {top_p}");
                let end = nucleus_end(&row, top_p, &mut candidates);
                assert_eq!(end.1, *allowed.last().unwrap(), "{seed} {top_p}");
                let first = allowed.iter().min().unwrap();
                assert_eq!(nucleus_id(&row, top_p, 0.0, &mut candidates), *first);
            }
        }
    }

    fn counter(i: u64) -> f32 {
        crate::counter_uniform(99, i)
    }

    #[test]
    fn a_forbidden_id_is_never_drawn_however_probable() {
        let forbidden = Tensor::from_slice(&[true, false, false, false, true]);
        let logits = Tensor::from_slice(&[11.0_f32, 0.5, 0.0, -1.0, -3.0]).unsqueeze(0) / 0.01;
        for (temperature, top_p) in [(0.0, 1.0), (0.01, 1.0), (0.01, 0.9)] {
            let sampler = Sampler { temperature, top_p, forbidden: forbidden.shallow_clone() };
            for uniform in [0.0, 0.5, 0.999] {
                let (id, logprob) = sampler.draw_from(&logits, &[uniform]).unwrap()[0];
                assert!(id == 1 && (logprob + 1050.0).abs() < 0.1, "{temperature} {top_p} {uniform}: {id} {logprob}");
            }
        }
    }

    #[test]
    fn a_flat_row_keeps_every_id_it_needs() {
        let row = vec![0.25f32; 4];
        let mut candidates = Vec::new();
        let ids: Vec<usize> = [0.0, 0.4, 0.99].map(|u| nucleus_id(&row, 0.6, u, &mut candidates)).to_vec();
        assert_eq!(ids, [0, 1, 2]);
    }
}
