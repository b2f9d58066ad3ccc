//! One walk over a model's parameters: it lists their names and shapes, or builds the model from tensors in that order.

use tch::{Device, Kind, Tensor};

use crate::adapter::{Adapter, Adapters};
use crate::kernels::Kernels;
use crate::{Error, Runtime};

/// Passed through the constructors of a model; each asks it for its parameters by name and shape.
pub(crate) struct Builder {
    listed: Vec<(String, Vec<i64>)>,
    tensors: Option<std::vec::IntoIter<Tensor>>,
    kernels: Kernels,
    adapters: Adapters,
}

impl Builder {
    /// Lists what `build` asks for, in order.
    pub(crate) fn list<M>(build: impl FnOnce(&mut Self) -> M) -> Vec<(String, Vec<i64>)> {
        let mut builder = Self { listed: Vec::new(), tensors: None, kernels: Kernels::Fast, adapters: Adapters::new() };
        build(&mut builder);
        builder.listed
    }

    /// Builds a model that uses `kernels` from `tensors`, which must be those that `list` gave, in that order, and adapters
    /// of some of its layers.
    pub(crate) fn build<M>(
        tensors: Vec<Tensor>,
        kernels: Kernels,
        adapters: Adapters,
        build: impl FnOnce(&mut Self) -> M,
    ) -> M {
        let mut builder = Self { listed: Vec::new(), tensors: Some(tensors.into_iter()), kernels, adapters };
        build(&mut builder)
    }

    /// How the model is to compute.
    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The adapter of a layer, if it has one.
    pub(crate) fn adapter(&self, layer: &str) -> Option<Adapter> {
        self.adapters.get(layer).cloned()
    }

    /// The parameter of this name and shape (nothing yet while listing).
    pub(crate) fn parameter(&mut self, name: String, shape: &[i64]) -> Tensor {
        let Some(tensors) = &mut self.tensors else {
            self.listed.push((name, shape.to_vec()));
            return Tensor::empty([0], (Kind::Float, Device::Cpu));
        };
        let tensor = tensors.next().expect("the walk that listed the parameters asks for as many");
        assert_eq!(tensor.size(), shape, "tensor `{name}`");
        tensor
    }
}

/// Parameters of these names and shapes, one after the other in a flat buffer of zeros.
pub(crate) fn allocate(shapes: Vec<(String, Vec<i64>)>, runtime: &Runtime) -> Result<Vec<(String, Tensor)>, Error> {
    let count = |shape: &[i64]| shape.iter().product::<i64>();
    let total = shapes.iter().map(|(_, shape)| count(shape)).sum::<i64>();
    let flat = Tensor::f_zeros([total], (runtime.kind, runtime.device)).map_err(|_| {
        let gibibytes = total as f64 * runtime.kind.elt_size_in_bytes() as f64 / f64::from(1 << 30);
        Error::Device(format!("the model's weights take {gibibytes:.1} GiB, more memory than {:?} has", runtime.device))
    })?;
    let mut start = 0;
    let mut parameters = Vec::with_capacity(shapes.len());
    for (name, shape) in shapes {
        parameters.push((name, flat.narrow(0, start, count(&shape)).view(&shape[..])));
        start += count(&shape);
    }
    Ok(parameters)
}
