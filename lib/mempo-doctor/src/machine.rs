//! libtorch and the device.

use mempo_model::{DeviceOptions, Libtorch, Runtime};

use crate::report::Report;

/// Device and number format, if they can be had.
pub(crate) fn examine(options: &DeviceOptions, report: &mut Report) -> Option<Runtime> {
    let runtime = report.value("device", options.resolve());
    let libtorch = Libtorch::in_use();
    let place =
        |path: Option<std::path::PathBuf>, none: &str| path.map_or(none.to_owned(), |p| p.display().to_string());
    report.good(
        "libtorch",
        &format!(
            "{} in {}; GPU part: {}",
            libtorch.version.as_deref().unwrap_or("of unknown version"),
            place(libtorch.folder, "an unknown folder"),
            place(libtorch.cuda_library, "none beside it (`./just setup cuda` fetches it)"),
        ),
    );
    let runtime = runtime?;
    let speed = report.value("device", runtime.try_product())?;
    report.good("device", &format!("{}, matrix product {speed:.0} GFLOP/s", runtime.name()));
    Some(runtime)
}
