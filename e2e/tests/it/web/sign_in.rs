//! Logging in elsewhere: at two real providers, one of which is shaped as GitHub.

use std::path::Path;

use e2e::{Browser, Front};
use serde_json::json;
use testkit::{http::Client, node::NodeServer};

use super::{messenger::Messenger, site::site};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn login_at_a_provider_returns_to_the_messenger() {
    let browser = Browser::launch().await;
    let front = Front::plain();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/tests/providers");
    let providers = NodeServer::start(&folder, "providers.mjs", &front.origin());
    let [oidc, github] = ["oidc", "github"].map(|name| providers.said[name].as_str().unwrap());
    let account = json!({
        "preferred_username": "sam",
        "github": { "id": 1, "login": "kim", "name": null, "avatar_url": null },
    });
    Client::default().call("PUT", format!("{oidc}/control/accounts/1")).json(&account).expect(204).await;
    let settings = [
        ("OIDC_ISSUER", oidc),
        ("OIDC_CLIENT_ID", "messenger"),
        ("OIDC_CLIENT_SECRET", "the-client-secret-of-these-tests"),
        ("GITHUB_URL", github),
        ("GITHUB_API_URL", github),
        ("GITHUB_CLIENT_ID", "messenger"),
        ("GITHUB_CLIENT_SECRET", "the-client-secret-of-these-tests"),
    ];
    let site = site(front, &settings).await;
    for (link, name) in [("Continue with GitHub", "kim"), ("Continue with single sign-on", "sam")] {
        let context = browser.context(name, &site.origin).await;
        context.expect("status of 401"); // The page learns that it is not logged in.
        let page = Messenger::visit(&context, "/").await;
        page.role("link", link).click().await;
        page.live().await;
        page.css("header").with_text(name).appears().await;
        // No history entry has the code.
        assert_eq!(page.evaluate("location.pathname + location.search").await, "/");
        page.reload().await;
        page.live().await;
    }
}
