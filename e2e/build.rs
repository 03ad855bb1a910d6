//! The Rust block of `docs/clients.md`, for `src/bin/rust-client.rs`: the tests run what users copy.

use std::{env, fs, path::Path};

fn main() {
    println!("cargo::rerun-if-changed=../docs/clients.md");
    let document = fs::read_to_string("../docs/clients.md").expect("docs/clients.md can be read");
    let (_, begun) = document.split_once("```rust\n").expect("docs/clients.md has a block of Rust");
    let (block, _) = begun.split_once("```").expect("a block has an end");
    let folder = env::var_os("OUT_DIR").expect("cargo says where to build");
    fs::write(Path::new(&folder).join("client.rs"), block).expect("a file in cargo's own folder");
}
