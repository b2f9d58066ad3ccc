//! Build script of every package that links libtorch: its programs and tests find the library they were built against
//! by rpath, and one copied next to them (`lib/` beside the program's folder, or the program's own folder) before that.

#![expect(clippy::print_stdout, reason = "a build script talks to cargo on standard output")]

fn main() {
    println!("cargo:rerun-if-changed=../../libtorch-rpath.rs");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    for rpath in ["$ORIGIN/../lib", "$ORIGIN", &lib] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{rpath}");
    }
}
