//! The web client's files, outside `/api`.

use std::{collections::BTreeSet, fs, io::Read, path::Path};

use flate2::read::GzDecoder;
use serde_json::json;
use sqlx::PgPool;
use testkit::http::Answer;

use crate::support::{App, assert_problem};

fn assert_page_headers(answer: &Answer) {
    let policy = answer.header("content-security-policy").unwrap();
    for rule in [
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(policy.contains(rule), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    assert!(answer.header("etag").is_some());
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn files_have_their_type_and_other_paths_are_the_page(pool: PgPool) {
    let app = App::start(&pool).await;
    let page = fs::read(web().join("index.html")).unwrap();
    for path in [
        "/",
        "/index.html",
        "/conversations/1",
        "/callback?code=x",
        "/nothing.js",
        "/metrics",
        "/API/auth_user",
        "/apis",
    ] {
        let answer = app.call("GET", path).expect(200).await;
        assert_page_headers(&answer);
        assert_eq!(answer.header("content-type"), Some("text/html; charset=utf-8"), "{path}");
        assert_eq!(answer.body, page, "{path}");
    }
    for (file, form) in [("icon.svg", "image/svg+xml"), ("sw.js", "text/javascript; charset=utf-8")] {
        let answer = app.call("GET", &format!("/{file}")).expect(200).await;
        assert_page_headers(&answer);
        assert_eq!(answer.header("content-type"), Some(form));
        assert_eq!(answer.body, fs::read(web().join(file)).unwrap());
        let head = app.call("HEAD", &format!("/{file}")).expect(200).await;
        assert!(head.body.is_empty());
        assert_eq!(head.header("etag"), answer.header("etag"));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn files_answer_get_and_head_only(pool: PgPool) {
    let app = App::start(&pool).await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let answer = app.call(method, "/sw.js").send().await.unwrap();
        assert_problem(&answer, 405, "Method not allowed");
        assert_eq!(answer.header("allow"), Some("GET, HEAD"));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn known_file_is_304(pool: PgPool) {
    let app = App::start(&pool).await;
    let first = app.call("GET", "/").expect(200).await;
    let tag = first.header("etag").unwrap();
    let again = app.call("GET", "/").header("if-none-match", tag).expect(304).await;
    assert!(again.body.is_empty());
    assert_page_headers(&again);
    let other = app.call("GET", "/sw.js").header("if-none-match", tag).expect(200).await;
    assert_ne!(other.header("etag"), Some(tag));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn files_are_compressed_for_clients_that_accept_gzip(pool: PgPool) {
    let app = App::start(&pool).await;
    let plain = app.call("GET", "/sw.js").expect(200).await;
    assert_eq!(plain.header("content-encoding"), None);
    for _ in 0..2 {
        let short = app.call("GET", "/sw.js").header("accept-encoding", "gzip, br").expect(200).await;
        assert_eq!(short.header("content-encoding"), Some("gzip"));
        assert_eq!(short.header("vary"), Some("Accept-Encoding"));
        assert!(short.body.len() < plain.body.len());
        let mut read = Vec::new();
        GzDecoder::new(&short.body[..]).read_to_end(&mut read).unwrap();
        assert_eq!(read, plain.body);
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn only_files_of_the_web_client_are_served(pool: PgPool) {
    let app = App::start(&pool).await;
    let page = app.call("GET", "/").expect(200).await.body;
    for path in [
        "/../Cargo.toml",
        "/..%2fCargo.toml",
        "/%2e%2e/Cargo.toml",
        "//etc/passwd",
        "/pages/../../Cargo.toml",
        "/.",
    ] {
        assert_eq!(app.call("GET", path).expect(200).await.body, page, "{path}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn login_options_are_public(pool: PgPool) {
    let app = App::start(&pool).await;
    let answer = app.call("GET", "/api/login_options").expect(200).await;
    assert_eq!(answer.json(), json!({ "providers": [], "devLogin": true }));
    app.stop().await;
}

/// A module that is not preloaded loads late: after the page and after its importer.
#[test]
fn page_preloads_every_module() {
    let page = fs::read_to_string(web().join("index.html")).unwrap();
    let mut files = Vec::new();
    collect(&web(), &mut files);
    let modules: BTreeSet<_> =
        files.iter().filter(|file| file.ends_with(".js") && *file != "sw.js").collect();
    for module in modules {
        let preload = format!("<link rel=\"modulepreload\" href=\"/{module}\">");
        let entry = format!("<script type=\"module\" src=\"/{module}\"></script>");
        assert!(page.contains(&preload) || page.contains(&entry), "index.html does not preload {module}");
    }
}

fn web() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../web")
}

fn collect(folder: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path.strip_prefix(web()).unwrap().to_str().unwrap().to_owned());
        }
    }
}
