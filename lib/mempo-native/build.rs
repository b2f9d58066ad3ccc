//! Compiles the C++ part against the headers of the libtorch that torch-sys found, and sets the rpath as every package
//! that links libtorch does.

use std::path::Path;

fn main() {
    const SOURCES: [&str; 2] = ["src/native.cpp", "src/deterministic.cpp"];
    for source in SOURCES.iter().chain(&["src/guarded.h"]) {
        println!("cargo:rerun-if-changed={source}");
    }
    // Without libtorch there is nothing to compile against, and torch-sys has said so.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    for rpath in ["$ORIGIN/../lib", "$ORIGIN", &lib] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{rpath}");
    }
    // libtorch's own threads: the same library, found beside it.
    println!("cargo:rustc-link-lib=dylib=gomp");
    let include = Path::new(&lib).with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag("-isystem")
        .flag(include.to_string_lossy().as_ref())
        .flag("-fopenmp")
        .opt_level(1)
        .files(SOURCES)
        .compile("mempo-native");
}
