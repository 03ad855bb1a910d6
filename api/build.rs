//! Migrations are embedded in the binary: a new file must rebuild it.

#[expect(clippy::print_stdout, reason = "this is how a build script speaks")]
fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
